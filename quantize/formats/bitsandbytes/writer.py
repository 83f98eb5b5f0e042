"""Writes a checkpoint without the model: tensors stream from the source's files through rounding into the package's.

Reading, rounding and writing overlap, and memory holds a few tensors at a time. What becomes of each tensor says its
plan, see `tensor_plan`.
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

from quantize.errors import CorruptModel, SourceError, UnsupportedModel, storage_errors
from quantize.formats import safetensors
from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.sizes import ROW_FORMAT, ROW_SCALES
from quantize.formats.bitsandbytes.tensor_plan import TensorPlan, module_of
from quantize.formats.bounds import are_bounds
from quantize.formats.safetensors import Shard
from quantize.progress import Progress
from quantize.records import Recipe
from quantize.resume import ResumeFolder

AHEAD, AHEAD_ELSEWHERE = {"cpu": 32 << 20}, 512 << 20
"""Bytes that are read before they are needed, and that wait for being written; or one tensor, where that is larger. A
GPU is done before files are."""
READERS = WRITERS = 4
MatrixRounding = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
"""A matrix [outputs, inputs] in half precision -> its tensors, by the names after the module's own."""


@dataclass(frozen=True)
class Step:
    """What is read at once: `count` elements of a tensor from the element `first` on."""

    plan: TensorPlan
    first: int
    count: int

    @property
    def size(self) -> int:
        return self.count * self.plan.entry.dtype.itemsize


def write(
    plans: list[TensorPlan],
    output: Path,
    resume: ResumeFolder,
    recipe: Recipe,
    device: str,
    largest: int,
    progress: Progress,
    rounding: MatrixRounding | None = None,
) -> None:
    """Write the planned tensors into safetensors files of at most about `largest` bytes in `output`.

    Where there are several there is an index of them. Matrices become what `rounding` makes of them, nearest codes
    where none is given. Files that are finished in `resume` are taken over. Raises CorruptModel at the first NaN or
    infinity.
    """
    groups = safetensors.in_files(plans, lambda plan: sum(slot.size for slot in plan.slots(recipe)), largest)
    names = safetensors.file_names(len(groups))
    with progress.task("quantizing", sum(plan.entry.numel for plan in plans), "weights") as advance:
        for name, group in zip(names, groups, strict=True):
            file = resume.part(name)
            if file is not None:
                advance(sum(plan.entry.numel for plan in group))
            else:
                write_shard = functools.partial(
                    _write_shard, group=group, recipe=recipe, device=device, advance=advance, rounding=rounding
                )
                file = resume.keep(name, write_shard)
            _link(file, output / name)
    if len(groups) > 1:
        with storage_errors(output):
            safetensors.write_index(output, names)


def _write_shard(
    file: Path,
    group: list[TensorPlan],
    recipe: Recipe,
    device: str,
    advance: Callable[[int], None],
    rounding: MatrixRounding | None,
) -> None:
    rounding = rounding or functools.partial(_nearest, recipe=recipe)
    kind = torch.device(device).type
    pinned, ahead = kind == "cuda", AHEAD.get(kind, AHEAD_ELSEWHERE)
    slots = [slot for plan in group for slot in plan.slots(recipe)]
    with (
        ThreadPoolExecutor(READERS) as readers,
        Shard(file, slots) as shard,
        _WriteBehind(WRITERS, ahead) as writers,
    ):
        for step, values in _read_ahead(readers, _steps(group), ahead, pinned):
            tensors = _results(step, values, device, rounding)
            writers.submit(
                sum(tensor.nbytes for tensor in tensors.values()), _write_tensors, shard, tensors, step.first
            )
            advance(step.plan.entry.numel if step.plan.precomputed else step.count)


def _write_tensors(shard: Shard, tensors: Mapping[str, torch.Tensor], first: int) -> None:
    for name, values in tensors.items():
        shard.write(name, values, first)


def _results(step: Step, values: torch.Tensor, device: str, rounding: MatrixRounding) -> dict[str, torch.Tensor]:
    """What `values` become, on the CPU."""
    plan = step.plan
    if plan.precomputed:
        return dict(plan.precomputed)
    try:
        if not plan.rounded:
            kept = plan.laid_out(values) if plan.whole else values
            return {plan.name: _finite_or_bounds(kept, plan.dtype)}
        matrix = plan.laid_out(values).to(device, non_blocking=True).to(plan.dtype)
        parts = rounding(matrix.T if plan.transposed else matrix)
    except packing.NotFinite as error:
        raise _not_finite(f"{plan.name} in {plan.entry.file.name}", values, plan.dtype) from error
    return {f"{module_of(plan.name)}.{part}": _on_cpu(tensor) for part, tensor in parts.items()}


def _not_finite(name: str, values: torch.Tensor, dtype: torch.dtype) -> SourceError:
    """What to say of `values` that are not finite as `dtype`, or as the float16 from which 8-bit codes are made."""
    largest = float(values.abs().max())
    if not largest < float("inf"):
        return CorruptModel(f"{name} holds NaN or infinity: the source is damaged")
    stored = str(dtype).removeprefix("torch.")
    if fits(largest, stored):
        return overflow(name, largest, "float16", "8-bit codes are made from it, so choose --bits 4")
    return overflow(name, largest, stored)


def overflow(name: str, largest: float, dtype: str, advice: str = "choose another --compute-dtype") -> UnsupportedModel:
    """The error of a tensor called `name` whose `largest` value is infinite as `dtype`."""
    most = torch.finfo(getattr(torch, dtype)).max
    return UnsupportedModel(f"{name} holds {largest:.6g}, and {dtype} ends at {most:.6g}: {advice}")


def fits(value: float, dtype: str) -> bool:
    """Whether a value stays finite when it is rounded to `dtype`."""
    return bool(torch.tensor(value, dtype=torch.float64).to(getattr(torch, dtype)).isfinite())


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return (
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor) if tensor.is_cuda else tensor.cpu()
    )


def _nearest(matrix: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    if recipe.bits == 4:
        return packing.nearest_tensors(matrix, recipe.quant_type, recipe.double_quant)
    codes, scales, _ = functional.int8_vectorwise_quant(_finite(matrix.contiguous().to(torch.float16)))
    return {"weight": codes, ROW_SCALES: scales, ROW_FORMAT: torch.tensor(0, dtype=torch.uint8)}


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


def _finite_or_bounds(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` as `dtype`, or NotFinite: also where they are finite, and infinite as `dtype`."""
    try:
        return _finite(values.to(dtype))
    except packing.NotFinite:
        if are_bounds(values):
            return values.to(dtype)
        raise


def _steps(plans: list[TensorPlan]) -> Iterator[Step]:
    for plan in plans:
        count = 0 if plan.precomputed else plan.entry.numel
        part = max(count, 1) if plan.whole else safetensors.PART
        for first in range(0, max(count, 1), part):
            yield Step(plan, first, min(part, count - first))


def _read_ahead(
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
        entry, pin = step.plan.entry, pinned and step.plan.rounded
        waiting.append((step, readers.submit(safetensors.read, entry, step.first, step.count, pin)))
        held += step.size
    for step, future in waiting:
        yield step, future.result()


class _WriteBehind:
    """Writing in other threads, with no more than `most` bytes waiting for it; what fails there is raised here."""

    def __init__(self, workers: int, most: int) -> None:
        self.pool, self.most = ThreadPoolExecutor(workers), most
        self.waiting: deque[tuple[int, Future[None]]] = deque()
        self.held = 0

    def submit(self, size: int, function: Callable[..., None], *arguments: Any) -> None:
        while self.waiting and self.held + size > self.most:
            self._wait_for_first()
        self.waiting.append((size, self.pool.submit(function, *arguments)))
        self.held += size

    def _wait_for_first(self) -> None:
        size, future = self.waiting.popleft()
        self.held -= size
        future.result()

    def __enter__(self) -> _WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self.waiting and kind is None:
                self._wait_for_first()
        finally:
            self.pool.shutdown(cancel_futures=True)


def _link(file: Path, target: Path) -> None:
    """Put a finished file into the package, and keep it for a run that goes on after this one."""
    with storage_errors(target.parent):
        try:
            os.link(file, target)
        except OSError:  # a file system without links
            shutil.copyfile(file, target)
