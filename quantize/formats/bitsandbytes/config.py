"""What config.json says about a bitsandbytes checkpoint: read, expected of a recipe, and made for transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel
from quantize.files import CONFIG
from quantize.formats.bitsandbytes.modules import is_listed
from quantize.formats.bitsandbytes.sizes import MatrixFormat
from quantize.records import Recipe

QUANTIZATION_KEY, COMPRESSION_KEY = "quantization_config", "compression_config"
"""Of the config of a quantized model; bitsandbytes has the first."""


@dataclass(frozen=True)
class ExpectedConfig:
    """What a recipe, or a checkpoint's own config, says about it.

    `skips` tells by a module's name whether it stays as it is; a recipe leaves the head alone besides, while a
    config that lists modules means those and no others.
    """

    matrices: MatrixFormat
    skips: Callable[[str], bool]
    skips_head: bool = True

    @property
    def bits(self) -> int:
        return self.matrices.bits

    @classmethod
    def of(cls, recipe: Recipe, half_precision_modules: tuple[str, ...] = ()) -> ExpectedConfig:
        """What a recipe means, which left these modules in half precision besides those that it skips."""
        skipping = replace(recipe, skip_modules=(*recipe.skip_modules, *half_precision_modules))
        return cls(MatrixFormat.of(recipe), skipping.skips)

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


def build(recipe: Recipe, compute_dtype: str, skip_list: list[str] | None) -> Any:
    """transformers' BitsAndBytesConfig for a recipe whose matrices are multiplied in `compute_dtype`.

    A `skip_list` replaces the modules that transformers leaves alone by itself, so it must name the head; None leaves
    that to transformers.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if recipe.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_list)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quant_type,
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        llm_int8_skip_modules=skip_list,
    )
