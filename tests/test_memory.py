"""Free memory is what the machine has, or what limits of this process leave of it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from quantize import devices, memory

GIGABYTE = 1 << 30


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n", "utf-8")


def left(tmp_path: Path, *lines: str) -> list[int]:
    (tmp_path / "cgroup").write_text("\n".join(lines) + "\n", "utf-8")
    return list(memory._left_by_groups(tmp_path / "cgroup", tmp_path / "fs"))


def test_without_limits_it_is_what_the_machine_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_left_by_groups", lambda: iter(()))
    assert 0 < memory.free() <= psutil.virtual_memory().total


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    """The group and those above it; a file cache can be given back."""
    stat = f"anon {GIGABYTE}\ninactive_file {GIGABYTE}"
    group(tmp_path / "fs/jobs", memory__max=4 * GIGABYTE, memory__current=3 * GIGABYTE, memory__stat="anon 1")
    group(tmp_path / "fs/jobs/this", memory__max=8 * GIGABYTE, memory__current=2 * GIGABYTE, memory__stat=stat)
    assert left(tmp_path, "0::/jobs/this") == [7 * GIGABYTE, GIGABYTE]
    group(tmp_path / "fs/jobs/this", memory__max="max")
    assert left(tmp_path, "0::/jobs/this") == [GIGABYTE]


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    """In a container the group's own name may not exist, and its limit stands at the top."""
    names = {"memory__limit_in_bytes": 2 * GIGABYTE, "memory__usage_in_bytes": GIGABYTE}
    group(tmp_path / "fs/memory", **names, memory__stat="total_inactive_file 100")
    assert left(tmp_path, "5:cpu:/docker/x", "4:memory:/docker/x", "0::/") == [GIGABYTE + 100]
    group(tmp_path / "fs/memory", memory__limit_in_bytes=0x7FFFFFFFFFFFF000)
    assert left(tmp_path, "4:memory:/") == []


@pytest.mark.parametrize("limit", [resource.RLIMIT_DATA, resource.RLIMIT_AS])
def test_resource_limits(limit: int) -> None:
    code = (
        "import resource, sys; resource.setrlimit(int(sys.argv[1]), (1 << 30, 1 << 30));"
        "from quantize import memory; print(memory.free())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(limit)], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < GIGABYTE


def test_no_stage_takes_more_than_half_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda: 10 * GIGABYTE)
    assert devices.free_memory("cpu") == 10 * GIGABYTE and devices.usable_memory("cpu") == 5 * GIGABYTE


GROWTH = """
import sys
import psutil, torch
from quantize import memory

def grown():
    before, held = psutil.Process().memory_info().rss, []
    for number in range(60):
        held.append((torch.ones(600_000), torch.zeros(8)))
        if number >= 2:
            held[number - 2] = held[number - 2][1:]
    return psutil.Process().memory_info().rss - before

with memory.freed_blocks_returned():
    print(grown())
"""


@pytest.mark.slow
def test_freed_blocks_do_not_stay_in_the_heap() -> None:
    """Three blocks of 2.4 MB live at a time, with something small between them; glibc would hold on to sixty."""
    command = [sys.executable, "-c", GROWTH]
    assert int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) < 20_000_000
