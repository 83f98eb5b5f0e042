"""How weights become 4-bit: one module a recipe, and only here is bitsandbytes imported."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantize.errors import ConfigError
from quantize.progress import Progress
from quantize.records import AUTO, CALIBRATED, STOCK, Checkout, Quantized, Recipe


def quantize(
    checkout: Checkout,
    output: Path,
    recipe: Recipe,
    device: str,
    progress: Progress,
    corpus: str = "",
    resume: Path | None = None,
) -> Quantized:
    """Write quantized weights and their config of `checkout` into the folder `output`; stock where not calibrated.

    A calibrated recipe never looks at `corpus`, the text that the result is judged by. Finished parts are kept in the
    folder `resume` for a run that goes on there; without one they go away at the end. Raises CorruptModel (NaN,
    damage), UnsupportedModel (nothing to quantize), CorpusError (the calibration text), DeviceError or StorageError.
    """
    kept = resume or output.with_name(f"{output.name}.unfinished")
    made = _make(checkout, output, recipe, device, progress, corpus, kept)
    if resume is None:
        shutil.rmtree(kept, ignore_errors=True)
    return made


def _make(
    checkout: Checkout, output: Path, recipe: Recipe, device: str, progress: Progress, corpus: str, kept: Path
) -> Quantized:
    if recipe.name == CALIBRATED:
        from quantize.methods.calibration import quantizer

        return quantizer.quantize(checkout, output, recipe, device, progress, corpus, kept)
    from quantize.formats.bitsandbytes import checkpoint

    return checkpoint.quantize(checkout, output, recipe, device, progress, kept)


def check(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """Raise ConfigError or CorpusError now, rather than after other recipes, where one that is asked for cannot work.

    `corpus` is the text that the package will be judged by.
    """
    if recipe.name == CALIBRATED and recipe.bits != 4:
        raise ConfigError("the calibrated recipe makes 4-bit weights: leave it out with 8 bits")
    if recipe.size_budget > 1 and (recipe.name == STOCK or recipe.bits != 4):
        raise ConfigError(
            "a size budget is for 4-bit weights by the recipes calibrated and auto: leave one of them out"
        )
    from transformers import AutoConfig, AutoTokenizer

    from quantize.methods.calibration import calibration_text

    if recipe.name in (CALIBRATED, AUTO) and recipe.bits == 4 and recipe.calibration != calibration_text.SELF:
        options = {"local_files_only": True, "trust_remote_code": checkout.source.remote_code}
        config = AutoConfig.from_pretrained(checkout.folder, **options)
        calibration_text.given(recipe, config, AutoTokenizer.from_pretrained(checkout.folder, **options), corpus)


def works_on(device: str) -> bool:
    """Whether bitsandbytes quantizes to 4 bits on `device` and gets nearly the same values back."""
    import torch
    from bitsandbytes import functional

    weights = torch.randn(64, 64, device=device)
    restored = functional.dequantize_4bit(*functional.quantize_4bit(weights, quant_type="nf4"))
    return bool((restored - weights).norm() < 0.2 * weights.norm())
