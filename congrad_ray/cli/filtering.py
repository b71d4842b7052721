"""`congrad filter`: preferences that are there in, the pairs that agree across languages out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
import yaml

from congrad_ray.cli.options import TOOLS, ProfileName, Redo, examples, profile_for, screen
from congrad_ray.config import recipe as recipes
from congrad_ray.config.names import ExportFormat
from congrad_ray.config.printable import brief, without_keys
from congrad_ray.config.settings import SettingsError, apply_overrides, parse_yaml, validate

if TYPE_CHECKING:
    from congrad_ray.data.exports.write import Exported
    from congrad_ray.pipeline.exporting import Export

logger = logging.getLogger(__name__)

app = typer.Typer()


@app.command(
    "filter",
    rich_help_panel=TOOLS,
    epilog=examples(
        "congrad filter pairs.jsonl --model my-model --out filtered",
        "congrad filter pairs.parquet --model google/gemma-2-2b-it --out filtered --keep 0.3 --chat",
        "congrad filter 's3://bucket/*.jsonl.gz' --columns prompt=instruction --model my-model --out filtered",
    ),
)
def filter_command(
    preferences: Annotated[
        list[str],
        typer.Argument(
            metavar="PREFERENCES...",
            help="Files (JSON Lines, JSON, CSV, Parquet, Arrow; .gz, .zst), folders, patterns, s3:// and gs://, "
            "or a hub dataset.",
        ),
    ],
    model: Annotated[str, typer.Option(help="The model to be trained: a folder or hub name.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where selected.parquet and the rest go.")],
    keep: Annotated[float, typer.Option(help="Top fraction kept per language.")] = 0.5,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="a=b", help="How to select: direction=mean, score=dot, leave_out=language, ..."),
    ] = None,
    beta: Annotated[float, typer.Option(help="The loss's beta in the training to come.")] = 0.1,
    length_penalty: Annotated[float, typer.Option(help="Alpha of R-DPO, per token.")] = 0.0,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="a=b", help="Another loss than DPO's: loss_type=simpo, simpo_gamma=1, sft_weight=0.1, ..."
        ),
    ] = None,
    width: Annotated[int, typer.Option(help="Numbers per sketch.")] = recipes.Sketch().width,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact gradients: two passes, memory for a gradient per language.")
    ] = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt with one response.")] = 2048,
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Padded tokens of a micro-batch.", show_default="8192, on a CPU 4096")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="The model's dtype.")] = "float32",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="a=b,...",
            help="Columns of other names: prompt=instruction,language=lang; a dot leads into structs. "
            "responses=R,ratings=S: the best and the worst rated of several responses.",
        ),
    ] = None,
    language_names: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TAG,...", help="The data's own names of languages: Hinglish=hi."),
    ] = None,
    keep_scripts: Annotated[
        bool, typer.Option("--keep-scripts", help="zh-Hant and zh, sr-Latn and sr are languages of their own.")
    ] = False,
    identify_languages: Annotated[
        bool, typer.Option("--identify-languages", help="Identify the language of rows that have none.")
    ] = False,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset, or of a saved DatasetDict.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Commit or branch of a hub dataset.")] = None,
    failed_share: Annotated[
        float, typer.Option(help="Share of the rows that may go to quarantine; more stop the filter.")
    ] = recipes.Limits().failed_share,
    all_rows: Annotated[
        bool,
        typer.Option("--all-rows", help="Also write every row, and what became of it: rows.parquet, and in --to."),
    ] = False,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help=f"Also write what is kept for {', '.join(get_args(ExportFormat))}; repeat for more.",
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option("--push", metavar="USER/DATASET", help="Upload what --to wrote to the hub, private."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for all to see.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Take strings as chat messages.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or the name of one of the model's.")
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="What else the template is given: '{\"enable_thinking\": false}'."),
    ] = None,
    profile: ProfileName = "local",
    redo: Redo = False,
) -> None:
    """Filter a preference dataset: the pairs whose gradients agree across languages.

    PREFERENCES has prompt, chosen and rejected (strings or chat messages, as in TRL) and language. The texts are
    taken byte for byte; the prompt may be in the responses alone. Every row is kept, dropped or quarantined.
    """
    from congrad_ray.data.preferences import Columns
    from congrad_ray.pipeline.exporting import Export, export_filtered
    from congrad_ray.pipeline.filtering import FilterSettings, run_filter
    from congrad_ray.pipeline.preferences import Reading

    where = profile_for(profile, without_keys(out))
    export = Export(_formats(to or []), all_rows, push_to, public)
    _check_export(export)
    settings = FilterSettings(
        model=validate(
            recipes.Model,
            {
                "name": model,
                "dtype": dtype,
                "chat_template": chat_template,
                "max_length": max_length,
                "chat_template_kwargs": _mapping(chat_template_kwargs),
            },
            "--model",
        ),
        select=validate(recipes.Select, apply_overrides({"keep": keep}, select or []), "--keep, --select"),
        train=validate(
            recipes.Train,
            apply_overrides({"beta": beta, "length_penalty": length_penalty}, loss or []),
            "--beta, --length-penalty, --loss",
        ),
        sketch=validate(
            recipes.Sketch,
            {
                "method": "exact" if exact else "count_sketch",
                "width": width,
                "max_tokens_per_batch": max_tokens_per_batch,
            },
            "--width, --max-tokens-per-batch",
        ),
        limits=validate(recipes.Limits, {"failed_share": failed_share}, "--failed-share"),
    )
    of_source = {"config": config, "split": split, "revision": revision}
    reading = Reading(
        sources=[validate(recipes.Source, {"name": name, **of_source}, "PREFERENCES") for name in preferences],
        columns=Columns.of(_named(columns, "--columns")),
        chat=chat,
        language_names=validate(
            recipes.Source, {"language_names": _named(language_names, "--language-names")}, "--language-names"
        ).language_names,
        keep_scripts=keep_scripts,
        identify_languages=identify_languages,
    )
    filtered = run_filter(reading, out, settings, where, redo, all_rows=all_rows)
    if where.log_format == "text" and not screen.quiet:
        from congrad_ray.cli.display import show_figures
        from congrad_ray.stages.select.figures import selection

        for figures in selection(filtered.summary):
            show_figures(figures)
    place = without_keys(out).rstrip("/")
    logger.info(f"kept pairs: {place}/selected.parquet")
    for name, (exported, address) in export_filtered(export, reading, out, settings, filtered).items():
        _show_export(name, exported, f"{place}/export/{name}", address)


def _formats(names: list[str]) -> list[ExportFormat]:
    """Raises SettingsError for a format that there is not."""
    known: dict[str, ExportFormat] = {name: name for name in get_args(ExportFormat)}
    for name in names:
        if name not in known:
            raise SettingsError(f"--to {brief(name)}: there is no such format; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _check_export(export: Export) -> None:
    """Raises SettingsError or PushError for what could not be done in the end."""
    from congrad_ray.data.exports.push import check_push

    if export.push is None:
        if export.public:
            raise SettingsError("--public is of --push USER/DATASET: give both, or neither")
        return
    if len(export.to) != 1:
        raise SettingsError(f"--push uploads what one --to wrote, and there are {len(export.to)}: give one --to")
    check_push(export.push)


def _show_export(to: str, exported: Exported, place: str, address: str | None) -> None:
    """What was written and left out, on the log; what to tell the trainer, on the screen."""
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in sorted(exported.not_written.items()))
    dropped = f" and {exported.dropped:,} dropped" if exported.dropped else ""
    logger.info(
        f"--to {to}: {exported.rows:,} kept{dropped} rows in {place}"
        + (f"; {sum(exported.not_written.values()):,} that it cannot read: {left_out}" if left_out else "")
    )
    if address:
        logger.info(f"pushed to {address}")
    if not screen.quiet:
        typer.echo(exported.snippet)


def _named(given: list[str] | None, option: str) -> dict[str, str]:
    """`a=b,c=d`, given once or more often. Raises SettingsError."""
    found: dict[str, str] = {}
    for pair in (pair for text in given or [] for pair in text.split(",") if pair.strip()):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name or not value:
            raise SettingsError(f"{option} {brief(pair)}: give it as name=value, several with commas between")
        if name in found:
            raise SettingsError(f"{option}: {brief(name)} is there twice")
        found[name] = value
    return found


def _mapping(text: str | None) -> dict[str, Any]:
    """Raises SettingsError for what is no mapping in JSON or YAML."""
    if text is None:
        return {}
    try:
        found = parse_yaml(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise SettingsError(
            f"--chat-template-kwargs {brief(text)} is no mapping; give JSON, as in "
            "'{\"enable_thinking\": false}'"
        )
    return found
