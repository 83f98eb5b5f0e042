"""Tensors whose memory is a temporary file: the system takes it back whenever it is short, and nothing is lost."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch

CHUNK = 64 << 20
"""Bytes that are mapped at a time. They are given up with the last tensor that lies there."""


class PagedMemory:
    """Memory in temporary files of a folder, which have no name there and go with the tensors that lie in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunk: mmap.mmap | None = None
        self._taken = 0
        self._chunks: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def take(self, tensor: torch.Tensor) -> None:
        """Let a `tensor` on the CPU lie here from now on, for all who hold it; its values stay the same."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return
        size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._chunk is None or self._taken + size > len(self._chunk):
            self._chunk, self._taken = self._mapped(max(size, CHUNK)), 0
        room = torch.frombuffer(self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self._taken)
        self._taken += size
        tensor.data = room.view(tensor.shape).copy_(tensor)

    def release(self) -> None:
        """Leave all pages to their files; what is used again comes back from there."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for chunk in self._chunks:
                chunk.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, size: int) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            _reserve(file.fileno(), size)
            chunk = mmap.mmap(file.fileno(), size)
        self._chunks.add(chunk)
        return chunk


def _reserve(file: int, size: int) -> None:
    """Make room for so many bytes; raises OSError where the disk is full, which mapped memory could only crash on."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
