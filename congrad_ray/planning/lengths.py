"""Lengths that the finished stages of a run have measured, in place of assumed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import pyarrow as pa

from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Estimate
from congrad_ray.planning.storage import measured_row_bytes
from congrad_ray.planning.volume import Lengths, assumed_lengths
from congrad_ray.rundir.directory import Manifest, RunDirectory


class Measured(Protocol):
    """What is asked of a stage about its finished results."""

    @property
    def name(self) -> str:
        """As the plan calls it."""
        ...

    @property
    def folder(self) -> str:
        """Where its result lies in an iteration."""
        ...

    @property
    def schema(self) -> Callable[[Recipe], pa.Schema] | None:
        """Of its table; None: it has none."""
        ...

    @property
    def estimate(self) -> Estimate | None:
        """With the function that reads its manifest."""
        ...


def known_lengths(
    iterated: Sequence[Measured], recipe: Recipe, assumptions: Assumptions, run: RunDirectory | None
) -> Lengths:
    """Lengths, from the newest iteration of a run that has generated, and assumed where it does not know.

    `iterated`: the stages of an iteration in order.
    """
    lengths = assumed_lengths(recipe, assumptions)
    if run is None:
        return lengths
    for iteration in reversed(range(recipe.iterations)):
        found = {
            stage.folder: manifest
            for stage in iterated
            if (manifest := run.stage(stage.folder, iteration).manifest())
        }
        if iterated[0].folder in found:
            return with_measured(lengths, iterated, recipe, _of_one_making(found, iteration))
    return lengths


def with_measured(
    lengths: Lengths, stages: Iterable[Measured], recipe: Recipe, manifests: Mapping[str, Manifest]
) -> Lengths:
    """The lengths with what finished stages know of them; `manifests` are by folder.

    What a later stage has measured is nearer to what the stages after it see.
    """
    known: dict[str, float] = {}
    names: list[str] = []
    row_bytes: dict[str, float] = {}
    for stage in stages:
        manifest = manifests.get(stage.folder)
        if manifest is None:
            continue
        if stage.estimate and (found := stage.estimate.measured(recipe, manifest, manifests)):
            known |= found
            names.append(stage.name)
        size = measured_row_bytes(stage.schema(recipe), manifest) if stage.schema else None
        if size is not None:
            row_bytes[stage.name] = size
    return replace(lengths, **known, measured=tuple(names), row_bytes=row_bytes)


def _of_one_making(manifests: Mapping[str, Manifest], iteration: int) -> dict[str, Manifest]:
    """Without stages whose input is not the result that is there now; `manifests` are in the stages' order."""
    kept: dict[str, Manifest] = {}
    for folder, manifest in manifests.items():
        used = {name.removeprefix(f"iteration-{iteration}/"): print_ for name, print_ in manifest.inputs.items()}
        before = used.keys() & manifests.keys()
        if all(name in kept and kept[name].fingerprint == used[name] for name in before):
            kept[folder] = manifest
    return kept
