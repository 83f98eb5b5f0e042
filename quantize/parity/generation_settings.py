"""How a model's authors want texts generated: generation_config.json, or what stands in config.json in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel, first_line
from quantize.files import CONFIG, GENERATION_CONFIG

UNIMPORTANT = ("transformers_version", "_from_model_config")


def read(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The settings that differ from transformers' defaults; raises CorruptModel where they cannot be read."""
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    settings = read_json(path, path.name, CorruptModel) if path.is_file() else _of_config(folder, trust_remote_code)
    defaults = GenerationConfig._get_default_generation_params()
    return {
        name: value
        for name, value in settings.items()
        if name not in UNIMPORTANT and value is not None and value is not False and value != defaults.get(name)
    }


def ends_in(settings: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, in order; what is no number is left out."""
    value = settings.get("eos_token_id")
    listed = value if isinstance(value, list) else [value]
    return tuple(sorted({token for token in listed if type(token) is int and token >= 0}))


def _of_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What config.json says itself, beside what a config's own class makes of it, which in transformers 5 is less."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptModel(f"the config cannot be read: {first_line(error)}") from error
    written = GenerationConfig.from_model_config(read_json(folder / CONFIG, CONFIG, CorruptModel, finite=False))
    stated = {name: value for name, value in written.to_dict().items() if value is not None}
    return {**GenerationConfig.from_model_config(config).to_dict(), **stated}
