"""The source's own card: its front matter as data, its text quoted. It is never a template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$\r?\n?", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
HEADING = re.compile(r"^( {0,3})(#{1,6})(?=[ \t]|$)")
MARKDOWN_TARGET = re.compile(r"(?P<before>(?P<image>!?)\[[^\]\n]*\]\(\s*<?)(?P<target>[^)\s>]+)")
HTML_TARGET = re.compile(r"(?P<before>(?P<name>\bsrc|\bhref)\s*=\s*[\"'])(?P<target>[^\"']+)", re.IGNORECASE)
ABSOLUTE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//|#)", re.IGNORECASE)
DEEPEST = 6


def split(card: str) -> tuple[Mapping[str, Any], str]:
    """Front matter and body of a card; what is not a mapping in safe YAML counts as no front matter."""
    found = FRONT_MATTER.match(card)
    if not found:
        return {}, card
    try:
        metadata = yaml.safe_load(found.group(1))
    except (yaml.YAMLError, ValueError):  # ValueError: a date that no calendar has
        return {}, card[found.end() :]
    return metadata if isinstance(metadata, dict) else {}, card[found.end() :]


def quote(body: str, base: str | None, demote_by: int = 2) -> str:
    """`body` with headings `demote_by` levels lower and relative targets made absolute against `base`.

    `base` is the source's address at its commit with a `{kind}` in it: `resolve` for images, `blob` for links.
    Code, fenced or inline, stays as it is.
    """
    lines: list[str] = []
    fence: str | None = None
    for line in body.strip("\r\n").splitlines():
        mark = FENCE.match(line)
        if fence is None and mark:
            fence = mark.group(1)
        elif fence is not None:
            closes = line.strip().startswith(fence) and not line.strip().strip(fence[0])
            fence = None if closes else fence
        else:
            line = _demoted(line, demote_by)
            line = _outside_code(line, lambda text: _absolute(text, base)) if base else line
        lines.append(line.rstrip("\r"))
    if fence is not None:
        lines.append(fence)
    return "\n".join(lines)


def _demoted(line: str, by: int) -> str:
    return HEADING.sub(lambda found: found.group(1) + "#" * min(DEEPEST, len(found.group(2)) + by), line)


def _outside_code(line: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else change(part) for part in parts)


def _absolute(text: str, base: str) -> str:
    def markdown(found: re.Match[str]) -> str:
        return found["before"] + _joined(found["target"], base, "resolve" if found["image"] else "blob")

    def html(found: re.Match[str]) -> str:
        return found["before"] + _joined(found["target"], base, "resolve" if found["name"].lower() == "src" else "blob")

    return HTML_TARGET.sub(html, MARKDOWN_TARGET.sub(markdown, text))


def _joined(target: str, base: str, kind: str) -> str:
    if ABSOLUTE.match(target):
        return target
    return f"{base.format(kind=kind)}/{target.removeprefix('./').lstrip('/')}"
