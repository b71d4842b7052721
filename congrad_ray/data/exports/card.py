"""The README.md of an export: what was filtered, how, by which model, and how much of each language was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from congrad_ray.config.printable import printable, without_keys
from congrad_ray.config.recipe import Select


@dataclass(frozen=True)
class ExportFacts:
    """What a filter was, in plain values."""

    model: str
    sources: list[str]
    """Files, URIs or hub datasets that the pairs came from."""
    keep: str
    """The keep rule in words, such as `top 50 % of each language`."""
    direction: str
    pairs_by_language: dict[str, tuple[int, int]]
    """For each language's tag its scored pairs, and how many of them were kept."""
    max_length: int
    """Tokens of a prompt with one response, at most."""
    version: str
    """Of congrad_ray."""
    settings: dict[str, str] = field(default_factory=dict)
    """Any others, by name."""


def dataset_card(
    facts: ExportFacts,
    to: str,
    rows: int,
    dropped: int,
    not_written: Mapping[str, int],
    splits: Mapping[str, str],
) -> str:
    """The card's text: YAML that the hub and `load_dataset` read, and Markdown.

    `to`: the format; `rows` and `dropped`: rows written of kept and of dropped pairs; `not_written`: rows that the
    format's reader cannot take, by reason; `splits`: each split's files. Of paths on a disk only the last part is
    named, and nothing that may be a key.
    """
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        language=sorted({tag.partition("-")[0] for tag in facts.pairs_by_language}),
        tags=["preference", "dpo", "congrad"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": path} for split, path in splits.items()],
            }
        ],
    )
    pairs = sum(count for count, _ in facts.pairs_by_language.values())
    kept = sum(count for _, count in facts.pairs_by_language.values())
    settings = {
        "keep": facts.keep,
        "direction": facts.direction,
        "max_length": f"{facts.max_length} tokens",
        **facts.settings,
    }
    sources = ", ".join(map(plain_name, facts.sources))
    lines = [
        "# Preference pairs that agree across languages",
        "",
        f"{kept:,} of {pairs:,} preference pairs from {sources}, kept by ConGrad with the gradients of "
        f"{plain_name(facts.model)}.",
        "",
        "ConGrad ([arXiv 2503.23777](https://arxiv.org/abs/2503.23777)) takes the gradient of every pair, "
        "combines the languages' gradients into one direction that hurts none of them, and keeps the pairs that "
        "agree with it. `congrad_score` is the cosine of a pair's gradient with that direction.",
        "",
        "The texts are those of the source, and so is their licence.",
        "",
        "| language | pairs | kept |",
        "|---|--:|--:|",
        *(f"| {plain_cell(tag)} | {n:,} | {m:,} |" for tag, (n, m) in sorted(facts.pairs_by_language.items())),
        f"| all | {pairs:,} | {kept:,} |",
        "",
        f"The rows are in the format `{to}`: {rows:,} kept"
        + (f" and {dropped:,} dropped ones" if dropped else "")
        + ".",
    ]
    if not_written:
        why = ", ".join(f"{plain_cell(reason)} {count:,}" for reason, count in sorted(not_written.items()))
        lines.append(f"That format cannot hold {sum(not_written.values()):,} pairs, which are left out: {why}.")
    lines += [
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {plain_cell(name)} | {plain_cell(value)} |" for name, value in settings.items()),
        f"| congrad_ray | {plain_cell(facts.version)} |",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def keep_rule(select: Select) -> str:
    """The keep rule in words."""
    rules = {
        "per_language": f"top {select.keep:.0%} of each language",
        "overall": f"top {select.keep:.0%} of all",
        "threshold": f"scores above {select.threshold:g}",
        "token_budget": f"the best in {select.token_budget} tokens",
    }
    return rules[select.keep_rule]


def plain_name(name: str) -> str:
    """A source or model as the world may know it: what is on a disk by the last part of its path."""
    path = Path(name).expanduser()
    if "://" in name:
        name = without_keys(name)
    elif (
        path.is_absolute()
        or name.startswith(".")
        or path.suffix in (".jsonl", ".json", ".parquet")
        or path.exists()
    ):
        name = path.resolve().name
    return f"`{plain_cell(name).replace('`', chr(39))}`"


def plain_cell(text: str) -> str:
    """A text as it may stand in a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")
