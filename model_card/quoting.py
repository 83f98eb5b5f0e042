"""The source's own text quoted: deeper headings and absolute addresses, everything else as it was written."""

from __future__ import annotations

import bisect
import functools
import html
import itertools
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from model_card import html_tags
from model_card.markdown import SPAN, parser

if TYPE_CHECKING:
    from markdown_it.token import Token

ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)
CANDIDATE = re.compile(r"(?P<address>[^\s,](?:\S*[^\s,])?)(?P<size>[^,]*)")
"""One picture of a srcset, with the width or density that it is for."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".avif")
SHOWN = ("src", "poster", "data", "background")
"""Attributes of HTML whose file is shown in the page, where `href` leads to another page."""
HEADING = re.compile(r"h[1-6]")
CLOSING_MARKS = re.compile(r"(?<!\S)#+$")
BLANKS = " \t"
DEEPEST = 6
LONGEST = 500_000

Edit = tuple[int, int, str]
"""Start, end, and what stands there instead."""


@dataclass(frozen=True)
class Quotation:
    """How a text is quoted. `base` is the source's address at its commit with a `{kind}` in it: `resolve` for what
    is shown, `blob` for links; without one, relative addresses stay."""

    text: str
    base: str | None
    demote_by: int

    def written(self) -> str:
        """The quoted text."""
        tokens = parser().parse(self.text)
        lines = Lines(self.text)
        edits = sorted(itertools.chain.from_iterable(self._edits(tokens, lines)))
        return _applied(self.text, edits) + _end_of_fence(tokens, lines)

    def _edits(self, tokens: list[Token], lines: Lines) -> Iterator[Iterator[Edit]]:
        row = end_of_row = 0
        for index, token in enumerate(tokens):
            if token.type == "heading_open":
                yield self._heading(token, tokens[index + 1].content, lines)
            elif token.type == "html_block" and token.map:
                yield self._tags(token.content, 0, lines.fragment(token.content, token.map[0]))
            elif token.type == "definition" and token.map:
                yield self._definition(token, lines)
            elif token.type == "tr_open" and token.map:
                row, end_of_row = lines.starts[token.map[0]], lines.ends[token.map[0]]
            elif token.type == "inline" and token.map and tokens[index - 1].type in ("th_open", "td_open"):
                fragment = lines.cell(token.content, row, end_of_row)
                row = fragment.at(len(token.content)) or row
                yield self._inline(token, fragment)
            elif token.type == "inline" and token.map:
                yield self._inline(token, lines.fragment(token.content, token.map[0]))

    def _heading(self, token: Token, content: str, lines: Lines) -> Iterator[Edit]:
        """A heading some levels deeper; one that is underlined gets marks instead, since there are only two lines."""
        assert token.map is not None
        marks = "#" * min(DEEPEST, int(token.tag[1:]) + self.demote_by)
        begin, end = lines.starts[token.map[0]], lines.ends[token.map[1] - 1]
        if token.markup.startswith("#"):
            position = self.text.index("#", begin)
            yield position, position + len(token.markup), marks
            return
        parts = list(lines.fragment(content, token.map[0]).parts())
        if not parts:
            return
        yield parts[0][0], parts[0][0], f"{marks} "
        for (_, before), (after, _) in itertools.pairwise(parts):
            line = self.text[begin:before]
            mark = (len(line) - len(line.rstrip("\\"))) % 2
            breaks = mark or self.text.startswith("  ", before)
            yield before - mark, after, "<br>" if breaks else " "
        yield parts[-1][1], end, ""
        if closing := CLOSING_MARKS.search(self.text[parts[-1][0] : parts[-1][1]]):
            position = parts[-1][0] + closing.start()
            yield position, position, "\\"

    def _inline(self, token: Token, fragment: Fragment) -> Iterator[Edit]:
        for child in token.children or ():
            if SPAN not in child.meta:
                continue
            start, end = child.meta[SPAN]
            if child.type == "html_inline":
                yield from self._tags(child.content, start, fragment)
            else:
                written = token.content[start:end]
                kind = "resolve" if child.type == "image" else "blob"
                yield from fragment.edit(start, end, self._destination(written, kind))

    def _definition(self, token: Token, lines: Lines) -> Iterator[Edit]:
        """The address of `[label]: address`, which may stand in the next line, below the marks of a quotation."""
        assert token.map is not None
        opening = self.text.index("[", lines.starts[token.map[0]])
        begin = self.text.find("]:", opening + len(token.meta["label"])) + 2
        gap = re.compile(r"[ \t]*(?:\n[ \t>]*)?").match(self.text, begin)
        start = gap.end() if gap else begin
        destination = parser().helpers.parseLinkDestination(self.text, start, lines.ends[token.map[1] - 1])
        if destination.ok:
            yield start, destination.pos, self._destination(self.text[start : destination.pos], "blob")

    def _destination(self, written: str, kind: str) -> str:
        if written.startswith("<"):
            return f"<{self._absolute(written[1:-1], kind)}>"
        return self._absolute(written, kind)

    def _tags(self, text: str, offset: int, fragment: Fragment) -> Iterator[Edit]:
        """Headings and addresses in HTML; `text` begins at `offset` of the fragment."""
        for tag in html_tags.tags(text):
            if HEADING.fullmatch(tag.name):
                level = min(DEEPEST, int(tag.name[1]) + self.demote_by)
                position = offset + tag.name_start + 1
                yield from fragment.edit(position, position + 1, str(level))
            for attribute in tag.attributes:
                value = self._attribute(attribute)
                if value != attribute.value:
                    written = html.escape(value) if attribute.quoted else f'"{html.escape(value)}"'
                    yield from fragment.edit(offset + attribute.start, offset + attribute.end, written)

    def _attribute(self, attribute: html_tags.Attribute) -> str:
        if attribute.name == "srcset":
            pictures = CANDIDATE.finditer(attribute.value)
            return ", ".join(self._absolute(match["address"], "resolve") + match["size"] for match in pictures)
        if attribute.name in SHOWN:
            return self._absolute(attribute.value, "resolve")
        return self._absolute(attribute.value, "blob") if attribute.name == "href" else attribute.value

    def _absolute(self, target: str, kind: str) -> str:
        bare = target.strip()
        if not bare or self.base is None or ABSOLUTE.match(bare):
            return target
        try:
            suffix = PurePosixPath(urllib.parse.urlsplit(bare).path.lower()).suffix
            shown = "resolve" if suffix in IMAGE_SUFFIXES else kind
            return urllib.parse.urljoin(f"{self.base.format(kind=shown)}/", bare)
        except ValueError:  # no address, such as one with half a bracket
            return target


class Lines:
    """The lines of a text, by the positions where they begin and end."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.ends = [match.start() for match in re.finditer(r"\n|\Z", text)]
        self.starts = [0, *(end + 1 for end in self.ends)]

    def fragment(self, content: str, first: int) -> Fragment:
        """The place of some lines' content, which lacks the marks of quotations and lists and the indent before it."""
        parts = content.split("\n")
        while first < len(self.ends) - 1 and parts[0].strip(BLANKS) not in self._line(first):
            first += 1  # a line of blanks such as U+2028 belongs to a paragraph, but not to its content
        begins = [self._begin(part, number) for number, part in enumerate(parts, start=first)]
        return Fragment(content, begins, cell=False)

    def _begin(self, part: str, number: int) -> int | None:
        """Where a line's content begins in the text; None where it is empty or was not found."""
        core = part.strip(BLANKS)
        if not core or number >= len(self.ends):
            return None
        line = self._line(number).rstrip(BLANKS)
        column = len(line) - len(core) if line.endswith(core) else line.find(core)
        return self.starts[number] + column - (len(part) - len(part.lstrip(BLANKS))) if column >= 0 else None

    def _line(self, number: int) -> str:
        return self.text[self.starts[number] : self.ends[number]]

    def cell(self, content: str, start: int, end: int) -> Fragment:
        """The place of a table cell's content in the rest of its row, in which `\\|` stands for each `|`."""
        begin = self.text.find(content.replace("|", "\\|"), start, end)
        return Fragment(content, [begin if content and begin >= 0 else None], cell=True)


@dataclass(frozen=True)
class Fragment:
    """Where in the text the lines of some content begin; None for those that were not found."""

    content: str
    begins: list[int | None]
    cell: bool

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where the lines begin in the content."""
        return [0, *(match.end() for match in re.finditer("\n", self.content))]

    @functools.cached_property
    def escapes(self) -> list[int]:
        """Where the content has a character that an escape stands for."""
        return [match.start() for match in re.finditer(r"\|", self.content)] if self.cell else []

    def at(self, offset: int) -> int | None:
        """The position in the text of a position in the content."""
        line = bisect.bisect_right(self.starts, offset) - 1
        begin = self.begins[line]
        return None if begin is None else begin + offset - self.starts[line] + bisect.bisect_left(self.escapes, offset)

    def edit(self, start: int, end: int, written: str) -> Iterator[Edit]:
        """The replacement of a part of the content, where it lies in one line."""
        begin, finish = self.at(start), self.at(end)
        if begin is not None and finish is not None and "\n" not in self.content[start:end]:
            yield begin, finish, written

    def parts(self) -> Iterator[tuple[int, int]]:
        """Start and end in the text of each line's content, without the blanks around it."""
        for begin, part in zip(self.begins, self.content.split("\n"), strict=True):
            if begin is not None:
                yield begin + len(part) - len(part.lstrip(BLANKS)), begin + len(part.rstrip(BLANKS))


def quote(body: str, base: str | None, demote_by: int = 2) -> str:
    """`body` with headings `demote_by` levels lower and relative addresses made absolute against `base`.

    Code, formulas and comments stay as they are, and so does a text that is longer than any card.
    """
    if len(body) > LONGEST:
        return body.strip("\r\n")
    text = re.sub("\r\n?", "\n", body).replace("\0", "\ufffd").strip("\n")
    return Quotation(text, base, demote_by).written()


def _applied(text: str, edits: list[Edit]) -> str:
    pieces, position = [], 0
    for start, end, written in edits:
        if start >= position:
            pieces += [text[position:start], written]
            position = end
    return "".join([*pieces, text[position:]])


def _end_of_fence(tokens: list[Token], lines: Lines) -> str:
    """What closes a block of code that the text leaves open at its end."""
    last = tokens[-1] if tokens else None
    if last is None or last.type != "fence" or last.map is None:
        return ""
    line = lines.text[lines.starts[last.map[1] - 1] : lines.ends[last.map[1] - 1]].strip()
    closed = last.map[1] - last.map[0] > 1 and not line.strip(last.markup[0]) and len(line) >= len(last.markup)
    return "" if closed else f"\n{last.markup}"
