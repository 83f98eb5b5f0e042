"""A Markdown parser that remembers where in the text the targets of links and pictures and the tags of HTML stand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, reference
from markdown_it.rules_inline import StateInline, html_inline, image, link

if TYPE_CHECKING:
    from markdown_it.token import Token

InlineRule = Callable[[StateInline, bool], bool]
SPAN = "span"
"""Key of a token's meta: start and end, in the content of its inline token, of a destination or of a tag."""
FORMULAS = {"$$": "$$", "\\\\(": "\\\\)", "\\\\[": "\\\\]"}
"""Marks between which the Hub shows formulas (huggingface.co/docs/hub/model-cards), as a text of Markdown has them."""


@functools.cache
def parser() -> MarkdownIt:
    """CommonMark with HTML, tables, strikethrough and formulas; link definitions are tokens, and footnotes are text."""
    markdown = MarkdownIt("commonmark", {"html": True, "inline_definitions": True})
    markdown.enable(["table", "strikethrough"])
    markdown.block.ruler.at("reference", _definition)
    markdown.block.ruler.before("fence", "formula_block", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.inline.ruler.before("escape", "formula", _formula)
    markdown.inline.ruler.at("link", _with_destination(link, "link_open", label=0))
    markdown.inline.ruler.at("image", _with_destination(image, "image", label=1))
    markdown.inline.ruler.at("html_inline", _with_tag)
    return markdown


def _with_destination(rule: InlineRule, kind: str, label: int) -> InlineRule:
    """The rule for `[label](destination)`, whose bracket is the `label`-th character, recording the destination."""

    def recording(state: StateInline, silent: bool) -> bool:
        start, count = state.pos, len(state.tokens)
        matched = rule(state, silent)
        if matched and not silent:
            token = next(token for token in state.tokens[count:] if token.type == kind)
            _record_destination(state, token, start + label, nested=kind == "image")
        return matched

    return recording


def _record_destination(state: StateInline, token: Token, bracket: int, *, nested: bool) -> None:
    """Where the destination stands, unless it comes from a definition."""
    label_end = state.md.helpers.parseLinkLabel(state, bracket, not nested)
    if state.pos <= label_end + 1 or state.src[label_end + 1] != "(":
        return
    start = label_end + 2
    while state.src[start] in " \t\n":
        start += 1
    destination = state.md.helpers.parseLinkDestination(state.src, start, state.posMax)
    if destination.ok:
        token.meta[SPAN] = (start, destination.pos)


def _with_tag(state: StateInline, silent: bool) -> bool:
    start = state.pos
    matched = html_inline(state, silent)
    if matched and not silent:
        state.tokens[-1].meta[SPAN] = (start, state.pos)
    return matched


def _definition(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A link definition; what begins with [^ is a footnote, whose text has links of its own."""
    if state.src.startswith("[^", state.bMarks[start_line] + state.tShift[start_line]):
        return False
    return reference(state, start_line, end_line, silent)


def _formula(state: StateInline, silent: bool) -> bool:
    opening = next((mark for mark in FORMULAS if state.src.startswith(mark, state.pos)), None)
    if opening is None:
        return False
    begin, closing = state.pos + len(opening), FORMULAS[opening]
    if _last(state.src, closing) < begin:
        return False
    end = state.src.find(closing, begin, state.posMax)
    if end < 0:
        return False
    if not silent:
        state.push("formula", "", 0).content = state.src[state.pos : end + len(closing)]
    state.pos = end + len(closing)
    return True


def _formula_block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A formula over several lines; one in a single line is left to the rule for text."""
    begin, end = state.bMarks[start_line] + state.tShift[start_line], state.eMarks[start_line]
    opening = next((mark for mark in FORMULAS if state.src.startswith(mark, begin)), None)
    if opening is None or state.is_code_block(start_line):
        return False
    closing = FORMULAS[opening]
    if closing in state.src[begin + len(opening) : end] or _last(state.src, closing) < end:
        return False
    if silent:
        return True
    for line in range(start_line + 1, end_line):
        if state.sCount[line] < state.blkIndent and not state.isEmpty(line):
            return False
        if closing in state.src[state.bMarks[line] : state.eMarks[line]]:
            state.line = line + 1
            token = state.push("formula_block", "", 0)
            token.map = [start_line, state.line]
            token.content = state.getLines(start_line, state.line, state.blkIndent, True)
            return True
    return False


@functools.lru_cache(maxsize=8)
def _last(text: str, mark: str) -> int:
    return text.rfind(mark)
