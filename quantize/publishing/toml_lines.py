"""The lines of a TOML text's tables and keys, which tomllib does not tell."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A part of the text that begins with a header: its name, its line, and the line of each key."""

    name: str
    line: int
    keys: dict[str, int]

    def line_of(self, key: str) -> int:
        """The line of a key; that of the header for a key that is written in an unusual form."""
        return self.keys.get(key, self.line)


TOKEN = re.compile(r"""\"{3}(?:\\.|[^\\])*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*""", re.DOTALL)
HEADER = re.compile(r"\s*\[\[?(?P<name>[^\[\]]+)\]\]?\s*(?:#.*)?$")
KEY = re.compile(r"""\s*(?P<quote>["']?)(?P<name>[^"'\s=.\[\]#]+)(?P=quote)\s*[=.]""")


def tables_of(text: str) -> list[Table]:
    """What the text consists of; what stands above the first header comes first."""
    tables = [Table("", 1, {})]
    # a text of several lines may hold what looks like a key: only its line ends stay
    plain = TOKEN.sub(lambda token: "\n" * token[0].count("\n") or token[0], text)
    for number, line in enumerate(plain.split("\n"), start=1):
        if header := HEADER.match(line):
            tables.append(Table(header["name"].strip().strip("\"'"), number, {}))
        elif key := KEY.match(line):
            tables[-1].keys.setdefault(key["name"], number)
    return tables
