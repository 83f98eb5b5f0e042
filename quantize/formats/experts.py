"""Experts that transformers stacks in one tensor, as linear modules: in a model, in files, and in the package's code.

bitsandbytes 0.50 and transformers 5 have no 4-bit form of a stack. Where a later version has one, `unstacked` and
`as_linear` return the model as it is, and packages need no code any more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.files import hash_file
from quantize.formats import remote_code
from quantize.formats.model_class import class_of
from quantize.formats.safetensors import Entry
from quantize.records import FileRecord

if TYPE_CHECKING:
    import torch

MODELING = "modeling_experts.py"
"""The package's own code: the file of that name beside this one, byte for byte."""
OWN_CODE = Path(__file__).with_name(MODELING)


@dataclass(frozen=True)
class StackedPart:
    """How a tensor of an expert lies in what the source has for that expert: `transposed`, and then in these `rows`."""

    transposed: bool
    rows: slice

    def of(self, values: torch.Tensor) -> torch.Tensor:
        return (values.T if self.transposed else values)[self.rows].contiguous()

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        rows, *rest = reversed(whole) if self.transposed else whole
        return (len(range(*self.rows.indices(rows))), *rest)


def unstacked(model: Any) -> Any:
    """The `model` of transformers, whose experts are linear modules from now on, one per expert."""
    from quantize.formats import modeling_experts

    return model if model.is_remote_code() else modeling_experts.unstack(model)


def has_linear_experts(model: Any) -> bool:
    """Whether experts of a model are linear only by `unstacked`, so that others need the package's code for it."""
    return any(True for _ in linear_experts(model))


def linear_experts(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that `unstacked` has put into a model, with their names."""
    from quantize.formats.modeling_experts import LinearExperts

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LinearExperts))


@contextmanager
def as_linear(model: Any) -> Iterator[None]:
    """Within, a loaded model of transformers has linear experts, which are views of the stacked tensors."""
    from quantize.formats.modeling_experts import is_stacked, linear

    stacked = {name: module for name, module in model.named_modules() if is_stacked(module)}
    for name, module in stacked.items():
        model.set_submodule(name, linear(module))
    try:
        yield
    finally:
        for name, module in stacked.items():
            model.set_submodule(name, module)


def class_name(model: Any) -> str:
    """The class of transformers that a model is of."""
    from quantize.formats.modeling_experts import stock_class

    return str(stock_class(model).__name__)


def stacks(model: Any) -> dict[str, Any]:
    """The modules of linear experts by the names of the stacked tensors that they stand for."""
    return {f"{path}.{name}": module for path, module in linear_experts(model) for name in module.stacked_tensors()}


def parts(module: Any, name: str, entry: Entry) -> Iterator[tuple[str, Entry, StackedPart | None]]:
    """The tensors of linear experts that lie in the stacked tensor `name` of a file, by their names in the `module`.

    None is said of one that lies there as it is.
    """
    layers = module.stacked_tensors()[name]
    slab = replace(entry, shape=entry.shape[1:])
    transposed = _is_transposed(module, layers, slab)
    for number in range(min(entry.shape[0], module.num_experts)):
        own = replace(slab, start=entry.start + number * slab.numel * entry.dtype.itemsize)
        for index, (layer, kind) in enumerate(layers):
            yield f"{number}.{layer}.{kind}", *_part(own, module, transposed, index, len(layers))


def _is_transposed(module: Any, layers: list[tuple[str, str]], slab: Entry) -> bool:
    """Whether a file has [inputs, outputs] for an expert; where it does not show, as transformers has it."""
    if len(slab.shape) != 2:
        return False
    shapes = [module.get_parameter(f"0.{layer}.{kind}").shape for layer, kind in layers]
    plain = sum(shape[0] for shape in shapes), shapes[0][1]
    return (
        bool(module.is_transposed)
        if slab.shape in (plain, plain[::-1]) and plain[0] == plain[1]
        else slab.shape != plain
    )


def _part(slab: Entry, module: Any, transposed: bool, index: int, count: int) -> tuple[Entry, StackedPart | None]:
    length = (slab.shape[1] if transposed else slab.shape[0]) // count
    if count == 1:
        return slab, StackedPart(transposed, slice(None)) if transposed else None
    if not module.is_concatenated:
        return slab, StackedPart(transposed, slice(index, None, count))
    if transposed:
        return slab, StackedPart(transposed, slice(index * length, (index + 1) * length))
    own = replace(slab, shape=(length, *slab.shape[1:]))
    return replace(own, start=slab.start + index * math.prod(own.shape) * slab.dtype.itemsize), None


def auto_map(model: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """What the config.json of a package says of the code that its `model` needs: a class for each way to load it."""
    from quantize.formats.modeling_experts import PREFIX

    classes = {class_of(config).__name__: class_name(model), "AutoModel": class_name(model.base_model)}
    return {auto: f"{MODELING.removesuffix('.py')}.{PREFIX}{name}" for auto, name in classes.items()}


def add_code(folder: Path) -> None:
    """Put the package's own code into its folder."""
    (folder / MODELING).write_bytes(OWN_CODE.read_bytes())


def has_own_code(folder: Path) -> bool:
    """Whether a folder holds the package's own code, byte for byte."""
    path = folder / MODELING
    return path.is_file() and FileRecord(MODELING, *hash_file(path)) == own_record()


@functools.cache
def own_record() -> FileRecord:
    """The package's own code as a package lists it."""
    return FileRecord(MODELING, *hash_file(OWN_CODE))


def own_classes(folder: Path) -> set[str]:
    """The classes of the package's own code that a folder's configs name, none unless that code is there."""
    own = f"{MODELING.removesuffix('.py')}."
    return {name for name in remote_code.classes(folder) if name.startswith(own)} if has_own_code(folder) else set()


def names_only_own_code(folder: Path) -> bool:
    """Whether a folder's configs name classes of the package's own code, which is there, and of nothing else."""
    own = own_classes(folder)
    return bool(own) and own == remote_code.classes(folder)
