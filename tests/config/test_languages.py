"""One form of tag for every way in which people write a language."""

import langcodes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langcodes.data_dicts import DEFAULT_SCRIPTS, MACROLANGUAGES, VALIDITY

from congrad_ray.config.languages import full_tag, language_group, language_tag

JOINED = {"arb": "ar", "cmn": "zh", "zsm": "ms", "pes": "fa", "swh": "sw", "ekk": "et", "npi": "ne", "uzn": "uz"}
WRITTEN = {
    "zh": ["zh-CN", "zh_Hans", "zho_Hans", "zho", "chi", "zh-Hant-TW", "Chinese", "中文", "Simplified Chinese"],
    "en": ["eng_Latn", "EN", "en-us", "english", "  English ", "eng"],
    "pt": ["pt_br", "pt-PT", "por_Latn", "Português", "brazilian portuguese"],
    "de": ["Deutsch", "deu", "ger", "de_AT", "german"],
    "ru": ["rus_Cyrl", "русский", "Russian"],
    "he": ["iw", "heb"],
    "id": ["in", "Bahasa  Indonesia"],
    "fa": ["prs", "Farsi", "Iranian Persian"],
    "ar": ["ar-EG", "العربية", "Standard Arabic"],
}
APART = ["yue", "wuu", "arz", "ary", "no", "nb", "nn", "hr", "bs", "und", "x-mine"]
CODES = sorted(code for code in {*DEFAULT_SCRIPTS, *MACROLANGUAGES} if VALIDITY.match(code))


@pytest.mark.parametrize(("written", "tag"), JOINED.items())
def test_a_language_is_joined_to_what_people_mean_by_its_macrolanguage(written: str, tag: str) -> None:
    assert language_tag(written) == language_tag(written.upper()) == full_tag(written) == tag


@pytest.mark.parametrize(("written", "tag"), [(text, tag) for tag, texts in WRITTEN.items() for text in texts])
def test_every_way_to_write_a_language_is_its_tag(written: str, tag: str) -> None:
    assert language_tag(written) == tag


@pytest.mark.parametrize("tag", APART)
def test_languages_that_people_keep_apart_stay_apart(tag: str) -> None:
    assert language_tag(tag) == full_tag(tag) == tag


@pytest.mark.parametrize(
    ("written", "tag"),
    [
        ("zh-Hant", "zh-Hant"),
        ("zh_TW", "zh-Hant"),
        ("cmn-Hant", "zh-Hant"),
        ("zh-Hans", "zh"),
        ("zh-CN", "zh"),
        ("sr-Latn", "sr-Latn"),
        ("sr-ME", "sr-Latn"),
        ("srp_Cyrl", "sr"),
        ("hi-Latn", "hi-Latn"),
        ("pt-BR", "pt"),
        ("en_Latn", "en"),
    ],
)
def test_scripts_are_kept_on_request_where_they_are_not_the_usual_one(written: str, tag: str) -> None:
    assert language_tag(written, keep_scripts=True) == tag
    assert language_tag(written) == tag.partition("-")[0]


@given(
    st.sampled_from(CODES),
    st.sampled_from(["", "-Latn", "_Cyrl", "-Hant", "_arab"]),
    st.sampled_from(["", "-BR", "_tw", "-419"]),
    st.booleans(),
)
def test_a_tag_in_its_form_stays_as_it_is(code: str, script: str, region: str, keep_scripts: bool) -> None:
    text = code + script + region
    tag = language_tag(text, keep_scripts=keep_scripts)
    assert langcodes.tag_is_valid(tag)
    assert language_tag(tag, keep_scripts=keep_scripts) == tag
    assert full_tag(full_tag(text)) == full_tag(text)
    assert language_group(text, [tag]) == tag or (keep_scripts and "-" in tag)


@pytest.mark.parametrize(
    ("text", "near"),
    [("jp", "ja"), ("cn", "zh"), ("englisch", "english"), ("Portugese", "portuguese"), ("Deutch", "deutsch")],
)
def test_what_is_no_language_is_refused_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is neither .*did you mean {near}"):
        language_tag(text)


@pytest.mark.parametrize("text", ["", " ", "qq", "c++", "no language of this world", "\x1b[31m", "12", "a" * 5000])
def test_what_is_like_no_language_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is neither a BCP-47 tag") as error:
        language_tag(text)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 500


def test_a_users_own_names_go_before_all() -> None:
    names = {"en": "de", "klingonese": "tlh", "tw": "zh-Hant"}
    assert {name: language_tag(name, names) for name in (" en ", *names, "fr")} == {
        **names,
        " en ": "de",
        "fr": "fr",
    }
    assert language_group("tw", ["zh"], names) == "zh"
    assert language_group("klingonese", ["zh"], names) == "tlh"


@pytest.mark.parametrize(
    ("text", "groups", "group"),
    [
        ("pt_br", ["pt"], "pt"),
        ("pt_br", ["pt", "pt-BR"], "pt-BR"),
        ("pt", ["pt-PT", "pt-BR"], "pt-BR"),  # as CLDR has it
        ("pt-PT", ["pt-BR"], "pt"),  # none of the groups
        ("zh-TW", ["zh", "zh-Hant"], "zh-Hant"),
        ("cmn", ["zh", "zh-Hant"], "zh"),
        ("cmn", ["zh-Hans", "zh-Hant"], "zh-Hans"),
        ("zh-Hant", ["zh"], "zh"),
        ("Deutsch", ["en"], "de"),
        ("yue", ["zh"], "yue"),
    ],
)
def test_a_text_is_in_the_group_that_says_most_of_it(text: str, groups: list[str], group: str) -> None:
    assert language_group(text, groups) == language_group(text, groups[::-1]) == group
