"""What the Hub checks in a card: the metadata at the top of README.md."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def front_matter(readme: bytes) -> dict[str, Any] | None:
    """The card's metadata as JSON has it, None where there is none that reads."""
    metadata, problem = _read(readme.decode("utf-8", "replace"))
    return metadata if problem is None else None


def problems(readme: str) -> tuple[list[str], list[str]]:
    """What is wrong with a card's metadata, as errors and warnings."""
    metadata, problem = _read(readme)
    if problem is not None:
        return [problem], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    if "license" in metadata and not isinstance(metadata["license"], str):
        errors.append('"license" must be a string')
    base = metadata.get("base_model", [])
    bases = base if isinstance(base, list) else [base]
    if not all(isinstance(name, str) for name in bases):
        errors.append('"base_model" must be a string or a list of strings')
    return errors, []


def _read(readme: str) -> tuple[dict[str, Any] | None, str | None]:
    found = FRONT_MATTER.match(readme)
    if found is None or importlib.util.find_spec("yaml") is None:
        return None, None
    yaml = importlib.import_module("yaml")
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return None, f"Invalid YAML: {error}"
    if metadata is not None and not isinstance(metadata, dict):
        return None, "The metadata is not a mapping"
    return metadata, None
