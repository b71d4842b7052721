"""Reading HTML pages."""

import re
from html.parser import HTMLParser
from typing import Any

ATTACK = '</dd></style></script><script>alert(1)</script><img src=x onerror=alert(2)><!--{{ 7 * 7 }}" onclick="x'
"""A text that would do something on a page that does not escape it, or ends an element of it."""


class Page(HTMLParser):
    """Every element of a page with its attributes, checked to close what it opens."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []  # those that run
        self.texts: dict[str, str] = {}  # of the other script elements, by id
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes = self.elements[-1][1]
            if "type" in attributes:
                self.texts[attributes["id"]] = self.texts.get(attributes["id"], "") + data
            else:
                self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def words(page: str) -> str:
    """The text of a page with single spaces, without its scripts."""
    shown = re.sub(r"<script.*?</script>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", shown))
