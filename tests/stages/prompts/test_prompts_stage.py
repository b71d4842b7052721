"""The prompts stage: cleaning, de-duplication, seen and unseen, quarantine."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Limits, Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import prompt_id, row_id
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import MANIFEST, RunDirectory, RunDirectoryError
from congrad_ray.stages.prompts import stage as prompts
from congrad_ray.stages.prompts.schema import PROMPTS


def recipe_for(path: Path, **settings: object) -> Recipe:
    values = {
        "train": {"name": str(path)},
        "evaluation": {"name": str(path)},
        "languages": ["en", "de"],
        "train_per_language": 3,
        "evaluation_per_language": 1,
    }
    return validate(Recipe, {"name": "test", "prompts": values | settings}, "test")


def write(path: Path, rows: list[object]) -> Path:
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return path


GOOD = [
    {"prompt": f"{word} {n}", "language": tag}
    for tag, word in [("en", "Count"), ("de", "Zähle")]
    for n in range(5)
]


def perform(recipe: Recipe, folder: Path) -> tuple[pa.Table, dict[str, int]]:
    run = RunDirectory.open(folder)
    manifest = run_stage(prompts.STAGE, recipe, Profile(name="test"), run)
    return run.stage("prompts", None).read_table(), manifest.counters.get("quarantined", {})


def test_bad_rows_are_set_apart_with_their_reason_and_no_good_row_is_lost(tmp_path: Path) -> None:
    bad = [
        b'{"prompt": "caf\xe9", "language": "en"}',
        b"{not json",
        ["a", "list"],
        {"prompt": None, "language": "en"},
        {"prompt": "   ", "language": "en"},
        {"prompt": "x\x00y", "language": "en"},
        {"prompt": "x", "language": "klingonese-language"},
        {"prompt": [{"role": "assistant", "content": "I first"}], "language": "en"},
        {"prompt": [{"role": "user"}], "language": "en"},
        {"prompt": {"nested": 1}, "language": "en"},
        {"prompt": "\ud800", "language": "en"},
        {"prompt": "Bonjour", "language": "fr"},
    ]
    path = write(tmp_path / "prompts.jsonl", [*bad, *GOOD, *GOOD])
    recipe = recipe_for(path, train_per_language=10)
    with pytest.raises(InputError, match=r"11 of 32 rows cannot be used, more than limits\.failed_share \(0\.2\)"):
        perform(recipe, tmp_path / "run")
    recipe = recipe.model_copy(update={"limits": Limits(failed_share=0.5)})
    table, reasons = perform(recipe, tmp_path / "run")
    assert table.num_rows == len(GOOD)
    assert table.schema.equals(PROMPTS)
    assert reasons == {
        "not_json": 1,
        "not_utf8": 1,
        "not_an_object": 1,
        "prompt_not_text": 3,
        "prompt_empty": 1,
        "prompt_control_characters": 1,
        "prompt_last_role": 1,
        "prompt_not_unicode": 1,
        "unknown_language": 1,
    }


def test_training_and_evaluation_prompts_are_disjoint_and_drawn_the_same_every_time(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [*GOOD])
    backwards = write(tmp_path / "backwards.jsonl", GOOD[::-1])
    first, _ = perform(recipe_for(path), tmp_path / "one")
    second, _ = perform(recipe_for(backwards), tmp_path / "two")
    rows = {(row["prompt_id"], row["split"]) for row in first.to_pylist()}
    assert rows == {(row["prompt_id"], row["split"]) for row in second.to_pylist()}
    assert len({identifier for identifier, _ in rows}) == len(rows) == 2 * (3 + 1)


@pytest.mark.parametrize("one_source", [True, False])
def test_the_table_is_that_of_all_prompts_sorted(
    tmp_path: Path, one_source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "ROWS_PER_PART", 16)
    tags = ["en", "de", "fr", "it", None]
    rows = [{"prompt": f"Say {n % 140}", "language": tags[n % 7 % 5]} for n in range(400)]
    other = rows if one_source else [{"prompt": f"Say {n}", "language": tags[n % 3]} for n in range(100, 190)]
    train, evaluation = write(tmp_path / "train.jsonl", rows), write(tmp_path / "evaluation.jsonl", other)
    source = {"name": str(train if one_source else evaluation)}
    settings = {"evaluation": source, "unseen_languages": ["fr"]}
    recipe = recipe_for(train, **settings, train_per_language=20, evaluation_per_language=5)
    run = RunDirectory.open(tmp_path / "run")
    manifest = run_stage(prompts.STAGE, recipe, Profile(name="test"), run)

    def by_hand(rows: list[dict[str, Any]], language: str, count: int, taken: set[str]) -> list[str]:
        texts = {row["prompt"] for row in rows if row["language"] == language}
        ids = {prompt_id(language, [{"role": "user", "content": text}]) for text in texts} - taken
        chosen = sorted(ids, key=lambda identifier: row_id("draw", recipe.seed, identifier))[:count]
        taken.update(chosen)
        return chosen

    taken: set[str] = set()
    expected = [i for language in ("en", "de", "fr") for i in by_hand(other, language, 5, taken)]
    expected += [i for language in ("en", "de") for i in by_hand(rows, language, 20, taken)]
    folder = run.stage("prompts", None)
    assert folder.read_table()["prompt_id"].to_pylist() == expected
    assert len(folder.files(".parquet")) == -(-len(expected) // 16)
    counts = manifest.counters
    assert counts["rows_read"] == len(rows) + (0 if one_source else len(other))
    rest = [counts[name] for name in ("not_drawn", "duplicates", "other_languages")]
    assert counts["rows_read"] == manifest.rows + sum(rest) + sum(counts.get("quarantined", {}).values())
    assert all(rest) and folder.quarantine_counts() == {
        "language_not_text": sum(row["language"] is None for row in rows)
    }
    assert len(folder.quarantine.files(".parquet")) > 1

    # What a try before has left, under whatever name, is not read with what is written now.
    before = folder.read_table()
    folder.filesystem.delete_file(f"{folder.path}/{MANIFEST}")
    folder.write_table("prompts.parquet", before)
    run_stage(prompts.STAGE, recipe, Profile(name="test"), run)
    assert folder.read_table().equals(before)


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", GOOD)
    perform(recipe_for(path), tmp_path / "run")
    perform(recipe_for(path), tmp_path / "run")
    write(path, GOOD[1:])
    with pytest.raises(RunDirectoryError, match=r"prompts in .* was made with other settings or inputs"):
        perform(recipe_for(path), tmp_path / "run")


def test_unseen_languages_have_evaluation_prompts_only(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [*GOOD, {"prompt": "Compte", "language": "fra"}])
    table, _ = perform(recipe_for(path, unseen_languages=["fr"]), tmp_path / "run")
    french = [row for row in table.to_pylist() if row["language"] == "fr"]
    assert [(row["split"], row["seen"]) for row in french] == [("evaluation", False)]


def test_parquet_with_messages_and_names_of_languages(tmp_path: Path) -> None:
    rows = [{"q": [{"role": "user", "content": f"Hi {n}"}], "lang": "English"} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    source = {
        "name": str(tmp_path / "p.parquet"),
        "prompt_column": "q",
        "language_column": "lang",
        "language_names": {"English": "en"},
    }
    table, _ = perform(recipe_for(tmp_path, train=source, evaluation=source, languages=["en"]), tmp_path / "run")
    assert table.num_rows == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        (
            "columns.jsonl",
            b'{"text": "x", "language": "en"}\n',
            "no column 'prompt'; columns found: language, text",
        ),
        ("few.jsonl", b'{"prompt": "x", "language": "en"}\n', "'de'"),
        ("broken.parquet", b"PAR1", "not a readable Parquet"),
        ("folder", None, "has no file that can be read"),
        ("missing.jsonl", None, "no file"),
    ],
)
def test_an_input_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=message) as error:
        perform(recipe_for(path), tmp_path / "run")
    assert name in str(error.value)


def test_rows_of_one_language_are_one_group_whatever_it_is_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {
        "ar": ["ar", "arb", "Arabic", "ar_EG"],
        "zh": ["zh-CN", "cmn", "zho_Hans", "zh_TW"],
        "ms": ["zsm", "ms", "Malay"],
        "en": ["english", "eng_Latn", "en-US"],
    }
    given = [(tag, name) for tag, of_tag in names.items() for name in of_tag]
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{n}", "language": name} for n, (_, name) in enumerate(given)])
    settings = {"languages": ["arb", "Chinese"], "unseen_languages": ["ms"], "train_per_language": 10}
    with caplog.at_level("INFO"):
        table, reasons = perform(recipe_for(path, **settings), tmp_path / "run")
    found = Counter(row["language"] for row in table.to_pylist())
    assert found == {"ar": 4, "zh": 4, "ms": 1} and not reasons
    text = caplog.text
    assert "from Arabic, ar, ar_EG, arb" in text
    assert "too few for a direction of their own, fewer than 10: ar (3), zh (3)" in text
    assert "languages that the recipe does not name: en 3" in text
    assert text.index("by language") < text.index("done")


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        (["zh"], {"zh": 8}),
        (["zh", "zh-Hant"], {"zh": 4, "zh-Hant": 4}),
        (["zh-Hans", "zh-Hant"], {"zh-Hans": 4, "zh-Hant": 4}),
        (["zh-Hant"], {"zh-Hant": 4}),
    ],
)
def test_scripts_are_groups_where_the_recipe_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, languages: list[str], expected: dict[str, int]
) -> None:
    tags = ["zh", "cmn", "zho_Hans", "zh-CN", "zh-TW", "zho_Hant", "zh-HK", "zh-Hant"]
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{n}", "language": tag} for n, tag in enumerate(tags)])
    with caplog.at_level("INFO"):
        table, _ = perform(recipe_for(path, languages=languages, train_per_language=10), tmp_path / "run")
    assert Counter(table["language"].to_pylist()) == expected
    assert ("kept apart" in caplog.text) == (len(languages) > 1)


def test_a_text_is_in_the_same_group_for_training_and_evaluation(tmp_path: Path) -> None:
    rows = [{"prompt": f"{tag} {n}", "language": tag} for tag in ("zh-CN", "zh-TW") for n in range(4)]
    train, evaluation = write(tmp_path / "t.jsonl", rows), write(tmp_path / "e.jsonl", rows)
    source = {"name": str(evaluation)}
    recipe = recipe_for(train, evaluation=source, languages=["zh"], unseen_languages=["zh-Hant"])
    table, _ = perform(recipe, tmp_path / "run")
    assert {(row["language"], row["prompt"][0]["content"][:5]) for row in table.to_pylist()} == {
        ("zh", "zh-CN"),
        ("zh-Hant", "zh-TW"),
    }


def test_prompts_are_cleaned_unless_the_recipe_says_not(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": " Cafe\u0301"}, {"type": "text", "text": "? "}]
    rows = [{"prompt": " Cafe\u0301? ", "language": "en"}, {"prompt": [{"role": "user", "content": parts}]}]
    rows[1]["language"] = "en"
    path = write(tmp_path / "prompts.jsonl", [*rows, {"prompt": "Why?", "language": "en"}])
    for clean, text in ((True, "Caf\u00e9?"), (False, " Cafe\u0301? ")):
        recipe = recipe_for(path, languages=["en"], clean=clean)
        table, _ = perform(recipe, tmp_path / f"run-{clean}")
        assert sorted(row[0]["content"] for row in table["prompt"].to_pylist()) == sorted([text, "Why?"])
