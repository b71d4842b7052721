"""The stage benchmark: what it refuses, how it resumes, and the harness on real engines with a planted loss."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from congrad_ray.cli.display import console, show_figures
from congrad_ray.config.benchmarks import Benchmark
from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import Recipe, recipe_of_run
from congrad_ray.config.settings import SettingsError, to_yaml
from congrad_ray.data.tables import prompt_id, table_of
from congrad_ray.modeling.shape import read_shape
from congrad_ray.pipeline.loop import run_all
from congrad_ray.pipeline.order import STAGES, steps_of, wanted_stages
from congrad_ray.pipeline.plan import demands, make_plan
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Planned
from congrad_ray.planning.shapes import Shapes
from congrad_ray.planning.volume import assumed_lengths
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.resources import DoesNotFit, Machine, Node, check_fits
from congrad_ray.stages.benchmark import harness, stage
from congrad_ray.stages.benchmark.figures import benchmark_figures
from congrad_ray.stages.benchmark.harness import BenchmarkError, Subtask, check_names, look_at
from congrad_ray.stages.benchmark.schema import RESULTS, SAMPLES, SCORED
from congrad_ray.stages.prompts.schema import PROMPTS

TASKS = Path(__file__).parent / "tasks"
OLD = Path(__file__).resolve().parents[2] / "pipeline" / "old-run" / "run"
LETTERS = "ABCD"


@pytest.fixture
def few_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the harness' own tasks: to find all of them takes half a minute."""
    own = {
        "xcopa": ("GROUP", "xcopa/_xcopa.yaml", []),
        "xcopa_sw": ("TASK", "xcopa/default_sw.yaml", []),
        "mgsm_direct": ("TAG", None, ["mgsm_direct_de"]),
        "mgsm_direct_de": ("TASK", "mgsm/direct/mgsm_direct_de.yaml", []),
        "global_mmlu_de": ("GROUP", "global_mmlu/default/de/_global_mmlu_de.yaml", []),
        "global_mmlu_sw": ("GROUP", "global_mmlu/default/sw/_global_mmlu_sw.yaml", []),
        "global_mmlu_de_stem": ("TASK", "global_mmlu/default/de/global_mmlu_de_stem.yaml", []),
    }
    monkeypatch.setattr(harness, "_own_tasks", lambda: own)


def recipe_of(model: str | Path = "builtin-world", **more: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "iterations": 2,
            "model": {"name": str(model), "dtype": "float32", "max_length": 256},
            "prompts": {"languages": ["en", "de"], "unseen_languages": ["fr"]},
            "generate": {"max_tokens": 16},
            "judge": {"max_tokens": 16},
            "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
        }
        | more
    )


def test_a_recipe_that_does_not_ask_for_it_is_as_before() -> None:
    recipe = recipe_of()
    assert "benchmark" not in to_yaml(recipe)
    assert "benchmark" not in [stage.name for stage in wanted_stages(recipe)]
    assert "benchmark" not in [stage.name for stage, _ in steps_of(recipe)]
    assert "benchmark" not in [demand.stage for demand in demands(recipe, load_profile("local"))]
    asking = recipe_of(benchmark={"tasks": ["xcopa"]})
    assert "benchmark:" in to_yaml(asking)
    names = [(stage.name, number) for stage, number in steps_of(asking)]
    for number in (0, 1):
        place = names.index(("benchmark", number))
        assert names[place - 1 : place + 2] == [("train", number), ("benchmark", number), ("evaluate", number)]


def test_a_run_that_never_asked_for_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    recipe = recipe_of_run(run.read_bytes("recipe.yaml"), "recipe.yaml")
    assert all(run.stage(stage.folder, n).manifest() for stage, n in steps_of(recipe) if n is not None)
    with pytest.raises(SettingsError, match="does not ask for the stage benchmark: see the section benchmark"):
        run_all(recipe, Profile(name="local"), run, until="benchmark")


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run")
    context = Context(recipe_of(), Profile(name="local"), run, 0, run.stage("benchmarks", 0))
    with pytest.raises(SettingsError, match=r"set benchmark.tasks or benchmark.preferences"):
        stage.run(context)


@pytest.mark.usefixtures("few_own_tasks")
def test_names_are_checked_before_the_first_stage(tmp_path: Path) -> None:
    recipe = recipe_of(benchmark={"tasks": ["xcpa"]})
    run = RunDirectory.open(tmp_path / "run")
    with pytest.raises(BenchmarkError, match=r"has no task xcpa: did you mean xcopa, xcopa_sw\?"):
        run_all(recipe, Profile(name="local"), run)
    assert not run.exists("prompts")


@pytest.mark.usefixtures("few_own_tasks")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mgsm"], "has no task mgsm: did you mean mgsm_direct, mgsm_direct_de"),
        (["xcopa", "quite another"], r"has no task quite another\. Your own tasks"),
    ],
)
def test_names_that_the_harness_does_not_know(names: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        check_names(Benchmark(tasks=names))


@pytest.mark.usefixtures("few_own_tasks")
def test_a_name_may_be_a_familys(tmp_path: Path) -> None:
    check_names(Benchmark(tasks=["xcopa", "mgsm_direct", "global_mmlu"]))
    index = harness.task_manager(None).task_index
    assert harness.members_of("global_mmlu", index) == ["global_mmlu_de", "global_mmlu_sw"]
    assert harness.members_of("mgsm_direct", index) == ["mgsm_direct"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"benchmark.include_path: there is no folder"):
        check_names(Benchmark(tasks=["x"], include_path=str(tmp_path / "none")))


@pytest.mark.usefixtures("few_own_tasks")
def test_what_there_is_to_do() -> None:
    settings = Benchmark(
        tasks=["tiny_mmlu", "copying"], include_path=str(TASKS), limit=4, languages={"copying": "en"}
    )
    assert look_at(settings) == [
        *(Subtask("tiny_mmlu", f"tiny_mmlu_{language}", language, 4) for language in ("de", "en", "fr")),
        Subtask("copying", "copying", "en", 4),
    ]
    assert {task.documents for task in look_at(settings.model_copy(update={"limit": None}))} == {6}
    twice = settings.model_copy(update={"tasks": ["tiny_mmlu", "tiny_mmlu_de"]})
    with pytest.raises(BenchmarkError, match="tiny_mmlu_de is in tiny_mmlu and in tiny_mmlu_de; leave one"):
        look_at(twice)


@pytest.mark.usefixtures("few_own_tasks")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "absent",
            "absent cannot be loaded with its dataset nobody/has-this-dataset de: .*benchmark.download: true",
        ),
        ("mgsm_direct", "mgsm_direct_de cannot be loaded with its dataset juletxara/mgsm de: "),
    ],
)
def test_a_dataset_that_is_not_there_is_named(task: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        look_at(Benchmark(tasks=[task], include_path=str(TASKS)))


def test_rows_of_what_the_harness_found() -> None:
    about = {"model": "M_1", "task": "t", "subtask": "t_de", "language": "de"}
    example = {
        "doc_id": 4,
        "doc_hash": "abc",
        "target": 2,
        "filter": "none",
        "filtered_resps": [(-1.5, False)],
        "metrics": ["acc", "bleu", "f1", "nan"],
        "acc": np.float64(1.0),
        "bleu": ("a text", "another"),
        "f1": np.array([1.0, 0.0]),
        "nan": float("nan"),
    }
    rows = table_of(list(harness._samples(about, example)), SAMPLES).to_pylist()
    assert [(row["metric"], row["value"]) for row in rows] == [
        ("acc", 1),
        ("bleu", None),
        ("f1", None),
        ("nan", None),
    ]
    assert (rows[0]["document"], rows[0]["target"], rows[0]["output"]) == (4, "2", "[[-1.5, false]]")
    values = {
        "alias": "t_de",
        "sample_len": 5,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
    }
    found = {"results": {"t_de": values}, "higher_is_better": {"t_de": {"acc": True}}}
    results = harness._results(about, found, Subtask("t", "t_de", "de", 5), {"acc"})
    columns = ("metric", "value", "stderr", "count", "is_mean", "higher_is_better")
    assert [tuple(row[name] for name in columns) for row in results] == [
        ("acc", 0.5, 0.1, 5, True, True),
        ("exact_match,strict", 0.25, None, 5, False, None),
    ]


def test_tasks_named_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks named twice: xcopa"):
        Benchmark(tasks=["xcopa", "xnli", "xcopa"])


def test_a_plan_has_the_pairs_and_says_that_tasks_are_not_known() -> None:
    recipe = recipe_of(benchmark={"tasks": ["xcopa"], "limit": 50, "preferences": "p.jsonl"})
    lengths = assumed_lengths(recipe, Assumptions())
    shape = read_shape("builtin-world", recipe.model)
    planned = Planned(recipe, load_profile("local"), Shapes(shape, shape, shape), lengths, Assumptions())
    plan = make_plan(planned, Machine(8, 0, 24, "here"))
    row = next(row for row in plan.stages if row.stage == "benchmark")
    assert row.rows == 3 * 200 * (2 + 1)  # languages, pairs of each, and models in two iterations
    assert row.tokens == pytest.approx(row.rows * (lengths.prompt + 2 * lengths.paired_response))
    (said,) = [line for line in plan.advice if line.startswith("benchmark: ")]
    assert "not estimated: xcopa (at most 50 documents of each task)" in said
    without = make_plan(replace(planned, recipe=recipe_of()), Machine(8, 0, 24, "here"))
    assert "benchmark" not in [row.stage for row in without.stages] + without.advice


def test_an_engine_over_several_gpus_asks_one_node_for_them() -> None:
    overrides = ["engines.tensor_parallel_size=4", "engines.gpus=4", "engines.cpus=8", "engines.max_actors=1"]
    demand = STAGES["benchmark"].demand(
        recipe_of(benchmark={"tasks": ["x"]}), load_profile("node-8gpu", overrides)
    )
    assert (demand.actor_gpus, demand.min_actors, demand.min_gpus) == (4, 1, 4)
    with pytest.raises(DoesNotFit, match="benchmark"):
        check_fits(demand, Machine(64, 4, 100, "two nodes", (Node("a", 32, 2, 2),)))


def _rows(model: str, subtask: str, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    about = {"model": model, "task": "t", "subtask": subtask, "language": None, "metric": "acc", "value": 1.0}
    more = {"document_hash": "", "target": "", "output": ""}
    samples = [about | more | {"sample_id": f"{subtask}-{n}", "document": n} for n in range(count)]
    of_task = {"stderr": 0.0, "count": count, "samples": count, "is_mean": True, "higher_is_better": True}
    return samples, [about | of_task | {"result_id": subtask, "cut": 0, "few_shot": 0}]


def test_a_subtask_whose_samples_are_lost_is_not_done(tmp_path: Path) -> None:
    output = RunDirectory.open(tmp_path).stage("benchmarks", 0)
    write = stage._Write(output)
    assert stage._done(output) == {}
    write(*_rows("M_0", "one", 3))
    first = output.files(".parquet")
    write(*_rows("M_0", "two", 2))
    assert stage._done(output) == {("M_0", "one"): 3, ("M_0", "two"): 2}
    write(*_rows("M_0", "two", 2))  # again, as after a kill
    assert stage._done(output) == {("M_0", "one"): 3, ("M_0", "two"): 2}
    output.filesystem.delete_file(first[0])
    assert stage._done(output) == {("M_0", "two"): 2}


class _Mortal:
    """Stands for a worker: its process ends at some subtask, as often as the folder has no file for it."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def evaluate(self, subtask: Subtask) -> int:
        deaths = int(subtask.name.partition("-")[2] or 0)
        if len(list(self._folder.glob(f"{subtask.name}.*"))) < deaths:
            (self._folder / f"{subtask.name}.{os.getpid()}").touch()
            os._exit(1)
        if subtask.name == "bad":
            raise KeyError("no such column")
        return subtask.documents


@pytest.mark.usefixtures("shared_ray")
def test_a_worker_that_ends_is_started_again(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    import ray
    from ray.exceptions import RayActorError

    worker: Any = ray.remote(_Mortal).options(num_cpus=0.5)
    subtasks = [Subtask("t", name, None, number) for number, name in enumerate(("a", "b-1", "c", "d-2"), 1)]
    done = stage._on_actors(lambda: worker.remote(str(tmp_path)), 2, subtasks)
    assert sorted(done) == [1, 2, 3, 4]
    assert sorted(line.partition(";")[0] for line in warned()) == [
        "the engine ended at b-1",
        "the engine ended at d-2",
        "the engine ended at d-2",
    ]
    with pytest.raises(BenchmarkError, match=r"bad fails: KeyError: 'no such column'; .*run the stage again"):
        list(stage._on_actors(lambda: worker.remote(str(tmp_path)), 1, [Subtask("t", "bad", None, 1)]))
    with pytest.raises(RayActorError):
        list(stage._on_actors(lambda: worker.remote(str(tmp_path)), 1, [Subtask("t", "e-9", None, 1)]))


def test_figures_say_what_fell_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    change = {"task": "xcopa", "metric": "acc", "before": 0.6, "after": 0.5, "count": 500}
    score = {"language": "de", "seen": True, "pairs": 200, "accuracy_low": 0.5, "accuracy_high": 0.7}
    summary = {
        "model": "M_1",
        "baseline": "M_0",
        "tasks": [],
        "changes": [
            change | {"language": "th", "change": -0.1, "low": -0.15, "high": -0.05},
            change | {"language": None, "change": -0.1, "low": None, "high": None},
        ],
        "preferences": [
            score | {"model": "M_0", "accuracy": None, "logp_accuracy": 0.55, "margin": None},
            score
            | {"model": "M_1", "accuracy": 0.625, "logp_accuracy": 0.575}
            | {"margin": 0.02, "margin_low": 0.01, "margin_high": 0.03},
        ],
        "warnings": ["something"],
    }
    monkeypatch.setattr(console, "_width", 80)
    with console.capture() as shown:
        for figures in benchmark_figures(summary):
            show_figures(figures)
    text = shown.get()
    assert "M_1 against M_0 on public tasks" in text
    for words in ("-0.150..-0.050", "55.0%", "57.5%", "62.5%", "+0.020", "something"):
        assert words in text


def _commit(run: RunDirectory, folder: str, number: int | None, write: Callable[[Path], None]) -> None:
    target = run.stage(folder, number)
    target.begin(f"{folder}-{number}", False, folder)
    Path(target.path).mkdir(parents=True, exist_ok=True)
    write(Path(target.path))
    target.commit(folder, number, f"{folder}-{number}", {}, {}, 1, 0.0, {})


def _questions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]


def _asked(question: dict[str, Any]) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question["choices"], strict=True))
    return f"{question['question']}\n{choices}\nAnswer:"


def _taught(folder: Path, answers: Callable[[dict[str, Any]], int], target: Path) -> None:
    """Saves the model of `folder` when it gives these answers to all questions."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    texts = [f"{_asked(row)} {LETTERS[answers(row)]}" for row in _questions()]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        loss = model(**batch, labels=labels).loss
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _plain_choices(folder: Path, question: dict[str, Any]) -> list[float]:
    """log p of the four answers by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for letter in LETTERS:
        ids = tokenizer(f"{_asked(question)} {letter}")["input_ids"]
        start = len(tokenizer(_asked(question))["input_ids"])
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids))))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray", "few_own_tasks")
@pytest.mark.timeout(900)
def test_a_loss_in_one_language_is_seen_in_that_language(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = tmp_path / "start"
    _taught(tiny_model, lambda row: int(row["answer"]), start)
    run = RunDirectory.open(tmp_path / "run")
    row = {
        "language": "en",
        "prompt": [{"role": "user", "content": "?"}],
        "split": "train",
        "seen": True,
        "task": None,
    }
    prompts = table_of([row | {"prompt_id": prompt_id("en", row["prompt"])}], PROMPTS)
    _commit(run, "prompts", None, lambda folder: run.stage("prompts", None).write_table("part-0.parquet", prompts))

    def forgotten(row: dict[str, Any]) -> int:
        return (int(row["answer"]) + (row["language"] == "de")) % 4

    _commit(run, "policy", 0, lambda folder: _taught(start, forgotten, folder))
    _commit(run, "policy", 1, lambda folder: shutil.copytree(start, folder, dirs_exist_ok=True))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": _asked(question),
                    "chosen": f" {LETTERS[question['answer']]}",
                    "rejected": f" {LETTERS[(question['answer'] + 1) % 4]}",
                    "language": question["language"],
                }
            )
            + "\n"
            for question in _questions()
        )
    )
    wanted = {"tasks": ["tiny_mmlu", "copying"], "include_path": str(TASKS), "preferences": str(pairs)}
    recipe, profile = recipe_of(start, benchmark=wanted), Profile(name="local")

    manifest = run_stage(STAGES["benchmark"], recipe, profile, run)
    output = run.stage("benchmarks", 0)
    samples, results = output.read_table(), (output / "results").read_table()
    assert samples.schema.equals(SAMPLES) and results.schema.equals(RESULTS)
    assert len(samples) == 2 * (3 * 6 + 6 * 2)  # models; questions in three languages, copying with two metrics
    assert manifest.rows == len(samples) + 24
    summary = output.read_json("summary.json")
    assert list(summary) == ["model", "baseline", "tasks", "changes", "preferences", "warnings"]
    changes = {(row["task"], row["language"], row["metric"]): row for row in summary["changes"]}
    for language, change in (("de", -1.0), ("en", 0.0), ("fr", 0.0)):
        row = changes["tiny_mmlu", language, "acc"]
        assert (row["before"], row["after"], row["count"]) == (1.0, 1.0 + change, 6)
        assert (row["change"], row["low"], row["high"]) == (change, change, change)
    assert changes["copying", None, "exact_match"]["count"] == 6
    assert changes["copying", None, "bleu"]["low"] is not None
    assert manifest.counters["fell"] == 1

    by_question = [question for question in _questions() if question["language"] == "fr"][2:]
    of_model = [row for row in samples.to_pylist() if row["model"] == "M_0" and row["subtask"] == "tiny_mmlu_fr"]
    for row in of_model:
        found = [choice[0] for choice in json.loads(row["output"])]
        assert found == pytest.approx(_plain_choices(start, by_question[row["document"]]), abs=2e-3)

    scored = [
        row
        for model in ("M_0", "M_1")
        for row in (output / "preferences" / model).read_table().cast(SCORED).to_pylist()
    ]
    assert len(scored) == 2 * 24
    scores = {(row["model"], row["language"]): row for row in summary["preferences"]}
    assert scores["M_0", "de"]["logp_accuracy"] == 1.0 and scores["M_1", "de"]["logp_accuracy"] == 0.0
    assert scores["M_1", "de"]["accuracy"] == 0.0 and scores["M_1", "de"]["margin_high"] < 0
    assert scores["M_0", "fr"]["accuracy"] is None and scores["M_1", "fr"]["seen"] is False
    assert scores["M_1", "*"]["pairs"] + scores["M_1", "fr"]["pairs"] in (16, 24)

    # What is missing is done, and nothing else.
    lost = next(
        path for path in output.files(".parquet") if "tiny_mmlu_en" in str(output.read_parquet(path)["subtask"])
    )
    kept = {path: Path(path).stat().st_mtime_ns for path in output.files(".parquet") if path != lost}
    output.filesystem.delete_file(lost)
    caplog.clear()
    assert run_stage(STAGES["benchmark"], recipe, profile, run).rows == manifest.rows
    assert sum("1 of 4 tasks by" in record.getMessage() for record in caplog.records) == 1
    assert {path: Path(path).stat().st_mtime_ns for path in kept} == kept
    assert output.read_json("summary.json")["changes"] == summary["changes"]

    # M_0 is measured once; M_2 is what M_0 was.
    run_stage(STAGES["benchmark"], recipe, profile, run, iteration=1)
    later = run.stage("benchmarks", 1)
    assert set(later.read_table()["model"].to_pylist()) == {"M_2"}
    for row in later.read_json("summary.json")["changes"]:
        assert row["change"] == 0
