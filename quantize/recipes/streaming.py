"""The stock recipe without the model: tensors stream from the source's files through rounding into the package's.

What becomes 4-bit, what is tied and what things are called is learned from the model on the meta device. Reading,
rounding and writing overlap, and memory holds a few tensors at a time. Where transformers would change weights in a way
that is not known here, `plan` says so, and nothing is done.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional

from quantize.errors import CorruptModel, storage_errors
from quantize.progress import Progress
from quantize.recipes import packing, shards
from quantize.recipes.blocks import is_transposed
from quantize.recipes.shards import Entry, Shard, Slot
from quantize.records import Checkout, Recipe

PART = 16 << 20
"""Elements of a tensor that stays in half precision which are copied together."""
AHEAD = 256 << 20
"""Bytes that are read before they are needed, and that wait for being written; or one tensor, where that is larger."""
READERS = WRITERS = 2
INDEX = "model.safetensors.index.json"


class NotKnown(Exception):
    """Transformers would load this model in a way that is not known here."""


@dataclass(frozen=True)
class Piece:
    """A tensor of the model: where it comes from, what it becomes, and what files call it.

    `rounded` tensors become codes of a matrix, which is `transposed` first where the source has it the other way
    round; others stay as they are, as `dtype`.
    """

    name: str
    entry: Entry
    dtype: torch.dtype
    rounded: bool
    transposed: bool

    def slots(self, recipe: Recipe) -> list[Slot]:
        """What there will be in the package's files."""
        if not self.rounded:
            return [Slot(self.name, self.dtype, self.entry.shape)]
        rows, inputs = reversed(self.entry.shape) if self.transposed else self.entry.shape
        if recipe.bits == 8:
            return [
                Slot(self.name, torch.int8, (rows, inputs)),
                Slot(f"{_module(self.name)}.SCB", torch.float32, (rows,)),
                Slot(f"{_module(self.name)}.weight_format", torch.uint8, ()),
            ]
        blocks = math.ceil(rows * inputs / packing.BLOCK)
        nested = [
            Slot(f"{self.name}.nested_absmax", torch.float32, (math.ceil(blocks / packing.NESTED_BLOCK),)),
            Slot(f"{self.name}.nested_quant_map", torch.float32, (256,)),
        ]
        return [
            Slot(self.name, torch.uint8, (math.ceil(rows * inputs / 2), 1)),
            Slot(f"{self.name}.absmax", torch.uint8 if recipe.double_quant else torch.float32, (blocks,)),
            Slot(f"{self.name}.quant_map", torch.float32, (16,)),
            *(nested if recipe.double_quant else []),
            Slot(f"{self.name}.quant_state.bitsandbytes__{recipe.quant_type}", torch.uint8, None),
        ]


@dataclass(frozen=True)
class Work:
    """What one step reads: `count` elements of a piece from the element `first` on."""

    piece: Piece
    first: int
    count: int

    @property
    def size(self) -> int:
        return self.count * self.piece.entry.dtype.itemsize


def plan(checkout: Checkout, model: Any, quantized: Iterable[str], dtype: torch.dtype) -> list[Piece]:
    """The pieces of the source's `model` (on the meta device, of `dtype`), in the order of their names.

    `quantized` are the names of the modules that become codes. Raises NotKnown.
    """
    _require_plain(model, dtype)
    wanted, ties = model.state_dict(), dict(model.all_tied_weights_keys)
    found: dict[str, tuple[str, Entry]] = {}
    rename = _renaming(model, wanted)
    for file in checkout.source.files:
        if file.path.endswith(".safetensors"):
            for key, entry in shards.entries(checkout.folder / file.path).items():
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
        pieces.append(Piece(called, entry, wanted[name].dtype, rounded, transposed))
    return pieces


def write(
    pieces: list[Piece], output: Path, resume: Path, recipe: Recipe, device: str, largest: int, progress: Progress
) -> None:
    """Write the pieces into safetensors files of at most about `largest` bytes in `output`, with an index of several.

    Files that are finished in the folder `resume` are taken over. Raises CorruptModel at the first NaN or infinity.
    """
    groups = _in_files(pieces, recipe, largest)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    with progress.task("quantizing", sum(piece.entry.numel for piece in pieces), "weights") as advance:
        for name, group in zip(names, groups, strict=True):
            file = resume / name
            if file.is_file():
                advance(sum(piece.entry.numel for piece in group))
            else:
                with storage_errors(resume):
                    _write_shard(file, group, recipe, device, advance)
            _place(file, output / name)
    if len(groups) > 1:
        _write_index(output, names)


def _write_shard(file: Path, group: list[Piece], recipe: Recipe, device: str, advance: Callable[[int], None]) -> None:
    pinned = torch.device(device).type == "cuda"
    slots = [slot for piece in group for slot in piece.slots(recipe)]
    with (
        ThreadPoolExecutor(READERS) as readers,
        Shard(file, slots) as shard,
        _Behind(WRITERS) as writers,
    ):
        for work, values in _ahead(readers, _works(group), pinned):
            tensors = _results(work, values, recipe, device)
            writers.submit(sum(one.nbytes for one in tensors.values()), _put, shard, tensors, work.first)
            advance(work.count)


def _put(shard: Shard, tensors: Mapping[str, torch.Tensor], first: int) -> None:
    for name, values in tensors.items():
        shard.write(name, values, first)


def _results(work: Work, values: torch.Tensor, recipe: Recipe, device: str) -> dict[str, torch.Tensor]:
    """What `values` become, on the CPU."""
    piece = work.piece
    try:
        if not piece.rounded:
            return {piece.name: _finite(values).to(piece.dtype)}
        matrix = values.view(piece.entry.shape).to(device, non_blocking=True).to(piece.dtype)
        tensors = _codes(matrix.T if piece.transposed else matrix, recipe)
    except ValueError as error:
        place = piece.entry.file.name
        raise CorruptModel(f"{piece.name} in {place} holds NaN or infinity: the source is damaged") from error
    return {f"{_module(piece.name)}.{part}": tensor.cpu() for part, tensor in tensors.items()}


def _codes(matrix: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    if recipe.bits == 4:
        return packing.nearest_tensors(matrix, recipe.quant_type, recipe.double_quant)
    codes, scales, _ = functional.int8_vectorwise_quant(_finite(matrix).contiguous().to(torch.float16))
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _finite(values: torch.Tensor) -> torch.Tensor:
    """`values`, or ValueError: the largest exponents are those of NaN and infinity."""
    if values.is_floating_point() and values.numel():
        if values.dtype in (torch.float16, torch.bfloat16):
            largest = values.contiguous().view(torch.int16).bitwise_and(0x7FFF).amax().view(values.dtype)
        else:
            largest = values.abs().amax()
        if not bool(largest.isfinite()):
            raise ValueError("NaN or infinity among the weights")
    return values


def _works(pieces: list[Piece]) -> Iterator[Work]:
    for piece in pieces:
        count = piece.entry.numel
        step = max(count, 1) if piece.rounded else PART
        for first in range(0, max(count, 1), step):
            yield Work(piece, first, min(step, count - first))


def _ahead(readers: ThreadPoolExecutor, works: Iterable[Work], pinned: bool) -> Iterator[tuple[Work, torch.Tensor]]:
    """Each of `works` with what it reads, while what comes next is being read."""
    waiting: deque[tuple[Work, Future[torch.Tensor]]] = deque()
    held = 0
    for work in works:
        while waiting and held + work.size > AHEAD:
            first, future = waiting.popleft()
            held -= first.size
            yield first, future.result()
        entry = work.piece.entry
        waiting.append(
            (work, readers.submit(shards.read, entry, work.first, work.count, pinned and work.piece.rounded))
        )
        held += work.size
    for work, future in waiting:
        yield work, future.result()


class _Behind:
    """Work that others do, with no more than AHEAD bytes of it waiting; what fails there is raised here."""

    def __init__(self, workers: int) -> None:
        self.pool = ThreadPoolExecutor(workers)
        self.waiting: deque[tuple[int, Future[None]]] = deque()
        self.held = 0

    def submit(self, size: int, function: Callable[..., None], *arguments: Any) -> None:
        while self.waiting and self.held + size > AHEAD:
            self._take()
        self.waiting.append((size, self.pool.submit(function, *arguments)))
        self.held += size

    def _take(self) -> None:
        size, future = self.waiting.popleft()
        self.held -= size
        future.result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self.waiting and kind is None:
                self._take()
        finally:
            self.pool.shutdown(cancel_futures=True)


def _in_files(pieces: list[Piece], recipe: Recipe, largest: int) -> list[list[Piece]]:
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        size = sum(slot.size for slot in piece.slots(recipe))
        if groups[-1] and filled + size > largest:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += size
    return groups


def _place(file: Path, target: Path) -> None:
    """Give a finished file its place in the package, and keep it for a run that goes on after this one."""
    with storage_errors(target.parent):
        try:
            os.link(file, target)
        except OSError:  # a file system without links
            shutil.copyfile(file, target)


def _write_index(output: Path, names: list[str]) -> None:
    places = {key: name for name in names for key in shards.entries(output / name)}
    sizes = sum(
        entry.numel * entry.dtype.itemsize for name in names for entry in shards.entries(output / name).values()
    )
    index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(places.items()))}
    with storage_errors(output):
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


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
    starts = range(0, one.numel, PART)
    parts = ((start, min(PART, one.numel - start)) for start in starts)
    return all(torch.equal(shards.read(one, *part, False), shards.read(other, *part, False)) for part in parts)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers in names by their size."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
