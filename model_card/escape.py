"""Text that others wrote, made harmless where it is shown: on a terminal, in Markdown, in a link, in code."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable

BLANKS = re.compile(r"\s+")
UNSEEN = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
"""Control characters, those that turn the direction of writing, line ends, and halves of characters."""
EVERY_UNSEEN = re.compile(f"[{UNSEEN}]")
UNSEEN_IN_CODE = re.compile(f"(?![\n\t])[{UNSEEN}]")
MARKUP = re.compile(
    r"[\\`*\[\]<>&|~$@]"  # anywhere
    r"|_(?![^\W_])|(?<![^\W_])_"  # not within a word
    r"|(?<=www)\.|:(?=//)"  # addresses that would become links
    r"|^[#=]|#$|^[+-](?=[\s-]|$)|(?<=^[0-9])[.)](?=\s|$)|(?<=^[0-9]{2})[.)](?=\s|$)"  # headings, rules and lists
    r"|!(?=\[)"
)
ADDRESS_CHARACTERS = "/:?#@!$&'*+,;=%~"


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def visible(text: str) -> str:
    """`text` in one line, with escapes such as \\x1b or \\u202e for what acts on a terminal instead of being seen."""
    return EVERY_UNSEEN.sub(_escape, text)


def visible_json(document: str) -> str:
    """A JSON document with JSON's own escapes in the same places; its line ends stay."""
    return UNSEEN_IN_CODE.sub(lambda match: f"\\u{ord(match[0]):04x}", document)


def markdown(value: object) -> Markdown:
    """A value as one line of Markdown that shows just its characters; what is Markdown already stays."""
    return value if isinstance(value, Markdown) else Markdown(MARKUP.sub(r"\\\g<0>", _one_line(value)))


def code(value: object) -> Markdown:
    """A value as a code span, or as text where it looks like markup rather than a name."""
    text = _one_line(value).strip()
    if not text or set(text) & set("`<>"):
        return markdown(text)
    return Markdown(f"`{text}`")


def codes(values: Iterable[object]) -> Markdown:
    """Code spans, separated by commas."""
    return Markdown(", ".join(code(value) for value in values))


def fenced(text: str, language: str = "text") -> Markdown:
    """A code block that no run of backticks in `text` can end."""
    shown = UNSEEN_IN_CODE.sub(_escape, re.sub("\r\n?", "\n", text))
    fence = "`" * max(3, _longest_run(shown) + 1)
    return Markdown(f"{fence}{language}\n{shown}\n{fence}")


def address(text: str) -> Markdown:
    """An address that cannot end the link it stands in."""
    return Markdown(urllib.parse.quote(text.encode("utf-8", "replace"), safe=ADDRESS_CHARACTERS))


def literal(value: str) -> Markdown:
    """A text as it is written in Python, for a line of a code block."""
    return Markdown(json.dumps(value))


def plain(text: str) -> str:
    """`text` in one line, without characters that nobody sees."""
    return EVERY_UNSEEN.sub("", BLANKS.sub(" ", _whole(text))).strip()


def plain_lines(text: str) -> str:
    """`text` in its lines, without characters that nobody sees."""
    return UNSEEN_IN_CODE.sub("", re.sub("\r\n?", "\n", _whole(text)))


def _whole(text: str) -> str:
    """`text` with pairs of surrogates joined, as escapes in YAML make them, and lone ones replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _one_line(value: object) -> str:
    return visible(BLANKS.sub(" ", str(value)))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
