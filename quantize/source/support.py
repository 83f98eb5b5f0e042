"""Models that cannot be quantized, refused by what their config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.errors import UnsupportedModel
from quantize.formats.bitsandbytes.config import is_quantized


def check_config(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], name: str, trust_remote_code: bool
) -> None:
    """Raise UnsupportedModel for a model that cannot be quantized, saying what to do about it."""
    architectures = config.get("architectures") or []
    if not config.get("model_type") or not architectures:
        raise UnsupportedModel(f"{name}: config.json names no model_type and architectures; it needs both")
    if is_quantized(config):
        raise UnsupportedModel(f"{name} is already quantized: name the original model instead")
    if needs_remote_code(config):
        if not trust_remote_code:
            raise UnsupportedModel(
                f"{name} needs code from its own repo: read that code, then allow it with --trust-remote-code"
            )
    elif not set(architectures) & _causal_architectures():
        raise UnsupportedModel(
            f"{name} is not a causal language model ({', '.join(architectures)}): only those can be quantized here"
        )
    if not trust_remote_code and tokenizer_needs_remote_code(config, tokenizer_config):
        raise UnsupportedModel(
            f"the tokenizer of {name} needs code from its own repo: read that code, then allow it with "
            f"--trust-remote-code"
        )


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself cannot build this model and the repo brings code that can."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    brings_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    return brings_code and config.get("model_type") not in CONFIG_MAPPING_NAMES


def tokenizer_needs_remote_code(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether transformers itself has no tokenizer for this model and the repo brings code of one."""
    code = tokenizer_config.get("auto_map") or {}
    brings_code = isinstance(code, list) or "AutoTokenizer" in code
    return brings_code and not _has_tokenizer(config["model_type"], str(tokenizer_config.get("tokenizer_class") or ""))


def _has_tokenizer(model_type: str, class_name: str) -> bool:
    from transformers.models.auto import tokenization_auto

    plain = class_name.removesuffix("Fast")
    known = map(tokenization_auto.tokenizer_class_from_name, (plain, f"{plain}Fast") if plain else ())
    return bool(tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model_type)) or any(known)


def _causal_architectures() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {name for value in NAMES.values() for name in ((value,) if isinstance(value, str) else value)}
