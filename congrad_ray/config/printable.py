"""Text that others wrote, as it may stand in a message, a log line or a table on a terminal."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path

# Level of log records that only move a progress bar, between DEBUG and INFO. They, and the occasional ones at INFO
# that stand for them where there is no bar, have an attribute `bar`: (done, total).
BAR = 15

_LONGEST = 200

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _LONGEST
_repr.maxlevel = 4


def printable(text: object, lines: bool = False) -> str:
    """The text with escapes (\\x1b) for what a terminal could act on, what nobody sees, and what is no Unicode.

    That is control and formatting characters, those that turn the direction of writing among them, and lone
    surrogates. With `lines` line ends and tabs stay.
    """
    return "".join(
        c if c.isprintable() or (lines and c in "\n\t") else c.encode("unicode_escape").decode() for c in str(text)
    )


def brief(text: object) -> str:
    """`printable`, cut after 200 characters."""
    whole = str(text)
    return printable(whole[:_LONGEST]) + ("..." if len(whole) > _LONGEST else "")


def shown(value: object) -> str:
    """A value of any type in Python's notation, cut in length and depth."""
    return brief(_repr.repr(value))


def without_keys(uri: str | Path) -> str:
    """A path or URI as it may be printed: without user part and query, which may hold keys."""
    text = str(uri)
    return re.sub("://.*@", "://", text).partition("?")[0] if "://" in text else text
