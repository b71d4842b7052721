"""What mkdocs does with a page before it renders it (see mkdocs.yml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to code lead out of docs/, where the site has nothing: there they become plain text."""
    folder = (DOCS / page.file.src_path).parent

    def shown(link: re.Match[str]) -> str:
        text, target = link.groups()
        inside = (folder / target.partition("#")[0]).resolve().is_relative_to(DOCS)
        return link[0] if inside or "://" in target else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", shown, markdown)
