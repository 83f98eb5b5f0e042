"""What config.json says about a bitsandbytes checkpoint: read, expected of a recipe, and made for transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel
from quantize.files import CONFIG
from quantize.formats import experts, remote_code
from quantize.formats.bitsandbytes.modules import is_listed
from quantize.formats.bitsandbytes.sizes import MatrixFormat
from quantize.records import Checkout, Recipe

QUANTIZATION_KEY, COMPRESSION_KEY = "quantization_config", "compression_config"
"""Of the config of a quantized model; bitsandbytes has the first."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""What transformers calls the type of the weights, and what versions before 4.56 did."""
OUTLIER_THRESHOLD, STOCK_THRESHOLD = "llm_int8_threshold", 6.0
"""From where on inputs of 8-bit products are outliers, and its value where nothing else is said."""


@dataclass(frozen=True)
class ExpectedConfig:
    """What a recipe, or a checkpoint's own config, says about it.

    `skips` tells by a module's name whether it stays as it is; a recipe leaves the head and routers alone besides, and
    towers unless it quantizes them, while a config that lists modules means those and no others.
    """

    matrices: MatrixFormat
    skips: Callable[[str], bool]
    skips_head: bool = True
    skips_towers: bool = False
    skips_routers: bool = False

    @property
    def bits(self) -> int:
        return self.matrices.bits

    @classmethod
    def of(cls, recipe: Recipe, half_precision_modules: tuple[str, ...] = ()) -> ExpectedConfig:
        """What a recipe means, which left these modules in half precision besides those that it skips."""
        skipping = replace(recipe, skip_modules=(*recipe.skip_modules, *half_precision_modules))
        towers = not recipe.quantize_towers
        return cls(MatrixFormat.of(recipe), skipping.skips, skips_towers=towers, skips_routers=True)

    @classmethod
    def read(cls, folder: Path) -> ExpectedConfig | None:
        """What config.json in `folder` says, None where not of bitsandbytes; raises OSError or CorruptModel."""
        config = read_json(folder / CONFIG, CONFIG, CorruptModel, finite=False).get(QUANTIZATION_KEY) or {}
        if not isinstance(config, dict):
            raise CorruptModel(f"{CONFIG} has a {QUANTIZATION_KEY} that is no object")
        if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
            return None
        skip_list = config.get("llm_int8_skip_modules")
        matrices = MatrixFormat(
            bits=4 if config.get("load_in_4bit") else 8,
            quant_type=config.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant")),
        )
        return cls(matrices, lambda name: is_listed(name, skip_list or []), skips_head=skip_list is None)

    @classmethod
    def read_if_possible(cls, folder: Path) -> ExpectedConfig | None:
        """What config.json in `folder` says, None also where it cannot be read."""
        try:
            return cls.read(folder)
        except (OSError, CorruptModel):
            return None


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """How a model is quantized by what its config.json says, in this format or another; None where it is not."""
    stated = config.get(QUANTIZATION_KEY) or config.get(COMPRESSION_KEY)
    if not stated:
        return None
    if not isinstance(stated, dict):
        return str(stated)
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
        return "bitsandbytes"
    return str(stated.get("quant_method") or COMPRESSION_KEY)


def write(checkout: Checkout, output: Path, model: Any, quantization: Any, dtype: str) -> None:
    """Write config.json of the quantized `model`: the source's own, with what is different now.

    One that transformers writes anew is in its newest dialect, of which older versions take defaults without a word.
    `quantization` is a BitsAndBytesConfig, `dtype` the type of what stays in half precision.
    """
    own = read_json(checkout.folder / CONFIG, CONFIG, CorruptModel, finite=False)
    if checkout.source.code_left_out:
        own = remote_code.without_code(own)
    changed = {
        **_with_dtype(own, dtype),
        "architectures": [experts.class_name(model)],
        "dtype": dtype,
        QUANTIZATION_KEY: quantization.to_dict(),
    }
    if experts.has_linear_experts(model):
        changed["auto_map"] = experts.auto_map(model, own)
    (output / CONFIG).write_text(json.dumps(changed, indent=2) + "\n", "utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose every mention of the weights' type is `dtype`, in those of its parts as well."""

    def renewed(name: str, value: Any) -> Any:
        if name in DTYPE_KEYS:
            return dtype
        return _with_dtype(value, dtype) if name.endswith("_config") and isinstance(value, dict) else value

    return {name: renewed(name, value) for name, value in config.items()}


def build(recipe: Recipe, compute_dtype: str, skip_list: list[str] | None) -> Any:
    """transformers' BitsAndBytesConfig for a recipe whose matrices are multiplied in `compute_dtype`.

    A `skip_list` replaces the modules that transformers leaves alone by itself, so it must name the head; None leaves
    that to transformers.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if recipe.bits == 8:
        threshold = float(recipe.options.get("outlier_threshold") or STOCK_THRESHOLD)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skip_list)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quant_type,
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        llm_int8_skip_modules=skip_list,
    )
