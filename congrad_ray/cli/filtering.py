"""`congrad filter`: preferences that are there in, the pairs that agree across languages out."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import typer

from congrad_ray.cli.options import TOOLS, ProfileName, Redo, examples, profile_for, screen
from congrad_ray.config import recipe as recipes
from congrad_ray.config.settings import apply_overrides, validate
from congrad_ray.rundir.directory import without_keys

logger = logging.getLogger(__name__)

app = typer.Typer()


@app.command(
    "filter",
    rich_help_panel=TOOLS,
    epilog=examples(
        "congrad filter pairs.jsonl --model my-model --out filtered",
        "congrad filter pairs.parquet --model google/gemma-2-2b-it --out filtered --keep 0.3 --chat",
    ),
)
def filter_command(
    preferences: Annotated[str, typer.Argument(metavar="PREFERENCES", help="JSONL, Parquet, or a hub dataset.")],
    model: Annotated[str, typer.Option(help="The model to be trained: a folder or hub name.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where selected.parquet and the rest go.")],
    keep: Annotated[float, typer.Option(help="Top fraction kept per language.")] = 0.5,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="a=b", help="How to select: direction=mean, score=dot, leave_out=language, ..."),
    ] = None,
    beta: Annotated[float, typer.Option(help="DPO's beta of the training to come.")] = 0.1,
    length_penalty: Annotated[float, typer.Option(help="Alpha of R-DPO, per token.")] = 0.0,
    width: Annotated[int, typer.Option(help="Numbers per sketch.")] = recipes.Sketch().width,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact gradients: two passes, memory for a gradient per language.")
    ] = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt with one response.")] = 2048,
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Padded tokens of a micro-batch.", show_default="8192, on a CPU 4096")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="The model's dtype.")] = "float32",
    chat: Annotated[bool, typer.Option("--chat", help="Take strings as chat messages.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or the name of one of the model's.")
    ] = None,
    profile: ProfileName = "local",
    redo: Redo = False,
) -> None:
    """Filter a preference dataset: the pairs whose gradients agree across languages.

    PREFERENCES has prompt, chosen and rejected (strings or chat messages, as in TRL) and language.
    """
    from congrad_ray.pipeline.filtering import FilterSettings, run_filter

    where = profile_for(profile, without_keys(out))
    settings = FilterSettings(
        model=validate(
            recipes.Model,
            {"name": model, "dtype": dtype, "chat_template": chat_template, "max_length": max_length},
            "--model",
        ),
        select=validate(recipes.Select, apply_overrides({"keep": keep}, select or []), "--keep, --select"),
        train=validate(
            recipes.Train, {"beta": beta, "length_penalty": length_penalty}, "--beta, --length-penalty"
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
        chat=chat,
    )
    filtered = run_filter(preferences, out, settings, where, redo)
    if where.log_format == "text" and not screen.quiet:
        from congrad_ray.cli.display import show_figures
        from congrad_ray.stages.select.figures import selection

        for figures in selection(filtered.summary):
            show_figures(figures)
    logger.info(f"kept pairs: {without_keys(out).rstrip('/')}/selected.parquet")
