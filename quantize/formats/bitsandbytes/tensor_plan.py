"""What the tensors of a model are in its source's files, and what they become in the package's.

Ties, names and shapes are learned from the model on the meta device. Where transformers would change weights in a way
that is not known here, `plan` raises NotKnown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.formats import experts
from quantize.formats.bitsandbytes.modules import is_listed, is_transposed
from quantize.formats.bitsandbytes.sizes import STATE, MatrixFormat
from quantize.formats.experts import StackedPart
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
    round; others stay as they are, as `dtype`. One that is `stacked` with others has to be taken out first. Instead of
    all that, tensors may be `precomputed`, by their names.
    """

    name: str
    entry: Entry
    dtype: torch.dtype
    rounded: bool
    transposed: bool
    precomputed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stacked: StackedPart | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """What the tensor has when it is by itself, as the source has it."""
        return _shape(self.entry, self.stacked)

    @property
    def whole(self) -> bool:
        """Whether all of it is needed at once."""
        return self.rounded or self.stacked is not None

    def laid_out(self, values: torch.Tensor) -> torch.Tensor:
        """All elements [elements] that were read, as the tensor that they are."""
        held = values.view(self.entry.shape)
        return self.stacked.of(held) if self.stacked else held

    def slots(self, recipe: Recipe) -> list[Slot]:
        """What there will be in the package's files."""
        if self.precomputed:
            return [
                Slot(name, tensor.dtype, None if STATE in name else tuple(tensor.shape))
                for name, tensor in self.precomputed.items()
            ]
        if not self.rounded:
            return [Slot(self.name, self.dtype, self.shape)]
        rows, inputs = reversed(self.shape) if self.transposed else self.shape
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
    quantized = tuple(quantized)
    _require_plain(model)
    in_float32 = _kept_in_float32(model, dtype, quantized)
    expected, ties = model.state_dict(), dict(model.all_tied_weights_keys)
    stacks = experts.stacks(model)
    stored = _with_parts(_stored(checkout, renaming(model, {*expected, *stacks})), stacks)
    for target, kept in ties.items():
        if target in stored and kept in stored and not same_values(stored[target].entry, stored[kept].entry):
            raise NotKnown(f"{target} is to be {kept}, and differs from it")
    matrices = {f"{module}.weight": model.get_submodule(module) for module in quantized}
    plans = []
    for name in sorted(expected.keys() - ties.keys() - set(model._keys_to_ignore_on_save or ()), key=natural):
        if name not in stored or tuple(expected[name].shape) != stored[name].shape:
            raise NotKnown(f"{name} is not in the source as the model has it")
        rounded, held = name in matrices, stored[name]
        transposed = rounded and is_transposed(matrices[name])
        own = _precomputed_for(name, held.saved_name, precomputed)
        kept_type = expected[name].dtype if not in_float32(name) else torch.float32
        plans.append(TensorPlan(held.saved_name, held.entry, kept_type, rounded, transposed, own, held.stacked))
    return plans


@dataclass(frozen=True)
class _Stored:
    """What a tensor of the source is called in the package, and where it lies."""

    saved_name: str
    entry: Entry
    stacked: StackedPart | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.entry, self.stacked)


def _shape(entry: Entry, stacked: StackedPart | None) -> tuple[int, ...]:
    return stacked.shape(entry.shape) if stacked else entry.shape


def _stored(checkout: Checkout, rename: Callable[[str], Renamed]) -> dict[str, _Stored]:
    """The source's tensors by the model's names for them."""
    stored: dict[str, _Stored] = {}
    for key, entry in tensors(checkout).items():
        renamed = rename(key)
        if renamed.converted:
            raise NotKnown(f"{key} is fused or split while it is loaded")
        if renamed.name in stored:
            raise NotKnown(f"{renamed.name} is stored twice")
        stored[renamed.name] = _Stored(renamed.saved_name, entry)
    return stored


def _with_parts(stored: dict[str, _Stored], stacks: Mapping[str, Any]) -> dict[str, _Stored]:
    """The same with the tensors of linear experts in place of those that stack them."""
    divided = {name: tensor for name, tensor in stored.items() if name not in stacks}
    for name in stored.keys() & stacks.keys():
        path, _, own = name.rpartition(".")
        for part, entry, stacked in experts.parts(stacks[name], own, stored[name].entry):
            divided[f"{path}.{part}"] = _Stored(f"{path}.{part}", entry, stacked)
    return divided


def _precomputed_for(name: str, saved_name: str, precomputed: PrecomputedTensors) -> dict[str, torch.Tensor]:
    """The tensors that belong to a parameter of the model: what is below its name in its module."""
    module, _, own = name.rpartition(".")
    parts = precomputed.get(module, {})
    return {
        saved_name + part.removeprefix(own): tensor
        for part, tensor in parts.items()
        if f"{part}.".startswith(f"{own}.")
    }


def _require_plain(model: Any) -> None:
    if model.is_remote_code():
        raise NotKnown("the model brings its own code")


def _kept_in_float32(model: Any, dtype: torch.dtype, quantized: Iterable[str]) -> Callable[[str], bool]:
    """Tells which tensors transformers loads as float32 into a model of `dtype`.

    Raises NotKnown where matrices are among them that could be quantized otherwise.
    """
    always, from_float16 = list(model._keep_in_fp32_modules_strict or ()), list(model._keep_in_fp32_modules or ())
    patterns = [*always * (dtype != torch.float32), *from_float16 * (dtype == torch.float16)]
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]

    def in_float32(name: str) -> bool:
        return any(pattern.search(name) for pattern in kept)

    if any(in_float32(f"{name}.weight") or is_listed(name, from_float16) for name in quantized):
        raise NotKnown("the architecture keeps matrices in float32")
    return in_float32


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")
