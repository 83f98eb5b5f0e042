"""The stock recipe without the model: tensors stream from the source's files through rounding into the package's.

What becomes 4-bit, what is tied and what things are called is learned from the model on the meta device. Reading,
rounding and writing overlap, and memory holds a few tensors at a time. Where transformers would change weights in a way
that is not known here, `pieces.plan` raises NotKnown, and nothing is done.
"""

from __future__ import annotations

import functools
import os
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
from quantize.formats import safetensors
from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.tensor_plan import Piece, module_of
from quantize.formats.safetensors import Shard
from quantize.progress import Progress
from quantize.records import Recipe

AHEAD, AHEAD_ELSEWHERE = {"cpu": 32 << 20}, 512 << 20
"""Bytes that are read before they are needed, and that wait for being written; or one tensor, where that is larger. A
GPU is done before files are."""
READERS = WRITERS = 4
MatrixRounding = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
"""A matrix [outputs, inputs] in half precision -> its tensors, by the names after the module's own."""


@dataclass(frozen=True)
class Step:
    """What one step reads: `count` elements of a piece from the element `first` on."""

    piece: Piece
    first: int
    count: int

    @property
    def size(self) -> int:
        return self.count * self.piece.entry.dtype.itemsize


def write(
    pieces: list[Piece],
    output: Path,
    resume: Path,
    recipe: Recipe,
    device: str,
    largest: int,
    progress: Progress,
    rounding: MatrixRounding | None = None,
) -> None:
    """Write the pieces into safetensors files of at most about `largest` bytes in `output`, with an index of several.

    Matrices become what `rounding` makes of them, nearest codes where none is given.
    Files that are finished in the folder `resume` are taken over. Raises CorruptModel at the first NaN or infinity.
    """
    groups = safetensors.in_files(pieces, lambda piece: sum(slot.size for slot in piece.slots(recipe)), largest)
    names = safetensors.file_names(len(groups))
    with progress.task("quantizing", sum(piece.entry.numel for piece in pieces), "weights") as advance:
        for name, group in zip(names, groups, strict=True):
            file = resume / name
            if file.is_file():
                advance(sum(piece.entry.numel for piece in group))
            else:
                with storage_errors(resume):
                    _write_shard(file, group, recipe, device, advance, rounding)
            _place(file, output / name)
    if len(groups) > 1:
        with storage_errors(output):
            safetensors.write_index(output, names)


def _write_shard(
    file: Path,
    group: list[Piece],
    recipe: Recipe,
    device: str,
    advance: Callable[[int], None],
    rounding: MatrixRounding | None,
) -> None:
    rounding = rounding or functools.partial(_nearest, recipe=recipe)
    kind = torch.device(device).type
    pinned, ahead = kind == "cuda", AHEAD.get(kind, AHEAD_ELSEWHERE)
    slots = [slot for piece in group for slot in piece.slots(recipe)]
    with (
        ThreadPoolExecutor(READERS) as readers,
        Shard(file, slots) as shard,
        _Behind(WRITERS, ahead) as writers,
    ):
        for step, values in _ahead(readers, _steps(group), ahead, pinned):
            found = _results(step, values, device, rounding)
            writers.submit(sum(one.nbytes for one in found.values()), _put, shard, found, step.first)
            advance(step.piece.entry.numel if step.piece.given else step.count)


def _put(shard: Shard, found: Mapping[str, torch.Tensor], first: int) -> None:
    for name, values in found.items():
        shard.write(name, values, first)


def _results(step: Step, values: torch.Tensor, device: str, rounding: MatrixRounding) -> dict[str, torch.Tensor]:
    """What `values` become, on the CPU."""
    piece = step.piece
    if piece.given:
        return dict(piece.given)
    try:
        if not piece.rounded:
            return {piece.name: _finite(values).to(piece.dtype)}
        matrix = values.view(piece.entry.shape).to(device, non_blocking=True).to(piece.dtype)
        parts = rounding(matrix.T if piece.transposed else matrix)
    except packing.NotFinite as error:
        place = piece.entry.file.name
        raise CorruptModel(f"{piece.name} in {place} holds NaN or infinity: the source is damaged") from error
    return {f"{module_of(piece.name)}.{part}": _on_cpu(tensor) for part, tensor in parts.items()}


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return (
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor) if tensor.is_cuda else tensor.cpu()
    )


def _nearest(matrix: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    if recipe.bits == 4:
        return packing.nearest_tensors(matrix, recipe.quant_type, recipe.double_quant)
    codes, scales, _ = functional.int8_vectorwise_quant(_finite(matrix).contiguous().to(torch.float16))
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _finite(values: torch.Tensor) -> torch.Tensor:
    """`values`, or NotFinite: the largest exponents are those of NaN and infinity."""
    if values.is_floating_point() and values.numel():
        if values.dtype in (torch.float16, torch.bfloat16):
            largest = values.contiguous().view(torch.int16).bitwise_and(0x7FFF).amax().view(values.dtype)
        else:
            largest = values.abs().amax()
        if not bool(largest.isfinite()):
            raise packing.NotFinite
    return values


def _steps(pieces: list[Piece]) -> Iterator[Step]:
    for piece in pieces:
        count = 0 if piece.given else piece.entry.numel
        part = max(count, 1) if piece.rounded else safetensors.PART
        for first in range(0, max(count, 1), part):
            yield Step(piece, first, min(part, count - first))


def _ahead(
    readers: ThreadPoolExecutor, steps: Iterable[Step], ahead: int, pinned: bool
) -> Iterator[tuple[Step, torch.Tensor]]:
    """Each of `steps` with what it reads, while what comes next is being read, at most `ahead` bytes of it."""
    waiting: deque[tuple[Step, Future[torch.Tensor]]] = deque()
    held = 0
    for step in steps:
        while waiting and held + step.size > ahead:
            first, future = waiting.popleft()
            held -= first.size
            yield first, future.result()
        entry, on_its_way = step.piece.entry, pinned and step.piece.rounded
        waiting.append((step, readers.submit(safetensors.read, entry, step.first, step.count, on_its_way)))
        held += step.size
    for step, future in waiting:
        yield step, future.result()


class _Behind:
    """ResumeFolder that others do, with no more than `most` bytes of it waiting; what fails there is raised here."""

    def __init__(self, workers: int, most: int) -> None:
        self.pool, self.most = ThreadPoolExecutor(workers), most
        self.waiting: deque[tuple[int, Future[None]]] = deque()
        self.held = 0

    def submit(self, size: int, function: Callable[..., None], *arguments: Any) -> None:
        while self.waiting and self.held + size > self.most:
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


def _place(file: Path, target: Path) -> None:
    """Give a finished file its place in the package, and keep it for a run that goes on after this one."""
    with storage_errors(target.parent):
        try:
            os.link(file, target)
        except OSError:  # a file system without links
            shutil.copyfile(file, target)
