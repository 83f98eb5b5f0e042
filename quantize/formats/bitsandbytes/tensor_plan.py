"""What the tensors of a model are in its source's files, and what they become in the package's.

Ties, names and shapes are learned from the model on the meta device. Where transformers would change weights in a way
that is not known here, `plan` raises NotKnown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.formats import safetensors
from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.modules import is_transposed
from quantize.formats.safetensors import Entry, Slot
from quantize.records import Checkout, Recipe


class NotKnown(Exception):
    """Transformers would load this model in a way that is not known here."""


@dataclass(frozen=True)
class Piece:
    """A tensor of the model: where it comes from, what it becomes, and what files call it.

    `rounded` tensors become codes of a matrix, which is `transposed` first where the source has it the other way
    round; others stay as they are, as `dtype`. Instead of all that the tensors may be `given`, by their names.
    """

    name: str
    entry: Entry
    dtype: torch.dtype
    rounded: bool
    transposed: bool
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def slots(self, recipe: Recipe) -> list[Slot]:
        """What there will be in the package's files."""
        if self.given:
            return [
                Slot(name, one.dtype, None if packing.STATE in name else tuple(one.shape))
                for name, one in self.given.items()
            ]
        if not self.rounded:
            return [Slot(self.name, self.dtype, self.entry.shape)]
        rows, inputs = reversed(self.entry.shape) if self.transposed else self.entry.shape
        if recipe.bits == 8:
            return [
                Slot(self.name, torch.int8, (rows, inputs)),
                Slot(f"{module_of(self.name)}.SCB", torch.float32, (rows,)),
                Slot(f"{module_of(self.name)}.weight_format", torch.uint8, ()),
            ]
        return packing.slots(self.name, rows, inputs, recipe.quant_type, recipe.double_quant)


def plan(
    checkout: Checkout,
    model: Any,
    quantized: Iterable[str],
    dtype: torch.dtype,
    given: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[Piece]:
    """The pieces of the source's `model` (on the meta device, of `dtype`), in the order of their names.

    `quantized` are the names of the modules that become codes, `given` the tensors of some of them. Raises NotKnown.
    """
    _require_plain(model, dtype)
    wanted, ties = model.state_dict(), dict(model.all_tied_weights_keys)
    found: dict[str, tuple[str, Entry]] = {}
    rename = _renaming(model, wanted)
    for file in checkout.source.files:
        if file.path.endswith(".safetensors"):
            for key, entry in safetensors.entries(checkout.folder / file.path).items():
                name, called = rename(key)
                if name in found:
                    raise NotKnown(f"{name} is there twice")
                found[name] = called, entry
    for target, kept in ties.items():
        if target in found and kept in found and not _same(found[target][1], found[kept][1]):
            raise NotKnown(f"{target} is to be {kept}, and differs from it")
    matrices = {f"{module}.weight": model.get_submodule(module) for module in quantized}
    pieces = []
    for name in sorted(wanted.keys() - ties.keys() - set(model._keys_to_ignore_on_save or ()), key=_natural):
        if name not in found or tuple(wanted[name].shape) != found[name][1].shape:
            raise NotKnown(f"{name} is not in the source as the model has it")
        called, entry = found[name]
        rounded = name in matrices
        transposed = rounded and is_transposed(matrices[name])
        pieces.append(Piece(called, entry, wanted[name].dtype, rounded, transposed, _given_for(name, called, given)))
    return pieces


def _given_for(name: str, called: str, given: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors that belong to a parameter of the model: what is below its name in its module."""
    module, _, own = name.rpartition(".")
    parts = given.get(module, {})
    return {called + part.removeprefix(own): one for part, one in parts.items() if f"{part}.".startswith(f"{own}.")}


def _require_plain(model: Any, dtype: torch.dtype) -> None:
    if model.is_remote_code():
        raise NotKnown("the model brings its own code")
    kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    if any(kept) and dtype != torch.float32:
        raise NotKnown("the architecture keeps modules in float32")


def _renaming(model: Any, wanted: Mapping[str, Any]) -> Callable[[str], tuple[str, str]]:
    """Tells what the model calls a tensor of the source, and what it is called again when the model is saved.

    Names may lack the model's prefix, or have it too much, and some architectures have had others. Raises NotKnown for
    a tensor that is fused or split on the way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms, prefix = get_model_conversion_mapping(model), model.base_model_prefix

    def rename(key: str) -> tuple[str, str]:
        renamed = key
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(renamed)
            if pattern is not None and isinstance(transform, WeightConverter):
                raise NotKnown(f"{key} is fused or split while it is loaded")
        for name in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}.")):
            if name in wanted:
                return name, name if renamed == key else key
        return key, key

    return rename


def _same(one: Entry, other: Entry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, one.numel, safetensors.PART)
    parts = ((start, min(safetensors.PART, one.numel - start)) for start in starts)
    return all(
        torch.equal(safetensors.read(one, *part, False), safetensors.read(other, *part, False)) for part in parts
    )


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers in names by their size."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
