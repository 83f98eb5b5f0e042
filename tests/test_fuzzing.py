"""Damaged inputs of every reader are taken or refused in one line: those that once failed, and some hundred others."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from tests.fuzzing import KEPT, READERS, damaged, fault

INPUTS = {"card": 30, "records": 150}
MOST_INPUTS = 300
PAST = sorted(KEPT.glob("*/*"))


@pytest.mark.parametrize("path", PAST, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_failed(path: Path, tmp_path: Path) -> None:
    assert fault(READERS[path.parent.name], path.read_bytes(), tmp_path) is None


@pytest.mark.parametrize("name", READERS)
def test_sound_inputs_are_taken(name: str, tmp_path: Path) -> None:
    sound = READERS[name].sound()
    assert sound
    taken = [data for data in sound if _is_taken(name, data, tmp_path)]
    assert taken


def _is_taken(name: str, data: bytes, folder: Path) -> bool:
    from quantize.errors import QuantizeError

    try:
        READERS[name].read(data, folder)
    except QuantizeError:
        return False
    return True


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for data in itertools.islice(damaged(reader.sound(), random.Random(name)), INPUTS.get(name, MOST_INPUTS)):
        assert (said := fault(reader, data, tmp_path)) is None, f"{data!r}\n{said}"
