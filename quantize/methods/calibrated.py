"""Two-sided GPTQ with a scale search, on text that the model writes itself."""

from __future__ import annotations

import dataclasses

from quantize import memory
from quantize.errors import ConfigError
from quantize.methods.calibration.options import OPTIONS, SELF, CalibratedOptions
from quantize.methods.method import Job, Larger, Method
from quantize.records import Checkout, Quantized, Recipe

REFINED_PASSES, REFINED_EPOCHS, REFINED_TEXT = 3, 8, 2
"""Of the refined attempt, unless more are asked for; its text is so many times longer."""
REFINED_SHARE = 0.8
"""Of the calibrated recipe's divergence: what the refined attempt leaves at the least, with some room."""


def quantize(job: Job) -> Quantized:
    """Write the source with chosen codes, scales and biases, in the stock files."""
    from quantize.methods.calibration import quantizer

    with memory.freed_blocks_returned():
        return quantizer.quantize(job, CalibratedOptions.of(job.recipe))


def check(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """Raise ConfigError for what cannot be combined, CorpusError for a given text that cannot be calibrated on."""
    from transformers import AutoConfig, AutoTokenizer

    from quantize.methods.calibration import calibration_text

    options = CalibratedOptions.of(recipe)
    if recipe.name == METHOD.name:
        METHOD.require_bits(recipe)
    if options.size_budget > 1 and recipe.bits != 4:
        raise ConfigError("a size budget is for 4-bit weights: leave it out with 8 bits")
    if recipe.bits == 4 and options.calibration != SELF:
        trust = {"local_files_only": True, "trust_remote_code": checkout.source.remote_code}
        config = AutoConfig.from_pretrained(checkout.folder, **trust)
        tokenizer = AutoTokenizer.from_pretrained(checkout.folder, **trust)
        calibration_text.from_text(calibration_text.read(options.calibration), options, config, tokenizer, corpus)


def attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    """As requested; then with more text, more passes and learned rounding; last, with a size budget, more bytes."""
    if recipe.bits != 4:
        return ()
    options = CalibratedOptions.of(recipe)
    plain = dataclasses.replace(options, size_budget=1.0)
    refined = dataclasses.replace(
        plain,
        calibration_windows=REFINED_TEXT * options.calibration_windows,
        passes=max(options.passes, REFINED_PASSES),
        epochs=max(options.epochs, REFINED_EPOCHS),
    )
    larger = dataclasses.replace(refined, size_budget=options.size_budget)
    tried = (plain, refined, larger) if options.size_budget > 1 else (plain, refined)
    return tuple(
        dataclasses.replace(recipe, name=METHOD.name, options=dataclasses.asdict(attempt)) for attempt in tried
    )


def least_left(before: Recipe, then: Recipe) -> float:
    """More text, passes and learned rounding took away an eighth at most of what the recipe leaves in the same bytes
    (docs/accuracy.md)."""
    if before.name != METHOD.name or CalibratedOptions.of(before).size_budget != CalibratedOptions.of(then).size_budget:
        return 0.0
    return REFINED_SHARE


def resized(job: Job, share: float, asked: Recipe) -> Larger | None:
    """The smallest file predicted to diverge by `share` of what the recipe of `job` does, on as much text as refining
    takes, but without learned rounding.

    Learning takes longer than all the rest, and gains less than a hundredth more bytes do. None where a size was asked
    for.
    """
    from quantize.methods.calibration import quantizer

    if CalibratedOptions.of(asked).size_budget > 1:
        return None
    options = CalibratedOptions.of(job.recipe)
    as_plain = options.epochs == 0 and options.size_budget == 1
    windows = options.calibration_windows * (REFINED_TEXT if as_plain else 1)
    values = dataclasses.asdict(
        dataclasses.replace(options, size_budget=1.0, epochs=0, calibration_windows=windows),
    )
    recipe = dataclasses.replace(job.recipe, options=values)
    with memory.freed_blocks_returned():
        offers = quantizer.offers(dataclasses.replace(job, recipe=recipe), CalibratedOptions.of(recipe))
    now = offers.divergence(options.size_budget)
    needed = offers.smallest(share * now)
    times = min(needed, asked.max_size)
    larger = dataclasses.replace(recipe, options={**values, "size_budget": times})
    return Larger(larger, times, options.size_budget, offers.divergence(times) / now, share, needed)


def describe(recipe: Recipe, quantized: Quantized) -> str:
    text = quantized.calibration_text
    if text is None:
        return ""
    if text.source == SELF:
        origin = "that the original wrote itself"
    else:
        origin = f"of {text.source}" + (f" (data set {text.repo_id} at commit {text.commit})" if text.repo_id else "")
    epochs = CalibratedOptions.of(recipe).epochs
    learned = f", and rounding was then learned in {epochs} epochs on that text" if epochs else ""
    return (
        f"Codes, scales and biases were not rounded to nearest but chosen so that the model's outputs change least, on "
        f"{text.windows} windows of {text.length} tokens {origin} (seed {text.seed}, sha256 {text.sha256[:12]})"
        f"{learned}; the corpus above was kept out of it. The file format is stock, and so are the kernels."
    )


METHOD = Method(
    name="calibrated",
    summary="changes the outputs least on calibration text, in the same bytes",
    quantize=quantize,
    options=OPTIONS,
    order=10,
    check=check,
    attempts=attempts,
    least_left=least_left,
    resized=resized,
    describe=describe,
    improves_on="rtn",
)
