"""The table of languages, and finding the languages of texts."""

import itertools
import json
from pathlib import Path

import pytest

from congrad_ray.data.languages import (
    LanguageIdentifier,
    identify_languages,
    in_other_script,
    language_table,
    prose,
)

GERMAN = "Das Wetter wird morgen im ganzen Land schön sein."
RUSSIAN = "Завтра во всей стране будет хорошая погода."
CHINESE = "明天全国天气晴朗。"


def test_the_table_has_every_language_largest_first_with_what_it_was_called() -> None:
    counts = {"sw": 3, "ar": 1200, "en": 1200}
    lines = language_table(counts, written={"ar": {"arb", "ar"}, "en": {"en"}})
    assert [line.split() for line in lines[:4]] == [
        ["language", "count"],
        ["ar", "1,200", "from", "ar,", "arb"],
        ["en", "1,200"],
        ["sw", "3"],
    ]
    assert len(lines[0]) == len(lines[2]) == len(lines[3])  # numbers end under their title


@pytest.mark.parametrize(("smallest", "small"), [(10, "de (9)"), (11, "de (9), en (10)"), (1, None)])
def test_groups_too_small_for_a_direction_are_named(smallest: int, small: str | None) -> None:
    notes = language_table({"de": 9, "en": 10, "fr": 11}, smallest)[4:]
    assert notes == ([f"too few for a direction of their own, fewer than {smallest}: {small}"] if small else [])


@pytest.mark.parametrize(
    ("tags", "apart"),
    [
        (["zh", "zh-Hant", "en"], ["zh and zh-Hant"]),
        (["pt-BR", "pt-PT", "sr", "sr-Latn"], ["pt-BR and pt-PT", "sr and sr-Latn"]),
        (["nb", "no", "nn"], ["nb and nn and no"]),
        (["zh", "yue", "ar", "arz"], []),
    ],
)
def test_tags_of_one_language_that_are_kept_apart_are_named(tags: list[str], apart: list[str]) -> None:
    notes = language_table(dict.fromkeys(tags, 100))[1 + len(tags) :]
    assert notes == [f"one language, kept apart: {tags}" for tags in apart]


NOT_PROSE = [
    "```python\nfor word in the_long_list of words:\n    print this and that\n```",
    "```\nan open fence with words that are never closed",
    "`some words of code in one line`",
    "https://example.org/some/words-of-an/address and@mail.org",
    r"\[ E = m c^2 \text{where all of these are the letters} \]",
    "$x is the first and y is the second$",
    "<div class='these are not the words'>",
    "def is_prime(n): return all(n % i for i in range(2, n))",
    "Johann Wolfgang von Goethe, Friedrich Schiller, Heinrich Heine",
    "1. Meryl Streep\n2. Hugh Jackman\n3. Audra McDonald",
    "12 345 678,90 3.14",
    '"never gonna give you up"',
    "Yes, of course",
    "#these #are #only #tags",
    "好的",
    "",
]


@pytest.mark.parametrize("text", NOT_PROSE)
def test_what_is_no_full_sentence_is_no_prose(text: str) -> None:
    assert prose(text).sentences == []


@pytest.mark.parametrize("sentence", [GERMAN, RUSSIAN, CHINESE, 'She said "yes" and 3 others came too.'])
@pytest.mark.parametrize("other", NOT_PROSE[:1] + NOT_PROSE[2:])
def test_a_sentence_is_found_beside_what_is_none(sentence: str, other: str) -> None:
    for text in (f"{sentence}\n{other}", f"{other}\n{sentence}"):
        assert len(prose(text).sentences) == 1


@pytest.mark.parametrize(
    "piece",
    ["a", "好", "$$", "\\[", "`", "<a ", "a_", "1", '"', "```", "(", "a.", "@a", "\\(", "~~~", "\\begin{a}"],
)
def test_the_longest_answers_are_read(piece: str) -> None:
    assert prose(piece * 20_000).share in (0, 1)


def test_of_a_long_text_some_sentences_from_all_over_it_are_looked_at() -> None:
    text = " ".join(f"This sentence ends with the letters {'a' * n}." for n in range(1, 201))
    found = prose(text)
    ends = [len(sentence.split()[-1]) - 1 for sentence in found.sentences]
    assert found.share == 1 and len(ends) <= 24 and ends[0] == 1 and ends[-1] > 180
    assert {later - earlier for earlier, later in itertools.pairwise(ends)} == {9}


@pytest.mark.parametrize(
    ("text", "language", "other"),
    [
        (GERMAN, "ru", True),
        (GERMAN, "yo", False),  # of the same script
        (RUSSIAN, "ru", False),
        (RUSSIAN, "am", True),
        (CHINESE, "zh-Hant", False),
        (CHINESE, "yue", False),
        (CHINESE, "ja", False),
        (RUSSIAN, "ja", True),
        ("안녕하세요 여러분", "ko", False),
        (GERMAN, "sr", False),  # Serbian has both
        (GERMAN, "uz-Cyrl", True),
        ("Слово Beatles стоит здесь", "ru", False),
    ],
)
def test_a_script_that_a_language_does_not_use_is_seen(text: str, language: str, other: bool) -> None:
    assert in_other_script(text, language) is other


def test_languages_are_found_or_none_is() -> None:
    texts = [GERMAN, RUSSIAN, CHINESE, "x = 3", "", f"{GERMAN} {RUSSIAN}"]
    assert identify_languages(texts)[:5] == ["de", "ru", "zh", None, None]
    assert identify_languages(texts, ["de", "ru", "zh-Hant"])[:5] == ["de", "ru", "zh", None, None]


def test_nothing_is_found_where_there_is_nothing_to_choose_among() -> None:
    identifier = LanguageIdentifier(["qu", "ht"])
    assert not identifier.knows("qu")
    assert identifier.identify([GERMAN]) == [None]


def test_languages_of_real_sentences_are_found(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "xcopa.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["language"] not in ("ht", "qu")][::10]  # lingua knows neither
    texts = [f"{row['premise']} {row['choice1']} {row['choice2']}" for row in rows]
    found = identify_languages(texts, sorted({row["language"] for row in rows}))
    wrong = [row["language"] for row, tag in zip(rows, found, strict=True) if tag not in (None, row["language"])]
    assert len(wrong) <= 0.01 * len(rows)
    assert sum(tag is not None for tag in found) > 0.7 * len(rows)
