"""What waits for a layer lies in temporary files: with the same values, and in no memory of the process's own."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from quantize.methods.calibration.layers import ActivationStream
from quantize.methods.calibration.paging import CHUNK, PagedMemory
from tests.methods.test_layers import decoder_of, tiny, windows


def walked(kind: str, memory: PagedMemory | None) -> list[list[torch.Tensor]]:
    """The outputs of each layer, as they are when the last one has run."""
    model = tiny(kind)
    decoder = decoder_of(model)
    with ActivationStream(model, decoder, windows(), "cpu", 2, False, memory) as stream:
        return [stream.advance(index) for index in range(len(decoder.layers))]


@pytest.mark.parametrize("kind", ["gpt2", "gemma4_text"])
def test_a_walk_is_the_same_bit_by_bit(kind: str, tmp_path: Path) -> None:
    paged, plain = walked(kind, PagedMemory(tmp_path)), walked(kind, None)
    assert len(paged) == len(plain)
    for left, right in zip(paged, plain, strict=True):
        assert all(map(torch.equal, left, right))
    assert not list(tmp_path.iterdir())


def test_values_stay_for_all_who_hold_a_tensor(tmp_path: Path) -> None:
    memory = PagedMemory(tmp_path)
    tensors = [torch.full((3, 5), float(number), dtype=torch.bfloat16).T for number in range(4)]
    held = list(tensors)
    for tensor in tensors:
        memory.take(tensor)
    memory.release()
    assert all(torch.equal(tensor.float(), torch.full((5, 3), float(number))) for number, tensor in enumerate(held))


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_no_more_than_what_is_used_takes_memory(tmp_path: Path) -> None:
    memory, process = PagedMemory(tmp_path), psutil.Process()
    tensors = [torch.ones(12 << 20) for _ in range(2)]  # more than the heap would keep
    before = process.memory_info().rss
    for tensor in tensors:
        memory.take(tensor)
    memory.release()
    assert process.memory_info().rss < before - (72 << 20)
    assert float(tensors[1].sum()) == 12 << 20


def test_memory_goes_with_the_last_tensor_in_it(tmp_path: Path) -> None:
    memory = PagedMemory(tmp_path)
    tensors = [torch.ones(CHUNK // 4) for _ in range(3)]
    for tensor in tensors:
        memory.take(tensor)
    assert len(memory._chunks) == 3
    del tensor, tensors[1:]
    assert len(memory._chunks) == 2  # the last one is kept for what comes next
    assert float(tensors[0].mean()) == 1.0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room in files")
def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = torch.ones(5)
    with pytest.raises(OSError, match="No space left"):
        PagedMemory(tmp_path).take(tensor)
    assert float(tensor.sum()) == 5.0
