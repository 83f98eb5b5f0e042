"""LLM.int8 without loss: nearest 8-bit codes, and in half precision as much of the products as that takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

from quantize.errors import ConfigError, CorruptModel, QuantizeError, memory_errors
from quantize.formats.bitsandbytes.config import STOCK_THRESHOLD
from quantize.methods.method import Job, Method
from quantize.options import Number, Option
from quantize.records import CalibrationText, Checkout, Quantized, Recipe

if TYPE_CHECKING:
    from quantize.methods.outliers.choice import Choice

TARGET = 0.003
"""Mean KL divergence (nats) on the text that the model writes: half of what the grade lossless allows elsewhere."""
WINDOWS, LENGTH, SEED = 8, 256, 0
"""Of that text."""
ROUNDS = 3
"""In which what was predicted is corrected by what was measured."""
CHOICE = "choice.json"


@dataclasses.dataclass(frozen=True)
class Int8Options:
    """The threshold from which inputs of a product are outliers; 0 where it is to be chosen."""

    outlier_threshold: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Int8Options:
        return cls(float(recipe.options.get("outlier_threshold", 0.0)))


def quantize(job: Job) -> Quantized:
    """Write nearest 8-bit codes, in half precision the matrices that were chosen, and the threshold in the config."""
    from quantize.formats.bitsandbytes import checkpoint
    from quantize.resume import ResumeFolder

    started, recipe = time.monotonic(), job.recipe
    dtype = checkpoint.half_precision(job.checkout, recipe, job.progress)
    inputs = {
        "source": job.checkout.source.fingerprint(),
        "recipe": recipe,
        "dtype": dtype,
        "device": job.device,
        "corpus": hashlib.sha256(job.corpus.encode()).hexdigest(),
    }
    resume = ResumeFolder.begin(job.resume_folder, inputs)
    file = resume.part(CHOICE) or resume.keep(CHOICE, lambda path: path.write_text(json.dumps(_chosen(job))))
    chosen = json.loads(file.read_text("utf-8"))
    threshold, kept = float(chosen["threshold"]), tuple(chosen["half_precision"])
    skipping = dataclasses.replace(
        recipe, skip_modules=(*recipe.skip_modules, *kept), options={"outlier_threshold": threshold}
    )
    written = checkpoint.write(job.checkout, job.output, skipping, dtype, job.device, job.progress, resume)
    return Quantized(
        modules=written.modules,
        kept_modules=written.kept_modules,
        dtype=dtype,
        device=job.device,
        seconds=round(time.monotonic() - started, 3),
        calibration_text=CalibrationText(**chosen["text"]) if chosen["text"] else None,
        half_precision_modules=kept,
        outlier_threshold=threshold,
    )


def _chosen(job: Job) -> dict[str, Any]:
    """The threshold, the matrices in half precision and the record of the text; those of stock where none was read."""
    fixed = Int8Options.of(job.recipe).outlier_threshold
    try:
        with memory_errors(f"measuring 8-bit products of {job.checkout.source.name}", "try another --device"):
            choice, text = _measured(job, fixed)
    except CorruptModel:
        raise
    except QuantizeError as reason:
        job.progress.note(f"8-bit products were not measured, and stay as in stock: {reason}")
        return {"threshold": fixed or STOCK_THRESHOLD, "half_precision": [], "text": None}
    return {
        "threshold": choice.threshold,
        "half_precision": choice.half_precision,
        "text": dataclasses.asdict(text),
    }


def _measured(job: Job, fixed: float) -> tuple[Choice, CalibrationText]:
    """What reaches TARGET on text that the source writes: predicted, measured, and corrected where that was off."""
    from quantize import devices
    from quantize.methods.calibration import calibration_text
    from quantize.methods.calibration.options import CalibratedOptions
    from quantize.methods.outliers import choice, loading, sensitivity

    thresholds = (fixed,) if fixed else choice.THRESHOLDS
    model, names = loading.load(job)
    options = CalibratedOptions(calibration_windows=WINDOWS, calibration_length=LENGTH, calibration_seed=SEED)
    tokens, record = calibration_text.of_job(job, options, model, bfloat16=False)
    comparison = sensitivity.Comparison(model, names, tokens)
    plain = comparison.divergence(choice.Choice(STOCK_THRESHOLD, (), 0.0, 0, 0.0))
    best, aim = choice.Choice(fixed or STOCK_THRESHOLD, (), 0.0, 0, 0.0), TARGET
    measured = comparison.divergence(best) if fixed else plain
    if measured > TARGET:
        matrices = sensitivity.sensitivities(model, names, tokens, thresholds, SEED, job.progress)
        for _ in range(ROUNDS):
            candidate = choice.choose(matrices, thresholds, aim)
            reached = comparison.divergence(candidate)
            if reached < measured:
                best, measured = candidate, reached
            if reached <= TARGET:
                break
            aim *= TARGET / reached
    devices.release(job.device)
    job.progress.note(
        f"outliers begin at {best.threshold:g} ({STOCK_THRESHOLD:g} in stock), and {len(best.half_precision)} of "
        f"{len(names)} matrices stay in half precision: a KL divergence of {measured:.5f} instead of {plain:.5f} nats "
        f"on text that the original wrote"
    )
    return best, record


def check(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """Raise ConfigError for what cannot be combined."""
    if recipe.name == METHOD.name:
        METHOD.require_bits(recipe)
    if recipe.bits != 8 and Int8Options.of(recipe).outlier_threshold:
        raise ConfigError("a threshold of outliers is for 8-bit weights: leave --llm-int8-threshold out with 4 bits")


def attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    if recipe.bits != 8:
        return ()
    return (dataclasses.replace(recipe, name=METHOD.name, options=dataclasses.asdict(Int8Options.of(recipe))),)


def describe(recipe: Recipe, quantized: Quantized) -> str:
    threshold, text = quantized.outlier_threshold, quantized.calibration_text
    if threshold is None:
        return ""
    stock = "as in stock" if threshold == STOCK_THRESHOLD else f"not {STOCK_THRESHOLD:g} as in stock"
    sentence = f"Columns of inputs that reach {threshold:g}, {stock}, are multiplied in half precision"
    if text is None:
        return f"{sentence}."
    given = bool(Int8Options.of(recipe).outlier_threshold)
    chosen = "What stays" if given else "This threshold, and what stays"
    return (
        f"{sentence}. {chosen} in {quantized.dtype} throughout {'was' if given else 'were'} chosen for a mean KL "
        f"divergence of {TARGET} nats on {text.windows} windows of {text.length} tokens that the original wrote itself "
        f"(seed {text.seed}, sha256 {text.sha256[:12]}); the corpus above was kept out of it."
    )


METHOD = Method(
    name="int8",
    summary="makes 8-bit weights, and keeps in half precision what a lossless copy needs",
    quantize=quantize,
    options=(
        Option(
            "--llm-int8-threshold",
            "outlier_threshold",
            Number(0),
            "With 8 bits, inputs from here on are outliers, which are multiplied in half precision; 0 measures it.",
            Int8Options,
        ),
    ),
    order=5,
    bits=(8,),
    check=check,
    attempts=attempts,
    describe=describe,
    improves_on="rtn",
)
