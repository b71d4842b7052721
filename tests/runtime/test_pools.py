"""Which engines there are, which of them serve whom, and which make room, without an engine."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import given
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from congrad_ray.config.profile import Engines, Profile
from congrad_ray.config.recipe import Model, Recipe
from congrad_ray.config.settings import SettingsError, validate
from congrad_ray.modeling.source import ModelSource
from congrad_ray.runtime import engines as asking
from congrad_ray.runtime.engines import AskEngines
from congrad_ray.runtime.notices import Notify
from congrad_ray.runtime.pools import EngineSpec, Hold, engine_spec, in_the_way, positions, room
from congrad_ray.runtime.resources import Node
from congrad_ray.runtime.vllm_engine import Answered, Asked


def _source(folder: Path, max_length: int = 64, longest: int = 0) -> ModelSource:
    settings = Model(name=str(folder), dtype="float32", max_length=max_length)
    return ModelSource(str(folder), settings, longest=longest)


def _gpu(**engines: Any) -> Profile:
    others = {"sketchers": {"gpus": 1.0}, "trainers": {"gpus": 1.0}}
    return Profile.model_validate({"name": "x", "device": "cuda", "engines": engines, **others})


def _spec(cpus: float = 1.0, gpus: float = 0.0, bundles: int = 1, placement: str = "STRICT_PACK") -> EngineSpec:
    source = ModelSource("m", Model(name="m"))
    return EngineSpec(source, {"max_model_len": 1}, {"CPU": cpus, "GPU": gpus}, bundles, placement, {})


def test_engines_on_a_cpu_compute_whole_prompts(tiny_model: Path) -> None:
    profile = Profile(name="local", threads=3)
    spec = engine_spec(_source(tiny_model), profile, profile.engines)
    assert spec.engine_kwargs["enable_chunked_prefill"] is False
    assert spec.engine_kwargs["max_num_batched_tokens"] >= spec.engine_kwargs["max_model_len"] == 64
    assert spec.environment["OMP_NUM_THREADS"] == "3"
    # Not the waiting that replicas are configured with: decoding would take a third longer and more.
    assert int(spec.environment["GOMP_SPINCOUNT"]) > 0
    weights = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors")) / 2**30
    assert spec.memory_gib == pytest.approx(weights + 1 + 1)


def test_engine_settings_on_gpus_share_the_bundle_over_tensor_parallel_workers(tiny_model: Path) -> None:
    profile = _gpu(min_actors=1, max_actors=2, cpus=8.0, gpus=4.0, tensor_parallel_size=4)
    spec = engine_spec(_source(tiny_model), profile, profile.engines)
    assert (spec.bundle, spec.bundles) == ({"CPU": 2.0, "GPU": 1.0}, 4)
    assert spec.engine_kwargs["tensor_parallel_size"] == 4
    assert spec.engine_kwargs["enforce_eager"] is False
    assert spec.environment == {}
    assert spec.hold(2) == Hold(8.0, 4.0, 2)
    assert replace(spec, placement="PACK").hold(2) == Hold(2.0, 1.0, 8)


def test_an_engine_is_as_long_as_any_stage_asks_and_the_model_is(tiny_model: Path) -> None:
    profile = Profile(name="local")
    assert json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"] > 100

    def length(**given: int) -> int:
        return engine_spec(_source(tiny_model, **given), profile, profile.engines).length

    most = positions(_source(tiny_model))
    assert most is not None
    assert length() == 64
    assert length(longest=100) == 100
    assert length(max_length=90, longest=70) == 90
    assert length(longest=most + 1) == most
    assert length(max_length=most + 5, longest=most + 9) == most + 5  # which vLLM refuses, and says so


def test_one_engine_serves_stages_of_every_length_but_no_other_model_or_settings(tiny_model: Path) -> None:
    profile = Profile(name="local")
    spec = engine_spec(_source(tiny_model, 64), profile, profile.engines)
    longer = engine_spec(_source(tiny_model, 100), profile, profile.engines)
    assert longer.serves(spec) and not spec.serves(longer) and longer.serves(longer)
    other_model = replace(_source(tiny_model), fingerprint="a policy's")
    other_type = replace(_source(tiny_model), settings=Model(name="m", dtype="bfloat16", max_length=64))
    for source in (other_model, other_type):
        assert not engine_spec(source, profile, profile.engines).serves(spec)
    for settings in ({"cpus": 2.0}, {"max_num_seqs": 8}, {"engine_kwargs": {"quantization": "fp8"}}):
        engines = Engines.model_validate(settings)
        assert not engine_spec(_source(tiny_model), profile, engines).serves(spec)
    more = Engines(max_actors=4)  # a larger pool of the same engines, with the same threads
    assert engine_spec(_source(tiny_model), Profile(name="x", threads=1), more).key == (
        engine_spec(_source(tiny_model), Profile(name="x", threads=1), Engines()).key
    )


def test_engine_kwargs_go_before_ours_and_not_where_another_setting_is_meant(tiny_model: Path) -> None:
    given = {"engine_kwargs": {"enable_prefix_caching": False, "quantization": "fp8"}}
    profile = validate(Profile, {"name": "x", "engines": given}, "x")
    kwargs = engine_spec(_source(tiny_model), profile, profile.engines).engine_kwargs
    assert (kwargs["enable_prefix_caching"], kwargs["quantization"]) == (False, "fp8")
    for name in ("model", "max_model_len", "tensor_parallel_size", "max_num_seqs"):
        with pytest.raises(SettingsError, match=rf"{name} is not taken from here: set "):
            validate(Profile, {"name": "x", "engines": {"engine_kwargs": {name: 1}}}, "x")


def test_judge_engines_are_a_section_of_their_own_or_engines() -> None:
    assert (profile := Profile(name="x")).engines_of("judge_engines") is profile.engines
    assert "judge_engines" in Profile.model_fields
    own = Profile.model_validate({"name": "x", "judge_engines": {"cpus": 3}})
    assert own.engines_of("judge_engines").cpus == 3 and own.engines_of("engines").cpus == 1
    with pytest.raises(ValueError, match=r"device is cpu but judge_engines.gpus is 1"):
        Profile.model_validate({"name": "x", "judge_engines": {"gpus": 1}})


@pytest.mark.parametrize(
    ("judge", "compared_by", "asked", "longest"),
    [
        ("policy", "start", "policy", 900),
        ("policy", "other", "policy", 600),
        ("other", "start", "policy", 900),
        ("other", "other", "policy", 500),
        ("other", "other", "other", 900),
        ("other", "start", "other", 600),
        ("own", "other", "policy", 600),  # the recipe's model by its name
        ("policy", "start", "other", 0),
    ],
)
def test_the_longest_sequence_asked_of_a_model(judge: str, compared_by: str, asked: str, longest: int) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"name": "own", "max_length": 500},
            "prompts": {"languages": ["en"]},
            "generate": {"max_tokens": 50},
            "judge": {"model": judge, "max_tokens": 50, "max_length": 600},
            "evaluate": {
                "judge": compared_by,
                "max_tokens": 50,
                "judge_max_tokens": 50,
                "judge_max_length": 900,
            },
        }
    )
    assert recipe.longest_asked(asked) == longest


def test_room_is_by_node_and_what_is_there_takes_its_place_wherever_it_may_be() -> None:
    nodes = [Node("a", 16, 4, 2)]
    assert room(nodes, _spec(1, 1), [], math.inf) == 8
    assert room(nodes, _spec(8, 1), [], math.inf) == 4  # by its CPUs
    assert room(nodes, _spec(1, 1, bundles=4), [], math.inf) == 2
    assert room(nodes, _spec(1, 3), [], math.inf) == 2  # one GPU of each node is left
    # Two engines of one GPU may be on one node or on two: nothing is sure for one of four.
    assert room(nodes, _spec(1, 1, bundles=4), [Hold(1, 1, 2)], math.inf) == 0
    assert room(nodes, _spec(1, 1, bundles=4, placement="PACK"), [Hold(1, 1, 2)], math.inf) == 1
    assert room(nodes, _spec(1, 1), [Hold(1, 2, 2)], math.inf) == 4
    assert room([Node("a", 4, 0)], _spec(1), [Hold(1), Hold(1, count=2)], math.inf) == 1
    heavy = replace(_spec(1), memory_gib=3.0)
    assert room([Node("a", 9, 0)], heavy, [Hold(1, memory_gib=4.0)], 11.0) == 2
    assert room([Node("a", 9, 0)], heavy, [Hold(1, memory_gib=math.inf)], 11.0) == 0


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=6),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_room_holds_however_the_others_lie(others: list[tuple[int, int]], cpus: int, nodes: list[int]) -> None:
    """Against every placement: `others` are (node, CPUs)."""
    free = list(nodes)
    held = []
    for place, size in others:
        if place < len(free) and free[place] >= size:
            free[place] -= size
            held.append(Hold(size))
    fitting = sum(left // cpus for left in free)
    assert room([Node(str(n), size, 0) for n, size in enumerate(nodes)], _spec(cpus), held, math.inf) <= fitting


@pytest.mark.parametrize(
    ("cpus", "count", "held", "useless", "going"),
    [
        (8, 1, [Hold(1), Hold(1)], [False, False], []),
        (3, 1, [Hold(1), Hold(1)], [False, False], [0]),  # one CPU is for data, one was used longest ago
        (2, 1, [Hold(1), Hold(1)], [False, False], [0, 1]),
        (8, 1, [Hold(1), Hold(1)], [False, True], [1]),
        (5, 2, [Hold(1), Hold(1), Hold(1)], [False, False, True], [2]),
        (4, 2, [Hold(1), Hold(1), Hold(1)], [False, False, True], [2, 0]),
        (1, 1, [Hold(1)], [False], [0]),
    ],
)
def test_those_used_longest_ago_make_room(
    cpus: int, count: int, held: Sequence[Hold], useless: Sequence[bool], going: list[int]
) -> None:
    nodes = [Node("a", cpus, 0)]
    assert in_the_way(nodes, _spec(1), count, held, useless, Hold(1), math.inf) == going


class _Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class _FakeEngine:
    """As an actor's handle; `lives`: how many batches each of its lives answers before it ends, and no more lives.

    A life of None is one in which it does not get ready.
    """

    def __init__(self, lives: list[int | None]) -> None:
        self.lives = lives
        self.most = self.at_once = self.answered = self.begun = 0
        self.ready = _Method(self._ready)
        self.ask = _Method(self._ask)

    async def _ready(self, notify: Notify, log: Any) -> None:
        if not self.lives:
            raise ActorDiedError()
        if self.lives[0] is None:
            self.lives.pop(0)
            self.begun += 1
            raise ActorUnavailableError("starting", None)
        self.begun = 0

    async def _ask(self, asked: list[Asked], notify: Notify, of_driver: Any) -> list[Answered]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= 1
        if not self.lives or self.lives[0] is None:
            raise ActorUnavailableError("restarting", None)
        if self.lives[0] == 0:
            self.lives.pop(0)
            raise ActorUnavailableError("ended", None)
        self.lives[0] -= 1
        self.answered += len(asked)
        return [Answered("answered", one.sampling) for one in asked]


def _asked_of(
    engines: Sequence[_FakeEngine], batches: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The texts of all rows, those that need no engine included."""
    monkeypatch.setattr(asking, "_LOOK_AGAIN", 0.0)

    class Log:
        async def _failed(self, name: str) -> int:
            return engines[int(name)].begun

        failed_starts = property(lambda self: _Method(self._failed))

    async def work() -> list[str]:
        ask = AskEngines({str(n): engine for n, engine in enumerate(engines)}, each, Log(), None, Notify())

        async def one(number: int) -> list[str]:
            rows = [
                {"row": str(n), "failure": "" if n else "bad", "ids": [n], "sampling": f"{number}.{n}"}
                for n in range(3)
            ]
            [table] = [table async for table in ask(pa.Table.from_pylist(rows))]
            assert table["row"].to_pylist() == ["0", "1", "2"]
            return [json.loads(text)["text"] if text else "" for text in table["answer"].to_pylist()]

        return [text for texts in await asyncio.gather(*map(one, range(batches))) for text in texts]

    return asyncio.run(work())


@pytest.mark.parametrize(
    "lives",
    [
        [[99]],
        [[99], [99]],
        [[3, 2, 99]],  # it ends twice
        [[0, 0, 99], [1, 99]],
        [[2], [99]],  # one ends for good
        [[None, None, 99]],  # it fails to start twice
        [[None, None, None], [99]],  # and once more: it is given up
        [[], [99]],
    ],
)
def test_every_batch_is_answered_once_whatever_ends(
    lives: list[list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [_FakeEngine(list(of_one)) for of_one in lives]
    texts = _asked_of(engines, 12, 3, monkeypatch)
    assert texts == [text for number in range(12) for text in ("", f"{number}.1", f"{number}.2")]
    assert sum(engine.answered for engine in engines) == 24
    assert all(engine.most <= 3 for engine in engines)


def test_batches_go_to_the_least_busy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [_FakeEngine([99]), _FakeEngine([99])]
    _asked_of(engines, 4, 3, monkeypatch)
    assert [engine.most for engine in engines] == [2, 2]


@pytest.mark.parametrize("lives", [[[]], [[2]], [[None, None, None]], [[1], [None, None, None, 9]]])
def test_without_an_engine_left_the_last_one_s_error_is_raised(
    lives: list[list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RayError):
        _asked_of([_FakeEngine(of_one) for of_one in lives], 12, 3, monkeypatch)
