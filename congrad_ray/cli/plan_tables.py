"""A plan as a person reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.padding import Padding
from rich.table import Table

from congrad_ray.cli.display import TABLES, console, plain, show
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.memory import GIB
from congrad_ray.planning.plan import Plan
from congrad_ray.planning.volume import Lengths
from congrad_ray.runtime.resources import Machine

# Counts below a thousand are whole.
_SUFFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_plan(
    plan: Plan, recipe: Recipe, profile: Profile, lengths: Lengths, assumptions: Assumptions, there_is: Machine
) -> None:
    """All that a plan says, but for whether everything fits."""
    together = "1 iteration" if recipe.iterations == 1 else f"{recipe.iterations} iterations together"
    show(plan_table(plan, plain(f"{recipe.name} on {profile.name}: {together}, predicted")))
    show(memory_table(plan))
    for line in memory_parts(plan):
        console.print(Padding(line, (0, 0, 0, 2)), highlight=False)
    console.print()
    for stage in plan.stages:
        if stage.temporary:
            console.print(f"While {stage.stage} runs, its checkpoints take {size(stage.temporary)} besides.")
    console.print(told_lengths(lengths, assumptions), highlight=False)
    console.print(f"There is: {there_is.where}, {there_is.cpus:g} CPUs and {there_is.gpus:g} GPUs for Ray")
    for line in plan.advice:
        console.print(plain(line), highlight=False)


def plan_values(plan: Plan, recipe: str, profile: str) -> dict[str, Any]:
    """A plan as --json gives it: bytes, seconds and dollars; null where it is not known."""
    stages = []
    for stage in plan.stages:
        memory = None if stage.needed is None else {"peak": stage.needed.peak, "parts": stage.needed.parts}
        stages.append({**asdict(stage), "needed": memory, "fits": stage.fits})
    return {
        "recipe": recipe,
        "profile": profile,
        "iterations": plan.iterations,
        "fits": not plan.short,
        "seconds": plan.total(lambda stage: stage.seconds),
        "dollars": plan.total(lambda stage: stage.dollars),
        "stored": plan.total(lambda stage: stage.stored),
        "advice": plan.advice,
        "stages": stages,
    }


def plan_table(plan: Plan, title: str) -> Table:
    """What every stage works through, takes and leaves: one row a stage and one of totals."""
    table = Table(title=title, **TABLES)
    for column in ("stage", "rows", "tokens", "FLOPs", "time", "cost", "on disk"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            short(stage.rows),
            short(stage.tokens),
            short(stage.flops),
            duration(stage.seconds),
            money(stage.dollars),
            size(stage.stored),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        short(plan.total(lambda stage: stage.tokens) or 0),
        short(plan.total(lambda stage: stage.flops) or 0),
        duration(plan.total(lambda stage: stage.seconds)),
        money(plan.total(lambda stage: stage.dollars)),
        size(plan.total(lambda stage: stage.stored) or 0),
    )
    return table


def memory_table(plan: Plan) -> Table:
    """The replicas of every stage and the memory of one, by part; parts that take turns do not add up.

    So many of them as `fit` run at once; `sequences` of mean length find room in an engine's KV cache.
    """
    table = Table(title="memory of one replica, GiB", **TABLES)
    for column in ("stage", "runs as", "fit", "needs", "has", "seqs"):
        table.add_column(column, justify="left" if column in ("stage", "runs as") else "right", no_wrap=True)
    for stage in plan.stages:
        if stage.needed is None:
            continue
        needs = _gib(stage.needed.peak)
        table.add_row(
            stage.stage,
            stage.what,
            str(stage.replicas),
            needs if stage.fits else f"[red]{needs}[/red]",
            "?" if stage.available is None else _gib(stage.available),
            "" if stage.sequences is None else str(stage.sequences),
        )
    return table


def memory_parts(plan: Plan) -> list[str]:
    """What the memory of one replica of each stage is made of: a line a stage."""
    lines = []
    for stage in plan.stages:
        if stage.needed is not None:
            parts = (f"{name.replace('_', ' ')} {_gib(part)}" for name, part in stage.needed.parts.items())
            lines.append(f"{stage.stage}: {', '.join(parts)}")
    return lines


def told_lengths(lengths: Lengths, assumptions: Assumptions) -> str:
    """The lengths and shares that everything was reckoned with."""
    source = f"measured by {', '.join(lengths.measured)} where they know" if lengths.measured else "assumed"
    return (
        f"Mean tokens ({source}): prompt {lengths.prompt:.0f}, response {lengths.response:.0f}, of a pair "
        f"{lengths.paired_response:.0f}, judgement {lengths.judgement:.0f}; pairs per prompt "
        f"{lengths.pairs_per_prompt:.2f}. Assumed share of the peak FLOP/s: prompts {assumptions.prefill_mfu:g}, "
        f"generated tokens {assumptions.decode_mfu:g}, sketching and training {assumptions.backward_mfu:g}. This "
        "is a prediction; override any assumption with --assume name=value."
    )


def short(number: float) -> str:
    """A number in three digits: 950, 12.3k, 4.56M."""
    for factor, suffix in _SUFFIXES:
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.0f}" if number else ""


def size(count: float) -> str:
    """Bytes in binary units."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count:.0f} B" if count else ""


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours; nothing where it is not known."""
    if seconds is None:
        return ""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def money(dollars: float | None) -> str:
    """US dollars; nothing where they are not known."""
    return "" if dollars is None else f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def _gib(count: float) -> str:
    gib = count / GIB
    return f"{gib:.1f}" if gib >= 10 or not gib else f"{gib:.2f}"
