"""Where bytes beyond the plain 4-bit ones help most: smaller blocks, or half precision, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.modules import laid_out, matrix
from quantize.formats.bitsandbytes.sizes import BLOCK, MatrixFormat
from quantize.progress import Progress
from quantize.records import Recipe

HALF = 0
"""In place of a block size: the matrix stays in half precision."""
FINE = 32
FINE_SHARE = 0.85
"""Of the divergence stays in calibrated blocks of 32, as measured on a trained model (docs/accuracy.md). Rounded to
nearest they diverge more than blocks of 64, although their weights err less, so that this cannot be read off there."""
WINDOWS = 8
"""That the sensitivity of each matrix is measured on."""


@dataclass(frozen=True)
class Form:
    """One way to store a matrix: its block size or HALF, the bytes that takes, and the divergence (nats) it costs."""

    block: int
    size: int
    divergence: float


def allocate(
    model: Any,
    names: list[str],
    tokens: torch.Tensor,
    recipe: Recipe,
    size_budget: float,
    dtype: str,
    device: str,
    progress: Progress,
) -> dict[str, int]:
    """The block size, or HALF, of each matrix of `model` (on the device), within `size_budget` x the plain bytes."""
    matrices = {name: model.get_submodule(name) for name in names}

    def rounded(module: Any) -> torch.Tensor:
        weight = matrix(module).to(getattr(torch, dtype))
        return laid_out(module, packing.nearest(weight, recipe.quant_type, recipe.double_quant).weight())

    costs = divergences(model, tokens, device, matrices, rounded, progress)
    offers = {name: _forms(matrix(one), costs[name], recipe.double_quant) for name, one in matrices.items()}
    weights = sum(module.weight.numel() for module in matrices.values())
    plain = 2 * (model.num_parameters() - weights) + sum(forms[0].size for forms in offers.values())
    return spend(offers, (size_budget - 1) * plain)


def _forms(weight: torch.Tensor, divergence: float, double_quant: bool) -> list[Form]:
    """What can be done with a matrix that costs so much in its plain form, which comes first."""
    rows, inputs = weight.shape
    shares = {BLOCK: 1.0, FINE: FINE_SHARE, HALF: 0.0}
    if inputs % FINE:  # blocks that run across rows are rounded to nearest
        del shares[FINE]
    return [
        Form(block, stored_bytes(rows, inputs, block, double_quant), share * divergence)
        for block, share in shares.items()
    ]


def stored_bytes(rows: int, inputs: int, block: int, double_quant: bool) -> int:
    """What a matrix takes in a file."""
    if block == HALF:
        return 2 * rows * inputs
    return MatrixFormat(double_quant=double_quant, block=block).stored_bytes(rows, inputs)


def divergences(
    model: Any,
    tokens: torch.Tensor,
    device: str,
    matrices: Mapping[str, Any],
    rounded: Callable[[Any], torch.Tensor],
    progress: Progress,
) -> dict[str, float]:
    """Mean KLD (nats a token) of the model with one of its `matrices` rounded to nearest, for each of them.

    `rounded` gives a module's weight after that. `tokens` are [windows, length].
    """
    windows = tokens[:WINDOWS]
    found = dict.fromkeys(matrices, 0.0)
    with (
        torch.inference_mode(),
        progress.task("measuring sensitivities", len(windows) * len(found), "matrices") as advance,
    ):
        for window in windows:
            truth = _answer(model, window, device)
            for name, module in matrices.items():
                whole = module.weight.data
                module.weight.data = rounded(module)
                guess = _answer(model, window, device)
                found[name] += float((truth.exp() * (truth - guess)).sum(-1).mean()) / len(windows)
                module.weight.data = whole
                advance(1)
    return found


def spend(offers: Mapping[str, list[Form]], extra: float) -> dict[str, int]:
    """The block size, or HALF, of each matrix: what saves most divergence with at most `extra` bytes over the first.

    Each list of `offers` begins with the plain form. The step that saves most for its bytes is always taken next,
    until none fits, which is the optimum but for the last step, as each matrix' forms are taken along their hull.
    """
    chosen = {name: forms[0] for name, forms in offers.items()}
    while True:
        steps = [
            (_gain(chosen[name], form), name, form)
            for name, forms in offers.items()
            for form in forms
            if chosen[name].size < form.size <= chosen[name].size + extra
        ]
        gain, name, form = max(steps, key=lambda step: step[0], default=(0.0, "", None))
        if form is None or gain <= 0:
            return {name: one.block for name, one in chosen.items()}
        extra -= form.size - chosen[name].size
        chosen[name] = form


def _gain(now: Form, then: Form) -> float:
    return (now.divergence - then.divergence) / (then.size - now.size)


def _answer(model: Any, window: torch.Tensor, device: str) -> torch.Tensor:
    logits: torch.Tensor = model(window[None].to(device), use_cache=False).logits
    return torch.log_softmax(logits[0].float(), -1)
