"""What the select stage makes of several judges' scores of a pair."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import zscore

from congrad_ray.config.judging import Judge, OneJudge
from congrad_ray.data.tables import table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select.stage import _least_margins


def test_the_judge_who_is_least_sure_of_a_pair_says_what_it_counts(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run")
    judge = Judge(also=[OneJudge(model="other")])
    names = list(judge.judges)
    scores = np.random.default_rng(0).uniform(0, 5, size=(6, 2))
    samples: list[dict[str, Any]] = [
        {
            **dict.fromkeys(JUDGEMENT_SAMPLES.names),
            "judgement_id": f"{response}-{name}",
            "response_id": f"r{response}",
            "prompt_id": f"p{response // 2}",
            "language": "en",
            "judge": name,
            "score": None if (response, place) == (4, 1) else float(scores[response, place]),
        }
        for response in range(6)
        for place, name in enumerate(names)
    ]
    run.stage("judgements/samples", 0).write_table("part.parquet", table_of(samples, JUDGEMENT_SAMPLES))
    rows: list[dict[str, Any]] = [
        {
            **{name: [{"role": "user", "content": "x"}] for name in ("prompt", "chosen", "rejected")},
            **{"pair_id": f"pair{pair}", "prompt_id": f"p{pair}", "language": "en"},
            **{"chosen_score": 1.0, "rejected_score": 0.0},
            **{"chosen_response_id": f"r{2 * pair + 1}", "rejected_response_id": f"r{2 * pair}"},
        }
        for pair in (2, 0, 1)
    ]
    run.stage("pairs", 0).write_table("pairs.parquet", table_of(rows, PAIRS))
    context: Any = SimpleNamespace(input=lambda folder: run.stage(folder, 0), recipe=SimpleNamespace(judge=judge))
    scores[4, 1] = np.nan
    standard = zscore(scores, axis=0, nan_policy="omit")
    margins = standard[1::2] - standard[::2]
    margins[2, 1] = 0.0  # the second judge could not read one of the two
    found = _least_margins(context, pa.table({"pair_id": ["pair0", "pair1", "pair2"]}))
    np.testing.assert_allclose(found, margins.min(axis=1))
