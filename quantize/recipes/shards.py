"""Safetensors files read and written tensor by tensor, so that memory need not hold a file."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantize.errors import CorruptModel

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}

PART = 1 << 22
"""Elements that are read together where a tensor need not be whole."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `start` is where its first byte lies in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def entries(file: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by name; raises CorruptModel."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        if one["dtype"] not in TYPES:
            raise CorruptModel(f"{name} in {file.name} has the type {one['dtype']}, which is not known here")
        start = 8 + length + one["data_offsets"][0]
        found[name] = Entry(file, TYPES[one["dtype"]], tuple(one["shape"]), start)
    return found


def parts(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a file, by its name and in parts."""
    for name, entry in entries(file).items():
        for first in range(0, entry.numel, PART):
            yield name, read(entry, first, min(PART, entry.numel - first), pinned=False)


def read(entry: Entry, first: int, count: int, pinned: bool) -> torch.Tensor:
    """`count` elements [count] of a tensor from the element `first` on, read into memory of their own."""
    size = entry.dtype.itemsize
    buffer = _room(count * size, pinned)
    view, place = memoryview(buffer.numpy().data), entry.start + first * size
    with entry.file.open("rb", buffering=0) as file:
        file.seek(place)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CorruptModel(f"{entry.file.name} ends before its tensors do: the source is damaged")
            done += got
    return buffer.view(entry.dtype)


def _room(size: int, pinned: bool) -> torch.Tensor:
    """Memory of `size` bytes that goes back to the system as soon as nobody needs it, where `malloc` might keep it."""
    if pinned or not size:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


@dataclass(frozen=True)
class Slot:
    """A tensor that is to be written; `shape` None where that is known only once it is there, of bytes then."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None

    @property
    def size(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape) if self.shape is not None else 0


class Shard:
    """A safetensors file whose tensors arrive in any order, in parts or whole; it gets its name when all are there.

    What is known of the slots lies first, the widest types first, so that every tensor is aligned to its type; then
    come those of unknown length, by name. The same tensors make the same file.
    """

    def __init__(self, file: Path, slots: Sequence[Slot]) -> None:
        self.file = file
        known = sorted(
            (slot for slot in slots if slot.shape is not None), key=lambda one: (-one.dtype.itemsize, one.name)
        )
        self.loose = {slot.name: b"" for slot in slots if slot.shape is None}
        self.slots = {slot.name: slot for slot in known}
        self.starts: dict[str, int] = {}
        end = 0
        for slot in known:
            self.starts[slot.name] = end
            end += slot.size
        self.end = end

    @cached_property
    def room(self) -> int:
        """Bytes of the header, a multiple of 8: what is known, and enough for what is not."""
        return -(-len(self._header(dict.fromkeys(self.loose, 0))) // 8) * 8 + 32 * len(self.loose)

    def __enter__(self) -> Shard:
        self.descriptor = os.open(self.file.with_suffix(".part"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def write(self, name: str, values: torch.Tensor, first: int = 0) -> None:
        """`values` of a tensor from its element `first` on; may be called from several threads."""
        data = values.contiguous().view(-1).view(torch.uint8).numpy()
        if name in self.loose:
            self.loose[name] = data.tobytes()
            return
        if values.dtype != self.slots[name].dtype:
            raise ValueError(f"{name} is {values.dtype}, not {self.slots[name].dtype}")
        place, view = 8 + self.room + self.starts[name] + first * values.dtype.itemsize, memoryview(data.data)
        done = 0
        while done < len(view):
            done += os.pwrite(self.descriptor, view[done:], place + done)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self.descriptor)
            self.file.with_suffix(".part").unlink(missing_ok=True)

    def _finish(self) -> None:
        tail = b"".join(self.loose[name] for name in sorted(self.loose))
        header = self._header({name: len(data) for name, data in self.loose.items()}).ljust(self.room)
        os.pwrite(self.descriptor, tail, 8 + self.room + self.end)
        os.pwrite(self.descriptor, self.room.to_bytes(8, "little") + header, 0)
        self.file.with_suffix(".part").rename(self.file)

    def _header(self, lengths: Mapping[str, int]) -> bytes:
        listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, slot in self.slots.items():
            start = self.starts[name]
            listed[name] = {"dtype": NAMES[slot.dtype], "shape": slot.shape, "data_offsets": [start, start + slot.size]}
        end = self.end
        for name in sorted(lengths):
            listed[name] = {"dtype": "U8", "shape": [lengths[name]], "data_offsets": [end, end + lengths[name]]}
            end += lengths[name]
        return json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
