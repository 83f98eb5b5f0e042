"""The host's memory: what this process may still take, by what is free and its limits, and how it gives it back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""More than any machine has; version 1 of control groups says "no limit" with a number near 2^63."""
M_MMAP_THRESHOLD = -3
"""The option of glibc's mallopt: from how many bytes on a block is the system's again when it is freed."""
LARGE_BLOCK, USUAL_BLOCK = 1 << 20, 1 << 25
"""The second is what glibc itself comes to in a process that frees large blocks."""


def free() -> int:
    """Free bytes: those of the machine, or what is left within the process's control groups and resource limits."""
    import psutil

    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *_left_by_groups(), *_left_by_resource_limits()]))


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """Within, blocks of a megabyte and more go back to the system when they are freed; afterwards all that is free.

    glibc would keep them in its heap, where a freed aligned block, which is what torch asks for, is not found again for
    another of the same size: the heap grows with every micro-batch. Blocks come a little slower from the system.
    """
    _tell_glibc("mallopt", M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        yield
    finally:
        _tell_glibc("mallopt", M_MMAP_THRESHOLD, USUAL_BLOCK)
        _tell_glibc("malloc_trim", 0)


def _tell_glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc's allocator, where there is one."""
    if sys.platform == "linux":
        known = getattr(ctypes.CDLL(None), function, None)
        if known is not None:
            known(*arguments)


def _left_by_resource_limits() -> Iterator[int]:
    """Within RLIMIT_AS and RLIMIT_DATA, where they are set."""
    if sys.platform != "linux":
        return
    import resource

    import psutil

    taken = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, taken.data)):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY:
            yield allowed - used


def _left_by_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> Iterator[int]:
    """Within the control group and those above it, version 1 or 2; pages that only cache files count as free."""
    lines = groups.read_text("utf-8").splitlines() if groups.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used, cached = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        for folder in _upwards(top, name):
            allowed, taken = _number(folder / limit), _number(folder / used)
            if max(allowed, taken) < UNLIMITED:
                yield allowed - taken + _statistic(folder / "memory.stat", cached)


def _upwards(top: Path, name: str) -> Iterator[Path]:
    """The folder of a group and those above it up to `top`, which in a container may be all that there is."""
    folder = top / name.lstrip("/")
    while folder.is_relative_to(top):
        yield folder
        folder = folder.parent


def _number(file: Path) -> int:
    """The number in a file; UNLIMITED where there is none, or `max`."""
    try:
        return int(file.read_text("utf-8"))
    except (OSError, ValueError):
        return UNLIMITED


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
