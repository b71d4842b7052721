"""The offline language identifier on real sentences."""

from congrad_ray.stages.pair.language_check import LanguageCheck

SENTENCES = {
    "en": "The weather will be fine tomorrow in the whole country.",
    "de": "Das Wetter wird morgen im ganzen Land schön sein.",
    "es": "Mañana hará buen tiempo en todo el país.",
    "ru": "Завтра во всей стране будет хорошая погода.",
    "hi": "कल पूरे देश में मौसम अच्छा रहेगा।",
    "zh": "明天全国天气晴朗。",
}


def test_right_and_wrong_languages_are_distinguished() -> None:
    check = LanguageCheck(list(SENTENCES), confidence=0.5, min_characters=5)
    texts = list(SENTENCES.values())
    assert check.wrong(texts, list(SENTENCES)) == [False] * len(texts)
    shifted = [*list(SENTENCES)[1:], "en"]
    assert check.wrong(texts, shifted) == [True] * len(texts)


def test_what_cannot_be_known_is_never_wrong() -> None:
    check = LanguageCheck(["de", "yo", "jv"], confidence=0.5, min_characters=10)
    assert check.wrong(["Ja", SENTENCES["en"], ""], ["de", "jv", "de"]) == [False, False, False]
    assert check.wrong([SENTENCES["en"]], ["de"]) == [True]


def test_a_tag_with_a_region_is_checked_as_its_language() -> None:
    check = LanguageCheck(["pt-BR", "es"], confidence=0.5, min_characters=5)
    assert check.wrong([SENTENCES["es"], "Amanhã o tempo estará bom em todo o país."], ["pt-BR", "pt-BR"]) == [
        True,
        False,
    ]
