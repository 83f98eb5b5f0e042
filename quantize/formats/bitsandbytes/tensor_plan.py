"""What the tensors of a model are in its source's files, and what they become in the package's.

Ties, names and shapes are learned from the model on the meta device. Where transformers would change weights in a way
that is not known here, `plan` raises NotKnown.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantize.errors import UnsupportedModel
from quantize.formats import experts
from quantize.formats.bitsandbytes.modules import float32_patterns, is_transposed
from quantize.formats.bitsandbytes.sizes import STATE, MatrixFormat
from quantize.formats.experts import StackedPart
from quantize.formats.safetensors import Entry, Slot
from quantize.formats.source_model import Renamed, converts_experts, natural, renaming, same_values, tensors
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
    in_float32 = _in_float32(model, dtype)
    expected, ties = model.state_dict(), dict(model.all_tied_weights_keys)
    stacks = experts.stacks(model)

    def kept_type(name: str) -> torch.dtype:
        return torch.float32 if in_float32(name) else expected[name].dtype

    matrices = {f"{module}.weight": model.get_submodule(module) for module in quantized}
    rename = renaming(model, {*expected, *stacks})
    held, converted = _stored_and_converted(checkout, rename, matrices.keys())
    stored = _with_parts(held, stacks)
    for target, kept in ties.items():
        if target in stored and kept in stored and not same_values(stored[target].entry, stored[kept].entry):
            raise NotKnown(f"{target} is to be {kept}, and differs from it")
    plain = expected.keys() - ties.keys() - set(model._keys_to_ignore_on_save or ())
    for tensor in converted:
        if not set(tensor.targets) <= plain - matrices.keys():
            raise NotKnown(f"{tensor.name} is fused or split while it is loaded")
    plans = [
        TensorPlan(tensor.name, tensor.entry, kept_type(tensor.targets[0]), rounded=False, transposed=False)
        for tensor in converted
    ]
    for name in sorted(plain - {target for tensor in converted for target in tensor.targets}, key=natural):
        if name not in stored or tuple(expected[name].shape) != stored[name].shape:
            raise NotKnown(f"{name} is not in the source as the model has it")
        rounded, source = name in matrices, stored[name]
        transposed = rounded and is_transposed(matrices[name])
        own = _precomputed_for(name, source.saved_name, precomputed)
        plans.append(
            TensorPlan(source.saved_name, source.entry, kept_type(name), rounded, transposed, own, source.stacked)
        )
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


@dataclass(frozen=True)
class _Converted:
    """A tensor of the source of which transformers makes others, its `targets`, as it will of the package's again."""

    name: str
    entry: Entry
    targets: tuple[str, ...]


def _stored_and_converted(
    checkout: Checkout, rename: Callable[[str], Renamed], matrices: Container[str]
) -> tuple[dict[str, _Stored], list[_Converted]]:
    """The source's tensors by the model's names for them, and those that it has in another form.

    Where `matrices` are some of a tensor's rows, all that come of it are taken apart here.
    """
    stored: dict[str, _Stored] = {}
    converted: list[_Converted] = []
    for key, entry in tensors(checkout).items():
        renamed = rename(key)
        targets = (renamed.name, *renamed.others)
        if not renamed.converted:
            parts = {renamed.name: _Stored(renamed.saved_name, entry)}
        elif renamed.split_by_rows and any(target in matrices for target in targets):
            parts = dict(zip(targets, _rows_apart(targets, entry), strict=True))
        else:
            converted.append(_Converted(key, entry, targets))
            continue
        if twice := next((name for name in parts if name in stored), None):
            raise NotKnown(f"{twice} is stored twice")
        stored |= parts
    return stored, converted


def _rows_apart(names: tuple[str, ...], entry: Entry) -> Iterator[_Stored]:
    """What each of the tensors called `names` has of a stored one: equal numbers of its rows."""
    rows, rest = divmod(entry.shape[0], len(names))
    if rest:
        raise NotKnown(f"{names[0]} has no whole share of the rows that are stored")
    size = entry.numel // len(names)
    for index, name in enumerate(names):
        start = entry.start + index * size * entry.dtype.itemsize
        yield _Stored(name, replace(entry, shape=(rows, *entry.shape[1:]), start=start))


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


def require_readable(model: Any, name: str) -> None:
    """Raise UnsupportedModel where a `model` with linear experts has files that cannot be read tensor by tensor.

    Told before they are here, by what transformers does to the files of such models while it loads them.
    """
    if not experts.has_linear_experts(model):
        return
    if tied := sorted(experts.stacks(model).keys() & model.all_tied_weights_keys.keys()):
        raise without_whole_model(name, f"{tied[0]} is tied to other experts")
    if converts_experts(model):
        raise without_whole_model(name, "its experts are stored in a form that is not known here")


def without_whole_model(name: str, reason: str) -> UnsupportedModel:
    """What is said of a model with experts where another would be loaded as a whole."""
    return UnsupportedModel(f"{name} has experts, and cannot be read tensor by tensor: {reason}")


def _require_plain(model: Any) -> None:
    if model.is_remote_code():
        raise NotKnown("the model brings its own code")


def _in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Tells which tensors transformers loads as float32 into a model of `dtype`."""
    patterns = float32_patterns(model, float16=dtype == torch.float16) if dtype != torch.float32 else []
    return lambda name: any(pattern.search(name) for pattern in patterns)


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")
