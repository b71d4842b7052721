from pathlib import Path

import pytest

from congrad_ray.stages.judge.rubric import RubricError, conversation_text, load_rubric
from congrad_ray.stages.judge.scores import read_score

PROMPT = [{"role": "user", "content": "What is {response}?"}]
LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "ja", "pt", "ru", "zh"]


def test_additive_rubric_has_its_languages() -> None:
    assert sorted(load_rubric("additive").templates) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_rubric_asks_for_a_score_line_that_is_read_back(language: str) -> None:
    rubric = load_rubric("additive")
    text = rubric.fill(language, "sampled", PROMPT, "An answer.")
    label = text.rstrip().rsplit("\n", 1)[-1].split("<")[0]
    assert read_score(f"...\n{label}4", language) == 4.0
    digit_only = rubric.fill(language, "expected_score", PROMPT, "An answer.")
    assert label not in digit_only
    assert "===" not in text + digit_only
    assert digit_only.count("An answer.") == 1


def test_braces_in_a_prompt_or_response_are_not_filled() -> None:
    text = load_rubric("additive").fill("en", "sampled", PROMPT, "It is {prompt}.")
    assert "What is {response}?" in text
    assert "It is {prompt}." in text


@pytest.mark.parametrize(
    ("asked", "got"), [("pt-BR", "pt"), ("zh-Hant", "zh"), ("de", "de"), ("sw", "en"), ("sw-KE", "en")]
)
def test_language_falls_back_to_its_primary_subtag_and_then_english(asked: str, got: str) -> None:
    assert load_rubric("additive").language_of(asked) == got


def test_a_folder_is_used_verbatim_and_its_digest_follows_its_text(tmp_path: Path) -> None:
    file = tmp_path / "en.txt"
    file.write_text("Q {prompt} A {response}\nScore:")
    rubric = load_rubric(str(tmp_path))
    filled = rubric.fill("en", "expected_score", [{"role": "user", "content": "x"}], "y")
    assert filled == "Q x A y\nScore:"
    file.write_text("Question {prompt} A {response}\nScore:")
    assert load_rubric(str(tmp_path)).digest() != rubric.digest()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("en", "only {prompt}", r"en.txt lacks \{response\}"),
        ("de", "{prompt} {response}", "needs en.txt"),
        (
            "en",
            "{prompt} {response}\n=== guessed\nx",
            "endings for guessed; known are expected_score, sampled, structured",
        ),
    ],
)
def test_a_wrong_folder_is_refused_with_the_reason(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(RubricError, match=message):
        load_rubric(str(tmp_path))


def test_an_unknown_rubric_names_the_built_in_ones() -> None:
    with pytest.raises(RubricError, match="additive, builtin-world"):
        load_rubric("no-such-rubric")


def test_builtin_world_rubric_loads_in_english() -> None:
    assert "{prompt}" in load_rubric("builtin-world").templates["en"]


def test_conversations_keep_their_roles() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation_text(messages) == "[user]\na\n\n[assistant]\nb"
