"""Records to JSON and back. Files of an older format are read through one mapping; newer ones are refused."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from quantize.documents import parse_json, read_text
from quantize.errors import NewerFormat, PackageError
from quantize.evidence import Evidence
from quantize.records import FORMAT_VERSION, Provenance
from quantize.validation import UnknownField, structured

Record = TypeVar("Record")
Document = dict[str, Any]
UPDATE = "pip install --upgrade quantize-bnb"


def to_json(record: object) -> str:
    """The record as JSON text; refuses NaN, which JSON cannot say."""
    return json.dumps(_converter().unstructure(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(kind: type[Record], text: str, where: object) -> Record:
    """The record that `to_json` wrote, now or in an earlier version; `where` names the file for the error line.

    Raises PackageError: NewerFormat where a later version of quantize wrote the file.
    """
    try:
        document = parse_json(text)
        current = _upgraded(kind, document, where)
        record = structured(kind, current, unknown_fields=current is not document)
    except PackageError:
        raise
    except UnknownField as error:
        raise NewerFormat(
            f"{where} is not readable as {kind.__name__}: {error}; take it out, or update quantize with `{UPDATE}` "
            f"where a later version wrote it"
        ) from error
    except Exception as error:
        raise PackageError(f"{where} is not readable as {kind.__name__}: {_in_one_line(error)}") from error
    return _with_key(record) if current is not document else record


def read_record(kind: type[Record], path: Path) -> Record:
    """The record in a package's file; raises PackageError."""
    try:
        text = read_text(path, path, PackageError)
    except FileNotFoundError:
        raise PackageError(f"{path.parent} is not a package: {path.name} is missing") from None
    return from_json(kind, text, path)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, KeyError):  # of the mapping from an older format
        return f"{error.args[0]} is missing"
    return " ".join(str(error).split()) or type(error).__name__


def now() -> str:
    """This second in UTC, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _upgraded(kind: type, document: Any, where: object) -> Any:
    """The document as this version writes it; the document itself where it already is."""
    if kind not in UPGRADES or not isinstance(document, dict):
        return document
    version = document.get("format_version", 1)
    if type(version) is not int or version < 1:
        raise PackageError(f"{where} has {version!r} as its format version: restore it, or make the package again")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{where} has format version {version}, and this quantize reads up to {FORMAT_VERSION}: "
            f"update it with `{UPDATE}`"
        )
    return document if version == FORMAT_VERSION else UPGRADES[kind](document)


def _with_key(record: Record) -> Record:
    """An upgraded provenance with the key that this version gives to the same package."""
    if not isinstance(record, Provenance) or not record.key:
        return record
    source = record.source
    return replace(record, key=record.demand.key(source.repo_id or source.name, source.pinned))


# Format version 1: its names for what version 2 calls otherwise

VERSION_1_OPTIONS = {
    "size_budget": ("size_budget", 1.0),
    "sweeps": ("passes", 1),
    "epochs": ("epochs", 0),
    "calibration": ("calibration", "self"),
    "calibration_windows": ("calibration_windows", 128),
    "calibration_length": ("calibration_length", 512),
    "calibration_seed": ("calibration_seed", 0),
}
"""The calibrated recipe's parameters, which stood beside the others: their names now, and their defaults then."""
VERSION_1_RECIPES = {"stock": "rtn"}


def _evidence_from_1(old: Document) -> Document:
    new = _renamed(
        old,
        {"reference_places": "reference_devices", "conventions": "standard_perplexities", "rungs": "attempts"},
    )
    new["attempts"] = [attempt | {"recipe": _recipe_from_1(attempt["recipe"])} for attempt in new.get("attempts", ())]
    return new | {"format_version": FORMAT_VERSION}


def _provenance_from_1(old: Document) -> Document:
    new = _renamed(old, {"asked": "requested"})
    quantized = {"calibrated": "calibration_text", "spared": "half_precision_modules", "fine": "block_32_modules"}
    requested = new.get("requested")
    return new | {
        "recipe": _recipe_from_1(new["recipe"]),
        "requested": None if requested is None else _recipe_from_1(requested),
        "quantized": _renamed(new["quantized"], quantized),
        "settings": _renamed(new["settings"], {"conventions": "standard_perplexities"}),
        "format_version": FORMAT_VERSION,
    }


def _recipe_from_1(old: Document) -> Document:
    shared = {key: value for key, value in old.items() if key not in VERSION_1_OPTIONS}
    name = VERSION_1_RECIPES.get(old["name"], old["name"])
    changed = {
        new_name: old[key]
        for key, (new_name, default) in VERSION_1_OPTIONS.items()
        if key in old and old[key] != default and old["name"] != "stock"
    }
    return shared | {"name": name, "options": changed}


def _renamed(document: Document, names: dict[str, str]) -> Document:
    return {names.get(key, key): value for key, value in document.items()}


UPGRADES: dict[type, Callable[[Document], Document]] = {
    Evidence: _evidence_from_1,
    Provenance: _provenance_from_1,
}


@functools.cache
def _converter() -> Any:
    from cattrs.preconf.json import make_converter

    return make_converter()
