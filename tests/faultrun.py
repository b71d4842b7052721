"""The fault run: the demo recipe in small, killed at seeded random moments, against an undisturbed run.

    python tests/faultrun.py --run DIR --kills 100 --seed 0

starts a Ray cluster of several local nodes and runs `congrad run` on it again and again. At random moments it
kills (SIGKILL) one of: the actor or the core process of a vLLM engine, a Ray Data worker, a gradient actor, a
training rank, a worker node with all its processes, the driver. A killed driver's command is given again; after
other kills the command has to go on by itself. Then all tables are compared with those of a run that nobody
disturbed.

A round has two phases. `sampling` goes from nothing to judgements; engines may write other texts when they compute
requests together with others, so texts and scores that differ are counted only. `rest` goes from the undisturbed
run's responses and judgements to the report; its pairs, sketches, scores and selection have to be bitwise equal.

Every kill and every comparison is a line of the results file. The same command resumes where it was. The exit code
is 1 where a row was lost or doubled, where something differs that may not, or where the command kept failing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from faults.cluster import local_cluster
from faults.command import Recipe
from faults.results import Results
from faults.rounds import REPEATED, REST, SAMPLING, UNDISTURBED, WHOLE, FaultRun, GaveUp
from faults.tables import show
from heads import end_in_order


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, required=True, metavar="DIR", help="where all runs go")
    options.add_argument("--kills", type=int, default=100, metavar="N", help="processes and nodes to kill")
    options.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments and kinds")
    options.add_argument("--results", type=Path, metavar="FILE.jsonl", help="default: DIR/results.jsonl")
    given = options.parse_args()
    folder = given.run.resolve()
    results = Results(given.results.resolve() if given.results else folder / "results.jsonl")
    _set_environment()
    end_in_order()
    failed = False
    with local_cluster() as cluster:
        recipe = Recipe.make(folder, cluster.address)
        run = FaultRun(folder, cluster, recipe, results, given.seed)
        try:
            _undisturbed(run)
            _rounds(run, given.kills)
            _repeated(run)
        except GaveUp as error:
            print(f"the command keeps failing:\n{error}", file=sys.stderr)
            results.add("gave up", lines=str(error).splitlines())
            failed = True
    show(results)
    return int(failed or bool(results.of("compare", broken=True)))


def _undisturbed(run: FaultRun) -> None:
    """The run to compare with."""
    if not run.results.of("done", round=UNDISTURBED):
        shutil.rmtree(run.undisturbed, ignore_errors=True)  # its time and its batches are counted from the start
        run.run_phase(WHOLE, UNDISTURBED, kills=0)


def _repeated(run: FaultRun) -> None:
    """Another undisturbed run: what it differs in from the first is no kill's doing."""
    for phase in (SAMPLING, REST):
        if not run.results.of("done", round=REPEATED, phase=phase.name):
            run.run_phase(phase, REPEATED, kills=0)


def _rounds(run: FaultRun, kills: int) -> None:
    """Rounds of both phases until this many kills were made, shared out by their numbers of stages."""
    number = 0
    while (left := kills - len(run.results.of("kill"))) > 0 or _begun(run, f"round-{number}"):
        round_ = f"round-{number}"
        for phase in (SAMPLING, REST):
            if run.results.of("done", round=round_, phase=phase.name):
                continue
            left = kills - len(run.results.of("kill"))
            run.run_phase(
                phase,
                round_,
                round(left * len(SAMPLING.stages) / len(WHOLE.stages)) if phase is SAMPLING else left,
            )
        number += 1


def _begun(run: FaultRun, round_: str) -> bool:
    return any(path.is_dir() for path in run.folder.glob(f"{round_}-*"))


def _set_environment() -> None:
    """The environment of the cluster and of all commands."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Some virtual machines announce AMX and then trap on it, in any bfloat16 product.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    # Ray's workers step back behind everything else on the machine, which on a busy one starves them.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    # A node is given up, or ends itself, when it is not up after half a minute, which a busy machine may need.
    os.environ["RAY_raylet_start_wait_time_s"] = "300"  # noqa: SIM112
    os.environ["RAY_agent_register_timeout_ms"] = "300000"  # noqa: SIM112 - Ray's own spelling
    # Of a killed process nothing is known that it had not reported yet.
    os.environ["RAY_task_events_report_interval_ms"] = "100"  # noqa: SIM112 - Ray's own spelling


if __name__ == "__main__":
    sys.exit(main())
