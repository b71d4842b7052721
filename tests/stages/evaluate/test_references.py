import json
from pathlib import Path
from typing import Any

import pytest

from congrad_ray.config.recipe import Prompts, Source
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import prompt_id
from congrad_ray.stages.evaluate.comparing import Baseline, wanted_comparisons
from congrad_ray.stages.evaluate.references import read_references

PROMPTS = Prompts(languages=["de"], unseen_languages=["fr"])


def _id(language: str, text: str) -> str:
    return prompt_id(language, [{"role": "user", "content": text}])


def _file(folder: Path, rows: list[dict[str, Any]]) -> Source:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(name=str(path))


@pytest.mark.parametrize("column", ["response", "output", "chosen"])
def test_answers_are_joined_by_prompt_and_the_others_counted(tmp_path: Path, column: str) -> None:
    chat = [{"role": "user", "content": "Frage?"}, {"role": "assistant", "content": "aus dem Chat"}]
    rows = [
        {"prompt": " Wer? ", "language": "German", column: "Ich."},  # cleaned as prompts are
        {"prompt": "Wer?", "language": "de", column: "Noch einmal."},
        {"prompt": "Qui?", "language": "fr", column: chat},
        {"prompt": "Wer?", "language": "en", column: "Another language, another prompt."},
        {"prompt": "Was?", "language": "de", column: ""},
    ]
    ids = {_id("de", "Wer?"), _id("fr", "Qui?"), _id("de", "Was?")}
    found = read_references(_file(tmp_path, rows), PROMPTS, ids)
    assert {key: row["response"] for key, row in found.answers.items()} == {
        _id("de", "Wer?"): "Ich.",
        _id("fr", "Qui?"): "aus dem Chat",
    }
    assert (found.unmatched, found.bad, found.repeated) == (1, 1, 1)
    note = found.note("answers.jsonl", 3)
    assert note is not None
    assert "2 of 3 evaluation prompts" in note
    assert "1 of its rows are to other prompts" in note and "1 answer a prompt that has one" in note
    assert found.answers[_id("de", "Wer?")]["answer_id"] != found.answers[_id("fr", "Qui?")]["answer_id"]


def test_answers_that_fit_exactly_need_no_note(tmp_path: Path) -> None:
    rows = [{"prompt": "Wer?", "response": "Ich."}]
    assert read_references(_file(tmp_path, rows), PROMPTS, {_id("de", "Wer?")}, "de").note("x", 1) is None


def test_a_file_without_answers_or_of_other_prompts_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Wer?", "language": "de", "answer": "Ich."}]
    with pytest.raises(InputError, match="no column of answers: one of response, output, chosen"):
        read_references(_file(tmp_path, rows), PROMPTS, {"x"})
    rows = [{"prompt": "Wer?", "language": "de", "response": "Ich."}]
    with pytest.raises(InputError, match=r"no answer to any of the 1 evaluation prompts: 1 of its rows"):
        read_references(_file(tmp_path, rows), PROMPTS, {"x"})


def test_each_baseline_is_compared_in_both_orders_where_it_answered() -> None:
    prompt = [{"role": "user", "content": "?"}]

    def answer(name: str, model: str, **more: Any) -> dict[str, Any]:
        row = {"prompt_id": name, "model": model, "answer_id": f"{model} {name}", "response": f"{model}: {name}"}
        row |= {"language": "de", "seen": True, "prompt": prompt, "decoding": "greedy", "true_score": None}
        return row | more

    answers = [
        answer("p1", "M_2"),
        answer("p2", "M_2"),
        answer("p3", "M_2", true_score=0.5),
        answer("p1", "M_2", decoding="sampled"),
    ]
    baselines = [
        Baseline("M_0", {name: answer(name, "M_0") for name in ("p1", "p2", "p3")}),
        Baseline("references", {"p2": {"answer_id": "r", "response": "written"}}),
    ]
    rows = wanted_comparisons(answers, baselines)
    assert [(row["baseline"], row["prompt_id"], row["order"]) for row in rows] == [
        ("M_0", "p1", "model_first"),
        ("M_0", "p1", "baseline_first"),
        ("M_0", "p2", "model_first"),
        ("M_0", "p2", "baseline_first"),
        ("references", "p2", "model_first"),
        ("references", "p2", "baseline_first"),
    ]
    assert rows[-1]["baseline_response"] == "written" and rows[-1]["model_response"] == "M_2: p2"
    assert len({row["comparison_id"] for row in rows}) == 6
