"""The site is built without a warning, and asks for nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the site is built with mkdocs-material")
ROOT = Path(__file__).resolve().parents[2]


def test_the_site_is_built_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    loaded = {
        address
        for text in pages.values()
        for tag in re.findall(r"<(?:script|link|img)[^>]*>", text)
        for address in re.findall(r'(?:src|href)="(https?:[^"]*)"', tag)
    }
    assert loaded == set()
    # Links to code lead out of docs/ and are plain text on the site.
    assert not [page for page, text in pages.items() if re.search(r'href="[^"]*\.(?:py|yaml)"', text)]
