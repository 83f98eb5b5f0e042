"""The tags in a piece of HTML by their positions, as CommonMark defines a tag; nothing else in it is touched."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

ATTRIBUTE = re.compile(
    r"""\s++(?P<name>[a-z_:][\w:.-]*+)(?:\s*+=\s*+(?:"(?P<double>[^"]*+)"|'(?P<single>[^']*+)'|(?P<bare>[^\s"'=<>`]++)))?""",
    re.IGNORECASE | re.ASCII,
)
TAG = re.compile(
    r"""<(?P<closing>/?)(?P<name>[a-z][a-z0-9-]*+)"""
    r"""(?P<attributes>(?:\s++[a-z_:][\w:.-]*+(?:\s*+=\s*+(?:"[^"]*+"|'[^']*+'|[^\s"'=<>`]++))?+)*+)\s*+/?>""",
    re.IGNORECASE | re.ASCII,
)
RAW_TEXT = ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes", "plaintext")
"""Elements whose content is text up to their end tag."""


@dataclass(frozen=True)
class Attribute:
    """An attribute with its value unescaped; `start` and `end` are where the written value stands, without quotes."""

    name: str
    value: str
    start: int
    end: int
    quoted: bool


@dataclass(frozen=True)
class Tag:
    """One start or end tag; positions count from the beginning of the text that it was found in.

    `content_end` is where the content of an element that holds plain text ends, and `end` for any other tag.
    """

    name: str
    closing: bool
    start: int
    end: int
    content_end: int
    name_start: int
    attributes: tuple[Attribute, ...]


def tags(text: str) -> Iterator[Tag]:
    """The tags of `text`, without those in comments and in elements that hold plain text."""
    position = 0
    while (position := text.find("<", position)) >= 0:
        if text.startswith("<!--", position):
            position = _after(text, "-->", position + 4)
        elif match := TAG.match(text, position):
            tag = _tag(match)
            yield tag
            position = tag.content_end
        else:
            position += 1


def _tag(match: re.Match[str]) -> Tag:
    attributes = tuple(_attribute(item) for item in ATTRIBUTE.finditer(match.string, *match.span("attributes")))
    closing, name = bool(match["closing"]), match["name"].lower()
    end = match.end() if closing or name not in RAW_TEXT else _raw_end(match.string, name, match.end())
    return Tag(name, closing, match.start(), match.end(), end, match.start("name"), attributes)


def _raw_end(text: str, name: str, position: int) -> int:
    match = re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE).search(text, position)
    return match.start() if match else len(text)


def _attribute(match: re.Match[str]) -> Attribute:
    kind = match.lastgroup if match.lastgroup != "name" else None
    start, end = match.span(kind) if kind else (match.end(), match.end())
    value = html.unescape(match[kind]) if kind else ""
    return Attribute(match["name"].lower(), value, start, end, kind in ("double", "single"))


def _after(text: str, mark: str, position: int) -> int:
    end = text.find(mark, position)
    return len(text) if end < 0 else end + len(mark)
