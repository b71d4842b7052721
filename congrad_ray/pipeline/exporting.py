"""`congrad filter --to`: what a filter kept, as other trainers read it."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from congrad_ray.config.names import ExportFormat
from congrad_ray.config.printable import without_keys
from congrad_ray.data.exports.card import ExportFacts, keep_rule
from congrad_ray.data.exports.push import push
from congrad_ray.data.exports.write import Exported, Rows, write_export
from congrad_ray.pipeline.filtering import Filtered, FilterSettings
from congrad_ray.pipeline.outcomes import every_row, exported_rows
from congrad_ray.pipeline.preferences import Reading
from congrad_ray.rundir.directory import RunDirectory


@dataclass(frozen=True)
class Export:
    """What to write of a filter beside its own files, and where to."""

    to: Sequence[ExportFormat] = ()
    all_rows: bool = False
    """Whether the dropped rows are written, too."""
    push: str | None = None
    """The name of a dataset on the Hugging Face hub; of one format."""
    public: bool = False


def export_filtered(
    export: Export, reading: Reading, out: str | Path, settings: FilterSettings, filtered: Filtered
) -> dict[ExportFormat, tuple[Exported, str | None]]:
    """Writes what `run_filter` left in `out` to OUT/export/FORMAT for every format.

    Returns what was written of each, and the address on the hub where it was pushed. Raises ExportError where a
    format cannot hold the rows, PushError, InputError.
    """
    target = RunDirectory.open(out, "--out")
    work = RunDirectory(target.filesystem, f"{target.path}/work")
    if export.all_rows:
        added = every_row(work)
        numbers = np.arange(filtered.rows)
    else:
        numbers = np.array(filtered.kept, dtype=np.int64)
        added = {"congrad_score": pa.array(filtered.scores, pa.float64())}
    rows = Rows(lambda: exported_rows(work), reading.sources, numbers, added)
    facts = _facts(reading, settings, filtered)
    found: dict[ExportFormat, tuple[Exported, str | None]] = {}
    for to in export.to:
        folder = target / "export" / to
        place = f"{without_keys(out).rstrip('/')}/export/{to}"
        with tempfile.TemporaryDirectory(prefix="congrad-export-") as temporary:
            local = Path(folder.path) if target.is_local else Path(temporary) / to
            exported = write_export(rows, to, local, facts, all_rows=export.all_rows, place=place)
            if not target.is_local:
                folder.delete()
                here = pafs.LocalFileSystem()
                folder.filesystem.create_dir(folder.path, recursive=True)
                pafs.copy_files(
                    str(local), folder.path, source_filesystem=here, destination_filesystem=folder.filesystem
                )
            found[to] = exported, push(local, export.push, export.public) if export.push else None
    return found


def _facts(reading: Reading, settings: FilterSettings, filtered: Filtered) -> ExportFacts:
    of_language = filtered.summary["per_language"]
    train = settings.train
    return ExportFacts(
        model=settings.model.name,
        sources=[source.name for source in reading.sources],
        keep=keep_rule(settings.select),
        direction=settings.select.direction,
        pairs_by_language={tag: (numbers["pairs"], numbers["kept"]) for tag, numbers in of_language.items()},
        max_length=settings.model.max_length,
        version=importlib.metadata.version("congrad_ray"),
        settings={
            "strategy": settings.select.strategy,
            "score": settings.select.score,
            "sketch": f"{settings.sketch.method}, width {settings.sketch.width}",
            "beta": f"{train.beta:g}",
            "length_penalty": f"{train.length_penalty:g}",
            **({} if train.loss_type == "sigmoid" else {"loss_type": train.loss_type}),
        },
    )
