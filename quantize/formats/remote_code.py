"""Code that a model brings: what its configs say of it, and what they say without it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel

KEYS = ("auto_map", "custom_pipelines")
"""Under these a config names classes in Python files of its own repo, or of another one."""
CONFIGS = "*config.json"
"""The files that may have them: config.json, tokenizer_config.json, preprocessor_config.json ..."""


def names_code(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config name code, in themselves or in a part."""
    return next(_classes(config), None) is not None


def names_own_code(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config name code of the model's own repo."""
    return any("--" not in name for name in _classes(config))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a config without what they say of code."""
    return {
        name: without_code(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in KEYS
    }


def leave_out(path: Path) -> None:
    """Write a config anew without what it says of code; one that says nothing of it stays as it is."""
    config = _read(path)
    if names_code(config):
        path.write_text(json.dumps(without_code(config), indent=2) + "\n", "utf-8")


def classes(folder: Path) -> set[str]:
    """Every class that a folder's configs name, with the repo that it comes from where they say one."""
    return {name for path in folder.glob(CONFIGS) for name in _classes(_read(path))}


def _read(path: Path) -> dict[str, Any]:
    """The contents of a config; nothing where it cannot be read, which others find out."""
    try:
        return read_json(path, path, CorruptModel, finite=False)
    except (OSError, CorruptModel):
        return {}


def _classes(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if name in KEYS:
            yield from _texts(value)
        elif isinstance(value, dict):
            yield from _classes(value)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, whatever it is built of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
