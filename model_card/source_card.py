"""The source's own card: its front matter as data, its text quoted. It is never a template."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$\r?\n?", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
HEADING = re.compile(r"^( {0,3})(#{1,6})(?=[ \t]|$)")
UNDERLINE = re.compile(r"^ {0,3}(=+|-+)[ \t]*$")
NOT_A_PARAGRAPH = re.compile(r"^\s*$|^ {4}|^ {0,3}(?:[#>|<]|[-*+][ \t]|\d+[.)][ \t])")
HTML_HEADING = re.compile(r"(</?h)([1-6])(?=[\s>])", re.IGNORECASE)
IMAGE = re.compile(r"(?P<before>!\[[^\[\]\n]*\]\(\s*<?)(?P<target>[^)\s>]+)")
LINK = re.compile(r"(?P<before>\]\(\s*<?)(?P<target>[^)\s>]+)")
DEFINITION = re.compile(r"(?P<before>^ {0,3}\[[^\[\]\n]+\]:\s*<?)(?P<target>[^\s>]+)")
HTML_TARGET = re.compile(r"(?P<before>\b(?P<name>src|href)\s*=\s*[\"'])(?P<target>[^\"'\n]+)", re.IGNORECASE)
ABSOLUTE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//|#)", re.IGNORECASE)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".avif")
DEEPEST = 6


@dataclass(frozen=True)
class SourceCard:
    """A card taken apart: its metadata, its text, and why its metadata could not be read, where it could not."""

    metadata: Mapping[str, Any]
    body: str
    problem: str | None = None


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without what a card has no use for: aliases, which can grow without bound, and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which no card needs")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.YAMLError(f"the key {name!r} twice, again in line {key.start_mark.line + 1}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def split(card: str) -> SourceCard:
    """Front matter and body of a card; front matter that is not a mapping in plain YAML counts as none."""
    matter = FRONT_MATTER.match(card)
    if not matter:
        return SourceCard({}, card)
    body = card[matter.end() :]
    try:
        metadata = yaml.load(matter.group(1), _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that no calendar has
        return SourceCard({}, body, _in_one_line(error))
    if metadata is None:
        return SourceCard({}, body)
    if not isinstance(metadata, dict):
        return SourceCard({}, body, "it is not a mapping")
    return SourceCard(metadata, body)


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
        elif (level := _underlined(lines, line)) is not None:
            lines[-1] = f"{'#' * min(DEEPEST, level + demote_by)} {lines[-1].strip()}"
            continue
        else:
            line = _demoted(line, demote_by)
            line = _outside_code(line, lambda text: _absolute(text, base)) if base else line
        lines.append(line.rstrip("\r"))
    if fence is not None:
        lines.append(fence)
    return "\n".join(lines)


def _underlined(lines: list[str], line: str) -> int | None:
    """The level of the heading that `line` makes of the one before it, as `====` and `----` do."""
    mark = UNDERLINE.match(line)
    if not mark or not lines or NOT_A_PARAGRAPH.match(lines[-1]):
        return None
    if len(lines) > 1 and not re.match(r"^\s*$|^#", lines[-2]):
        return None
    return 1 if mark.group(1)[0] == "=" else 2


def _demoted(line: str, by: int) -> str:
    line = HEADING.sub(lambda match: match.group(1) + "#" * min(DEEPEST, len(match.group(2)) + by), line)
    return HTML_HEADING.sub(lambda match: f"{match.group(1)}{min(DEEPEST, int(match.group(2)) + by)}", line)


def _outside_code(line: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else change(part) for part in parts)


def _absolute(text: str, base: str) -> str:
    def image(match: re.Match[str]) -> str:
        return match["before"] + _joined(match["target"], base, "resolve")

    def link(match: re.Match[str]) -> str:
        return match["before"] + _joined(match["target"], base, "blob")

    def html(match: re.Match[str]) -> str:
        return image(match) if match["name"].lower() == "src" else link(match)

    return HTML_TARGET.sub(html, DEFINITION.sub(link, LINK.sub(link, IMAGE.sub(image, text))))


def _joined(target: str, base: str, kind: str) -> str:
    if ABSOLUTE.match(target):
        return target
    if PurePosixPath(target.lower()).suffix in IMAGE_SUFFIXES:
        kind = "resolve"
    return f"{base.format(kind=kind)}/{target.removeprefix('./').lstrip('/')}"


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
