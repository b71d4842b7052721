"""Preferences held out: which pairs are drawn, and what the policy's log-probabilities say of them."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from congrad_ray.config.benchmarks import Benchmark
from congrad_ray.config.languages import language_group
from congrad_ray.config.loss import LossSettings, over_means
from congrad_ray.config.printable import brief, without_keys
from congrad_ray.config.recipe import Source
from congrad_ray.data.preferences import Columns, preference_in, stored
from congrad_ray.data.reading import read_records
from congrad_ray.data.records import BadRow, InputError, clean_language, too_many_bad
from congrad_ray.data.tables import quarantined, row_id
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE, bootstrap_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """The pairs drawn, rows of PREFERENCES, and what became of the others."""

    pairs: list[Row]
    languages: dict[str, int]
    """Pairs that there are, each once, by language."""
    duplicates: int
    quarantine: list[Row]

    @property
    def drawn(self) -> dict[str, int]:
        """Pairs drawn by language."""
        return dict(sorted(Counter(row["language"] for row in self.pairs).items()))


@dataclass(frozen=True)
class PreferenceScore:
    """Pairs of a language, or of all seen or unseen ones ('*').

    `logp_accuracy`: share with log p(chosen) > log p(rejected). `margin`: mean of the implicit reward's,
    `accuracy`: share where it is above 0; None for the reference itself. Intervals of 95 %.
    """

    model: str
    language: str
    seen: bool
    pairs: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    logp_accuracy: float
    margin: float | None
    margin_low: float | None
    margin_high: float | None


def draw(settings: Benchmark, groups: Collection[str], failed_share: float) -> Drawn:
    """Reads `settings.preferences` as `congrad filter` reads preferences, and draws pairs of each language.

    Which are drawn depends on their texts and the seed alone, not on their order. A pair's language is the one of
    `groups` that it belongs to, or else its own. Memory grows by a hash of each pair. Raises InputError where the
    source cannot be read, has no usable pair, or more than `failed_share` of its rows cannot be used.
    """
    assert settings.preferences is not None
    columns = Columns()
    chosen: dict[str, list[tuple[int, int, Row]]] = defaultdict(list)  # heaps of the smallest hashes, negated
    languages: Counter[str] = Counter()
    seen: set[str] = set()
    bad: list[Row] = []
    number = duplicates = 0
    needed = [*columns.needed, columns.language]
    for number, record in enumerate(read_records(source_of(settings), needed, columns.read), 1):
        try:
            if record.problem:
                raise BadRow(*record.problem)
            tag = clean_language(record.values.get(columns.language), {}, keep_scripts=True)
            language = language_group(tag, groups)
            row = stored(preference_in(record, columns, language, settings.preferences_chat), number - 1)
        except BadRow as error:
            given = record.values.get(columns.language)
            bad.append(
                quarantined(record.place, given if isinstance(given, str) else None, error.reason, str(error))
            )
            continue
        if row["pair_id"] in seen:
            duplicates += 1
            continue
        seen.add(row["pair_id"])
        languages[language] += 1
        place = int(row_id("benchmark", settings.seed, row["pair_id"]), 16)
        heap = chosen[language]
        if len(heap) < settings.preferences_per_language:
            heapq.heappush(heap, (-place, number, row))
        else:
            heapq.heappushpop(heap, (-place, number, row))
    name = brief(without_keys(settings.preferences))
    why = ", ".join(f"{reason} {count}" for reason, count in Counter(row["reason"] for row in bad).items())
    if not seen:
        raise InputError(f"benchmark.preferences ({name}) has no usable pair: {why or 'no rows'}")
    if too_many_bad(len(bad), number, failed_share):
        raise InputError(
            f"benchmark.preferences ({name}): {len(bad):,} of {number:,} rows cannot be used, more than "
            f"limits.failed_share ({failed_share:g}) of them: {why}; the first is {bad[0]['row_id']}: "
            f"{bad[0]['detail']}. Fix the rows, or raise limits.failed_share"
        )
    pairs = [row for _, heap in sorted(chosen.items()) for _, _, row in sorted(heap, key=lambda item: item[1])]
    return Drawn(pairs, dict(sorted(languages.items())), duplicates, bad)


def source_of(settings: Benchmark) -> Source:
    """Where the preferences are read from."""
    assert settings.preferences is not None
    return Source(name=settings.preferences)


def margins(
    rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], loss: LossSettings
) -> list[float]:
    """Implicit rewards of chosen less those of rejected, rows of SCORED against the reference's of the same pairs.

    beta * [(logp_w - ref_w) - (logp_l - ref_l)] (Rafailov et al. 2023, arXiv 2305.18290); for losses over means
    each log-ratio is divided by its completion's tokens. Losses without a reference are measured against it too:
    this is about what training changed.
    """
    found = []
    for row, ref in zip(rows, reference, strict=True):
        chosen, rejected = (row[name] - ref[name] for name in ("chosen_logps", "rejected_logps"))
        if over_means(loss):
            chosen, rejected = chosen / row["chosen_tokens"], rejected / row["rejected_tokens"]
        found.append(loss.beta * (chosen - rejected))
    return found


def preference_scores(
    scored: Sequence[Mapping[str, Any]],
    reference: str,
    model: str,
    loss: LossSettings,
    seen: Collection[str],
    seed: int = 0,
) -> list[PreferenceScore]:
    """Both models' scores by language, from rows of SCORED; pairs that one of them could not do are left out.

    `seen`: the languages trained on. First all seen and all unseen languages together, pairs counting the same.
    """
    by_pair: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in scored:
        by_pair[row["pair_id"]][row["model"]] = row
    both = [found for _, found in sorted(by_pair.items()) if reference in found and model in found]
    groups: dict[tuple[bool, str], list[dict[str, Mapping[str, Any]]]] = defaultdict(list)
    for found in both:
        language = found[model]["language"]
        groups[language not in seen, EVERY_LANGUAGE].append(found)
        groups[language not in seen, language].append(found)
    order = sorted(groups, key=lambda key: (key[1] != EVERY_LANGUAGE, *key))
    return [
        _score(name, language, not unseen, groups[unseen, language], reference, loss, seed)
        for unseen, language in order
        for name in (reference, model)
    ]


def _score(
    name: str,
    language: str,
    seen: bool,
    pairs: Sequence[Mapping[str, Mapping[str, Any]]],
    reference: str,
    loss: LossSettings,
    seed: int,
) -> PreferenceScore:
    rows = [pair[name] for pair in pairs]
    right = fmean(row["chosen_logps"] > row["rejected_logps"] for row in rows)
    if name == reference:
        return PreferenceScore(name, language, seen, len(rows), None, None, None, right, None, None, None)
    found = margins(rows, [pair[reference] for pair in pairs], loss)
    above = [float(margin > 0) for margin in found]
    return PreferenceScore(
        name,
        language,
        seen,
        len(rows),
        fmean(above),
        *bootstrap_interval(above, seed),
        right,
        fmean(found),
        *bootstrap_interval(found, seed),
    )
