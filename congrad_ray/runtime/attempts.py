"""Rows that kill their workers: found by the attempts that never ended, and quarantined instead of tried for ever.

Ray restarts an actor that died and hands it the same rows again. Here every worker says what it begins and what it
has ended, so that what a dead worker was at is known. Rows that were in a batch whose worker died several times
are tried one at a time, and one whose worker then dies again is not tried any more. A worker that was killed by
something else, a spot node above all, costs its rows nothing but the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from congrad_ray.data.tables import failure
from congrad_ray.runtime.driver_actors import driver_actor

Verdict = Literal["together", "alone", "never"]

# Deaths of a batch's worker before its rows are tried one at a time. More than one: rows worked on in other
# company give other last bits, which nodes that are taken away should not bring about.
_DEATHS_TOGETHER = 3
# Deaths while at nothing but this row. More than one, for the same nodes.
_DEATHS_ALONE = 2


class Attempts:
    """What is being worked on; one Ray actor of a driver, which dies with it. Rows go by keys of their own."""

    def __init__(self) -> None:
        self._together: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()

    def begin(self, keys: Sequence[str]) -> list[Verdict]:
        """How each row may be worked on; those that may be worked on together are counted as begun."""
        verdicts = [self._verdict(key) for key in keys]
        self._together.update(key for key, verdict in zip(keys, verdicts, strict=True) if verdict == "together")
        return verdicts

    def begin_alone(self, key: str) -> None:
        self._alone[key] += 1

    def end(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._together.pop(key, None)
            self._alone.pop(key, None)

    def _verdict(self, key: str) -> Verdict:
        if self._alone[key] >= _DEATHS_ALONE:
            return "never"
        return "alone" if self._together[key] >= _DEATHS_TOGETHER else "together"


def attempts() -> Any:
    """The actor of the connected Ray's driver."""
    return driver_actor(Attempts)


def attempt(actor: Any, keys: Sequence[str], work: Callable[[list[int]], None]) -> list[int]:
    """Calls `work` with the places of rows: of all that may be worked on together, then of others one at a time.

    Returns the places of the rows that must not be tried again.
    """
    import ray

    verdicts: list[Verdict] = ray.get(actor.begin.remote(keys))
    together, alone, never = (
        [place for place, found in enumerate(verdicts) if found == verdict]
        for verdict in ("together", "alone", "never")
    )
    if together:
        work(together)
        ray.get(actor.end.remote([keys[place] for place in together]))
    for place in alone:
        ray.get(actor.begin_alone.remote(keys[place]))
        work([place])
        ray.get(actor.end.remote([keys[place]]))
    return never


def killed_worker() -> dict[str, str]:
    """The failure of a row that must not be tried again."""
    deaths = _DEATHS_TOGETHER + _DEATHS_ALONE
    return failure(
        "killed_worker",
        f"the process at work on it died {deaths} times, {_DEATHS_ALONE} of them at nothing but this row; what "
        "it said is in the logs of its node, by default in /tmp/ray/session_latest/logs",
    )
