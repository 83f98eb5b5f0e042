"""Messages are one line that no terminal obeys, and tell what a disk says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from quantize.errors import (
    OF_A_DEVICE,
    OF_A_PATH,
    CorruptModel,
    DeviceError,
    StorageError,
    memory_errors,
    printable,
    storage_errors,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\n::error title=x::made up", "a ::error title=x::made up"),
        ("a\r\nb\u2028c", "a b c"),
        ("\u202eabc", r"\u202eabc"),
        ("\ud800", r"\ud800"),
        ("Ünïcödé, 中文字, 10\xa0MB", "Ünïcödé, 中文字, 10\xa0MB"),
        ("https://me:hf_secret@hub.example/a?b=c@d", "https://hub.example/a?b=c@d"),
    ],
)
def test_what_a_message_shows(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(CorruptModel(text)) == shown


def test_a_message_of_several_lines_is_given_line_by_line() -> None:
    assert str(CorruptModel("one\ntwo", "three")) == "one two\nthree"


@pytest.mark.parametrize("number", sorted(OF_A_DEVICE | OF_A_PATH), ids=errno.errorcode.get)
def test_every_number_of_a_disk_is_one_line(number: int) -> None:
    with pytest.raises(StorageError) as raised, storage_errors("here"):
        raise OSError(number, os.strerror(number), "/models/" + "x" * 5000)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("x")]
)
def test_other_errors_keep_their_type(error: Exception) -> None:
    with pytest.raises(type(error)), storage_errors("here"):
        raise error


def test_what_is_written_is_named_and_what_is_read_as_well(tmp_path: Path) -> None:
    full = r"^no space left while writing here; nothing was left half done"
    with pytest.raises(StorageError, match=full), storage_errors("here"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match=r"absent\.txt: no such file or directory"), storage_errors("here"):
        (tmp_path / "absent.txt").read_bytes()


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_memory_that_runs_out_is_one_line_with_advice(error: Exception) -> None:
    with (
        pytest.raises(DeviceError, match=r"^out of memory while loading a model: end other programs$"),
        memory_errors("loading a model", "end other programs"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), CorruptModel("out of memory"), KeyError("bad_alloc")])
def test_what_is_not_about_memory_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)), memory_errors("loading a model", "end other programs"):
        raise error
