"""Safetensors files read and written tensor by tensor, so that memory need not hold a file."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantize.errors import CorruptModel
from quantize.records import FileRecord

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""What torch calls the types of a file."""
PART = 1 << 22
"""Elements that are read together where a tensor need not be whole."""
SUFFIX = ".safetensors"
SINGLE_FILE = f"model{SUFFIX}"
INDEX = f"{SINGLE_FILE}.index.json"


def is_weights(path: str) -> bool:
    """Whether a file of that name holds weights."""
    return path.endswith(SUFFIX)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder, in the order of their names."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def weight_bytes(folder: Path) -> int:
    """Size of the weight files of a model's folder."""
    return sum(path.stat().st_size for path in weight_files(folder))


def recorded_weight_bytes(files: Iterable[FileRecord]) -> int:
    """Size of the weight files among those that are recorded."""
    return sum(file.size for file in files if is_weights(file.path))


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `kind` is its type as the file says it, `start` where its first byte lies in the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        if self.kind not in TYPES:
            raise CorruptModel(f"{self.file.name} holds tensors of the type {self.kind}, which is not known here")
        dtype: torch.dtype = getattr(torch, TYPES[self.kind])
        return dtype


def entries(file: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by name, in the order of the bytes; raises CorruptModel where it is damaged.

    The library, which users will load the file with, is the judge of it: of its length, and of every type, shape and
    place in its header. A name that stands there twice is damage as well.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):  # raises before anything in the header is believed
            header, first = _header_of(file)
    except (SafetensorError, ValueError) as error:
        raise CorruptModel(f"{file.name} is damaged ({error}): fetch it again") from error
    header.pop("__metadata__", None)
    listed = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Entry(file, fields["dtype"], tuple(fields["shape"]), first + fields["data_offsets"][0])
        for name, fields in listed
    }


def _header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a sound file, and where the tensors' bytes begin; raises ValueError."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length), object_pairs_hook=_once), 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return held


def parts(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a file, by its name and in parts; an empty one as it is."""
    for name, entry in entries(file).items():
        for first in range(0, max(entry.numel, 1), PART):
            yield name, read(entry, first, min(PART, entry.numel - first), pinned=False)


def read(entry: Entry, first: int, count: int, pinned: bool) -> torch.Tensor:
    """`count` elements [count] of a tensor from the element `first` on, read into memory of their own."""
    size = entry.dtype.itemsize
    buffer = _buffer(count * size, pinned)
    view = memoryview(buffer.numpy().data)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + first * size)
        done = 0
        while done < len(view):
            length = file.readinto(view[done:])
            if not length:
                raise CorruptModel(f"{entry.file.name} ends before its tensors do: the source is damaged")
            done += length
    return buffer.view(entry.dtype)


def _buffer(size: int, pinned: bool) -> torch.Tensor:
    """Memory of `size` bytes that goes back to the system as soon as nobody needs it, where `malloc` might keep it."""
    import torch

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
            (slot for slot in slots if slot.shape is not None), key=lambda slot: (-slot.dtype.itemsize, slot.name)
        )
        self.late = {slot.name: b"" for slot in slots if slot.shape is None}
        self.slots = {slot.name: slot for slot in known}
        self.starts: dict[str, int] = {}
        end = 0
        for slot in known:
            self.starts[slot.name] = end
            end += slot.size
        self.end = end
        # a multiple of 8: enough for what is known, and for what is not
        self.header_size = -(-len(self._header(dict.fromkeys(self.late, 0))) // 8) * 8 + 32 * len(self.late)

    def __enter__(self) -> Shard:
        self.descriptor = os.open(self.file.with_suffix(".part"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def write(self, name: str, values: torch.Tensor, first: int = 0) -> None:
        """`values` of a tensor from its element `first` on; may be called from several threads."""
        import torch

        data = values.contiguous().view(-1).view(torch.uint8).numpy()
        if name in self.late:
            self.late[name] = data.tobytes()
            return
        if values.dtype != self.slots[name].dtype:
            raise ValueError(f"{name} is {values.dtype}, not {self.slots[name].dtype}")
        start = 8 + self.header_size + self.starts[name] + first * values.dtype.itemsize
        view = memoryview(data.data)
        done = 0
        while done < len(view):
            done += os.pwrite(self.descriptor, view[done:], start + done)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self.descriptor)
            self.file.with_suffix(".part").unlink(missing_ok=True)

    def _finish(self) -> None:
        tail = b"".join(self.late[name] for name in sorted(self.late))
        header = self._header({name: len(data) for name, data in self.late.items()}).ljust(self.header_size)
        os.pwrite(self.descriptor, tail, 8 + self.header_size + self.end)
        os.pwrite(self.descriptor, self.header_size.to_bytes(8, "little") + header, 0)
        self.file.with_suffix(".part").rename(self.file)

    def _header(self, lengths: Mapping[str, int]) -> bytes:
        listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, slot in self.slots.items():
            start = self.starts[name]
            listed[name] = {"dtype": _kind(slot.dtype), "shape": slot.shape, "data_offsets": [start, start + slot.size]}
        end = self.end
        for name in sorted(lengths):
            listed[name] = {"dtype": "U8", "shape": [lengths[name]], "data_offsets": [end, end + lengths[name]]}
            end += lengths[name]
        return json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()


def _kind(dtype: torch.dtype) -> str:
    torch_name = str(dtype).removeprefix("torch.")
    return next(kind for kind, name in TYPES.items() if name == torch_name)


def in_files(items: Iterable[Item], size: Callable[[Item], int], largest: int) -> list[list[Item]]:
    """The items in their order, in groups of at most `largest` bytes, or of one."""
    groups: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if groups[-1] and filled + size(item) > largest:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size(item)
    return groups


def file_names(count: int) -> list[str]:
    """What transformers calls the weight files of a model that has so many."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]


def write_index(folder: Path, names: list[str]) -> None:
    """Say which of the weight files `names` holds which tensor."""
    held = {name: entries(folder / name) for name in names}
    size = sum(entry.numel * entry.dtype.itemsize for listed in held.values() for entry in listed.values())
    weight_map = {key: name for name, listed in held.items() for key in listed}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
