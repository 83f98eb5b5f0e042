"""What calibrating takes of memory, compared with what may be used before any of it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantize import devices
from quantize.errors import DeviceError
from quantize.formats.bitsandbytes.modules import matrix
from quantize.formats.experts import linear_experts
from quantize.methods.calibration.calibration_text import CACHE_BYTES
from quantize.methods.calibration.layers import DecoderLayers
from quantize.methods.calibration.options import CalibratedOptions

HOST, FLOAT = "cpu", 4
SAVED = 3
"""Times the inputs and outputs of a layer's matrices: what it keeps for its backward pass."""
WAITING = 4
"""Times the hidden states of all tokens: those before and after a layer, and the embeddings of tokens and positions."""
LEARNING = 9
"""Times a layer's matrices: rounding variables, their steps and gradients, Adam's moments, copies."""


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used on the host and on the device which computes, as they were before anything was loaded."""

    model: str
    device: str
    host: int
    on_device: int

    @classmethod
    def of(cls, model: str, device: str) -> Budget:
        return cls(model, device, devices.usable_memory(HOST), devices.usable_memory(device))

    def require(self, stage: str, host: int, on_device: int = 0) -> None:
        """Raise DeviceError where a stage takes more than these bytes; a CPU's are the host's."""
        needs = [(HOST, host, self.host), (self.device, on_device, self.on_device)]
        if self.device == HOST:
            needs = [(HOST, host + on_device, self.host)]
        for place, needed, usable in needs:
            if needed > usable:
                raise DeviceError(
                    f"{stage} for {self.model} takes about {needed / 1e9:.1f} GB of memory on {place}, where "
                    f"{usable / 1e9:.1f} GB may be used: ask for fewer --calibration-windows, end other programs, or "
                    f"choose --recipe rtn"
                )


def require_memory(
    budget: Budget,
    model: Any,
    decoder: DecoderLayers,
    names: list[str],
    options: CalibratedOptions,
    tokens_at_once: int,
    gradients: bool,
) -> None:
    """Raise DeviceError where a stage takes more than the `budget`, which counts the loaded `model` as well.

    Matrices `names` are quantized, and `tokens_at_once` run through the model together.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    width, count = model.config.get_text_config().hidden_size, len(decoder.layers)
    tokens = options.calibration_windows * options.calibration_length
    inside = [name for name in names if name.startswith(f"{decoder.name(count - 1)}.")]
    shapes = [matrix(model.get_submodule(name)).shape for name in inside]
    layer = FLOAT * sum(rows * inputs for rows, inputs in shapes)
    runs = [_share(model, name) * sum(matrix(model.get_submodule(name)).shape) for name in inside]
    kept = int(FLOAT * SAVED * tokens_at_once * sum(runs))
    on_host, on_device = (weights, 0) if budget.device == HOST else (0, weights)
    budget.require("writing calibration text", on_host, on_device + CACHE_BYTES[devices.kind(budget.device)])
    if gradients:
        hessians = output_hessian_bytes(model, names, count if options.epochs else 0)
        entering = FLOAT * tokens_at_once * width * count
        budget.require(
            "reading gradients", on_host + FLOAT * tokens * len(names), on_device + hessians + kept + entering
        )
    budget.require("choosing codes and scales", weights, kept + LEARNING * layer)


def waiting_bytes(model: Any, options: CalibratedOptions) -> int:
    """Of all hidden states and embeddings that wait in files for the next layer."""
    tokens = options.calibration_windows * options.calibration_length
    streams = 2 if options.epochs else 1
    return FLOAT * tokens * int(model.config.get_text_config().hidden_size) * streams * WAITING


def _share(model: Any, name: str) -> float:
    """The share of all tokens that run through a module: of an expert, that which an even router sends to it."""
    config = model.config.get_text_config()
    for path, experts in linear_experts(model):
        if name.startswith(f"{path}."):
            return float(min(1.0, getattr(config, "num_experts_per_tok", experts.num_experts) / experts.num_experts))
    return 1.0


def output_hessian_bytes(model: Any, names: Iterable[str], layers: int) -> int:
    """Of the named matrices and of so many whole decoder layers."""
    widths = [len(matrix(model.get_submodule(name))) for name in names]
    return sum(FLOAT * width**2 for width in [*widths, *[model.config.get_text_config().hidden_size] * layers])
