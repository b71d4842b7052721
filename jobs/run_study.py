"""The study: does filtering by gradient agreement help, and where? Selection strategies on the built-in world.

    python jobs/run_study.py jobs/study/protocol.yaml --run runs/study --results runs/study/results.jsonl

Every row of results is appended as soon as it is known. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from congrad_ray.config.profile import load_profile
from congrad_ray.pipeline.plan import max_cpus
from congrad_ray.runtime.logs import configure
from congrad_ray.runtime.session import connect
from study.analysis import KEYS, without_seeds
from study.protocol import cells, load_protocol
from study.report import write_report
from study.results import Results
from study.running import check_with_exact, run_cells

logger = logging.getLogger("congrad_ray.study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path, help="a protocol YAML; see jobs/study/protocol.yaml")
    parser.add_argument("--run", type=Path, required=True, help="folder for models, pairs and sketches")
    parser.add_argument("--results", type=Path, required=True, help="the results file, one JSON object a line")
    parser.add_argument("--report", type=Path, help="write the report, an HTML file, at the end")
    parser.add_argument("--tuning", action="store_true", help="run the tuning block only")
    parser.add_argument("--only-report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--seeds", type=int, nargs="+", help="only cells of these seeds")
    parser.add_argument("--blocks", type=int, nargs="+", help="only these blocks, counted from 1")
    parser.add_argument("--exact", action="store_true", help="run the check with exact gradients only")
    parser.add_argument("--workers", type=int, default=2, help="cells at once, one CPU each")
    parser.add_argument("--profile", default="local", help="a profile YAML or its name")
    arguments = parser.parse_args()
    configure()
    protocol, profile = load_protocol(arguments.protocol), load_profile(arguments.profile)
    results = Results(arguments.results, KEYS)
    if not arguments.only_report:
        blocks = [protocol.tuning] if arguments.tuning else protocol.blocks
        connect(profile, max(arguments.workers, max_cpus(protocol.recipe, profile)))
        if arguments.exact:
            check_with_exact(protocol, profile, arguments.run.resolve(), results)
        for number, block in enumerate([] if arguments.exact else blocks, 1):
            if arguments.blocks and number not in arguments.blocks:
                continue
            wanted = [cell for cell in cells(block) if not arguments.seeds or cell.seed in arguments.seeds]
            logger.info(f"block {number} of {len(blocks)}")
            run_cells(protocol, wanted, profile, arguments.run.resolve(), results, arguments.workers)
    if arguments.report:
        compared = without_seeds(results.rows, protocol.tuning.seeds)
        write_report(compared, arguments.report, arguments.protocol.read_text(encoding="utf-8"))
        logger.info(f"report: {arguments.report}")


if __name__ == "__main__":
    main()
