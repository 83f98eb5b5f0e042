"""The source on a device, to be compared with itself in 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from quantize import devices
from quantize.errors import DeviceError
from quantize.formats import experts, source_model
from quantize.formats.bitsandbytes import checkpoint
from quantize.methods.method import Job

FLOAT32, BFLOAT16 = 4, 2


def load(job: Job) -> tuple[Any, tuple[str, ...]]:
    """The source in float32, or in bfloat16 where that does not fit, and the names of the modules that become 8-bit.

    Raises DeviceError where neither fits.
    """
    source, room = job.checkout.source, devices.usable_memory(job.device)
    if source.parameters * BFLOAT16 > room:
        raise DeviceError(f"{source.name} in half precision does not fit into the {room / 1e9:.1f} GB of {job.device}")
    dtype = torch.float32 if source.parameters * FLOAT32 <= room else torch.bfloat16
    model = source_model.load(
        job.checkout.folder, source.name, dtype=dtype, trust_remote_code=source.remote_code, device_map={"": job.device}
    )
    return experts.unstacked(model.eval().requires_grad_(False)), checkpoint.quantized_names(job.checkout, job.recipe)
