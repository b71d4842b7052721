"""The offline language check: right, wrong or unknown, on real sentences."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from congrad_ray.stages.pair.language_check import LanguageCheck, Verdict

SENTENCES = {
    "en": "The weather will be fine tomorrow in the whole country.",
    "de": "Das Wetter wird morgen im ganzen Land schön sein.",
    "es": "Mañana hará buen tiempo en todo el país.",
    "ru": "Завтра во всей стране будет хорошая погода.",
    "hi": "कल पूरे देश में मौसम अच्छा रहेगा।",
    "zh": "明天全国天气晴朗。",
}


def verdict(text: str, language: str, *others: str, confidence: float = 0.5, shortest: int = 5) -> Verdict:
    return LanguageCheck([language, *others], confidence, shortest).verdicts([text], [language])[0]


def test_right_and_wrong_languages_are_distinguished() -> None:
    check = LanguageCheck(list(SENTENCES), confidence=0.5, min_characters=5)
    pairs = list(itertools.product(SENTENCES, SENTENCES))
    said = check.verdicts([SENTENCES[text] for text, _ in pairs], [asked for _, asked in pairs])
    assert said == ["right" if text == asked else "wrong" for text, asked in pairs]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ja",
        "Yes.",
        "```python\nfor word in words_of_the_list:\n    print(word, 'is one of the words')\n```",
        "for i in range(10):\n    print('The answer is: ')\n    print(i)",
        "x = 3.5 * y + sin(z)",
        r"$$\text{where it is the sum of all the numbers} \sum_i x_i$$",
        "42",
        "Meryl Streep, Hugh Jackman, Denzel Washington",
        "1. Daft Punk\n2. Justice\n3. Deadmau5\n4. The Chemical Brothers",
        "1. AirPods\n2. Laptop sleeve or case\n3. External hard drive\n4. USB-C hub\n5. Laptop stand",
        "https://example.org/the/weather/will/be/fine/tomorrow",
        '"Put on a happy face"',
    ],
)
@pytest.mark.parametrize("language", ["ru", "de", "hi", "yo", "jv"])
def test_what_has_no_language_is_unknown(text: str, language: str) -> None:
    assert verdict(text, language, "de", "ru") == "unknown"


@pytest.mark.parametrize(("one", "other"), itertools.permutations(["en", "de", "es", "ru", "hi"], 2))
def test_mixed_text_is_wrong_only_where_no_part_of_it_is_right(one: str, other: str) -> None:
    text = f"{SENTENCES[one]} {SENTENCES[other]}"
    assert verdict(text, one, other) == verdict(text, other, one) == "unknown"
    assert verdict(text, "zh", one, other) == "wrong"


@pytest.mark.parametrize("language", ["ru", "de"])
@pytest.mark.parametrize(
    "beside",
    ["```\nthe code of it in words and names\n```", "Meryl Streep\nHugh Jackman", '"Put on a happy face"', "x=3"],
)
def test_what_has_no_language_changes_no_verdict(language: str, beside: str) -> None:
    for asked, expected in ((language, "right"), ("es", "wrong")):
        for text in (f"{SENTENCES[language]}\n\n{beside}", f"{beside}\n\n{SENTENCES[language]}"):
            assert verdict(text, asked, "ru", "de") == expected


@pytest.mark.parametrize(("language", "expected"), [("am", "wrong"), ("dv", "wrong"), ("ht", "unknown")])
def test_of_a_language_that_the_identifier_does_not_know_only_the_script_is_checked(
    language: str, expected: Verdict
) -> None:
    assert verdict(SENTENCES["en"], language, "de") == expected


@pytest.mark.parametrize(("asked", "text"), [("ms", "id"), ("nb", "da"), ("no", "da"), ("sr", "hr")])
def test_languages_that_can_hardly_be_told_apart_are_never_wrong(asked: str, text: str) -> None:
    sentences = {
        "id": "Besok cuaca akan cerah di seluruh negeri, kata mereka kepada wartawan kemarin.",
        "da": "I morgen bliver vejret godt i hele landet, siger meteorologerne.",
        "hr": "Sutra će vrijeme biti lijepo u cijeloj zemlji, tvrde stručnjaci.",
    }
    assert verdict(sentences[text], text, asked) == "right"
    assert verdict(sentences[text], asked, text) == "unknown"


def test_settings_say_what_is_checked() -> None:
    assert verdict(SENTENCES["en"], "de", shortest=len(SENTENCES["en"])) == "wrong"
    assert verdict(SENTENCES["en"], "de", shortest=len(SENTENCES["en"]) + 1) == "unknown"
    unsure = "Die is in de was."  # of Dutch, German and English words
    assert verdict(unsure, "en", "de", "nl", confidence=1.0) == "unknown"


def test_a_tag_with_a_region_or_script_is_checked_as_its_language() -> None:
    check = LanguageCheck(["pt-BR", "es", "zh-Hant"], confidence=0.5, min_characters=5)
    texts = [SENTENCES["es"], "Amanhã o tempo estará bom em todo o país.", SENTENCES["zh"], SENTENCES["es"]]
    assert check.verdicts(texts, ["pt-BR", "pt-BR", "zh-Hant", "zh-Hant"]) == ["wrong", "right", "right", "wrong"]


def test_real_sentences_in_their_own_language_are_almost_never_wrong(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "xcopa.jsonl").read_text().splitlines()][::3]
    texts = [(row[name], row["language"]) for row in rows for name in ("premise", "choice1", "choice2")]
    check = LanguageCheck(sorted({language for _, language in texts}), 0.5, 10)
    said = Counter(check.verdicts([text for text, _ in texts], [language for _, language in texts]))
    assert said["wrong"] <= 0.002 * len(texts)
    assert said["right"] >= 0.5 * len(texts)


def test_answers_in_another_script_are_wrong_only_where_they_are_sentences(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "preferences.jsonl").read_text().splitlines()]
    texts = [row[name] for row in rows if row["language"] == "ru" for name in ("chosen", "rejected")]
    check = LanguageCheck(["en", "es", "ru", "de", "fr"], 0.5, 10)
    said = check.verdicts(texts, ["ru"] * len(texts))
    for text, found in zip(texts, said, strict=True):
        letters = [letter for letter in text.lower() if letter.isalpha()]
        cyrillic = sum("а" <= letter <= "я" or letter == "ё" for letter in letters)
        assert found != "wrong" or cyrillic < 0.5 * len(letters), text
    assert 20 <= said.count("wrong") <= 40 and said.count("right") > 0.85 * len(texts)
