"""Round to nearest: what stock transformers and bitsandbytes do."""

from __future__ import annotations

import dataclasses
import time

from quantize.methods.method import Job, Method
from quantize.records import Quantized, Recipe


def quantize(job: Job) -> Quantized:
    """Write what stock transformers and bitsandbytes would write."""
    from quantize.formats.bitsandbytes import checkpoint
    from quantize.resume import ResumeFolder

    started = time.monotonic()
    dtype = checkpoint.half_precision(job.checkout, job.recipe, job.progress)
    inputs = {"source": job.checkout.source.fingerprint(), "recipe": job.recipe, "dtype": dtype, "device": job.device}
    resume = ResumeFolder.begin(job.resume_folder, inputs)
    written = checkpoint.write(job.checkout, job.output, job.recipe, dtype, job.device, job.progress, resume)
    seconds = round(time.monotonic() - started, 3)
    return Quantized(written.modules, written.kept_modules, dtype, job.device, seconds)


def attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    return (dataclasses.replace(recipe, name=METHOD.name, options={}),) if recipe.bits == 4 else ()


def describe(recipe: Recipe, quantized: Quantized) -> str:
    return "Weights are rounded to nearest, as stock bitsandbytes does." if recipe.bits == 4 else ""


METHOD = Method(
    name="rtn",
    summary="rounds to nearest, as stock bitsandbytes does",
    quantize=quantize,
    order=0,
    bits=(4, 8),
    attempts=attempts,
    describe=describe,
    former_names=("stock",),
)
