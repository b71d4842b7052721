"""One form of a language's tag: what people write for languages, as the tag of the group its texts belong to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from functools import cache, lru_cache

import langcodes

from congrad_ray.config.printable import brief

# Names that people write and CLDR lacks, beside those it has in English and in the languages themselves.
_OTHER_NAMES = {
    "bahasa indonesia": "id",
    "bahasa melayu": "ms",
    "chinese (simplified)": "zh-Hans",
    "chinese (traditional)": "zh-Hant",
    "farsi": "fa",
    "iranian persian": "fa",
    "mandarin": "zh",
    "mandarin chinese": "zh",
    "oriya": "or",
    "standard arabic": "ar",
    "standard malay": "ms",
}


def language_tag(text: str, names: Mapping[str, str] | None = None, keep_scripts: bool = False) -> str:
    """The tag of the language that `text` means: "arb", "ar_EG" and "Arabic" are all "ar".

    Understood are BCP-47 tags in any case and with `_` for `-`, ISO 639-3 and FLORES codes (zho_Hans), deprecated
    codes (iw), and languages' names in English and in the language itself. An individual language that is what
    people mean by its macro-language is joined to it, as CLDR has it (arb to ar, cmn to zh, zsm to ms, pes to fa,
    swh to sw); those that people keep apart stay apart (yue, arz, ary; no, nb and nn). Regions are dropped, and
    scripts too; with `keep_scripts` a script stays where it is not the language's usual one (zh-Hant and zh-TW are
    zh-Hant, zh-Hans is zh, sr-Latn stays).

    `names`, a user's own mapping of names to tags, goes before all of that and its tags are taken as they are.
    Raises ValueError for anything else, with the nearest name where there is one.
    """
    text = text.strip()
    return names[text] if names and text in names else _joined(full_tag(text), keep_scripts)


def language_group(text: str, groups: Collection[str], names: Mapping[str, str] | None = None) -> str:
    """The one of `groups`, tags as of `full_tag`, that `text` belongs to; `language_tag(text)` where none is.

    A group takes the texts that have all of its parts: `zh` takes every Chinese, `zh-Hant` also zh-TW. What a text
    does not state is what CLDR calls likely: zh is written in Hans, pt is of Brazil. The group with most parts
    wins, and first of all the one of the very same tag. Raises ValueError as `language_tag` does.
    """
    text = text.strip()
    named = names[text] if names and text in names else None
    return _group(full_tag(named or text), tuple(groups)) or named or language_tag(text)


@lru_cache(maxsize=4096)
def full_tag(text: str) -> str:
    """As `language_tag`, but with script and region where they are written: pt_br is pt-BR, cmn-Hant is zh-Hant.

    Raises ValueError as `language_tag` does.
    """
    tag = text.strip().replace("_", "-")
    if langcodes.tag_is_valid(tag):
        return langcodes.standardize_tag(tag, macro=True)
    named = _tags_by_name().get(_plain(text))
    if named:
        return langcodes.standardize_tag(named, macro=True)
    raise ValueError(
        f"{brief(repr(text))} is neither a BCP-47 tag (en, pt-BR, zh-Hant) nor the name of a language{_hint(text)}"
    )


@lru_cache(maxsize=4096)
def _joined(tag: str, keep_scripts: bool) -> str:
    found = langcodes.Language.get(tag, normalize=False)
    if not found.language:  # private use: x-mine
        return tag
    script = found.maximize().script
    if not keep_scripts or script == langcodes.Language.get(found.language).maximize().script:
        return found.language
    return f"{found.language}-{script}"


@lru_cache(maxsize=4096)
def _group(tag: str, groups: tuple[str, ...]) -> str | None:
    if tag in groups:
        return tag
    has = set(langcodes.Language.get(tag, normalize=False).maximize().to_tag().split("-"))
    language = tag.partition("-")[0]
    fitting = [
        group for group in groups if group.partition("-")[0] == language and has.issuperset(group.split("-"))
    ]
    return max(fitting, key=lambda group: group.count("-"), default=None)


@cache
def _tags_by_name() -> dict[str, str]:
    """Tags by the names of languages, in lower case: English names before languages' own."""
    from babel import Locale, localedata  # half a second, and only for names

    found = {_plain(name): tag.replace("_", "-") for tag, name in Locale("en").languages.items()}
    for identifier in localedata.locale_identifiers():
        own = Locale(identifier).languages.get(identifier) if "_" not in identifier else None
        if own:
            found.setdefault(_plain(own), identifier)
    return _OTHER_NAMES | found


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


@lru_cache(maxsize=4096)  # a file has the same name on many rows
def _hint(text: str) -> str:
    """What `text` may have meant: the language of a country's code (jp), or the most similar name."""
    if re.fullmatch(r"[A-Za-z]{2}", text):
        country = langcodes.Language.make(territory=text.upper())
        return f" (did you mean {country.maximize().language}?)" if country.is_valid() else ""
    names = _tags_by_name()
    similar = difflib.get_close_matches(_plain(text), names, n=1)
    return f" (did you mean {similar[0]} or {names[similar[0]]}?)" if similar else ""
