"""JSON and TOML that somebody else wrote: bounded in size and depth, with one meaning, or refused in one line."""

from __future__ import annotations

import json
import math
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError

LARGEST = 32 << 20
"""Bytes of a text; the index of a model of a million million parameters has half of that."""
LARGEST_TOML = 1 << 20
DEEPEST = 64
"""Levels of lists and objects in each other; no config has a dozen."""
LONGEST_NUMBER = 256
"""Bits of a whole number. A tokenizer's `model_max_length` may be 10^30."""

Object = dict[str, Any]


def read_text(path: Path, where: object, error: type[QuantizeError], largest: int = LARGEST) -> str:
    """The text of a UTF-8 file of at most `largest` bytes; raises `error`, which calls it `where`, or OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{where} is no regular file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise error(f"{where} has {max(status.st_size, len(content)):,} bytes, and may have {largest:,}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise error(f"{where} is not UTF-8 text (line {line})") from problem


def read_json(path: Path, where: object, error: type[QuantizeError], *, finite: bool = True) -> Object:
    """The JSON object in a file; raises `error`, which calls it `where`, or OSError."""
    return json_object(read_text(path, where, error), where, error, finite=finite)


def read_toml(path: Path, where: object, error: type[QuantizeError]) -> tuple[Object, str]:
    """The contents of a TOML file, and its text; raises `error`, which calls it `where`, or OSError."""
    text = read_text(path, where, error, LARGEST_TOML)
    try:
        return _plain(tomllib.loads(text)), text
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not TOML: {_reason(problem)}") from problem


def json_object(text: str, where: object, error: type[QuantizeError], *, finite: bool = True) -> Object:
    """The JSON object in a text; raises `error`, which calls it `where`."""
    try:
        content = parse_json(text, finite=finite)
    except ValueError as problem:
        raise error(f"{where} is not JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{where} is not a JSON object")
    return content


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The contents of a JSON text. Raises ValueError for what is none, is too deep, or has two meanings.

    Unless `finite`, numbers may be NaN and infinite, as Python writes them and some configs have them.
    """
    numbers: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
    try:
        return _plain(json.loads(text, object_pairs_hook=_object, **numbers))
    except (ValueError, RecursionError) as problem:
        raise ValueError(_reason(problem)) from problem


def _plain(content: Any) -> Any:
    """The content itself, where it is no deeper than it may be and holds nothing that a file could not."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        for value in level:
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair is no character
            elif isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
                raise ValueError(f"it has a number of more than {LONGEST_NUMBER} bits")
        level = [part for value in level for part in _parts(value)]
    return content


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> Object:
    """An object whose keys stand there once; one that repeats a key with the same value means one thing, too."""
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f"the key {key!r} stands there twice, with two values")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _reason(problem: Exception) -> str:
    if isinstance(problem, RecursionError):
        return f"it is nested more than {DEEPEST} levels deep"
    if isinstance(problem, UnicodeEncodeError):
        return "it holds half of a surrogate pair, which is no character"
    return str(problem)
