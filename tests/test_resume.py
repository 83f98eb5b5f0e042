"""Finished parts count when they are whole, in the order in which they came, for the same inputs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.resume import LIST, ResumeFolder

INPUTS = {"source": {"model.safetensors": "5eed"}}
NAMES = ("text", "layer-0", "layer-1", "layer-2")


def filled(folder: Path) -> ResumeFolder:
    begun = ResumeFolder.begin(folder, INPUTS)
    for name in NAMES:
        begun.keep(name, lambda file: file.write_bytes(file.name.encode() * 9))
    return begun


def finished(folder: Path) -> list[str]:
    begun = ResumeFolder.begin(folder, INPUTS)
    return [name for name in NAMES if begun.part(name)]


@given(damaged=st.sampled_from(NAMES), content=st.sampled_from([b"", b"text", None]))
@settings(max_examples=12, deadline=None)
def test_from_the_first_damaged_part_on_all_are_made_again(
    tmp_path_factory: pytest.TempPathFactory, damaged: str, content: bytes | None
) -> None:
    folder = tmp_path_factory.mktemp("resume")
    filled(folder)
    assert finished(folder) == list(NAMES)
    (folder / damaged).unlink()
    if content is not None:
        (folder / damaged).write_bytes(content)
    assert finished(folder) == list(NAMES[: NAMES.index(damaged)])


def test_a_part_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    def interrupted(file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    begun = filled(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        begun.keep("layer-3", interrupted)
    assert begun.part("layer-3") is None and not (tmp_path / "layer-3").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"fingerprint": 1}', b'{"fingerprint'])
def test_a_list_that_cannot_be_read_begins_anew(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path)
    (tmp_path / LIST).write_bytes(content)
    assert finished(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [LIST]


def test_other_inputs_begin_anew(tmp_path: Path) -> None:
    filled(tmp_path)
    assert not ResumeFolder.begin(tmp_path, {"source": {"model.safetensors": "other"}}).hashes
    assert [path.name for path in tmp_path.iterdir()] == [LIST]
