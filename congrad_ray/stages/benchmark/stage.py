"""benchmark: what training changed elsewhere, on tasks of lm-evaluation-harness and on preferences held out.

Both are done for M_{t+1}, and in iteration 0 for M_0, whose results serve all later iterations.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.benchmarks import Benchmark
from congrad_ray.config.loss import loss_settings
from congrad_ray.config.printable import brief
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsError
from congrad_ray.data.files import source_digest
from congrad_ray.data.preferences import PREFERENCES
from congrad_ray.data.tables import MESSAGES, table_of
from congrad_ray.modeling.source import ModelSource, policy
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.rundir.directory import Folder, StageFolder
from congrad_ray.runtime.attempts import attempts
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.engines import engine_failures
from congrad_ray.runtime.notices import Notify, heard
from congrad_ray.runtime.pools import engine_spec
from congrad_ray.runtime.progress import Progress
from congrad_ray.runtime.resources import Demand, pool_demand, pool_sizes
from congrad_ray.runtime.rows import PartWriter, follow, outcome_of, pool_arguments, read_missing_batches
from congrad_ray.stages.base import Stage
from congrad_ray.stages.benchmark.estimate import ESTIMATE, held_out_pairs
from congrad_ray.stages.benchmark.figures import figures
from congrad_ray.stages.benchmark.harness import BenchmarkError, Harness, Subtask, check_names, look_at
from congrad_ray.stages.benchmark.intervals import left_out, task_changes, task_values
from congrad_ray.stages.benchmark.preferences import draw, preference_scores, source_of
from congrad_ray.stages.benchmark.schema import RESULTS, SAMPLES, SCORED
from congrad_ray.stages.benchmark.scorer import Scorer, ScorerSpec

logger = logging.getLogger(__name__)

Row = dict[str, Any]

BASELINE = "M_0"
_RESTARTS = 3  # of engines that end at the same subtask, before the stage does; what is done is kept
_PAIRS_PER_PART, _PART_BYTES = 64, 2**20
# Log-probabilities of a prompt's tokens are float32 logits over the whole vocabulary, several copies of them,
# beside the memory that vLLM has reckoned with: few tokens at a time. Only a GPU computes a prompt in pieces.
_BATCHED_TOKENS = 2048
_ENDED_ENGINE = ("EngineDeadError", "EngineGenerateError")


def run(context: Context) -> Outcome:
    """Writes SAMPLES, `results/`, `preferences/` and `summary.json`.

    Raises SettingsError for a recipe without tasks and preferences, BenchmarkError for tasks that cannot be had
    and InputError for preferences that cannot be read, all before an engine starts.
    """
    recipe = context.recipe
    settings, model = recipe.benchmark, f"M_{context.iteration + 1}"
    if not settings.wanted:
        raise SettingsError("there is nothing to do: set benchmark.tasks or benchmark.preferences in the recipe")
    models = [model] if context.iteration else [BASELINE, model]
    sources = {name: policy(recipe, context.run, int(name.removeprefix("M_"))) for name in models}
    for source in sources.values():
        tokenizer = source.load_tokenizer()
        if settings.apply_chat_template:
            chat_prompt_ids(tokenizer, [{"role": "user", "content": "?"}])
    warnings: list[str] = []
    expected = 0
    subtasks = _look(settings, context.profile) if settings.tasks else []
    pairs = _draw(context, warnings) if settings.preferences else None
    for name, source in sources.items():
        expected += _run_tasks(context, source, name, subtasks)
    if pairs is not None:
        for name, source in sources.items():
            _score(context, source, name, pairs)
    return _summarise(context, model, warnings, expected)


def _look(settings: Benchmark, profile: Profile) -> list[Subtask]:
    """The subtasks with their documents, as a worker finds them: an engine would start in vain without."""
    import ray

    check_names(settings)
    look = ray.remote(look_at).options(num_cpus=profile.data_cpus, runtime_env=_environment(settings, {}))
    try:
        found: list[Subtask] = ray.get(look.remote(settings))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BenchmarkError):
            raise BenchmarkError(str(error.cause)) from None
        raise
    languages = {subtask.language for subtask in found if subtask.language}
    documents = sum(subtask.documents for subtask in found)
    logger.info(f"{len(found)} tasks in {len(languages)} languages, {documents:,} documents")
    if unknown := [subtask.name for subtask in found if subtask.language is None]:
        logger.info(
            f"{len(unknown)} tasks have no language in their names, such as {unknown[0]}; benchmark.languages "
            "gives them one"
        )
    return found


def _environment(settings: Benchmark, variables: Mapping[str, str]) -> dict[str, Any]:
    """The environment of a worker that loads datasets."""
    offline = {} if settings.download else {"HF_DATASETS_OFFLINE": "1"}
    return {"env_vars": {**variables, **offline}}


@dataclass(frozen=True)
class _Write:
    """Writes what came of a subtask, its row of results last: where that is there, the subtask is done."""

    output: StageFolder

    def __call__(self, samples: list[Row], results: list[Row]) -> None:
        for folder, rows, schema in ((self.output, samples, SAMPLES), (self.output / "results", results, RESULTS)):
            key = hashlib.sha256(f"{rows[0]['model']} {rows[0]['subtask']}".encode()).hexdigest()[:32]
            folder.write_table(f"part-{key}.parquet", table_of(rows, schema))


class _Worker:
    """An actor with an engine that runs subtasks and writes what comes of them."""

    def __init__(
        self,
        source: ModelSource,
        model: str,
        settings: Benchmark,
        engine: dict[str, Any],
        batch_size: int,
        write: _Write,
        notify: Notify,
    ) -> None:
        notify.forward_warnings()
        notify(f"starting vLLM for {source.name}")
        self._harness = Harness(source, model, settings, engine, batch_size, notify.computed)
        notify("vLLM is ready")
        self._write, self._notify = write, notify

    def evaluate(self, subtask: Subtask) -> int:
        """Returns the documents done."""
        try:
            found = self._harness.evaluate(subtask)
        except Exception as error:
            if type(error).__name__ in _ENDED_ENGINE:
                # The engine is another process: this one ends too, and both are started again.
                logging.getLogger(__name__).error("the engine ended: %s", error)
                os._exit(1)
            raise
        self._notify.computed(0, last=True)
        self._write(found.samples, found.results)
        return subtask.documents


def _run_tasks(context: Context, source: ModelSource, model: str, subtasks: list[Subtask]) -> int:
    """Runs the subtasks that a model has not done yet; returns the rows of SAMPLES that it has in all."""
    import ray

    output, profile, settings = context.output, context.profile, context.recipe.benchmark
    done = _done(output)
    missing = [subtask for subtask in subtasks if (model, subtask.name) not in done]
    if missing:
        logger.info(f"{len(missing)} of {len(subtasks)} tasks by {model}")
        engines = profile.engines
        _, most = pool_sizes(engines, profile, len(missing))
        have = ray.cluster_resources()
        fitting = [int((have.get("CPU", 0) - profile.data_cpus) // engines.cpus)]
        if engines.gpus:
            fitting.append(int(have.get("GPU", 0) // engines.gpus))
        count = max(1, min(most, *fitting))
        arguments, variables = harness_engine(source, profile)
        worker: Any = ray.remote(_Worker).options(
            num_cpus=engines.cpus,
            num_gpus=engines.gpus or None,
            memory=engines.memory_bytes,
            resources=engines.resources or None,
            runtime_env=_environment(settings, variables),
        )
        batch = 4 * engines.max_num_seqs if engines.gpus else 32
        notify = context.notify()
        given = (source, model, settings, arguments, batch, _Write(output), notify)
        progress = Progress(sum(subtask.documents for subtask in missing))

        def computed(documents: int) -> None:
            progress.computed(documents)
            context.progressed()

        with engine_failures(), heard(notify, computed):
            for documents in _on_actors(lambda: worker.remote(*given), count, missing):
                progress.add(documents)
                context.progressed()
                context.meter.count("congrad_rows", documents, outcome="written")
                context.meter.set("congrad_rows_left", progress.left)
        done = _done(output)
    return sum(done[model, subtask.name] for subtask in subtasks)


def _on_actors(start: Callable[[], Any], count: int, subtasks: Sequence[Subtask]) -> Iterator[int]:
    """The documents of each subtask when it is done; an actor whose process ends is started again.

    Raises BenchmarkError where a subtask fails, and Ray's error where an actor cannot start, or ends again and
    again at the same subtask.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    waiting, deaths = list(reversed(subtasks)), Counter[str]()
    running: dict[Any, tuple[Any, Subtask]] = {}

    def give(actor: Any) -> None:
        if waiting:
            subtask = waiting.pop()
            running[actor.evaluate.remote(subtask)] = actor, subtask
        else:
            ray.kill(actor)

    for _ in range(count):
        give(start())
    while running:
        ended, _ = ray.wait(list(running), num_returns=1)
        actor, subtask = running.pop(ended[0])
        try:
            documents: int = ray.get(ended[0])
        except RayActorError as error:
            deaths[subtask.name] += 1
            if "creation task" in str(error) or deaths[subtask.name] > _RESTARTS:
                raise
            logger.warning(f"the engine ended at {subtask.name}; it is started again")
            waiting.append(subtask)
            actor = start()
        except RayTaskError as error:
            said = " ".join(str(error.cause).split())
            raise BenchmarkError(
                f"benchmark.tasks: {subtask.name} fails: {type(error.cause).__name__}: {brief(said)}; what else "
                "was said is in the logs of its node, by default in /tmp/ray/session_latest/logs. Take it out of "
                "benchmark.tasks, or run the stage again to resume"
            ) from error
        else:
            yield documents
        give(actor)


def harness_engine(source: ModelSource, profile: Profile) -> tuple[dict[str, Any], dict[str, str]]:
    """vLLM's arguments for log-probabilities of whole prompts, one engine for each actor; and its environment."""
    spec = engine_spec(source, profile, profile.engines)
    arguments = spec.engine_kwargs | {"max_model_len": source.settings.max_length}
    if profile.device == "cpu":
        arguments["max_num_batched_tokens"] = max(_BATCHED_TOKENS, source.settings.max_length)
    else:
        arguments["max_num_batched_tokens"] = _BATCHED_TOKENS
    if profile.engines.tensor_parallel_size > 1:
        # Not Ray's: the actor holds the GPUs, and its own processes share them.
        arguments["distributed_executor_backend"] = "mp"
    return arguments | profile.engines.engine_kwargs, spec.environment


def _done(output: StageFolder) -> dict[tuple[str, str], int]:
    """The rows of SAMPLES of each model and subtask that is done; one whose rows are not all there is not."""
    results = output / "results"
    if not results.files(".parquet") or not output.parts():
        return {}
    table = output.read_table(["model", "subtask"])
    counted = table.group_by(["model", "subtask"]).aggregate([([], "count_all")]).to_pylist()
    there = {(row["model"], row["subtask"]): row["count_all"] for row in counted}
    said = results.read_table(["model", "subtask", "samples"]).to_pylist()
    wanted = {(row["model"], row["subtask"]): row["samples"] for row in said}
    return {key: samples for key, samples in wanted.items() if there.get(key) == samples}


def _draw(context: Context, warnings: list[str]) -> Folder:
    """The folder with the pairs drawn; reads them where they are not there yet."""
    recipe, folder = context.recipe, context.output / "pairs"
    groups = [*recipe.prompts.languages, *recipe.prompts.unseen_languages]
    found = folder.read_json("counts.json")
    if found is None or not folder.exists("pairs.parquet"):
        drawn = draw(recipe.benchmark, groups, recipe.limits.failed_share)
        context.output.write_quarantine(drawn.quarantine, "preferences.parquet")
        folder.write_table("pairs.parquet", table_of(drawn.pairs, PREFERENCES))
        found = {"languages": drawn.languages, "drawn": drawn.drawn, "duplicates": drawn.duplicates}
        found["trained_on"] = _trained_on(context, drawn.pairs)
        folder.write_json("counts.json", found)
    counts = ", ".join(f"{language} {count:,}" for language, count in found["drawn"].items())
    logger.info(
        f"{sum(found['drawn'].values()):,} of {sum(found['languages'].values()):,} pairs held out: {counts}"
    )
    if found["trained_on"]:
        warnings.append(
            f"{found['trained_on']} of {sum(found['drawn'].values())} held-out pairs have a prompt that is "
            "trained on: take them out of benchmark.preferences"
        )
    return folder


def _trained_on(context: Context, pairs: list[Row]) -> int:
    """How many pairs have a prompt whose last turn is that of a training prompt."""
    import json

    prompts = context.prompts.read_table(["prompt", "split"])
    trained = prompts.filter(pc.equal(prompts["split"], "train"))["prompt"].to_pylist()
    texts = {messages[-1]["content"].strip() for messages in trained}
    asked = [json.loads(row["prompt"])[-1].get("content") if row["chat"] else row["prompt"] for row in pairs]
    return sum(str(text or "").strip() in texts for text in asked)


def _score(context: Context, source: ModelSource, model: str, pairs: Folder) -> None:
    """Scores the pairs that a model has not scored yet."""
    profile = context.profile
    pool = profile.sketchers
    output = StageFolder(context.output.filesystem, f"{context.output.path}/preferences/{model}")
    missing = read_missing_batches(pairs, output, "pair_id", _PAIRS_PER_PART, _PART_BYTES)
    if missing.schema.field("prompt").type == MESSAGES or _has_chats(pairs):
        chat_prompt_ids(source.load_tokenizer(), [{"role": "user", "content": "?"}])
    if missing.count:
        logger.info(f"{missing.count:,} pairs by {model}")
        within = replace(context, output=output)
        spec = ScorerSpec(
            source,
            model,
            profile.device,
            max(1, int(pool.gpus)),
            profile.threads_of(pool),
            context.recipe.sketch.batch_tokens(profile.device),
        )
        parts = missing.dataset.map_batches(
            Scorer,
            fn_constructor_args=(spec,),
            fn_constructor_kwargs={
                "attempts": attempts(),
                "write": PartWriter(output, SCORED, "pair_id", _counted),
                "notify": within.notify(),
            },
            **pool_arguments(pool, profile, missing.batches),
        )
        follow(parts, within, missing.count)
    outcome_of(output, "pair_id", expected=len(missing.ids))


def _counted(row: Row) -> dict[str, int]:
    return {"congrad_tokens": row["prompt_tokens"] + row["chosen_tokens"] + row["rejected_tokens"]}


def _has_chats(pairs: Folder) -> bool:
    return bool(pc.any(pairs.read_table(["chat"])["chat"]).as_py())


def _summarise(context: Context, model: str, warnings: list[str], expected: int) -> Outcome:
    recipe, output = context.recipe, context.output
    settings = recipe.benchmark
    folders = [output, *([context.input("benchmarks", 0)] if context.iteration else [])]
    values, changes, scores = [], [], []
    counters: dict[str, Any] = {}
    if settings.tasks:
        # A subtask that was tried again after its samples were lost has its results twice.
        outcome_of(StageFolder(output.filesystem, f"{output.path}/results"), "result_id")
        wanted = (BASELINE, model)
        samples = _of_models([folder.read_table() for folder in folders], wanted)
        results = _of_models([(folder / "results").read_table() for folder in folders], wanted)
        values = task_values(samples, results)
        changes = task_changes(samples, results, BASELINE, model, settings.seed)
        if left := left_out(results):
            warnings.append(f"no value over several subtasks of what is no mean over documents: {', '.join(left)}")
        cut = {row["subtask"]: row["cut"] for row in results.to_pylist() if row["cut"]}
        if cut:
            warnings.append(
                f"{sum(cut.values()):,} requests of {len(cut)} tasks, such as {next(iter(cut))}, are longer than "
                f"model.max_length ({recipe.model.max_length}): their beginning was cut off; raise it, or lower "
                "benchmark.num_fewshot"
            )
        counters["fell"] = sum(row.high is not None and row.high < 0 for row in changes)
        counters["rose"] = sum(row.low is not None and row.low > 0 for row in changes)
    quarantined: dict[str, int] = dict(output.quarantine_counts())
    if settings.preferences:
        scored = []
        for name in (BASELINE, model):
            for folder in folders:
                of_model = StageFolder(folder.filesystem, f"{folder.path}/preferences/{name}")
                if of_model.files(".parquet"):
                    scored += of_model.read_table().to_pylist()
                if folder is output:
                    for reason, count in of_model.quarantine_counts().items():
                        quarantined[reason] = quarantined.get(reason, 0) + count
        loss = loss_settings(recipe.train)
        scores = preference_scores(scored, BASELINE, model, loss, recipe.prompts.languages, settings.seed)
        for row in scores:
            if row.language == "*" and row.accuracy is not None:
                counters[f"accuracy_{'seen' if row.seen else 'unseen'}"] = round(row.accuracy, 4)
        if not scores:
            warnings.append(f"no held-out pair could be scored by both models: {quarantined}")
    for warning in warnings:
        logger.warning(warning)
    output.write_json(
        "summary.json",
        {
            "model": model,
            "baseline": BASELINE,
            "tasks": [asdict(value) for value in values],
            "changes": [asdict(change) for change in changes],
            "preferences": [asdict(score) for score in scores],
            "warnings": warnings,
        },
    )
    rows = expected + sum(score.pairs for score in scores if score.language == "*" and score.model == model)
    return Outcome(rows, {**counters, "quarantined": quarantined})


def _of_models(tables: list[pa.Table], models: tuple[str, ...]) -> pa.Table:
    table = pa.concat_tables(tables)
    return table.filter(pc.is_in(table["model"], value_set=pa.array(models)))


def _settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the results beside the policies and the prompts."""
    settings = recipe.benchmark
    loss = asdict(loss_settings(recipe.train))
    return {
        "model": recipe.model.model_dump(mode="json"),
        "benchmark": settings.model_dump(mode="json"),
        "loss": {name: loss[name] for name in ("beta", "loss_type")},
        "languages": [*recipe.prompts.languages, *recipe.prompts.unseen_languages],
        "seen": len(recipe.prompts.languages),
        "preferences": source_digest(source_of(settings)) if settings.preferences else None,
        "include_path": _folder_digest(settings.include_path) if settings.include_path else None,
        "iteration": iteration,
    }


def _folder_digest(name: str) -> str | None:
    """A hash of the tasks' own files in a folder; None where there is no such folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".yaml", ".py", ".jsonl", ".json", ".csv", ".parquet"):
            found.update(f"{path.relative_to(folder)}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:32]


def _demand(recipe: Recipe, profile: Profile) -> Demand:
    if not recipe.benchmark.tasks:
        rows = 2 * held_out_pairs(recipe)
        return pool_demand("benchmark", rows, "model replicas", "sketchers", profile)
    demand = pool_demand("benchmark", 2 * held_out_pairs(recipe), "vLLM engines", "engines", profile)
    # One actor holds all GPUs of an engine, and one is enough.
    engines = profile.engines
    return replace(
        demand,
        min_cpus=engines.cpus + profile.data_cpus,
        min_gpus=engines.gpus,
        actor_cpus=engines.cpus,
        actor_gpus=engines.gpus,
        min_actors=1,
    )


def _check(recipe: Recipe) -> None:
    if recipe.benchmark.tasks:
        check_names(recipe.benchmark)


STAGE = Stage(
    name="benchmark",
    folder="benchmarks",
    summary="Measure what training changed on public tasks and on held-out preferences",
    example="benchmark.limit=100",
    inputs=lambda iteration: [
        ("prompts", None),
        ("policy", iteration),
        *([("benchmarks", 0)] if iteration > 0 else []),
    ],
    settings=_settings,
    run=run,
    demand=_demand,
    schema=lambda recipe: SAMPLES,
    estimate=ESTIMATE,
    figures=figures,
    parts=("", "results"),
    wanted=lambda recipe: recipe.benchmark.wanted,
    check=_check,
)
