"""Length-controlled win rates of planted models, and of public outputs beside alpaca_eval's own.

    python jobs/benchmarks/length_control.py planted
    python jobs/benchmarks/length_control.py public CLONE MODEL...

CLONE is one of github.com/tatsu-lab/alpaca_eval, which has annotations of AlpacaEval 2 for many models. Their own
code runs where the package alpaca_eval is installed: in an environment of its own, with PYTHONPATH set to this
repository. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from congrad_ray.stages.evaluate.bootstrap import bootstrap_interval
from congrad_ray.stages.evaluate.length_control import (
    in_deviations,
    length_controlled_interval,
    length_controlled_rate,
)

PLANTED = ((0.0, 1.0), (0.0, 1.25), (0.0, 1.5), (0.0, 2.0), (1.0, 1.0), (1.0, 1.5), (1.0, 0.7))  # better, padding
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = options.add_subparsers(dest="kind", required=True)
    planted = kinds.add_parser("planted")
    planted.add_argument("--prompts", type=int, default=100)
    planted.add_argument("--trials", type=int, default=40)
    public = kinds.add_parser("public")
    public.add_argument("clone", type=Path)
    public.add_argument("models", nargs="+")
    given = options.parse_args()
    if given.kind == "planted":
        for better, padding in (
            (0.0, 1.0),
            (0.0, 1.25),
            (0.0, 1.5),
            (0.0, 2.0),
            (1.0, 1.0),
            (1.0, 1.5),
            (1.0, 0.7),
        ):
            _show(planted_models(better, padding, given.prompts, given.trials))
    else:
        for name in given.models:
            _show(public_outputs(given.clone, name))


def planted_models(better: float, padding: float, prompts: int, trials: int) -> dict[str, Any]:
    """A model `better` in logits that writes `padding` times as much, by a judge that likes length.

    Two verdicts a prompt; the judge's logit for the longer answer is 2 tanh(difference / mean length).
    """
    raw_rates, lc_rates = [], []
    raw_above = lc_above = lc_around = 0
    for seed in range(trials):
        generator = np.random.default_rng(seed)
        baseline = 1000 * generator.lognormal(0, 0.4, prompts)
        longer = baseline * padding * generator.lognormal(0, 0.3, prompts) - baseline
        likely = expit(better + 2 * np.tanh(longer / 1000))
        wins = (generator.random((prompts, 2)) < likely[:, None]).mean(1).tolist()
        deviations = in_deviations(longer.tolist())
        raw, controlled = bootstrap_interval(wins, 0), length_controlled_interval(wins, deviations, 0)
        raw_rates.append(float(np.mean(wins)))
        lc_rates.append(length_controlled_rate(wins, deviations))
        raw_above += raw[0] > 0.5
        lc_above += controlled[0] > 0.5
        lc_around += controlled[0] <= 0.5 <= controlled[1]
    return {
        "better": better,
        "padding": padding,
        "prompts": prompts,
        "trials": trials,
        "true_rate": round(float(expit(better)), 4),
        "raw": round(float(np.mean(raw_rates)), 4),
        "length_controlled": round(float(np.mean(lc_rates)), 4),
        "raw_interval_above_half": raw_above,
        "lc_interval_above_half": lc_above,
        "lc_interval_holds_half": lc_around,
    }


def public_outputs(clone: Path, name: str) -> dict[str, Any]:
    """A model of the leaderboard; `published` is AlpacaEval's, with instructions' difficulties."""
    place = f"HEAD:results/{name}/{ANNOTATOR}/annotations.json"
    rows = json.loads(_git(clone, place))
    wins = [0.5 if row["preference"] == 0 else row["preference"] - 1 for row in rows]
    deviations = in_deviations([len(row["output_2"]) - len(row["output_1"]) for row in rows])
    low, high = length_controlled_interval(wins, deviations)
    board = f"HEAD:src/alpaca_eval/leaderboards/data_AlpacaEval_2/{ANNOTATOR}_leaderboard.csv"
    header, *lines = _git(clone, board).splitlines()
    line = next(line.split(",") for line in lines if line.startswith(f"{name},"))
    return {
        "model": name,
        "prompts": len(rows),
        "median_difference": float(np.median([len(row["output_2"]) - len(row["output_1"]) for row in rows])),
        "raw": round(100 * float(np.mean(wins)), 2),
        "length_controlled": round(100 * length_controlled_rate(wins, deviations), 2),
        "low": round(100 * low, 1),
        "high": round(100 * high, 1),
        **(_theirs(rows) if importlib.util.find_spec("alpaca_eval") else {}),
        "published": round(float(line[header.split(",").index("length_controlled_winrate")]), 2),
    }


def _theirs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By alpaca_eval's own code: with its C of 100, and with C by cross-validation."""
    import pandas
    from alpaca_eval.metrics import glm_winrate

    table = pandas.DataFrame(rows)
    table["index"] = range(len(table))
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:  # of the hub; the formula below does not use it
        unused = {"model": "x", "index": range(len(table)), "instruction_difficulty": 0.0}
        pandas.DataFrame(unused).to_csv(file.name, index=False)
        glm_winrate.hf_hub_download = lambda **arguments: file.name
        found = {}
        for key, splits in (("alpaca_eval", 0), ("alpaca_eval_cross_validated", 5)):
            how = {**glm_winrate.GLM_INFO["length_controlled_minimal"], "kwargs": {"n_splits": splits}}
            metrics = glm_winrate.get_length_controlled_winrate(
                table.copy(), glm_info=how, save_weights_dir=None, is_warn_extreme_changes=False
            )
            found[key] = round(float(metrics["length_controlled_winrate"]), 2)
    return found


def _git(clone: Path, place: str) -> str:
    return subprocess.run(["git", "-C", clone, "show", place], capture_output=True, text=True, check=True).stdout


def _show(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
