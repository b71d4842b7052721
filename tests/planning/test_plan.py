"""Counts, memory, time and bytes against numbers worked out by hand; a shortage is reported with its fix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Model, Recipe
from congrad_ray.config.settings import SettingsError
from congrad_ray.config.training import Lora
from congrad_ray.modeling import rehearsal
from congrad_ray.modeling.shape import ModelShape, read_shape
from congrad_ray.modeling.source import ModelError
from congrad_ray.pipeline.order import ITERATED, STAGES
from congrad_ray.pipeline.plan import make_plan
from congrad_ray.planning import plan as plans
from congrad_ray.planning.assumptions import Assumptions, load_assumptions
from congrad_ray.planning.engines import kv_bytes_per_token
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.flops import forward_flops
from congrad_ray.planning.lengths import with_measured
from congrad_ray.planning.memory import GIB
from congrad_ray.planning.plan import Plan, starts_by_stage
from congrad_ray.planning.shapes import Shapes
from congrad_ray.planning.storage import file_bytes, measured_row_bytes
from congrad_ray.planning.volume import Lengths, Volume, assumed_lengths
from congrad_ray.rundir.directory import Manifest, Stored
from congrad_ray.runtime.resources import cluster_machine
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select.schema import SCORES
from congrad_ray.stages.sketch.estimate import sketch_working_bytes, stored_sketch_bytes
from congrad_ray.stages.train.estimate import (
    pass_tokens,
    policy_bytes,
    trainable_parameters,
    training_memory,
    training_working_bytes,
)

ASSUMED = Assumptions()


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def planned(recipe: Recipe, shape: ModelShape, profile: str, overrides: Sequence[str] = ()) -> Plan:
    where = load_profile(profile, overrides)
    assert where.cluster is not None
    given = Planned(recipe, where, Shapes(shape, shape, shape), assumed_lengths(recipe, ASSUMED), ASSUMED)
    return make_plan(given, cluster_machine(where.cluster))


def estimate_of(stage: str) -> Estimate:
    found = STAGES[stage].estimate
    assert found is not None
    return found


def given(recipe: Recipe, shape: ModelShape, lengths: Lengths) -> Planned:
    return Planned(recipe, load_profile("local"), Shapes(shape, shape, shape), lengths, ASSUMED)


def volumes(what: Planned, iteration: int = 0) -> dict[str, Volume]:
    return {
        name: stage.estimate.volume(what, iteration)
        for name, stage in STAGES.items()
        if stage.estimate is not None
    }


def test_parameters_are_the_published_totals(llama: ModelShape, gemma: ModelShape) -> None:
    """The totals that the models' pages on the hub give for their safetensors."""
    assert llama.parameters == 8_030_261_248
    assert gemma.parameters == 2_614_341_888
    assert (llama.tied, gemma.tied) == (False, True)
    assert llama.body == llama.parameters - 2 * 128256 * 4096
    assert gemma.body == gemma.parameters - 256000 * 2304
    assert sum(out * into for out, into in llama.linear) == llama.body - 65 * 4096  # norms
    assert (gemma.layers, gemma.attention_heads, gemma.key_value_heads, gemma.head_size) == (26, 8, 4, 256)


def test_the_built_in_world_needs_no_files() -> None:
    assert 1_000_000 < read_shape("builtin-world", Model()).parameters < 1_200_000


def test_a_configuration_that_cannot_be_had_is_reported_with_the_way_to_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"some/model.*hub's cache.*config\.json.*--set model\.name=FOLDER"):
        read_shape("some/model", Model())
    with pytest.raises(ModelError, match="in this folder"):
        read_shape(str(tmp_path), Model())


def test_tokens_follow_the_recipe_and_the_lengths(recipe: Recipe, llama: ModelShape) -> None:
    lengths = assumed_lengths(recipe, ASSUMED)
    assert lengths.prompt == pytest.approx(0.1 * (2048 - 512))
    assert lengths.response == 256
    counts = volumes(given(recipe, llama, lengths))
    assert counts["generate"].rows == 800
    assert counts["generate"].prefill == pytest.approx(800 * 153.6)
    assert counts["generate"].decode == 800 * 256
    assert counts["judge"].rows == 2400
    assert counts["sketch"].rows == 180
    assert counts["sketch"].trained == pytest.approx(180 * (153.6 + 512))
    assert counts["train"].rows == 90
    assert counts["train"].trained == pytest.approx(90 * (153.6 + 2 * 256))
    assert counts["baseline"].rows == counts["evaluate"].rows == 30 * 2
    assert counts["evaluate"].requests == 60 + 60  # and both orders of 30 greedy answers
    both = changed(recipe, "evaluate", baselines=["start", "previous"], references="answers.jsonl")
    assert volumes(given(both, llama, lengths))["evaluate"].requests == 60 + 2 * 60  # M_0 is both
    assert volumes(given(both, llama, lengths), iteration=1)["evaluate"].requests == 60 + 3 * 60
    asked = Endpoint(url="http://here/v1", model="m", requests_per_minute=30, input_price=2.0)
    served = given(changed(recipe, "evaluate", endpoint=asked), llama, lengths)
    assert volumes(served)["evaluate"].requests == 60
    estimate = STAGES["evaluate"].estimate
    assert estimate is not None
    whole, alone = (volumes(given(recipe, llama, lengths))["evaluate"], volumes(served)["evaluate"])
    assert estimate.served(served, 0).seconds == 60 * 60 / 30
    assert estimate.served(served, 0).dollars == pytest.approx((whole.prefill - alone.prefill) * 2 / 1e6)
    later = volumes(given(recipe, llama, lengths), iteration=1)
    assert later["evaluate"].rows == 60
    assert later["baseline"].rows == 0
    assert later["prompts"].rows == 0
    everything = volumes(given(changed(recipe, "select", strategy="all"), llama, lengths))
    assert everything["train"].rows == 180


def test_what_a_run_knows_takes_the_place_of_what_is_assumed(recipe: Recipe, llama: ModelShape) -> None:
    def manifest(stage: str, rows: int, **counters: Any) -> Manifest:
        return Manifest(stage, 0, "", rows, 1.0, counters)

    generate = manifest("generate", 400, responses={"de": 100, "en": 300}, mean_tokens={"de": 10.0, "en": 20.0})
    found = with_measured(assumed_lengths(recipe, ASSUMED), ITERATED, recipe, {"responses": generate})
    assert found.response == found.paired_response == found.answer == 17.5
    assert found.prompt == pytest.approx(153.6)
    finished = {
        "responses": generate,
        "judgements": manifest("judge", 400, mean_prompt_tokens=250.0, mean_output_tokens=30.0),
        "pairs": manifest("pair", 80),
        "sketches": manifest("sketch", 80, prompt_tokens=800, response_tokens=3200),
        "evaluation": manifest("evaluate", 120, mean_answer_tokens=33.0),
    }
    found = with_measured(found, ITERATED, recipe, finished)
    assert (found.prompt, found.response, found.paired_response, found.pairs_per_prompt) == (10, 17.5, 20, 0.8)
    assert found.answer == 33.0
    assert (found.judge_prompt, found.judgement) == (250.0, 30.0)
    assert found.measured == ("generate", "judge", "pair", "sketch", "evaluate")
    judge = volumes(given(recipe, llama, found))["judge"]
    assert judge.prefill == judge.requests * 250 and judge.decode == judge.requests * 30


def test_bytes_of_a_row_that_a_run_has_are_taken(recipe: Recipe, llama: ModelShape) -> None:
    """Parquet of the result, without headers and footers; a direction is as large for any number of pairs."""
    beside = file_bytes(PAIRS)
    files = {
        "part-0.parquet": 900 + beside,
        "part-1.parquet": 100 + beside,
        "quarantine/part-2.parquet": 5000,
        "summary.json": 70,
    }
    of_scores = {"scores.parquet": 50 + file_bytes(SCORES), "direction.safetensors": 999}
    finished = {
        "pairs": Manifest("pair", 0, "", 10, 1.0, {}, stored=Stored.of(files)),
        "selection": Manifest("select", 0, "", 10, 1.0, {}, stored=Stored.of(of_scores)),
    }
    assert measured_row_bytes(PAIRS, finished["pairs"]) == 100.0
    lengths = with_measured(assumed_lengths(recipe, ASSUMED), ITERATED, recipe, finished)
    assert lengths.row_bytes == {"pair": 100.0, "select": 5.0}
    what = given(recipe, llama, lengths)
    counts = volumes(what)
    stored = {stage: estimate_of(stage).stored(what, counts[stage]) for stage in ("pair", "select")}
    assert stored["pair"] == counts["pair"].rows * 100 + beside
    direction = 2 * 4 * len(recipe.prompts.languages) * recipe.sketch.width
    assert stored["select"] == counts["select"].rows * 5 + 2 * file_bytes(SCORES) + direction


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_normal_numbers_shrink_to_their_entropy(dtype: str) -> None:
    """int8: the entropy of a normal distribution of standard deviation s is log2(s sqrt(2 pi e)) bits; here the
    greatest of 32,768 numbers, some 4.2 standard deviations, goes to 127."""
    share = stored_sketch_bytes(32768, dtype) / (32768 * np.dtype(dtype).itemsize)
    if dtype == "int8":
        assert share == pytest.approx(np.log2(127 / 4.2 * np.sqrt(2 * np.pi * np.e)) / 8, abs=0.02)
    assert 0.85 < share < 0.95


def test_flops_of_a_forward_pass(llama: ModelShape, recipe: Recipe) -> None:
    """2 N per token; attention at a context of 2,048 adds 4 * 32 * 4096 * 2048 to it."""
    assert forward_flops(llama, 1, 0, 0) == 2 * llama.body
    assert forward_flops(llama, 1, 2048, 1) == 2 * (llama.body + llama.head) + 4 * 32 * 4096 * 2048
    lengths = assumed_lengths(recipe, ASSUMED)
    what = given(recipe, llama, lengths)
    counts = volumes(what)

    def flops(stage: str) -> float:
        replicas = estimate_of(stage).replicas
        assert replicas is not None
        return replicas.flops(what, counts[stage])[0]

    sketch = flops("sketch")
    # A forward and a backward to the inputs: 4 N a token and a little more.
    assert 4 * llama.body < sketch / counts["sketch"].trained < 4.8 * llama.body
    train = flops("train")
    assert 8 * llama.body < train / counts["train"].trained < 10 * llama.body  # with checkpointing


def test_key_value_cache_of_a_token(llama: ModelShape, gemma: ModelShape, recipe: Recipe) -> None:
    assert kv_bytes_per_token(llama, recipe) == 128 * 1024  # 2 * 32 * 8 * 128 * 2 bytes
    assert kv_bytes_per_token(gemma, recipe) == 2 * 26 * 4 * 256 * 2


@pytest.mark.parametrize(("stage", "bytes_"), [(0, 2 + 4 + 12 / 8), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_optimiser_states_by_zero_stage(llama: ModelShape, recipe: Recipe, stage: int, bytes_: float) -> None:
    """The ZeRO paper's 2 + 2 + 12 bytes a parameter over 8 workers; stage 0 gathers gradients in float32."""
    settings = changed(recipe, "train", zero_stage=stage)
    parts = training_memory(llama, settings, load_profile("node-8gpu"), ASSUMED).parts
    states = sum(parts[name] for name in ("weights", "master_weights", "moments", "gradients"))
    assert states == pytest.approx(llama.parameters * bytes_)


def test_of_an_adapter_only_the_adapter_has_gradients_and_optimiser_states(
    llama: ModelShape, recipe: Recipe
) -> None:
    """r (in + out) numbers for every linear layer: 41,943,040 for r = 16 in all of Llama-3-8B's."""
    profile, length = load_profile("node-8gpu"), 2 * recipe.model.max_length
    adapted = changed(recipe, "train", zero_stage=0, lora=Lora(r=16, merge=False))
    trained = sum(16 * (out + into) for out, into in llama.linear)
    assert trainable_parameters(llama, adapted) == trained == 41_943_040
    assert trainable_parameters(llama, recipe) == llama.parameters
    parts = training_memory(llama, adapted, profile, ASSUMED).parts
    assert parts["weights"] == 2 * (llama.parameters + trained)
    assert [parts[name] for name in ("gradients", "moments")] == [4 * trained, trained]  # moments on 8 workers
    assert training_working_bytes(llama, adapted, length) < training_working_bytes(llama, recipe, length)
    assert policy_bytes(llama, adapted) == 2 * trained
    assert policy_bytes(llama, changed(recipe, "train", lora=Lora())) == policy_bytes(llama, recipe)
    quantized = changed(recipe, "train", zero_stage=0, lora=Lora(quantization="nf4"))
    fewer = parts["weights"] - training_memory(llama, quantized, profile, ASSUMED).parts["weights"]
    assert 1.4 * llama.body < fewer < 1.5 * llama.body


def test_a_few_layers_foretell_the_memory_of_all(
    gemma: ModelShape, llama: ModelShape, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peaks() -> list[int]:
        shapes = (gemma, llama)
        sketch = [sketch_working_bytes(shape, recipe, 1) for shape in shapes]
        return sketch + [training_working_bytes(shape, recipe, 6000) for shape in shapes]

    found = peaks()
    monkeypatch.setattr(rehearsal, "_LAYERS", 100)
    assert found == pytest.approx(peaks(), rel=0.01)


def test_checkpointing_takes_less_memory(llama: ModelShape, recipe: Recipe) -> None:
    without = changed(recipe, "train", gradient_checkpointing=False)
    assert training_working_bytes(llama, recipe, 4096) < training_working_bytes(llama, without, 4096) / 3
    checkpointed = changed(recipe, "sketch", gradient_checkpointing=True)
    assert sketch_working_bytes(llama, checkpointed, 1) < sketch_working_bytes(llama, recipe, 1) / 3


def test_replicas_time_and_cost(llama: ModelShape, recipe: Recipe) -> None:
    plan = planned(recipe, llama, "aws-a100")
    stages = {stage.stage: stage for stage in plan.stages}
    assert {name: stage.replicas for name, stage in stages.items() if stage.needed} == dict.fromkeys(
        ("baseline", "generate", "judge", "sketch", "train", "evaluate"), 16
    )
    generate = stages["generate"]
    assert generate.available == pytest.approx(39.5 * GIB * 0.9)
    assert generate.seconds is not None and generate.dollars is not None
    assert generate.dollars == pytest.approx((2 * 21.96 + 0.384) * generate.seconds / 3600)
    assert stages["baseline"].seconds is not None
    assert stages["baseline"].seconds > ASSUMED.engine_start_s > generate.seconds  # whose engine is up
    half = planned(recipe, llama, "aws-a100", ["engines.max_actors=4"])
    generate = next(stage for stage in half.stages if stage.stage == "generate")
    assert generate.replicas == 4
    assert generate.dollars is not None and generate.seconds is not None
    assert generate.dollars == pytest.approx((21.96 + 0.384) * generate.seconds / 3600)


def test_what_each_kind_of_judge_reads_writes_and_costs(llama: ModelShape, recipe: Recipe) -> None:
    lengths = assumed_lengths(recipe, ASSUMED)
    training, n = (
        len(recipe.prompts.languages) * recipe.prompts.train_per_language,
        recipe.generate.num_generations,
    )

    def of(**judge: Any) -> tuple[Plan, Volume]:
        values = recipe.model_dump()
        chosen = Recipe.model_validate(values | {"judge": judge})
        volume = volumes(given(chosen, llama, assumed_lengths(chosen, ASSUMED)))["judge"]
        where = load_profile("aws-a10g")
        assert where.cluster is not None
        asked = Planned(chosen, where, Shapes(llama, llama, llama), assumed_lengths(chosen, ASSUMED), ASSUMED)
        return plans.make_plan([STAGES["judge"]], asked, cluster_machine(where.cluster)), volume

    def judged(plan: Plan) -> Any:
        return plan.stages[0]

    _, reward = of(model="reward", method="reward_model")
    assert (reward.requests, reward.decode) == (training * n, 0)
    assert reward.prefill == pytest.approx(training * n * (lengths.prompt + lengths.response))
    _, pairwise = of(method="pairwise", comparisons=n, max_tokens=100, max_length=8192)
    assert pairwise.requests == training * 2 * n
    assert pairwise.decode == pytest.approx(pairwise.requests * 100 * ASSUMED.judgement_share)
    server = {"url": "http://localhost/v1", "model": "m", "requests_per_minute": 600}
    free, volume = of(endpoint=server, samples=1, max_tokens=100)
    assert judged(free).seconds == pytest.approx(recipe.iterations * training * n / 10)
    assert (judged(free).dollars, judged(free).needed, judged(free).flops) == (None, None, 0)
    priced, _ = of(endpoint=server | {"input_price": 2.0, "output_price": 8.0}, samples=1, max_tokens=100)
    cost = recipe.iterations * (2 * volume.prefill + 8 * volume.decode) / 1e6
    assert judged(priced).dollars == pytest.approx(cost)
    both, together = of(method="expected_score", also=[{"endpoint": server, "samples": 2}])
    assert together.requests == training * n * 3
    alone, _ = of(method="expected_score")
    extra = recipe.iterations * 2 * training * n / 10
    assert judged(both).flops == pytest.approx(judged(alone).flops)
    assert judged(both).seconds == pytest.approx(judged(alone).seconds + extra)


def test_what_is_short_is_reported_with_the_setting_that_fixes_it(llama: ModelShape, recipe: Recipe) -> None:
    greedy = changed(recipe, "train", zero_stage=1, gradient_checkpointing=False)
    plan = planned(greedy, llama, "aws-a100")
    assert [stage.stage for stage in plan.short] == ["train"]
    message = next(line for line in plan.advice if line.startswith("train needs"))
    assert "--set train.gradient_checkpointing=true" in message
    assert "--set train.zero_stage=3" in message


def test_a_pass_is_planned_for_the_budget_or_for_the_longest_pair(llama: ModelShape, recipe: Recipe) -> None:
    small, large = (changed(recipe, "train", max_tokens_per_batch=tokens) for tokens in (100, 16384))
    profile = load_profile("aws-a100")
    assert [pass_tokens(settings, profile) for settings in (small, recipe, large)] == [4096, 4096, 16384]
    longest, four = (training_memory(llama, settings, profile, ASSUMED) for settings in (small, large))
    assert 2 < four.parts["activations"] / longest.parts["activations"] < 4.1  # beside a chunk of logits
    plan = planned(changed(large, "train", zero_stage=1, gradient_checkpointing=False), llama, "aws-a100")
    message = next(line for line in plan.advice if line.startswith("train needs"))
    assert "--set train.max_tokens_per_batch=4096" in message


def test_an_engine_too_small_for_the_weights_is_advised_to_use_more_gpus(
    llama: ModelShape, recipe: Recipe
) -> None:
    plan = planned(changed(recipe, "model", dtype="float32"), llama, "aws-a10g")
    assert "generate" in [stage.stage for stage in plan.short]
    message = next(line for line in plan.advice if line.startswith("generate needs"))
    assert "engines.tensor_parallel_size: 2 and gpus: 2" in message


def test_stored_bytes(llama: ModelShape, recipe: Recipe) -> None:
    assert policy_bytes(llama, recipe) == 2 * 8_030_261_248
    stages = {stage.stage: stage for stage in planned(recipe, llama, "aws-a100").stages}
    assert 0.85 < stages["sketch"].stored / (180 * 131072) < 0.95  # int8, which zstd makes a little smaller


def test_a_wrong_assumption_is_refused_with_what_is_allowed() -> None:
    assert load_assumptions(["response_share=0.2"]).response_share == 0.2
    with pytest.raises(
        SettingsError,
        match=r"response_shares: no such setting \(did you mean response_share\?\); allowed here: prompt_share",
    ):
        load_assumptions(["response_shares=0.2"])
    with pytest.raises(SettingsError, match="prefill_mfu"):
        load_assumptions(["prefill_mfu=2"])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # M_0 answers first; then its engine is up. M_1 answers in evaluate, and generates in the next iteration.
        ({}, {"baseline": [1, 0], "sketch": [1, 1], "train": [1, 1], "evaluate": [1, 1]}),
        (
            {"judge": {"model": "another"}},
            {"baseline": [1, 0], "judge": [1, 1], "sketch": [1, 1], "train": [1, 1], "evaluate": [1, 1]},
        ),
        # M_0 compares last, so that M_1 starts again.
        (
            {"prompts": {"languages": ["en"], "evaluation": {"name": "prompts.jsonl"}}},
            {"baseline": [1, 0], "generate": [0, 1], "sketch": [1, 1], "train": [1, 1], "evaluate": [2, 2]},
        ),
    ],
)
def test_engines_that_are_up_are_not_started_again(
    sections: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    values = {"name": "x", "iterations": 2, "prompts": {"languages": ["en"]}} | sections
    recipe = Recipe.model_validate(values)
    estimates = {name: estimate_of(name) for name in STAGES if STAGES[name].estimate is not None}
    starts = dict(zip(estimates, starts_by_stage(list(estimates.values()), recipe), strict=True))
    assert {name: of_stage for name, of_stage in starts.items() if any(of_stage)} == expected
