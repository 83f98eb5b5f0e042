"""Where the work runs, and a description of it for the evidence."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize.errors import DeviceError
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

FEWEST_SHARE, LARGEST_SHARE = 0.6, 0.9
WORKING_MEMORY = 1_500_000_000
"""Bytes for logits, activations and the cache of a generation."""


def choose(device: str) -> str:
    """`auto` is the first CUDA or XPU device where there is one, otherwise the CPU; anything else is checked."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "xpu:0" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"device {device!r} cannot be used here ({reason}); `quantize doctor` lists what can"
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
    """Installed versions of what computes; the build tag (`+cpu`, `+cu130`) is part of them."""
    return {name: metadata.version(name) for name in REPORTED}


def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    if device.startswith("xpu"):
        return str(torch.xpu.get_device_name(device))
    return _processor_name()


def free_memory(device: str) -> int:
    """Bytes that can still be taken on `device`."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if device.startswith("xpu"):
        return int(torch.xpu.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def usable_memory(device: str) -> int:
    """Bytes that models may take on `device`: what is free, less what arithmetic needs and a reserve for others."""
    free = free_memory(device)
    return max(int(free * FEWEST_SHARE), int(free * LARGEST_SHARE) - WORKING_MEMORY)


def release(device: str) -> None:
    """Give memory back to the device that is garbage by now, or that torch keeps for later."""
    import gc

    gc.collect()
    empty(device)


def empty(device: str) -> None:
    """Give memory back to the device that torch keeps for later, such as that of recordings which are gone."""
    import torch

    if torch.device(device).type != "cpu":
        getattr(torch, torch.device(device).type).empty_cache()


def steady_attention() -> Any:
    """While it lasts, attention is not computed by cuDNN, which makes a new plan for every length of a growing text."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def accelerators(device: str) -> dict[int | str, int]:
    """Room on all devices of the kind of `device`, it first, by the number that accelerate knows them by."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {}
    first = int(number or 0)
    numbers = [first, *(other for other in range(getattr(torch, kind).device_count()) if other != first)]
    return {one: usable_memory(f"{kind}:{one}") for one in numbers}


def name(place: object) -> str:
    """What accelerate's device map calls a place, in words: a bare number is an accelerator's."""
    import torch

    return str(torch.device(place)) if isinstance(place, int) else str(place)


def _processor_name() -> str:
    listing = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (listing.read_text().splitlines() if listing.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()
