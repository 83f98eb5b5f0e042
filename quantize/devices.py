"""Which device computes, how much memory it has left, and a description of it for the evidence."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize import memory
from quantize.errors import DeviceError, first_line
from quantize.records import Environment

REPORTED = (
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
)

HOST_SHARE = 0.5
"""Of the host's free memory, what one stage may take."""
SMALLEST_SHARE, LARGEST_SHARE = 0.6, 0.9
"""Of a GPU's free memory, the share that models may take at least, and at most."""
WORKING_MEMORY = 1_500_000_000
"""Bytes for logits, activations and the KV cache."""


def choose(device: str) -> str:
    """The name of a device: for `auto` the first CUDA or XPU device, without one the CPU. Raises DeviceError."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "xpu:0" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"device {device!r} cannot be used here ({first_line(error)}); `quantize doctor` lists the devices that can"
        ) from error
    return str(torch.device(device))


def describe(device: str) -> Environment:
    """Versions, and the name of the processor behind `device`."""
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=device,
        device_name=device_name(device),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Installed versions of the libraries that compute, with their build tags (`+cpu`, `+cu130`)."""
    return {name: metadata.version(name) for name in REPORTED}


def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    if device.startswith("xpu"):
        return str(torch.xpu.get_device_name(device))
    return _processor_name()


def kind(device: object) -> str:
    """Whether a device is a `cpu` or a `gpu`, which want work in pieces of different sizes."""
    return "cpu" if str(device).startswith("cpu") else "gpu"


def free_memory(device: str) -> int:
    """Free bytes on `device`, or on a CPU those that this process may still take."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if device.startswith("xpu"):
        return int(torch.xpu.mem_get_info(device)[0])
    return memory.free()


def usable_memory(device: str) -> int:
    """Bytes that one stage of the work may take on `device`.

    On a CPU half of the free ones, which others need as well; of a GPU most, less working memory.
    """
    free = free_memory(device)
    if kind(device) == "cpu":
        return int(free * HOST_SHARE)
    return max(int(free * SMALLEST_SHARE), int(free * LARGEST_SHARE) - WORKING_MEMORY)


def release(device: str) -> None:
    """Collect garbage, and return the memory that torch keeps for later to the device."""
    import gc

    gc.collect()
    empty(device)


def empty(device: str) -> None:
    """Return the memory that torch keeps for later to the device, such as that of CUDA graphs which are gone."""
    import torch

    if torch.device(device).type != "cpu":
        getattr(torch, torch.device(device).type).empty_cache()


def steady_attention() -> Any:
    """A context in which cuDNN does not compute attention: it would make a new plan for every length of a text."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def accelerators(device: str) -> dict[int | str, int]:
    """Usable bytes on all devices of the kind of `device`, that one first, by the numbers that accelerate uses."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {}
    first = int(number or 0)
    numbers = [first, *(other for other in range(getattr(torch, kind).device_count()) if other != first)]
    return {index: usable_memory(f"{kind}:{index}") for index in numbers}


def name(device: object) -> str:
    """A device of accelerate's device map by its full name: a bare number is an accelerator's."""
    import torch

    return str(torch.device(device)) if isinstance(device, int) else str(device)


def _processor_name() -> str:
    listing = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (listing.read_text().splitlines() if listing.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()
