"""The source's own card taken apart: its front matter as plain values, and its text."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

OPENING = re.compile(r"[\s\ufeff]*---[ \t]*(?=[\r\n])")
CLOSING = re.compile(r"[\r\n](?:---|\.\.\.)[ \t]*(?:\r\n|[\r\n]|\Z)")
"""What the Hub's own pattern takes (`REGEX_YAML_BLOCK` of huggingface_hub), and some more: blanks after the first mark,
lines that end with a carriage return alone, YAML's other end mark."""
FIRST_KEY = re.compile(r"[\r\n]+[\w-]+[ \t]*:")
WORDS = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag")
"""Keys whose values are texts, whatever else YAML would make of them: `no` is Norwegian."""
VALUES = ("widget", "co2_eq_emissions")
GATING = "extra_gated_"
TEXT_TAG, TAGS = "tag:yaml.org,2002:str", "tag:yaml.org,2002:"
PLAIN = re.compile(
    r"(?P<null>~|null|Null|NULL|)|(?P<true>true|True|TRUE)|(?P<false>false|False|FALSE)"
    r"|(?P<whole>[-+]?[0-9]{1,18})|(?P<number>[-+]?[0-9]{1,18}\.[0-9]{1,18})"
)
"""Unquoted values that are no texts, as in YAML 1.2, which the Hub reads."""
LONGEST_HEADER = 1_000_000
MOST_NODES = 20_000
LONGEST_PROBLEM = 300


@dataclass(frozen=True)
class SourceCard:
    """A card taken apart: the metadata that a card may inherit, its text, and why its metadata could not be read.

    `unread` is front matter that could not be read.
    """

    metadata: Mapping[str, Any]
    body: str
    problem: str | None = None
    unread: str = ""


class _Unreadable(Exception):
    pass


def parts(card: str) -> tuple[str | None, str]:
    """Front matter and text of a card; None where it has no front matter."""
    opening = OPENING.match(card)
    closing = CLOSING.search(card, opening.end()) if opening else None
    if opening is None or closing is None:
        return None, card
    return card[opening.end() : closing.start()], card[closing.end() :]


@functools.lru_cache(maxsize=4)
def split(card: str) -> SourceCard:
    """A card taken apart; front matter that is not a mapping in plain YAML counts as none."""
    header, body = parts(card)
    if header is None:
        opening = OPENING.match(card)
        if opening is None or not FIRST_KEY.match(card, opening.end()):
            return SourceCard({}, card)
        return SourceCard({}, card, "its front matter has no end mark", card[:LONGEST_HEADER])
    try:
        return SourceCard(_metadata(header), body)
    except RecursionError:
        problem = "it is nested too deeply"
    except (yaml.YAMLError, _Unreadable, ValueError) as error:
        problem = " ".join(str(error).split())[:LONGEST_PROBLEM]
    return SourceCard({}, body, problem, header)


def _metadata(header: str) -> dict[str, Any]:
    if len(header) > LONGEST_HEADER:
        raise _Unreadable(f"it is longer than {LONGEST_HEADER:,} characters")
    root = yaml.compose(header, Loader=yaml.SafeLoader)
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise _Unreadable("it is not a mapping")
    reader = _Reader()
    return {
        key: reader.value(node, only_text=key in WORDS)
        for key, node in reader.items(root)
        if key in WORDS or key in VALUES or key.startswith(GATING)
    }


class _Reader:
    """YAML's nodes as plain values. An alias stands for a copy, of which there may be so many only."""

    def __init__(self) -> None:
        self.nodes = 0

    def value(self, node: yaml.Node, *, only_text: bool) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise _Unreadable(f"it has more than {MOST_NODES:,} values")
        if not (node.tag or TAGS).startswith(TAGS):
            raise _Unreadable(f"{node.tag} in line {node.start_mark.line + 1} is no type that a card has")
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(value, only_text=only_text) for key, value in self.items(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, only_text=only_text) for item in node.value]
        return _scalar(node, only_text) if isinstance(node, yaml.ScalarNode) else None

    def items(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
        """Keys and nodes of a mapping, with what `<<` merges into it; no key may stand twice."""
        own: dict[str, yaml.Node] = {}
        merged: dict[str, yaml.Node] = {}
        for key, value in node.value:
            self.nodes += 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Unreadable(f"the key in line {key.start_mark.line + 1} is no word")
            if key.value in own:
                raise _Unreadable(f"the key {key.value!r} twice, again in line {key.start_mark.line + 1}")
            if key.value == "<<" and key.style is None:
                merged |= self._merged(value)
            else:
                own[key.value] = value
        return list({**merged, **own}.items())

    def _merged(self, node: yaml.Node) -> dict[str, yaml.Node]:
        if self.nodes > MOST_NODES:
            raise _Unreadable(f"it has more than {MOST_NODES:,} values")
        mappings = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(mapping, yaml.MappingNode) for mapping in mappings):
            raise _Unreadable(f"what << merges in line {node.start_mark.line + 1} is no mapping")
        merged: dict[str, yaml.Node] = {}
        for mapping in reversed(mappings):
            merged |= dict(self.items(mapping))
        return merged


def _scalar(node: yaml.ScalarNode, only_text: bool) -> Any:
    text = str(node.value)
    match = PLAIN.fullmatch(text) if node.style is None and node.tag != TEXT_TAG else None
    kind = match.lastgroup if match else None
    if kind == "null":
        return None
    if only_text or kind is None:
        return text
    return (
        {"true": True, "false": False}[kind] if kind in ("true", "false") else float(text) if "." in text else int(text)
    )
