"""`congrad filter` for real: Ray, a tiny model, real processes, a real interrupt."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from heads import connect_shared

LANGUAGES = ("en", "de", "fr")


@pytest.fixture(scope="module")
def write_preferences(preference_rows: Any) -> Callable[[Path, int], Path]:
    """Writes good rows, one of them twice, and bad ones."""

    def write(path: Path, count: int) -> Path:
        rows = [{**row, "source": {"row": n}} for n, row in enumerate(preference_rows(count, LANGUAGES))]
        bad = [{"prompt": "x", "chosen": "", "rejected": "y", "language": "en"}, {"prompt": "x", "language": "en"}]
        lines = [json.dumps(row) for row in (*rows, rows[0], *bad)]
        path.write_text("\n".join([*lines, "{broken"]))
        return path

    return write


def kept_rows(out: Path) -> list[dict[str, object]]:
    return pq.read_table(out / "selected.parquet").to_pylist()


GOOD = {"prompt": "x", "chosen": "y", "rejected": "z", "language": "en"}


@pytest.mark.parametrize(
    ("name", "text", "model", "message"),
    [
        ("nowhere.jsonl", None, "", "no file"),
        ("nowhere.csv", None, "", "no file"),
        ("rows.xlsx", "PK", "", ".xlsx files are not supported (JSON Lines, JSON, CSV"),
        ("rows.csv", "prompt,chosen\nx,y", "", "no column 'rejected'; columns found: chosen, prompt"),
        ("rows.csv", 'prompt,chosen\n"x,y', "", "line 2: unexpected end of data"),
        ("rows.json", '[{"prompt": "x"}', "", "line 1: the array does not end"),
        ("rows.parquet", "PAR1", "", "is not a readable Parquet file"),
        ("rows.jsonl", "prompt,chosen\nx,y", "", "none is a JSON object"),
        ("rows.jsonl", "", "", "is empty"),
        ("rows.jsonl", json.dumps({**GOOD, "language": None}), "", "no usable pair"),
        ("rows.jsonl", json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}), "", "no column 'language'"),
        ("rows.jsonl", json.dumps(GOOD), "./nowhere", "there is no such folder"),
        ("rows.jsonl", json.dumps(GOOD), "no-weights", "no *.safetensors"),
        ("rows.jsonl", json.dumps(GOOD), "no-template", "has no chat template"),
        ("rows.jsonl", json.dumps(GOOD), "empty", "cannot load the"),
    ],
)
def test_a_mistake_is_reported_and_leaves_nothing(
    tmp_path: Path,
    tiny_model: Path,
    name: str,
    text: str | None,
    model: str,
    message: str,
    filter_command: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from congrad_ray.cli.main import main

    if text is not None:
        (tmp_path / name).write_text(text)
    for folder, missing in (("no-weights", "model.safetensors"), ("no-template", "chat_template.jinja")):
        shutil.copytree(tiny_model, tmp_path / folder, ignore=shutil.ignore_patterns(missing))
    (tmp_path / "empty").mkdir()
    named = tiny_model if not model else model if model.startswith(".") else tmp_path / model
    with pytest.raises(SystemExit) as ended:
        main(filter_command(tmp_path / name, named, tmp_path / "out")[3:])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said
    assert "iteration" not in said and "--run" not in said
    assert not (tmp_path / "out").exists()


def test_the_corrected_command_works_in_the_same_folder_and_other_settings_are_refused(
    tmp_path: Path, tiny_model: Path, write_preferences: Any, filter_command: Any, congrad: Any
) -> None:
    out = tmp_path / "out"
    connect_shared()

    def run(preferences: Path, *more: str) -> Any:
        command = filter_command(preferences, tiny_model, out)
        return congrad(*command[command.index("filter") :], *more)

    (tmp_path / "rows.csv").write_text("prompt,chosen")
    assert run(tmp_path / "rows.csv").code == 2
    good = write_preferences(tmp_path / "preferences.jsonl", 24)
    done = run(good)
    assert done.code == 0, done.out + done.err
    assert "28 rows = 12 kept + 13 dropped (of which 1 are there twice) + 3 quarantined" in done.out
    assert len(kept_rows(out)) == 12
    (line,) = json.loads((out / "summary.json").read_text())["advice"]
    assert "dropped pairs have a cosine of 0 or more" in line
    assert " ".join(done.out.split()).count(f"advice: {line}") == 1
    other = write_preferences(tmp_path / "others.jsonl", 12)
    for preferences, more, what in (
        (other, (), f"preferences: {good} -> {other}"),
        (good, ("--width", "1024"), "sketch.width: 512 -> 1024"),
        (good, ("--select", "direction=mean"), "select.direction: pcgrad -> mean"),
    ):
        refused = run(preferences, *more)
        assert refused.code == 2 and what in refused.err
        assert "Give another --out, or add --redo" in refused.err
        assert "--run" not in refused.err and "iteration" not in refused.err
    assert run(good, "--select", "direction=mean", "--redo").code == 0


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_preferences: Any, filter_here: Any
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("filter")
    preferences = write_preferences(folder / "preferences.jsonl", 300)
    filter_here(preferences, tiny_model, folder / "out")
    return preferences, folder / "out"


def test_the_kept_pairs_come_out_in_the_shape_they_went_in(undisturbed: tuple[Path, Path]) -> None:
    _, out = undisturbed
    rows = kept_rows(out)
    assert len(rows) == 150
    assert {tuple(sorted(row)) for row in rows} == {
        ("chosen", "congrad_score", "language", "prompt", "rejected", "source")
    }
    # What training would need is not for the user's file, and judged the pairs are not.
    selected = pq.read_table(out / "work" / "iteration-0" / "selection" / "selected.parquet")
    assert min(selected["prompt_tokens"].to_pylist()) > 0 and selected["chosen_score"].null_count == 150
    numbers = [row["source"]["row"] for row in rows]  # type: ignore[index]
    assert numbers == sorted(numbers), "the input's order is kept"
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(scores) == 300 and sum(row["kept"] for row in scores) == 150
    summary = json.loads((out / "summary.json").read_text())
    assert {language: row["kept"] for language, row in summary["per_language"].items()} == {
        "de": 50,
        "en": 50,
        "fr": 50,
    }
    manifest = json.loads((out / "work" / "iteration-0" / "pairs" / "_manifest.json").read_text())
    assert manifest["counters"]["quarantined"] == {"chosen_empty": 1, "missing_column": 1, "not_json": 1}
    assert manifest["counters"]["duplicates"] == 1


def test_exact_scores_are_those_of_autograds_gradients(
    tmp_path: Path, tiny_model: Path, write_preferences: Any, filter_here: Any
) -> None:
    import torch

    from congrad_ray.config.recipe import Model
    from congrad_ray.modeling.batching import collate_pairs
    from congrad_ray.modeling.source import ModelSource
    from congrad_ray.modeling.tokenization import tokenize_pair
    from congrad_ray.stages.select.directions import direction_weights
    from congrad_ray.stages.sketch.exact import pair_gradient

    preferences = write_preferences(tmp_path / "preferences.jsonl", 24)
    more = ["--exact", "--keep", "1", "--length-penalty", "0.01", "--select", "score=dot"]
    filter_here(preferences, tiny_model, tmp_path / "out", *more)
    found = {row["prompt"]: row["congrad_score"] for row in kept_rows(tmp_path / "out")}

    source = ModelSource(str(tiny_model), Model(dtype="float32"))
    tokenizer, model = source.load_tokenizer(), source.load_model("cpu")
    rows = [json.loads(line) for line in preferences.read_text().splitlines()[:24]]
    gradients, coefficients = [], []
    for row in rows:
        texts = zip(("user", "assistant", "assistant"), ("prompt", "chosen", "rejected"), strict=True)
        messages = [[{"role": role, "content": row[name]}] for role, name in texts]
        pair = tokenize_pair(tokenizer, *messages, 256)
        exact = pair_gradient(model, collate_pairs([pair], 2))
        gradients.append(torch.cat([values.flatten() for values in exact.values()]).double().numpy())
        longer = len(pair.chosen_ids) - len(pair.rejected_ids)
        coefficients.append(0.1 / (1 + np.exp(0.01 * longer)))
    u = np.stack(gradients)
    weighted = u * np.array(coefficients)[:, None]
    names = np.array([row["language"] for row in rows])
    means = np.stack([weighted[names == name].mean(axis=0) for name in sorted(set(names))])
    direction = direction_weights(means @ means.T, "pcgrad") @ means
    expected = u @ direction
    tolerance = 1e-5 * float(np.abs(expected).max())
    assert [found[row["prompt"]] for row in rows] == pytest.approx(expected.tolist(), abs=tolerance)
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    cosines = expected / np.linalg.norm(u, axis=1) / np.linalg.norm(direction)
    assert sorted(row["cosine"] for row in scores) == pytest.approx(sorted(cosines), abs=1e-5)


def test_a_model_without_a_chat_template_is_reported_before_actors_start(
    undisturbed: tuple[Path, Path], tiny_model: Path, tmp_path: Path, filter_command: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink()
    result = subprocess.run(
        filter_command(undisturbed[0], model, tmp_path / "out"),
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "has no chat template" in result.stderr and "--chat-template" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_second_run_skips_everything(
    undisturbed: tuple[Path, Path], tiny_model: Path, filter_command: Any
) -> None:
    preferences, out = undisturbed
    before = kept_rows(out)
    again = subprocess.run(
        filter_command(preferences, tiny_model, out), check=True, timeout=300, capture_output=True, text=True
    )
    assert again.stdout.count("done already") == 3
    assert kept_rows(out) == before


# SIGTERM to a command on Ray is in runtime/test_interrupts.py too; Ctrl-C in every stage, in the end-to-end tests.
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_selection(
    undisturbed: tuple[Path, Path], tiny_model: Path, tmp_path: Path, stop: signal.Signals, filter_command: Any
) -> None:
    preferences, expected = undisturbed
    process = subprocess.Popen(
        filter_command(preferences, tiny_model, tmp_path / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    sketches = tmp_path / "out" / "work" / "iteration-0" / "sketches"
    try:
        end = time.monotonic() + 240
        while not list(sketches.glob("*.parquet")):
            assert process.poll() is None and time.monotonic() < end, "no part was written before the end"
            time.sleep(0.05)
        process.send_signal(stop)
        process.wait(60)
    finally:
        # The driver's death is the test; what is left of its Ray would disturb the next.
        if process.poll() is None or stop == signal.SIGKILL:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if stop != signal.SIGKILL else -signal.SIGKILL)
    parts = set(sketches.glob("*.parquet"))
    assert not (sketches / "_manifest.json").exists() and parts
    subprocess.run(filter_command(preferences, tiny_model, tmp_path / "out"), check=True, timeout=300)
    assert parts <= set(sketches.glob("*.parquet")), "rows that were there are not computed again"
    first, second = kept_rows(expected), kept_rows(tmp_path / "out")
    assert [row["source"] for row in first] == [row["source"] for row in second]


MIXED: list[dict[str, Any]] = [
    *(
        {
            "conversation": [{"role": "user", "content": f"Count to {n} "}],
            "chosen": [{"role": "assistant", "content": f" {n}\n"}],
            "rejected": "The fox",
            "lang": ("eng_Latn", "Deutsch", "deu")[n % 3],
        }
        for n in range(24)
    ),
    {"conversation": "Count to", "chosen": " 1 2", "rejected": " fox", "lang": "german"},
    {"conversation": "Count to", "chosen": " 1 2", "rejected": " fox", "lang": "de"},
    {"conversation": "Count to", "chosen": "1 2", "rejected": "1 2", "lang": "de"},
    {"conversation": "Count to", "chosen": "1 2", "rejected": "3 4", "lang": "Germann"},
    {"conversation": "Count to" * 200, "chosen": "1 2", "rejected": "3 4", "lang": "de"},
]


def test_every_row_is_kept_dropped_or_quarantined_and_said_to_be(
    tmp_path: Path, tiny_model: Path, congrad: Any, filter_command: Any
) -> None:
    connect_shared()
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(MIXED, indent=1))
    command = [word for word in filter_command(path, tiny_model, tmp_path / "out") if word != "--chat"]
    named = ("--columns", "prompt=conversation,language=lang", "--all-rows", "--to", "jsonl")
    done = congrad(*command[command.index("filter") :], *named)
    assert done.code == 0, done.err
    assert "29 rows = 13 kept + 13 dropped (of which 1 are there twice) + 3 quarantined" in done.out
    assert "quarantined: identical_responses 1, pair_too_long 1, unknown_language 1; see" in done.out
    assert "en               8  from eng_Latn" in done.out
    assert "too few for a direction of their own, fewer than 10: en (8)" in done.out
    assert "24 pairs are chats and 2 plain text: each goes by its own shape" in done.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert (summary["rows"], summary["kept"], summary["dropped"], summary["duplicates"]) == (29, 13, 13, 1)
    rows = [json.loads(line) for line in (tmp_path / "out/export/jsonl/train.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in MIXED[0]} for row in rows] == MIXED
    statuses = [row["congrad_status"] for row in rows]
    assert set(statuses[:25]) == {"kept", "dropped"} and statuses.count("kept") == 13
    assert statuses[25:] == ["duplicate", "identical_responses", "unknown_language", "pair_too_long"]
    assert [row["congrad_kept"] for row in rows] == [status == "kept" for status in statuses]
    table = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert table["congrad_status"].to_pylist() == statuses
    assert all(
        (row["congrad_score"] is not None) == (row["congrad_status"] in ("kept", "dropped")) for row in rows
    )

    few = congrad(*command[command.index("filter") :], *named, "--failed-share", "0.01", "--redo")
    assert few.code == 0, "ten bad rows never stop a filter"


def test_more_bad_rows_than_the_share_stop_the_filter_before_work(
    tmp_path: Path, tiny_model: Path, congrad: Any, filter_command: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    bad = {"prompt": "x", "chosen": "", "rejected": "y", "language": "en"}
    path.write_text("\n".join(json.dumps(row) for row in [GOOD] * 20 + [bad] * 11))
    command = filter_command(path, tiny_model, tmp_path / "out")
    refused = congrad(*command[command.index("filter") :])
    assert refused.code == 2 and not (tmp_path / "out").exists()
    assert "11 of 31 rows cannot be used, more than --failed-share (0.2)" in refused.err
    assert "chosen_empty: 11, such as rows.jsonl:21: chosen is empty" in refused.err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--columns", "promt=x"), "there is no 'promt'; there are prompt"),
        (("--columns", "prompt"), "--columns prompt: give it as name=value"),
        (("--language-names", "a=1,a=2"), "a is there twice"),
        (("--language-names", "a=klingonish"), "klingonish"),
        (("--chat-template-kwargs", "[1]"), "--chat-template-kwargs [1] is no mapping"),
        (("--to", "trll"), "--to trll: there is no such format; there are trl, llama-factory"),
        (("--public",), "--public is of --push"),
        (("--push", "me/pairs"), "--push uploads what one --to wrote, and there are 0"),
        (("--failed-share", "2"), "--failed-share"),
        (("--loss", "loss_type=simpo", "--length-penalty", "0.1"), "length_penalty (0.1) does nothing in"),
        (("--loss", "margin_weighting=true"), "these have no chosen_score, rejected_score"),
    ],
)
def test_options_that_cannot_be_are_refused_before_work(
    tmp_path: Path, tiny_model: Path, congrad: Any, filter_command: Any, more: tuple[str, ...], text: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD))
    command = filter_command(tmp_path / "rows.jsonl", tiny_model, tmp_path / "out")
    refused = congrad(*command[command.index("filter") :], *more)
    assert refused.code == 2 and text in refused.err and not (tmp_path / "out").exists()


def test_a_dropped_prompt_end_is_said_on_the_screen(
    tmp_path: Path, tiny_model: Path, preference_rows: Any, filter_command: Any, congrad: Any
) -> None:
    """By a replica, in another process; and the template gets what the command line gives it."""
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if not thinking %}<s>{% endif %}{% endif %}"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, preference_rows(6, LANGUAGES))))
    (tmp_path / "template.jinja").write_text(template)
    command = filter_command(tmp_path / "rows.jsonl", tiny_model, tmp_path / "out")
    command += ["--chat-template", str(tmp_path / "template.jinja")]
    warning = "the prompt's tokens are not a prefix of prompt + completion"
    connect_shared()
    runs = [
        congrad(*command[command.index("filter") :], *more)
        for more in ([], ["--chat-template-kwargs", '{"thinking": true}', "--redo"])
    ]
    assert [run.code for run in runs] == [0, 0]
    assert [warning in run.out + run.err for run in runs] == [True, False]


def test_rows_without_a_language_are_identified(
    tmp_path: Path, tiny_model: Path, congrad: Any, filter_command: Any
) -> None:
    connect_shared()
    sentences = {
        "en": ("What is the capital of the country?", "The capital is a large and beautiful city."),
        "de": ("Was ist die Hauptstadt des Landes?", "Die Hauptstadt ist eine große und schöne Stadt."),
    }
    rows = [
        {"prompt": prompt, "chosen": f"{chosen} {n}", "rejected": f"{n}"}
        for n in range(6)
        for prompt, chosen in sentences.values()
    ]
    rows.append({"prompt": "x = 3", "chosen": "y = 4", "rejected": "5"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = filter_command(tmp_path / "rows.jsonl", tiny_model, tmp_path / "out")
    done = congrad(*command[command.index("filter") :], "--identify-languages")
    assert done.code == 0, done.err
    assert "13 rows = 6 kept + 6 dropped + 1 quarantined" in done.out
    assert "quarantined: language_not_identified 1" in done.out
    scores = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert sorted(scores["language"].to_pylist()) == ["de"] * 6 + ["en"] * 6


SYSTEM = {"role": "system", "content": "Be brief. "}


@pytest.mark.slow
def test_every_export_filtered_again_gives_the_same_selection(
    tmp_path: Path, tiny_model: Path, filter_here: Any, preference_rows: Any
) -> None:
    rows = [
        {
            **row,
            "prompt": [
                {"role": "system", "content": "Be brief. "},
                {"role": "user", "content": f" {row['prompt']}"},
            ],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in preference_rows(60, LANGUAGES)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    formats = ("trl", "llama-factory", "openrlhf", "parquet", "jsonl", "dataset", "axolotl")
    to = [word for name in formats for word in ("--to", name)]
    filter_here(path, tiny_model, tmp_path / "out", "--keep", "1", *to)
    filter_here(path, tiny_model, tmp_path / "half")
    columns = {
        "llama-factory": ("--columns", "prompt=conversations,system=system"),
        "axolotl": ("--columns", "prompt=messages"),
    }
    expected = scores_of(tmp_path / "half")
    for name in formats:
        filter_here(tmp_path / "out/export" / name, tiny_model, tmp_path / name, *columns.get(name, ()))
        assert scores_of(tmp_path / name) == expected, name


def scores_of(out: Path) -> list[tuple[object, ...]]:
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    return sorted((row["pair_id"], row["language"], row["cosine"], row["kept"]) for row in rows)
