"""What a package was asked to be, as its record says it: without paths, with the content of the user's own texts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize import methods
from quantize.errors import CorpusError
from quantize.files import hash_file
from quantize.options import SETTINGS, TextName
from quantize.records import Demand, EvaluationSettings, Recipe


def demanded(recipe: Recipe, settings: EvaluationSettings) -> Demand:
    """The record of what is asked for; raises CorpusError for a text that passes for another or cannot be read."""
    values = {**recipe.options, **dataclasses.asdict(settings)}
    texts = {field: path for field, kind in _given_texts() if (path := kind.file(str(values.get(field, ""))))}
    hashes = {field: _digest(path) for field, path in texts.items()}
    return Demand(without_paths(recipe), _without_paths(settings), hashes)


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe with the user's own texts named without their folders."""
    options = dict(recipe.options)
    options |= {field: kind.bare(str(options[field])) for field, kind in _given_texts() if field in options}
    return dataclasses.replace(recipe, options=options)


def _without_paths(settings: EvaluationSettings) -> EvaluationSettings:
    values = dataclasses.asdict(settings)
    bare: dict[str, Any] = {field: kind.bare(values[field]) for field, kind in _given_texts() if field in values}
    return dataclasses.replace(settings, **bare)


def _given_texts() -> Iterator[tuple[str, TextName]]:
    """The fields that may name a text of the user's own."""
    for option in (*methods.options(), *SETTINGS):
        if isinstance(option.kind, TextName):
            yield option.field, option.kind


def _digest(path: Path) -> str:
    """The sha256 of a text as it is read, or of the bytes of a file that holds more than plain text."""
    try:
        return hashlib.sha256(path.read_text("utf-8").encode()).hexdigest()
    except UnicodeDecodeError:
        return hash_file(path)[1]
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
