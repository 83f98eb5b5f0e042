"""docs/architecture.md and CONTRIBUTING.md name what is there, and leave no room out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
TOP = ("quantize/", "model_card/", "tests/", "scripts/", "docs/", ".github/")


def named_paths(page: str) -> set[str]:
    """What stands in backquotes and looks like a path from the project's root."""
    text = (ROOT / page).read_text("utf-8")
    return {word for word in re.findall(r"`([\w./-]+)`", text) if word.startswith(TOP)}


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page: str) -> None:
    paths = named_paths(page)
    assert len(paths) > 10
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_every_room_is_named() -> None:
    rooms = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "quantize").rglob("*/__init__.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "quantize").glob("*.py")}
    named = named_paths("docs/architecture.md")
    assert (rooms | modules) - {"quantize/", "quantize/__main__.py"} - named == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
