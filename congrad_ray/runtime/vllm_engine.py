"""A vLLM engine as a Ray actor that any stage may ask: batches of requests in, one answer for each out."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from congrad_ray.modeling.source import ModelSource
from congrad_ray.runtime.notices import Notify

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass(frozen=True)
class Asked:
    """A request as an engine takes it: token ids and vLLM's SamplingParams as JSON.

    `key` names the row at work, for `runtime.attempts`.
    """

    key: str
    ids: Sequence[int]
    sampling: str


@dataclass(frozen=True)
class Answered:
    """What became of a request: a text, an `error` that vLLM raised, or nothing, since it kills its engines."""

    outcome: Literal["answered", "failed", "killed"]
    text: str = ""
    prompt_tokens: int = 0
    response_tokens: int = 0
    truncated: bool = False
    first_logprobs: Mapping[int, float] = field(default_factory=dict)
    error: str = ""


class EngineLog:
    """Which engines were started; an actor of the driver."""

    def __init__(self) -> None:
        self._starts = 0
        self._not_ready: Counter[str] = Counter()

    def starting(self, name: str) -> None:
        self._starts += 1
        self._not_ready[name] += 1

    def ready(self, name: str) -> None:
        self._not_ready[name] = 0

    def failed_starts(self, name: str) -> int:
        """How often in a row an engine began to start, or has begun now, without getting ready."""
        return self._not_ready[name]

    def starts(self) -> int:
        return self._starts


class VLLMEngine:
    """One engine, started by the first call of `ready`: also after Ray has restarted the actor.

    A model on an object store is copied, and an adapter merged, where the engine is. The actors of the driver come
    with the calls: with them among the constructor's arguments Ray does not promise to start the actor again.
    """

    def __init__(self, name: str, source: ModelSource, engine_kwargs: Mapping[str, Any]) -> None:
        self._name, self._source, self._kwargs = name, source, engine_kwargs
        self._llm: AsyncLLM | None = None
        self._starting, self._one_at_a_time = asyncio.Lock(), asyncio.Lock()
        self._asked = 0
        self._notifiers: dict[str, Notify] = {}

    async def ready(self, notify: Notify, log: Any) -> None:
        """Returns once the engine is up, as `log`, an EngineLog, knows. Raises what vLLM raises at its start."""
        async with self._starting:
            self._end_if_dead()
            if self._llm is not None:
                return
            await log.starting.remote(self._name)
            notify(f"starting vLLM for {self._source.name}")
            self._llm = self._start()
            log.ready.remote(self._name)
            notify(f"vLLM is ready: {self._source.name}")

    async def begin(self, notify: Notify, log: Any) -> None:
        """Starts the engine while its batches are still being read; `ready` says how that went."""
        with suppress(Exception):
            await self.ready(notify, log)

    def _start(self) -> AsyncLLM:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=self._source.local_path(), **self._kwargs))

    def _end_if_dead(self) -> None:
        """Ends this process where vLLM's own, which holds the model, is gone: Ray then starts another."""
        if self._llm is not None and self._llm.errored:
            # Not exit_actor: Ray would take that for the wish not to be started again.
            os._exit(1)

    async def ask(self, batch: Sequence[Asked], notify: Notify, of_driver: Any) -> list[Answered]:
        """The answers of a batch, in its order. Rows computed are reported by `notify`.

        `of_driver` is the actor of `runtime.attempts`: rows that ended engines again and again are asked one at a
        time, and then no longer.
        """
        self._end_if_dead()
        notify = self._notifiers.setdefault(notify.stage, notify)
        verdicts = await of_driver.begin.remote([asked.key for asked in batch])
        answers: dict[int, Answered] = {}

        async def answer(place: int) -> None:
            answers[place] = await self._answer(batch[place])
            notify.computed(1)

        together = [place for place, verdict in enumerate(verdicts) if verdict == "together"]
        if together:
            await asyncio.gather(*(answer(place) for place in together))
            notify.computed(0, last=True)
            await of_driver.end.remote([batch[place].key for place in together])
        for place, verdict in enumerate(verdicts):
            if verdict == "alone":
                async with self._one_at_a_time:
                    await of_driver.begin_alone.remote(batch[place].key)
                    await answer(place)
                    await of_driver.end.remote([batch[place].key])
            elif verdict == "never":
                answers[place] = Answered("killed")
        return [answers[place] for place in range(len(batch))]

    async def _answer(self, asked: Asked) -> Answered:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._llm is not None
        self._asked += 1
        try:
            values = json.loads(asked.sampling)
            if "structured_outputs" in values:
                values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
            sampling = SamplingParams(**values, output_kind=RequestOutputKind.FINAL_ONLY)
            prompt: Any = {"prompt_token_ids": list(asked.ids)}
            outputs = [found async for found in self._llm.generate(prompt, sampling, str(self._asked))]
        except EngineDeadError:
            os._exit(1)
        except Exception as error:  # of this request alone, whatever vLLM raises
            return Answered("failed", error=f"{type(error).__name__}: {error}")
        return _answered(outputs[-1])

    def stop(self) -> None:
        """Ends vLLM's processes."""
        if self._llm is not None:
            self._llm.shutdown()


def _answered(output: RequestOutput) -> Answered:
    found = output.outputs[0]
    first = found.logprobs[0] if found.logprobs else {}
    return Answered(
        "answered",
        found.text,
        len(output.prompt_token_ids or ()),
        len(found.token_ids),
        found.finish_reason == "length",
        {int(token): float(entry.logprob) for token, entry in first.items()},
    )
