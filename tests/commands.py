"""Commands that a test ran in its own process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str
