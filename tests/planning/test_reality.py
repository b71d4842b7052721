"""The plan against what a run took: tokens, bytes on disk, peak memory. Prints the ratios measured / predicted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe, load_recipe
from congrad_ray.modeling.tokenization import chat_prompt_ids, load_tokenizer
from congrad_ray.pipeline.order import ITERATED
from congrad_ray.pipeline.plan import known_lengths
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Planned
from congrad_ray.planning.shapes import read_shapes
from congrad_ray.planning.volume import Volume
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.judge.estimate import instruction_bytes
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.sketch.estimate import sketch_memory
from congrad_ray.stages.train.estimate import training_memory

ROOT = Path(__file__).resolve().parents[2]
TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def measured_tokens(run: RunDirectory, recipe: Recipe) -> dict[str, float]:
    """Tokens that the stages of the first iteration saw, from their tables."""
    tokenizer = load_tokenizer(recipe.model.name)
    responses = run.stage("responses", 0).read_table()
    sketches = run.stage("sketches", 0).read_table(TOKENS)
    trained = run.stage("selection", 0).read_table(TOKENS, "selected.parquet")
    answers = run.stage("evaluation", 0).read_table()
    judged = (run.stage("judgements", 0) / "samples").read_table()
    answered = 0
    for row in answers.to_pylist():
        answered += len(chat_prompt_ids(tokenizer, row["prompt"])) + row["response_tokens"]

    def total(table: object, *names: str) -> float:
        return float(sum(pc.sum(table[name]).as_py() for name in names))  # type: ignore[index]

    return {
        "generate": total(responses, "prompt_tokens", "response_tokens"),
        "judge": total(judged, "prompt_tokens", "output_tokens"),
        "sketch": total(sketches, *TOKENS),
        "train": total(trained, *TOKENS),
        "evaluate": float(answered),
    }


def measured_bytes(run: RunDirectory, recipe: Recipe) -> dict[str, int]:
    """Bytes of the files that a stage's result is made of."""
    found = {}
    for stage in (stage for stage in ITERATED if stage.wanted(recipe)):
        committed = run.stage(stage.folder, 0).committed_files()
        assert committed is not None
        names = ("model.safetensors",) if stage.name == "train" else (".parquet", "direction.safetensors")
        files = {name: size for name, size in committed.items() if not name.startswith("quarantine/")}
        found[stage.name] = sum(size for name, size in files.items() if name.endswith(names))
    return found


def bytes_per_token_of(run: RunDirectory, recipe: Recipe) -> tuple[float, float]:
    """Bytes of text a token in the judge's instructions and in responses, as this tokenizer cuts them."""
    tokenizer = load_tokenizer(recipe.model.name)
    rubric = load_rubric(recipe.judge.rubric)
    blank = [{"role": "user", "content": ""}]
    texts = [rubric.fill(language, recipe.judge.method, blank, "") for language in recipe.prompts.languages]
    instruction = instruction_bytes(recipe, recipe.judge) / (
        sum(len(tokenizer(text)["input_ids"]) for text in texts) / len(texts)
    )
    responses = run.stage("responses", 0).read_table(["response", "response_tokens"])
    written = sum(len(text.encode()) for text in responses["response"].to_pylist())
    return instruction, written / pc.sum(responses["response_tokens"]).as_py()


def predicted(run: RunDirectory, recipe: Recipe) -> tuple[dict[str, Volume], dict[str, float]]:
    """Counts and bytes by stage from the mean lengths that the run measured and its tokenizer's bytes a token.

    Not from what it knows of the judge's tokens and of rows' bytes, which would predict them by themselves.
    """
    instruction, text = bytes_per_token_of(run, recipe)
    lengths = known_lengths(recipe, Assumptions(), run)
    assert lengths.measured == ("generate", "judge", "pair", "sketch", "evaluate")
    lengths = replace(lengths, judge_prompt=None, row_bytes={})
    planned = Planned(
        recipe, load_profile("local"), read_shapes(recipe), lengths, Assumptions(bytes_per_token=instruction)
    )
    written = replace(planned, assumptions=Assumptions(bytes_per_token=text))
    counts, stored = {}, {}
    for stage in ITERATED:
        assert stage.estimate is not None
        counts[stage.name] = stage.estimate.volume(planned, 0)
        stored[stage.name] = stage.estimate.stored(written, counts[stage.name])
    return counts, stored


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Recipe]:
    from congrad_ray.world.model import world_model

    folder = tmp_path_factory.mktemp("plan")
    settings = [
        f"model.name={world_model(cache_dir=folder, training_tokens=150_000)}",
        "prompts.languages=[en, de]",
        "prompts.unseen_languages=[it]",
        "prompts.train_per_language=40",
        "prompts.evaluation_per_language=10",
        "judge.min_probability_mass=0.0",
        "pair.truncated=keep",
    ]
    demo = ROOT / "jobs" / "recipes" / "demo.yaml"
    arguments = [sys.executable, "-m", "congrad_ray", "run", str(demo), "--run", str(folder / "run")]
    subprocess.run([*arguments, *(f"--set={setting}" for setting in settings)], check=True, timeout=2500)
    return RunDirectory.open(folder / "run"), load_recipe(demo, settings)


def test_tokens_of_every_stage_with_the_lengths_a_run_measured(finished: tuple[RunDirectory, Recipe]) -> None:
    run, recipe = finished
    counts, _ = predicted(run, recipe)
    ratios = {stage: tokens / counts[stage].tokens for stage, tokens in measured_tokens(run, recipe).items()}
    print("tokens, measured / predicted:", {stage: round(ratio, 3) for stage, ratio in ratios.items()})
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios


def test_bytes_on_disk(finished: tuple[RunDirectory, Recipe]) -> None:
    """The policy's, and the sketches' before zstd makes them smaller; of texts, compression is assumed."""
    run, recipe = finished
    counts, stored = predicted(run, recipe)
    ratios = {stage: size / stored[stage] for stage, size in measured_bytes(run, recipe).items()}
    print("bytes, measured / predicted:", {stage: round(ratio, 3) for stage, ratio in ratios.items()})
    files = [pq.ParquetFile(path).metadata for path in run.stage("sketches", 0).files(".parquet")]
    columns = [
        m.row_group(g).column(c) for m in files for g in range(m.num_row_groups) for c in range(m.num_columns)
    ]
    sketches = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "sketch")
    uncompressed = sketches / (counts["sketch"].rows * recipe.sketch.width)  # int8
    print("sketches before compression, measured / predicted:", round(uncompressed, 4))
    assert 0.95 < uncompressed < 1.05
    assert 0.85 < ratios["train"] < 1.15
    assert 0.5 < ratios["sketch"] < 1.05


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 125M parameters, so large that Python's own memory does not hide it."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "llama-125m"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", ["sketch", "train"])
def test_peak_memory_of_a_replica_on_the_cpu(what: str, model: Path, tmp_path: Path) -> None:
    length = 1024
    sys.path.insert(0, str(Path(__file__).parent))
    from measure import WORKERS, recipe_for

    recipe = recipe_for(length, model={"name": str(model), "dtype": "float32", "max_length": length})
    shape = read_shapes(recipe).policy
    profile = load_profile("local", [f"trainers.num_workers={WORKERS}"])
    if what == "sketch":
        needed = sketch_memory(shape, recipe, profile, Assumptions(), None)
    else:
        needed = training_memory(shape, recipe, profile, Assumptions())
    arguments = [
        sys.executable,
        str(Path(__file__).parent / "measure.py"),
        what,
        str(model),
        str(length),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, timeout=1500)
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout.splitlines()[-1])["peak"]
    print(
        f"{what}: peak {peak / 2**20:.0f} MiB, predicted {needed.peak / 2**20:.0f}, ratio {peak / needed.peak:.3f}"
    )
    assert 0.85 < peak / needed.peak < 1.15
