"""Models that cannot be quantized, refused by what their config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantize.errors import CorruptModel, UnsupportedModel
from quantize.formats import experts, remote_code, source_model
from quantize.formats.bitsandbytes import coverage, tensor_plan
from quantize.formats.bitsandbytes.config import quantization_method
from quantize.formats.bitsandbytes.modules import require_mostly_linear
from quantize.formats.model_class import reads_pictures
from quantize.records import Recipe

OWN_ATTENTION = ("eager", "sdpa", "flex_attention")
OWN_EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""Implementations that transformers and torch have themselves; others are fetched from the Hub."""
IMPLEMENTATIONS = {
    "attn_implementation": OWN_ATTENTION,
    "_attn_implementation": OWN_ATTENTION,
    "experts_implementation": OWN_EXPERTS,
    "_experts_implementation": OWN_EXPERTS,
}
"""Keys of a config by which code may be fetched, and the values that fetch none."""
LOW_PRECISION = {
    "fp8": ("8-bit floats (fp8)", "FineGrainedFP8Config"),
    "mxfp4": ("4-bit floats (mxfp4)", "Mxfp4Config"),
}
"""Forms in which originals are published, in words, and the config by which transformers makes 16 bits of them."""
LOOKING_AHEAD = ("xlnet",)
"""Types that transformers lists among the causal ones, and that are trained to predict tokens in any order."""
OTHER_SENSES = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "speech_config")
"""Keys of models that see or hear."""


def check_config(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], name: str, trust_remote_code: bool
) -> None:
    """Raise UnsupportedModel for a model that cannot be quantized, or CorruptModel, saying what to do about it."""
    architectures = _architectures(config, name)
    _require_unquantized(config, name)
    _require_trusted(config, name, trust_remote_code)
    if not needs_remote_code(config):
        _require_causal(config, architectures, name)
    if not trust_remote_code and _tokenizer_needs_remote_code(config, tokenizer_config):
        raise UnsupportedModel(
            f"the tokenizer of {name} needs code from its own repo: read that code, then allow it with "
            f"--trust-remote-code"
        )


def check_model(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModel or CorruptModel where transformers builds a model of the config that cannot be quantized.

    Of a model with code of its own nothing is known before that is here.
    """
    if not needs_remote_code(config):
        model = experts.unstacked(source_model.promised(config, name))
        require_mostly_linear(model, name)
        coverage.require(model, Recipe(), name)
        tensor_plan.require_readable(model, name)


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself cannot build this model and the repo brings code that can."""
    return bool(_own_code(config))


def runs_remote_code(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether code that is not transformers' own runs when this model is loaded by who trusts it.

    Code of another repo, whose state nothing pins, is left alone where transformers can do without.
    """
    return any(remote_code.names_own_code(part) for part in (config, tokenizer_config)) or any(_fetched_code(config))


def _own_code(config: Mapping[str, Any]) -> str | None:
    """The class that a repo brings for a model which transformers does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    brought = config.get("auto_map")
    if not isinstance(brought, dict) or config.get("model_type") in CONFIG_MAPPING_NAMES:
        return None
    return str(brought["AutoModelForCausalLM"]) if "AutoModelForCausalLM" in brought else None


def _tokenizer_needs_remote_code(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether transformers itself has no tokenizer for this model and the repo brings code of one."""
    code = tokenizer_config.get("auto_map")
    brings_code = isinstance(code, list) or (isinstance(code, dict) and "AutoTokenizer" in code)
    return brings_code and not _has_tokenizer(config["model_type"], str(tokenizer_config.get("tokenizer_class") or ""))


def _has_tokenizer(model_type: str, class_name: str) -> bool:
    from transformers.models.auto import tokenization_auto

    plain = class_name.removesuffix("Fast")
    known = map(tokenization_auto.tokenizer_class_from_name, (plain, f"{plain}Fast") if plain else ())
    return bool(tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model_type)) or any(known)


def _fetched_code(config: Mapping[str, Any]) -> Iterator[str]:
    """Each setting, of this config or those in it, by which transformers fetches code that is not in the repo."""
    for key, value in config.items():
        if key in IMPLEMENTATIONS:
            named = value.values() if isinstance(value, dict) else (value,)
            yield from (f"{key} {item}" for item in named if item is not None and item not in IMPLEMENTATIONS[key])
        elif isinstance(value, dict):
            yield from _fetched_code(value)


def _architectures(config: Mapping[str, Any], name: str) -> list[str]:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not model_type or not architectures:
        raise UnsupportedModel(f"{name}: config.json names no model_type and architectures; it needs both")
    if not isinstance(architectures, list) or not all(isinstance(item, str) for item in (model_type, *architectures)):
        raise CorruptModel(f"{name}: in config.json, model_type is to be a name and architectures a list of names")
    return architectures


def _require_unquantized(config: Mapping[str, Any], name: str) -> None:
    method = quantization_method(config)
    if method in LOW_PRECISION:
        words, converter = LOW_PRECISION[method]
        raise UnsupportedModel(
            f"{name} holds {words}, in which it may have been published: take a copy of it in 16 bits, or make one "
            f"with transformers (from_pretrained with {converter}(dequantize=True), then "
            f"save_pretrained), and quantize its folder"
        )
    if method is not None:
        raise UnsupportedModel(f"{name} is already quantized ({method}): name the original model instead")


def _require_trusted(config: Mapping[str, Any], name: str, trust_remote_code: bool) -> None:
    own = _own_code(config)
    if own and "--" in own:
        raise UnsupportedModel(
            f"{name} takes its code from another repo ({own.partition('--')[0]}), whose state nothing pins: copy that "
            f"code into a folder with the model, correct auto_map in its config.json, and name the folder"
        )
    if trust_remote_code:
        return
    if own:
        raise UnsupportedModel(
            f"{name} needs code from its own repo: read that code, then allow it with --trust-remote-code"
        )
    for setting in _fetched_code(config):
        raise UnsupportedModel(
            f"{name}: by the setting {setting} in its config.json, code would be fetched from the Hub: take that out, "
            f"or allow it with --trust-remote-code"
        )


def _require_causal(config: Mapping[str, Any], architectures: list[str], name: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    classes, listed = set(architectures), ", ".join(architectures)
    if reads_pictures(config):
        return
    if any(map(config.get, OTHER_SENSES)):
        raise UnsupportedModel(
            f"{name} reads more than text and pictures ({listed}): only models of text, and of text and pictures, can "
            f"be quantized here"
        )
    if config["model_type"] in LOOKING_AHEAD:
        raise UnsupportedModel(
            f"{name} lets each token see those behind it ({listed}): only causal language models can be quantized here"
        )
    if classes & _named(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return
    if config.get("is_encoder_decoder") or classes & _named(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        raise UnsupportedModel(
            f"{name} has an encoder and a decoder ({listed}): only causal language models, which are decoders alone, "
            f"can be quantized here"
        )
    raise UnsupportedModel(f"{name} is not a causal language model ({listed}): only those can be quantized here")


def _named(mapping: Mapping[str, Any]) -> set[str]:
    return {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}
