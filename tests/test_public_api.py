"""The names that `congrad_ray` itself has, and the examples of docs/how-to/python.md."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import congrad_ray
from tiny_models import TEXTS, make_tiny_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "python.md"
LANGUAGES = ("en", "de", "fr")
RECIPE = """
name: demo
model: {name: builtin-world, dtype: float32, max_length: 256}
prompts: {languages: [en, de], unseen_languages: [it], train_per_language: 8, evaluation_per_language: 2}
generate: {num_generations: 3, temperature: 1.0, max_tokens: 24}
judge: {rubric: builtin-world, method: expected_score}
pair: {truncated: keep}
sketch: {width: 1024}
train: {batch_size: 4, max_tokens_per_batch: 150}
evaluate: {max_tokens: 24}
"""


def blocks(slow: bool) -> Iterator[tuple[int, str]]:
    """(line, text) of the Python blocks of the page."""
    page = PAGE.read_text()
    for found in re.finditer(r"(?:<!-- (\w+)[^>]*-->\n)?```python\n(.*?)```", page, re.DOTALL):
        if (found[1] == "slow") is slow:
            yield page.count("\n", 0, found.start(2)), found[2]


def execute(slow: bool, names: dict[str, Any]) -> dict[str, Any]:
    """The names that the page's blocks leave, run in order."""
    for line, text in blocks(slow):
        exec(compile("\n" * line + text, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def place(
    tmp_path: Path, preference_rows: Callable[..., list[dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory with what the page takes for granted."""
    import datasets

    (tmp_path / "my").mkdir()
    make_tiny_model(tmp_path / "my" / "model", TEXTS)
    lines = [json.dumps(row) for row in preference_rows(24, LANGUAGES)]
    (tmp_path / "preferences.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # of a training in this process
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_the_examples_of_the_page_run(place: Path) -> None:
    names = execute(slow=False, names={})
    assert len(names["kept"]) == 12 and len(names["mean"]) == 6
    assert names["kept"].column_names == ["prompt", "chosen", "rejected", "language", "congrad_score"]
    prompts = names["dataset"]["prompt"]
    kept = [prompts.index(prompt) for prompt in names["kept"]["prompt"]]
    assert kept == sorted(kept), "the rows keep their order"
    assert names["selected"].kept.sum() == 6 and len(names["selected"].scores) == 24
    assert names["trainer"].state.global_step == 1
    assert names["result"].sketches.shape == (2, 65536) and -1 < names["cosine"] < 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_loop_of_the_page_runs(place: Path) -> None:
    names = execute(slow=True, names={"congrad_ray": congrad_ray})
    assert names["selected"].num_rows > 0 and (place / "runs" / "first" / "report.html").exists()


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, congrad_ray\n"
        "dir(congrad_ray), congrad_ray.__version__, congrad_ray.load_recipe\n"
        "print(sorted({'torch', 'transformers', 'ray', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", congrad_ray.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(congrad_ray, name) is not None and name in dir(congrad_ray)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'filter_preference'"):
        _ = congrad_ray.filter_preference


def rows(**columns: Any) -> Any:
    from datasets import Dataset

    good = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "language": ["en", "de"]}
    return Dataset.from_dict({name: values for name, values in {**good, **columns}.items() if values is not None})


@pytest.mark.parametrize(
    ("dataset", "model", "arguments", "error", "text"),
    [
        (
            lambda: rows(language=None),
            "my/model",
            {},
            ValueError,
            "no column 'language'; columns found: chosen, prompt",
        ),
        (lambda: rows(language=["x?", "y?"]), "my/model", {}, ValueError, "unknown_language: 2"),
        (lambda: rows().select([]), "my/model", {}, ValueError, "the dataset is empty"),
        (lambda: {"train": rows()}, "my/model", {}, TypeError, "dataset is a dict"),
        (lambda: "nowhere.jsonl", "my/model", {}, ValueError, "no file nowhere.jsonl"),
        (rows, "./nowhere", {}, ValueError, "there is no such folder"),
        (rows, "my", {}, ValueError, "cannot load the"),
        (rows, "my/model", {"select": {"directoin": "mean"}}, ValueError, "directoin"),
        (rows, "my/model", {"keep": 2.0}, ValueError, "keep"),
        (rows, "my/model", {"profile": "kubernetes", "out": None}, ValueError, "give out"),
        (rows, "my/model", {"profile": "locl"}, ValueError, "locl"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(
    place: Path,
    dataset: Callable[[], Any],
    model: str,
    arguments: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        congrad_ray.filter_preferences(dataset(), model, **{"out": "filtered", **arguments})
    assert not (place / "filtered").exists()


def test_the_rows_of_a_dataset_come_back_as_they_were(place: Path) -> None:
    import datasets

    table = datasets.Dataset.from_json("preferences.jsonl")
    labels = datasets.ClassLabel(names=["odd", "even"])
    numbers = list(range(len(table)))
    table = table.add_column("label", [number % 2 for number in numbers]).cast_column("label", labels)
    table = table.add_column("congrad_score", [0.5] * len(table)).add_column("number", numbers)
    shuffled = table.shuffle(seed=1)  # by a mapping of indices
    kept = congrad_ray.filter_preferences(shuffled, Path("my/model"), keep=0.25, sketch={"width": 512}, chat=True)
    assert kept.column_names == [
        *(name for name in table.column_names if name != "congrad_score"),
        "congrad_score",
    ]
    assert kept.features["label"] == labels and len(kept) == 6
    places = [shuffled["number"].index(number) for number in kept["number"]]
    assert places == sorted(places)
    assert kept.remove_columns("congrad_score").to_list() == [
        {name: value for name, value in row.items() if name != "congrad_score"} for row in shuffled.select(places)
    ]
    assert all(-1 <= score <= 1 and score != 0.5 for score in kept["congrad_score"])
