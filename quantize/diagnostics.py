"""What `quantize doctor` finds on this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from quantize import devices, hub
from quantize.errors import first_line
from quantize.files import free_space
from quantize.formats.bitsandbytes import self_test


@dataclass(frozen=True)
class Device:
    """One device that can quantize; memory in bytes."""

    name: str
    processor: str
    free_memory: int


@dataclass(frozen=True)
class Diagnostics:
    """Devices as `--device auto` prefers them; disk sizes in bytes. The token itself is never shown."""

    python: str
    versions: dict[str, str]
    bitsandbytes_works: str
    devices: tuple[Device, ...]
    endpoint: str
    token_present: bool
    hub_cache: str
    hub_cache_free: int
    folder_free: int


def diagnose() -> Diagnostics:
    """Look at devices, versions, the Hub's settings and the disks, without network access."""
    names = list(dict.fromkeys([devices.choose("auto"), "cpu"]))
    return Diagnostics(
        python=platform.python_version(),
        versions=devices.versions(),
        bitsandbytes_works=_try_quantizing(names[0]),
        devices=tuple(Device(name, devices.device_name(name), devices.free_memory(name)) for name in names),
        endpoint=hub.endpoint(),
        token_present=hub.token_present(),
        hub_cache=str(hub.cache_folder()),
        hub_cache_free=free_space(hub.cache_folder()),
        folder_free=free_space(Path.cwd()),
    )


def _try_quantizing(device: str) -> str:
    """`yes`, or the reason why bitsandbytes cannot quantize on `device`."""
    try:
        return "yes" if self_test.works_on(device) else "no: dequantized values are wrong"
    except (RuntimeError, ImportError, AttributeError) as error:
        return f"no: {first_line(error)}"
