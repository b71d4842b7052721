"""A small folder of data in the shape of the real files, a protocol for it, and the sketches of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from congrad_ray.modeling.source import named_model
from congrad_ray.rundir.directory import RunDirectory
from real_study.protocol import Protocol, load_protocol, recipe_for
from real_study.sketches import Sketched, read_sketched
from real_study.sketching import embedding_sketches, exact_gram, sketch_dataset, write_pairs

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "jobs" / "real_study" / "open_answer.jinja"
LANGUAGES = ("de", "en", "es")
WORDS = {
    "de": "der schnelle braune Fuchs springt über den faulen Hund und läuft dann davon",
    "en": "the quick brown fox jumps over the lazy dog and then it runs away",
    "es": "el veloz zorro marrón salta sobre el perro perezoso y luego se va",
}


def text(language: str, start: int, count: int) -> str:
    words = WORDS[language].split()
    return " ".join(words[(start + k * (1 + start % 3)) % len(words)] for k in range(count))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prompts = {(language, n): f"{n} {text(language, n, 3)}?" for language in LANGUAGES for n in range(40)}
    preferences = [
        {
            "language": language,
            "prompt": prompts[language, n],
            "chosen": text(language, n, 10),
            "rejected": text(language, n + 5, 7 + n % 3),
        }
        for language in LANGUAGES
        for n in range(40)
        if (language, n) != ("es", 3)  # so that its rows are one ahead of the others' from here on
    ]
    parallel = [
        {"language": language, "prompt": prompts[language, n]} for language in LANGUAGES for n in range(0, 40, 2)
    ]
    tata = [
        {
            "language": language,
            "prompt": f"table {n}",
            "chosen": text(language, n, 6 + n % 2),
            "rejected": text(language, n + 3, 5 + n % 4),
            "chosen_score": 1 if n == 0 else 2,
            "rejected_score": n % 2,
            "id": f"AB-C1-{language}-{n}/mt5/other",
        }
        for language in LANGUAGES
        for n in range(15)
    ]
    xcopa = [
        {
            "language": language,
            "premise": f"{text(language, n, 4)}.",
            "choice1": f"It {text(language, n, 2)}.",
            "choice2": f"She {text(language, n + 1, 3)}.",
            "question": ("cause", "effect")[n % 2],
            "label": n % 2,
            "idx": n,
        }
        for language in LANGUAGES
        for n in range(4)
    ]
    for name, rows in (
        ("preferences", preferences),
        ("eval_prompts", parallel),
        ("tata", tata),
        ("xcopa", xcopa),
    ):
        write(folder / f"{name}.jsonl", rows)
    return folder


def small_protocol() -> dict[str, Any]:
    return {
        "sketch": {"width": 4096, "groups": 2, "audit_pairs": 0},
        "pairs_per_piece": 5,
        "alpaca": {
            "min_response_tokens": 4,
            "max_response_tokens": 12,
            "rows": 24,
            "gap": 2,
            "pairs_per_language": 8,
            "held_out_per_language": 4,
        },
        "tata": {"pairs_per_language": 6, "min_pairs": 2, "held_out_share": 0.3, "dtype": "bfloat16"},
        "plantings": {
            "clean": {},
            "flipped2": {"languages": 2},
            "verbose": {"languages": 1, "longer": True, "datasets": ["tata"]},
        },
        "strategies": {
            "all": {"strategy": "all"},
            "random": {"strategy": "random"},
            "reward_gap": {"strategy": "reward_gap"},
            "congrad": {},
            "mean": {"strategy": "no_surgery"},
            "mean_norm": {"direction": "mean", "normalise": "norm"},
            "consensus_overall": {"direction": "consensus", "keep_rule": "overall"},
            "oracle": "oracle",
            "oracle_overall": "oracle_overall",
        },
        "selection": {
            "draws": 3,
            "blocks": [[0], [1]],
            "block_strategies": ["congrad"],
            "block_plantings": ["flipped2"],
            "subset_per_language": 3,
            "subset_strategies": ["congrad"],
        },
        "training": {
            "languages": ["de", "en"],
            "dtype": "bfloat16",
            "train": {
                "max_steps": 2,
                "batch_size": 4,
                "zero_stage": 0,
                "report_to": [],
                "lora": {"r": 2, "lora_alpha": 4},
            },
            "variants": ["clean", "flipped2"],
            "strategies": ["all", "congrad", "oracle_overall"],
            "seeds": [1],
            "learning_rate": 1e-3,
            "tuning_seeds": [9],
            "tuning_learning_rates": [1e-3],
            "measures": {
                "held_out_per_language": 3,
                "tata_languages": ["es"],
                "tata_per_language": 2,
                "xcopa": {"de": {"cause": "weil", "effect": "also"}},
                "xcopa_per_language": 3,
            },
        },
    }


@pytest.fixture(scope="session")
def protocol_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("protocol") / "protocol.yaml"
    path.write_text(yaml.safe_dump(small_protocol()))
    return path


@pytest.fixture(scope="session")
def protocol(protocol_file: Path) -> Protocol:
    return load_protocol(protocol_file)


@pytest.fixture(scope="session")
def sketched_run(
    made_data: Path, protocol: Protocol, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A run with everything that the verb `sketch` makes."""
    run = RunDirectory.open(tmp_path_factory.mktemp("run"))
    recipe = recipe_for(protocol, str(tiny_model), TEMPLATE)
    source = named_model(recipe.model.name, recipe.model)
    for dataset in ("alpaca", "tata"):
        write_pairs(dataset, protocol, source, made_data, run)
        sketch_dataset(dataset, protocol, recipe, source, run, 1)
    exact_gram(protocol, recipe, source, run, 1)
    embedding_sketches(protocol, source, run, 1)
    return run


@pytest.fixture
def sketched(sketched_run: RunDirectory, protocol: Protocol) -> Sketched:
    return read_sketched(sketched_run, "alpaca", protocol.sketch.groups)
