"""License and notice files of a model, whatever their case and ending, and the one that its card links."""

from __future__ import annotations

import re
from pathlib import Path

import model_card

LEGAL = re.compile(
    r"(?:licen[sc]e|notice|copying|use[-_ ]?policy)[^/]*"
    r"|(?:[^/]*[^a-z/])?(?:licen[sc]es?|notices?|copying|copyright|patents|use[-_ ]?policy)(?![a-z])[^/]*"
    r"|licenses/[^/]+",
    re.IGNORECASE,
)
OTHERWISE_USED = re.compile(
    r".*\.(?:py|json|safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)|readme(?:\.[a-z]+)?|figures/.*", re.IGNORECASE
)
"""Files that are no text of a license whatever they are called, and such as a package has of its own."""


def is_legal(path: str) -> bool:
    """Whether a file at the top of a model, or in its folder of licenses, is a license or a notice."""
    return bool(LEGAL.fullmatch(path)) and not OTHERWISE_USED.fullmatch(path)


def linked_license(card: Path, repo_id: str | None) -> str | None:
    """The path of the file that the card's `license_link` names in the same model."""
    if not card.is_file():
        return None
    path = model_card.linked_file(model_card.split(card.read_bytes().decode("utf-8-sig", "replace")), repo_id)
    return None if path is None or OTHERWISE_USED.fullmatch(path) else path
