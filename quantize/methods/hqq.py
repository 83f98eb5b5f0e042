"""Half-quadratic quantization (Badri & Shaji 2023): scales from the weights alone, for the fixed table of 4-bit values.

Rounding to nearest takes the largest weight of a block as its scale. Here the scale s of a block w with values q of the
table minimises sum |w - s q|^p with p < 1, which lets a few weights err much so that most err little. With an auxiliary
error e, that is split into two steps which each have a closed form, alternated while beta grows:

    e = shrink_lp(w - s q, beta)            s = <w - e, q> / <q, q>            q = nearest value to w / s

HQQ itself learns the zero point of a uniform grid; the stock file has none, so the scale takes its place.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import TYPE_CHECKING

from quantize.methods.method import Job, Method
from quantize.options import Option, Whole
from quantize.records import Checkout, Quantized, Recipe

if TYPE_CHECKING:
    import torch

    from quantize.formats.bitsandbytes.packing import Packed
    from quantize.methods.rounding.gptq import Levels

NORM = 0.7
"""p of the l_p norm, as in the reference implementation."""
BETA, BETA_GROWTH = 30.0, 1.1
"""Weight of the quadratic term for blocks scaled to a largest weight of 1, and what each iteration multiplies it by."""
BLOCKS_AT_ONCE = 1 << 14
"""Blocks whose scales are fitted together, so that memory stays small."""


@dataclasses.dataclass(frozen=True)
class HqqOptions:
    """`hqq_iterations` of the alternation for each matrix."""

    hqq_iterations: int = 20

    @classmethod
    def of(cls, recipe: Recipe) -> HqqOptions:
        value = recipe.options.get("hqq_iterations", cls.hqq_iterations)
        return cls(int(value))


def quantize(job: Job) -> Quantized:
    """Write the source with fitted scales and their nearest codes, in the stock files, matrix by matrix."""
    from quantize.formats.bitsandbytes import checkpoint
    from quantize.resume import ResumeFolder

    started = time.monotonic()
    recipe, device = job.recipe, job.device
    dtype = checkpoint.half_precision(job.checkout, recipe, job.progress)
    inputs = {"source": job.checkout.source.fingerprint(), "recipe": recipe, "dtype": dtype, "device": device}
    resume = ResumeFolder.begin(job.resume_folder, inputs)
    rounding = functools.partial(round_tensors, recipe=recipe)
    written = checkpoint.write(job.checkout, job.output, recipe, dtype, device, job.progress, resume, rounding=rounding)
    return Quantized(written.modules, written.kept_modules, dtype, device, round(time.monotonic() - started, 3))


def round_tensors(weight: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of `weight` [rows, inputs] in a stock file; raises NotFinite where a weight is NaN or infinite."""
    options = HqqOptions.of(recipe)
    return round_matrix(weight, recipe.quant_type, recipe.double_quant, options.hqq_iterations).tensors()


def round_matrix(weight: torch.Tensor, quant_type: str, double_quant: bool, iterations: int) -> Packed:
    """`weight` [rows, inputs] under fitted scales, its codes the nearest for the scales as they are stored.

    Blocks follow the flattened matrix, across rows where 64 does not divide the inputs, as stock bitsandbytes has them.
    """
    import torch

    from quantize.formats.bitsandbytes.packing import NotFinite, Packed, ScaleGrid, table
    from quantize.formats.bitsandbytes.sizes import BLOCK
    from quantize.methods.rounding.gptq import Levels

    if not bool(weight.isfinite().all()):
        raise NotFinite
    levels = Levels.of(table(quant_type, weight.device))
    padding = -weight.numel() % BLOCK
    blocks = torch.nn.functional.pad(weight.reshape(-1), (0, padding)).view(-1, BLOCK)
    parts = torch.split(blocks, BLOCKS_AT_ONCE)
    scales = torch.cat([fit_scales(part.float(), levels, iterations) for part in parts])
    grid = ScaleGrid.around(scales) if double_quant else None
    stored = grid.quantized(scales, torch.arange(len(scales), device=scales.device)) if grid else scales
    codes = [
        levels.codes[_nearest(part.float(), scale, levels)]
        for part, scale in zip(parts, torch.split(stored, BLOCKS_AT_ONCE), strict=True)
    ]
    flat = torch.cat(codes).view(-1)[: weight.numel()]
    return Packed.build(flat.view(weight.shape), scales, grid, quant_type, weight.dtype)


def fit_scales(blocks: torch.Tensor, levels: Levels, iterations: int) -> torch.Tensor:
    """The scales [n] of `blocks` [n, block] float32; for each the best of all iterations, absmax among them."""
    import torch

    absmax = blocks.abs().amax(1)
    relative = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    scales = torch.ones_like(absmax)
    best, smallest = scales, torch.full_like(absmax, torch.inf)
    beta = BETA
    for _ in range(iterations + 1):
        values = levels.values[_nearest(relative, scales, levels)]
        error = relative - scales[:, None] * values
        loss = error.abs().pow(NORM).sum(1)
        best, smallest = torch.where(loss < smallest, scales, best), torch.minimum(loss, smallest)
        target = relative - shrink_lp(error, beta)
        scales = (target * values).sum(1) / values.square().sum(1).clamp(min=1e-12)
        beta *= BETA_GROWTH
    return best * absmax


def shrink_lp(error: torch.Tensor, beta: float) -> torch.Tensor:
    """sign(x) max(0, |x| - |x|^(p - 1) / beta): the generalised soft threshold that HQQ takes for the l_p norm."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(NORM - 1) / beta).clamp(min=0)


def _nearest(blocks: torch.Tensor, scales: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Places of the levels nearest to `blocks` [n, block] under `scales` [n]."""
    return levels.nearest(blocks / scales.masked_fill(scales == 0, 1.0)[:, None])


def check(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """Raise ConfigError for 8 bits."""
    if recipe.name == METHOD.name:
        METHOD.require_bits(recipe)


def describe(recipe: Recipe, quantized: Quantized) -> str:
    return (
        "Scales are fitted to the weights by half-quadratic quantization, without data; codes are the nearest. "
        "The file format is stock, and so are the kernels."
    )


METHOD = Method(
    name="hqq",
    summary="fits scales to the weights, without data",
    quantize=quantize,
    options=(
        Option("--hqq-iterations", "hqq_iterations", Whole(1), "Iterations of fitting a block's scale.", HqqOptions),
    ),
    order=20,
    check=check,
    describe=describe,
    improves_on="rtn",
)
