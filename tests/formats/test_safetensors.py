"""Safetensors files that are read and written in parts: the library agrees about every one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantize.errors import CorruptModel
from quantize.formats import safetensors
from quantize.formats.safetensors import Shard, Slot

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool)
contents = st.dictionaries(
    st.text("abcxyz.é0", min_size=1, max_size=12),
    st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 6), max_size=3)),
    min_size=1,
    max_size=6,
)


def made(listed: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(listed))
    return {name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (dtype, shape) in listed.items()}


def require_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        assert torch.equal(tensor, other[name])


@settings(deadline=None, max_examples=60)
@given(listed=contents, loose=st.binary(min_size=1, max_size=700))
def test_the_library_reads_what_was_written_in_parts(
    listed: dict[str, tuple[torch.dtype, list[int]]], loose: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In any order, tensors in halves, and one whose length nobody knew before."""
    file, wanted = tmp_path_factory.mktemp("shard") / "model.safetensors", made(listed)
    slots = [Slot(name, one.dtype, tuple(one.shape)) for name, one in wanted.items()]
    with Shard(file, [Slot("state", torch.uint8, None), *slots]) as shard:
        for name, one in reversed(wanted.items()):
            half = one.numel() // 2
            shard.write(name, one.view(-1)[half:], half)
            shard.write(name, one.view(-1)[:half])
        shard.write("state", torch.frombuffer(bytearray(loose), dtype=torch.uint8))
    assert not file.with_suffix(".part").exists()
    found = load_file(file)
    assert bytes(found.pop("state").tolist()) == loose
    require_equal(found, wanted)


@settings(deadline=None, max_examples=40)
@given(listed=contents)
def test_what_the_library_wrote_is_read_in_parts(
    listed: dict[str, tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file, wanted = tmp_path_factory.mktemp("shard") / "model.safetensors", made(listed)
    save_file(wanted, file)
    entries = safetensors.entries(file)
    whole = {name: safetensors.read(one, 0, one.numel, pinned=False).view(one.shape) for name, one in entries.items()}
    require_equal(whole, wanted)
    for name, one in entries.items():
        if one.numel > 1:
            assert torch.equal(safetensors.read(one, 1, one.numel - 1, pinned=False), wanted[name].view(-1)[1:])


def test_nothing_gets_the_name_when_something_went_wrong(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with (
        pytest.raises(ValueError, match=r"a is torch\.float32, not torch\.float16"),
        Shard(file, [Slot("a", torch.float16, (2,))]) as shard,
    ):
        shard.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["short", "long", "header", "json", "empty", "shape"])
def test_damaged_files(tmp_path: Path, change: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    damaged = {
        "short": data[:-1],
        "long": data + b"x",
        "header": (1 << 60).to_bytes(8, "little") + data[8:],
        "json": data[:8] + b"{" * length + data[8 + length :],
        "empty": b"",
        "shape": data.replace(b"[100]", b"[101]"),
    }
    file.write_bytes(damaged[change])
    with pytest.raises(CorruptModel, match=r"model\.safetensors is damaged \(.*\): fetch it again"):
        safetensors.entries(file)


def test_a_type_that_nobody_knows(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    (entry,) = safetensors.entries(file).values()
    with pytest.raises(CorruptModel, match="holds tensors of the type F4, which is not known here"):
        _ = entry.dtype
