"""`congrad init` and `doctor`: a first recipe, and whether this machine has what is needed."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from congrad_ray.cli.options import FAILED, TOOLS, AsJson, examples, print_json
from congrad_ray.config.settings import SettingsError, why_not_read

logger = logging.getLogger(__name__)

app = typer.Typer()


@app.command(
    rich_help_panel=TOOLS,
    epilog=examples("congrad init my.yaml", "congrad init my.yaml --schema"),
)
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("recipe.yaml"),
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Also write FILE's JSON schema beside it, for editors that check YAML."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write a starter recipe that explains every setting. It runs as it is, on the built-in toy world."""
    from congrad_ray.config.recipe import Recipe
    from congrad_ray.config.starter import starter_recipe

    beside = file.with_suffix(".schema.json")
    texts = {file: starter_recipe(file.stem, beside.name if schema else None)}
    if schema:
        texts[beside] = json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
    there = [str(path) for path in texts if path.exists()]
    if there and not force:
        verb = "exists" if len(there) == 1 else "exist"
        raise SettingsError(f"{' and '.join(there)} {verb}: add --force to overwrite")
    for path, text in texts.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"cannot write {path}: {why_not_read(error)}") from error
        logger.info(f"written: {path}")
    logger.info(f"next: congrad plan {file}, then congrad run {file} --run runs/{file.stem}")


@app.command(
    rich_help_panel=TOOLS, epilog=examples("congrad doctor", "congrad doctor --run s3://bucket/runs --json")
)
def doctor(
    run: Annotated[str, typer.Option("--run", metavar="DIR", help="Where runs will be written.")] = ".",
    as_json: AsJson = False,
) -> None:
    """Check versions, devices and disk, and show how to fix what is missing. Exit code 1 if something is."""
    from congrad_ray.deploy.doctor import examine

    findings = examine(run)
    missing = any(finding.fix for finding in findings)
    if as_json:
        print_json({"ok": not missing, "findings": [asdict(finding) for finding in findings]})
    else:
        from congrad_ray.cli.display import show_findings

        show_findings(findings)
    if missing:
        raise typer.Exit(FAILED)
