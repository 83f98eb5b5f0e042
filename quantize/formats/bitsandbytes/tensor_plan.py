"""What the tensors of a model are in its source's files, and what they become in the package's.

Ties, names and shapes are learned from the model on the meta device. Where transformers would change weights in a way
that is not known here, `plan` raises NotKnown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.formats.bitsandbytes.modules import is_transposed
from quantize.formats.bitsandbytes.sizes import STATE, MatrixFormat
from quantize.formats.safetensors import Entry, Slot
from quantize.formats.source_model import Renamed, natural, renaming, same_values, tensors
from quantize.records import Checkout, Recipe

PrecomputedTensors = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by the names of the modules that have them, and by what they are called there."""


class NotKnown(Exception):
    """Transformers would load this model in a way that is not known here."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the model: where it comes from, what it becomes, and what files call it.

    `rounded` tensors become codes of a matrix, which is `transposed` first where the source has it the other way
    round; others stay as they are, as `dtype`. Instead of all that, tensors may be `precomputed`, by their names.
    """

    name: str
    entry: Entry
    dtype: torch.dtype
    rounded: bool
    transposed: bool
    precomputed: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def slots(self, recipe: Recipe) -> list[Slot]:
        """What there will be in the package's files."""
        if self.precomputed:
            return [
                Slot(name, tensor.dtype, None if STATE in name else tuple(tensor.shape))
                for name, tensor in self.precomputed.items()
            ]
        if not self.rounded:
            return [Slot(self.name, self.dtype, self.entry.shape)]
        rows, inputs = reversed(self.entry.shape) if self.transposed else self.entry.shape
        return MatrixFormat.of(recipe).slots(module_of(self.name), rows, inputs)


def plan(
    checkout: Checkout,
    model: Any,
    quantized: Iterable[str],
    dtype: torch.dtype,
    precomputed: PrecomputedTensors,
) -> list[TensorPlan]:
    """A plan for each tensor of the source's `model` (on the meta device, of `dtype`), in the order of their names.

    `quantized` are the names of the modules that become codes, `precomputed` the tensors of some of them. Raises
    NotKnown.
    """
    _require_plain(model, dtype)
    expected, ties = model.state_dict(), dict(model.all_tied_weights_keys)
    stored = _stored(checkout, renaming(model, expected))
    for target, kept in ties.items():
        if target in stored and kept in stored and not same_values(stored[target][1], stored[kept][1]):
            raise NotKnown(f"{target} is to be {kept}, and differs from it")
    matrices = {f"{module}.weight": model.get_submodule(module) for module in quantized}
    plans = []
    for name in sorted(expected.keys() - ties.keys() - set(model._keys_to_ignore_on_save or ()), key=natural):
        if name not in stored or tuple(expected[name].shape) != stored[name][1].shape:
            raise NotKnown(f"{name} is not in the source as the model has it")
        saved_name, entry = stored[name]
        rounded = name in matrices
        transposed = rounded and is_transposed(matrices[name])
        own = _precomputed_for(name, saved_name, precomputed)
        plans.append(TensorPlan(saved_name, entry, expected[name].dtype, rounded, transposed, own))
    return plans


def _stored(checkout: Checkout, rename: Callable[[str], Renamed]) -> dict[str, tuple[str, Entry]]:
    """By the model's names for them, what the source's tensors are called in the package, and where they lie."""
    stored: dict[str, tuple[str, Entry]] = {}
    for key, entry in tensors(checkout).items():
        renamed = rename(key)
        if renamed.converted:
            raise NotKnown(f"{key} is fused or split while it is loaded")
        if renamed.name in stored:
            raise NotKnown(f"{renamed.name} is stored twice")
        stored[renamed.name] = renamed.saved_name, entry
    return stored


def _precomputed_for(name: str, saved_name: str, precomputed: PrecomputedTensors) -> dict[str, torch.Tensor]:
    """The tensors that belong to a parameter of the model: what is below its name in its module."""
    module, _, own = name.rpartition(".")
    parts = precomputed.get(module, {})
    return {
        saved_name + part.removeprefix(own): tensor
        for part, tensor in parts.items()
        if f"{part}.".startswith(f"{own}.")
    }


def _require_plain(model: Any, dtype: torch.dtype) -> None:
    if model.is_remote_code():
        raise NotKnown("the model brings its own code")
    kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    if any(kept) and dtype != torch.float32:
        raise NotKnown("the architecture keeps modules in float32")


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")
