"""Which of transformers' auto classes loads a model, by its config.json: text alone, or pictures and text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel
from quantize.files import CONFIG

PICTURES = "AutoModelForImageTextToText"


def reads_pictures(config: Mapping[str, Any]) -> bool:
    """Whether a model takes pictures besides text, and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    named = (
        name
        for value in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
        for name in ((value,) if isinstance(value, str) else value)
    )
    classes = config.get("architectures") or ()
    return not config.get("is_encoder_decoder") and any(name in classes for name in named)


def auto_class(folder: Path) -> Any:
    """The class that loads the model in `folder`; raises CorruptModel where its config.json cannot be read."""
    return class_of(read_json(folder / CONFIG, CONFIG, CorruptModel, finite=False))


def class_of(config: Mapping[str, Any]) -> Any:
    """The class that loads a model with this config.json."""
    import transformers

    return getattr(transformers, PICTURES if reads_pictures(config) else "AutoModelForCausalLM")
