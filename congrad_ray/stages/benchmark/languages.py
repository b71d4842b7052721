"""The language of a task of lm-evaluation-harness, by its name."""

from __future__ import annotations

import re
from functools import cache

import langcodes

from congrad_ray.config.languages import language_tag

# Parts of the harness' names that are codes of languages as well and hardly ever mean them there.
_NO_LANGUAGES = frozenset(["as", "ba", "ch", "kv", "la", "li", "mt", "na", "no", "or", "to", "mac", "run"])
_SCRIPTED = re.compile(r"(?<![A-Za-z])([a-z]{2,3})[_-]([A-Z][a-z]{3})(?![A-Za-z])")
_NUMBERED = re.compile(r"[_-]prompt[_-]?\d+$")


def task_language(name: str) -> str | None:
    """The tag of the language that a task's name carries; None where it carries none that is known for sure.

    Codes with a script go first (belebele_deu_Latn), then codes of two letters (global_mmlu_de_stem, with a region
    as in mmmlu_pt_br_anatomy), English names of languages (french_bench_arc_challenge), and codes of three letters
    at the end (afrimmlu_direct_swa). Of several of a kind it is the last: mgsm_en_cot_de asks in German, and
    flores_de-fr wants French. A script stays where it is not the usual one: belebele_hin_Latn is hi-Latn.
    """
    name = _NUMBERED.sub("", name)
    if scripted := _SCRIPTED.findall(name):
        return _tag("-".join(scripted[-1]))
    parts = re.split(r"[_:]+", name)
    for place in range(len(parts) - 1, 0, -1):  # the first part names the benchmark
        code = (
            parts[place].rpartition("-")[2] if re.fullmatch(r"[a-z]{2}-[a-z]{2}", parts[place]) else parts[place]
        )
        if not _is_code(code):
            continue
        if _is_code(before := parts[place - 1]) and _is_locale(before, code):
            return _tag(before)
        return _tag(code)
    for part in reversed(parts):
        if (code := _names().get(part.lower(), "")) and part.lower() == part:
            return code
    last = parts[-1] if len(parts) > 1 else ""
    if re.fullmatch(r"[a-z]{3}", last) and last not in _NO_LANGUAGES:
        # Words of three letters are codes of some small language more often than not: age, all, art, bio.
        tag = _tag(last)
        return tag if tag in _codes() else None
    return None


def _is_code(part: str) -> bool:
    return part in _codes() and part not in _NO_LANGUAGES


def _tag(code: str) -> str | None:
    try:
        return language_tag(code, keep_scripts=True)
    except ValueError:
        return None


def _is_locale(language: str, region: str) -> bool:
    """Whether CLDR has the language as written in this region."""
    from babel import localedata

    likely = langcodes.Language.get(language).maximize().territory or ""
    return likely.lower() == region or localedata.exists(f"{language}_{region.upper()}")


@cache
def _codes() -> dict[str, str]:
    """English names of the languages that have a code of two letters, by code."""
    from babel import Locale

    return {code: name for code, name in Locale("en").languages.items() if len(code) == 2}


@cache
def _names() -> dict[str, str]:
    """The other way round; short names, such as Ido and Ga, are too often something else."""
    return {name.lower(): code for code, name in _codes().items() if len(name) >= 5 and name.isalpha()}
