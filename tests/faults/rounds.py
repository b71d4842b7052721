"""One phase of a round: the command, kills at seeded random moments of its stages, and the command again."""

from __future__ import annotations

import math
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from faults.cluster import LocalCluster
from faults.command import Command, Recipe
from faults.compare import (
    DETERMINED,
    SAMPLED,
    compare_metrics,
    compare_policies,
    compare_report,
    compare_table,
)
from faults.kills import KINDS, Kind, actors_hit, at_work, find_victim, strike
from faults.results import Results
from faults.work import COMPUTING, computed, rows_written, training_state

UNDISTURBED = "undisturbed"
REPEATED = "repeated"  # a second undisturbed run: how much two runs without kills differ
# So that a batch that is hit again and again is not taken for one that kills its workers (stages/attempts.py).
_MOST_KILLS_PER_STAGE = 4
_LOOK_EVERY = 0.03
# The kinds whose moment is within the work itself, three times of four, and not within the actors' start.
_SHARE_AT_WORK = 0.75
_PATIENCE = 10.0
# A stage of seconds: its kills come in its first half, and what is not there soon is not waited for.
_SHORT_STAGE = 5.0
_LONGEST_STAGE = 1200.0
_MOST_EXITS = 3


@dataclass(frozen=True)
class Phase:
    """A part of the loop that is run under kills, and what it starts from."""

    name: str
    stages: tuple[str, ...]
    until: str | None = None
    copied: tuple[str, ...] = ()


SAMPLING = Phase("sampling", ("prompts", "baseline", "generate", "judge"), until="judge")
# The same responses and judgements as in the undisturbed run, so that all that follows is determined.
REST = Phase(
    "rest",
    ("pair", "sketch", "select", "train", "evaluate", "report"),
    copied=("prompts", "baseline", "iteration-0/responses", "iteration-0/judgements"),
)
WHOLE = Phase("whole", (*SAMPLING.stages, *REST.stages))


class GaveUp(RuntimeError):
    """The command ends with an error again and again although nothing is killed any more."""


@dataclass
class _Plan:
    """The next kill: of what, and how long after the stage began (or its actors are at work)."""

    kind: Kind
    after: float
    from_work: bool
    patience: float
    due: float | None = None


@dataclass
class _Stage:
    """A stage of the phase as it is followed, over all starts of the command."""

    kills_left: int
    entered: float  # seconds since the epoch
    left: float = 0.0
    kills: list[Kind] = field(default_factory=list)


@dataclass(frozen=True)
class FaultRun:
    """What all rounds share."""

    folder: Path
    cluster: LocalCluster
    recipe: Recipe
    results: Results
    seed: int

    @property
    def undisturbed(self) -> Path:
        return self.folder / UNDISTURBED

    def run_phase(self, phase: Phase, round_: str, kills: int) -> None:
        """Runs the phase to its end under at most this many kills, and resumes what was done in it before."""
        run = self.undisturbed if round_ == UNDISTURBED else self.folder / f"{round_}-{phase.name}"
        gone_on_with = run.exists()
        for name in phase.copied:
            if not (run / name).exists():
                shutil.copytree(self.undisturbed / name, run / name)
        followed = _Followed(self, phase, round_, run, kills)
        followed.to_the_end()
        followed.record_work(whole=not gone_on_with)
        if round_ != UNDISTURBED:
            self.compare(phase, round_, run)
        self.results.add("done", round=round_, phase=phase.name)

    def compare(self, phase: Phase, round_: str, run: Path) -> None:
        reference = self.undisturbed
        found = [compare_table(table, run, reference) for table in (SAMPLED if phase is SAMPLING else DETERMINED)]
        if phase is REST:
            weights, relative = compare_policies(run, reference)
            self.results.add("policy", round=round_, phase=phase.name, relative_difference=relative)
            found += [compare_metrics(run, reference), weights, compare_report(run)]
        for difference in found:
            self.results.add(
                "compare", round=round_, phase=phase.name, **difference.record(), broken=difference.broken
            )


class _Followed:
    """A phase under way."""

    def __init__(self, of: FaultRun, phase: Phase, round_: str, run: Path, kills: int) -> None:
        self._of, self._phase, self._round, self._run = of, phase, round_, run
        self._kills = kills
        self._stages: dict[str, _Stage] = {}
        self._plan: _Plan | None = None
        self._command = Command(of.recipe, run, phase.until)
        self._exits = 0
        # What is drawn depends on the kills made so far, so a fault run that is resumed does not repeat itself.
        self._chance = random.Random(f"{of.seed} {round_} {phase.name} {len(of.results.of('kill'))}")

    def to_the_end(self) -> None:
        current: str | None = None
        since = time.monotonic()
        try:
            while (code := self._command.exit_code) != 0:
                if code is not None:
                    self._start_again(code, current)
                    current = None
                if self._command.stage != current:
                    self._leave(current)
                    current, since = self._command.stage, time.monotonic()
                    self._enter(current)
                if current is not None and self._plan is not None and self._is_due(since):
                    self._strike(current, since)
                if time.monotonic() - since > _LONGEST_STAGE:
                    self._of.results.add("hang", round=self._round, phase=self._phase.name, stage=current)
                    self._command.kill()
                    self._command = Command(self._of.recipe, self._run, self._phase.until)
                time.sleep(_LOOK_EVERY)
            self._leave(current)
        finally:
            self._command.kill()

    def record_work(self, whole: bool) -> None:
        """For every stage that was seen: how many batches were begun, and how long the work took.

        Not `whole` where a part of the phase was done before this fault run was interrupted.
        """
        time.sleep(2.0)  # until the cluster has heard of the last tasks
        events = self._of.cluster.task_events()
        for name, stage in self._stages.items():
            done = computed(name, events, stage.entered, stage.left) if name in COMPUTING else None
            self._of.results.add(
                "work",
                round=self._round,
                phase=self._phase.name,
                stage=name,
                whole=whole,
                kills=stage.kills,
                seconds=round(stage.left - stage.entered, 2),
                batches=done.batches if done else None,
                working_seconds=round(done.seconds, 2) if done else None,
            )

    def _enter(self, name: str | None) -> None:
        self._plan = None
        if name is None:
            return
        if name not in self._stages:
            later = self._phase.stages[self._phase.stages.index(name) :]
            here = math.ceil(self._kills / len(later))
            most = 1 if len(KINDS[name]) == 1 else _MOST_KILLS_PER_STAGE
            self._stages[name] = _Stage(min(most, here), time.time())
        self._make_plan(name)

    def _leave(self, name: str | None) -> None:
        if name is not None:
            self._stages[name].left = time.time()

    def _make_plan(self, name: str, excluded: Kind | None = None) -> None:
        """The kind that was killed least in this stage, at a random moment of the stage or of its work."""
        self._plan = None
        if self._stages[name].kills_left <= 0 or self._kills <= 0:
            return
        made = [record["kind"] for record in self._of.results.of("kill", stage=name)]
        kinds = [kind for kind in KINDS[name] if kind != excluded]
        fewest = min(made.count(kind) for kind in kinds)
        kind = self._chance.choice([kind for kind in kinds if made.count(kind) == fewest])
        [usual] = self._of.results.of("work", round=UNDISTURBED, stage=name)[-1:] or [{"seconds": 0.0}]
        from_work = bool(usual.get("working_seconds")) and self._chance.random() < _SHARE_AT_WORK
        span = usual["working_seconds"] if from_work else usual["seconds"]
        if span < _SHORT_STAGE:
            span /= 2
        self._plan = _Plan(kind, self._chance.uniform(0.0, span), from_work, patience=min(_PATIENCE, span))

    def _is_due(self, since: float) -> bool:
        assert self._plan is not None
        if self._plan.due is None:
            if self._plan.from_work and not at_work(self._of.cluster):
                return False
            self._plan.due = time.monotonic() + self._plan.after
        return time.monotonic() >= self._plan.due

    def _strike(self, stage: str, since: float) -> None:
        plan = self._plan
        assert plan is not None and plan.due is not None
        victim = find_victim(plan.kind, self._of.cluster, self._chance)
        if victim is None:
            if time.monotonic() - plan.due > plan.patience:
                self._make_plan(stage, excluded=plan.kind)
            return
        rows, training = rows_written(self._run, stage), training_state(self._run)
        actors = actors_hit(victim, self._of.cluster)
        if self._command.stage != stage:
            return
        seconds = time.monotonic() - since  # a node takes seconds to replace
        if plan.kind == "driver":
            self._command.kill()
        elif not strike(victim, self._of.cluster):
            return
        self._of.results.add(
            "kill",
            round=self._round,
            phase=self._phase.name,
            stage=stage,
            kind=plan.kind,
            victim=victim.title,
            seconds=round(seconds, 2),
            at_work=plan.from_work,
            rows_written=rows,
            actors=actors,
            steps_lost_at_most=training.steps_lost_at_most if stage == "train" else None,
        )
        self._kills -= 1
        self._exits = 0
        self._stages[stage].kills_left -= 1
        self._stages[stage].kills.append(plan.kind)
        if plan.kind == "node":
            self._of.cluster.add_node()
        self._make_plan(stage)
        if plan.kind == "driver":
            self._leave(stage)
            self._command = Command(self._of.recipe, self._run, self._phase.until)

    def _start_again(self, code: int, stage: str | None) -> None:
        """After an end that no kill of the driver explains."""
        self._leave(stage)
        if died := self._of.cluster.replace_dead_nodes():
            self._of.results.add("nodes died", round=self._round, phase=self._phase.name, stage=stage, nodes=died)
        self._exits += 1
        lines = self._command.lines[-15:]
        kills = list(self._stages[stage].kills) if stage else []  # more may follow
        self._of.results.add(
            "exit", round=self._round, phase=self._phase.name, stage=stage, code=code, kills=kills, lines=lines
        )
        if self._exits > _MOST_EXITS or self._round == UNDISTURBED:  # whose batches are what is needed
            raise GaveUp("\n".join(lines))
        self._command = Command(self._of.recipe, self._run, self._phase.until)
