"""The whole filter and the whole loop as functions, for notebooks and scripts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from congrad_ray.config.printable import without_keys
from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import Limits, Model, Recipe, Select, Sketch, Source, load_recipe
from congrad_ray.config.settings import SettingsError, SettingsType, apply_overrides, validate
from congrad_ray.config.training import Train
from congrad_ray.data.preferences import Columns
from congrad_ray.data.reading import check_columns
from congrad_ray.data.records import InputError
from congrad_ray.pipeline.filtering import FilterSettings, run_filter
from congrad_ray.pipeline.loop import run_all
from congrad_ray.pipeline.order import STAGES
from congrad_ray.pipeline.preferences import Reading
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.runtime.logs import configure_unless_handled

_GIVEN = "a datasets.Dataset"


def filter_preferences(
    dataset: datasets.Dataset | str | os.PathLike[str],
    model: str | os.PathLike[str] | Model,
    *,
    keep: float | None = None,
    out: str | os.PathLike[str] | None = None,
    select: Select | Mapping[str, Any] | None = None,
    sketch: Sketch | Mapping[str, Any] | None = None,
    beta: float = 0.1,
    length_penalty: float = 0.0,
    loss: Mapping[str, Any] | None = None,
    chat: bool = False,
    columns: Mapping[str, str] | None = None,
    language_names: Mapping[str, str] | None = None,
    keep_scripts: bool = False,
    identify_languages: bool = False,
    failed_share: float | None = None,
    profile: str | os.PathLike[str] | Profile = "local",
    redo: bool = False,
) -> datasets.Dataset:
    """Keeps the preference pairs whose gradients agree across languages.

    Args:
        dataset: preference pairs with the columns prompt, chosen and rejected (strings or chat messages, as in
            TRL) and language. A Dataset, or what `congrad filter` reads: a file, a folder, a pattern, a URI, or a
            dataset's name on the hub.
        model: the model to be trained: a folder or hub name, loaded in float32; or a `Model` with more settings,
            such as `Model(name="my/model", dtype="bfloat16", max_length=4096)`.
        keep: the top fraction kept of each language; by default that of `select`, 0.5.
        out: a folder or URI for selected.parquet, scores.parquet and summary.json. An interrupted call with the
            same arguments is resumed from it, and a finished one is not repeated. By default the work goes to a
            temporary folder (see TMPDIR), which is removed at the end.
        select: how pairs are selected: the recipe's section `select`, as `{"direction": "mean"}` or a `Select`.
        sketch: how gradients are sketched: the recipe's section `sketch`.
        beta: the loss's beta in the training to come.
        length_penalty: R-DPO's alpha of the training to come, per token.
        loss: another loss than DPO's, by the settings of the recipe's section `train`, as in
            `{"loss_type": "simpo", "simpo_gamma": 1.0}`.
        chat: takes strings as chat messages.
        columns: columns of other names, as in `{"prompt": "instruction"}`; see `congrad filter --help`.
        language_names: the data's own names of languages and their tags, as in `{"Hinglish": "hi"}`.
        keep_scripts: zh-Hant and zh, sr-Latn and sr are languages of their own.
        identify_languages: rows without a language get the one that is identified in their texts.
        failed_share: the share of rows that may be unusable, by default 0.2; more raise an error.
        profile: where to compute: a profile's name, YAML file, or `Profile`.
        redo: replaces what is in `out` and was made from other rows or with other settings.

    Returns the kept rows in their order: all columns of the input, and congrad_score. Of a Dataset, its own rows,
    so its features are kept; a column congrad_score is replaced.

    Ray is started as the profile says; a Ray that is connected already is used as it is. It stays up, so that a
    second call is fast; `ray.shutdown()`, or the end of the process, ends it. Progress is printed, unless the
    program has handlers of its own for log records.

    Raises TypeError for anything but one split of a dataset, and ValueError with a text that says what to do for
    everything that is wrong with the rows, the model or the settings, before Ray starts.
    """
    where = profile if isinstance(profile, Profile) else load_profile(str(profile))
    if out is None and (where.ray_address or where.cluster):
        raise SettingsError(
            f"profile {where.name} is of a cluster, whose nodes do not share a temporary folder: give out"
        )
    named = (
        model if isinstance(model, Model) else validate(Model, {"name": str(model), "dtype": "float32"}, "model")
    )
    settings = FilterSettings(
        model=named,
        select=_section(Select, select, {} if keep is None else {"keep": keep}, "select"),
        sketch=_section(Sketch, sketch, {}, "sketch"),
        train=validate(
            Train, {"beta": beta, "length_penalty": length_penalty, **(loss or {})}, "beta, length_penalty, loss"
        ),
        limits=validate(Limits, {} if failed_share is None else {"failed_share": failed_share}, "failed_share"),
    )
    named_columns = Columns.of(columns or {})

    def reading(name: str) -> Reading:
        names = {"name": name, "language_names": dict(language_names or {})}
        source = validate(Source, names, "dataset")
        return Reading([source], named_columns, chat, source.language_names, keep_scripts, identify_languages)

    with tempfile.TemporaryDirectory(prefix="congrad-filter-") as folder:
        place = f"{folder}/out" if out is None else str(out)
        configure_unless_handled(where.log_format, without_keys(place))
        if not isinstance(dataset, datasets.Dataset):
            if not isinstance(dataset, str | os.PathLike):
                raise TypeError(
                    f"dataset is a {type(dataset).__name__}; give a datasets.Dataset, a file or a name"
                )
            run_filter(reading(str(dataset)), place, settings, where, redo)
            table = RunDirectory.open(place, "out").read_table(name="selected.parquet")
            return datasets.Dataset(table)
        if not len(dataset):
            raise InputError("the dataset is empty")
        check_columns(dataset.column_names, "the dataset", reading("").needed)
        path = f"{folder}/dataset.parquet"
        dataset.to_parquet(path)
        found = run_filter(reading(path), place, settings, where, redo, called=_GIVEN)
        kept = dataset.select(found.kept)
        if "congrad_score" in kept.column_names:
            kept = kept.remove_columns("congrad_score")
        return kept.add_column("congrad_score", found.scores, feature=datasets.Value("float64"))


def run(
    recipe: str | os.PathLike[str] | Recipe,
    run: str | os.PathLike[str],
    *,
    profile: str | os.PathLike[str] | Profile = "local",
    until: str | None = None,
    redo: bool = False,
    set: Sequence[str] = (),
) -> RunDirectory:
    """Runs all stages of a recipe in order, as `congrad run` does; stages that are done are skipped.

    Args:
        recipe: a recipe's YAML file, or a `Recipe`.
        run: the run directory: a path or a URI (s3://, gs://).
        profile: where to compute: a profile's name, YAML file, or `Profile`.
        until: the last stage to run.
        redo: replaces the results of stages that were made with other settings or inputs.
        set: settings that override the recipe's, as `["select.direction=mean"]`.

    Returns the run directory: `.stage("selection", 0).read_table(name="selected.parquet")` has what was kept.

    Ray and progress are treated as by `filter_preferences`. Raises ValueError with a text that says what to do.
    """
    where = profile if isinstance(profile, Profile) else load_profile(str(profile))
    if until is not None and until not in STAGES:
        raise RunDirectoryError(f"until={until!r}: no such stage; stages are {', '.join(STAGES)}")
    if not isinstance(recipe, Recipe):
        loaded = load_recipe(str(recipe), set)
    else:
        loaded = (
            validate(Recipe, apply_overrides(recipe.model_dump(mode="json"), set), "recipe") if set else recipe
        )
    directory = RunDirectory.open(where.run_uri(str(run)))
    configure_unless_handled(where.log_format, directory.path)
    run_all(loaded, where, directory, until, redo)
    return directory


def _section(
    kind: type[SettingsType],
    given: SettingsType | Mapping[str, Any] | None,
    more: Mapping[str, Any],
    name: str,
) -> SettingsType:
    values = given.model_dump() if isinstance(given, kind) else dict(given or {})
    return validate(kind, {**values, **more}, name)
