"""The small parts of a stage's table are merged on Ray, when the stage is about to be committed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from congrad_ray.rundir.directory import Folder
from congrad_ray.rundir.merging import Merge, merge, planned_merges

logger = logging.getLogger(__name__)


def merge_parts(folder: Folder, progressed: Callable[[], None] = lambda: None) -> None:
    """Merges the parts of a folder where they are many and small, as Ray Data tasks; see `rundir.merging`.

    Each of the table's rows is to be there once, as `rows.outcome_of` leaves them.
    """
    merges = planned_merges(folder)
    if not merges:
        return
    import ray

    logger.info(f"merging {sum(len(each.sources) for each in merges):,} parts into {len(merges):,}")

    def work(batch: dict[str, Any]) -> pa.Table:
        for sources, target in zip(batch["sources"], batch["target"], strict=True):
            merge(folder, Merge([str(name) for name in sources], str(target)))
        return pa.table({"merged": batch["target"]})

    items = [{"sources": each.sources, "target": each.target} for each in merges]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for _ in dataset.map_batches(work, batch_format="numpy", batch_size=None).iter_rows():
        progressed()
