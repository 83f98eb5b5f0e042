"""Measure what each method, and each part of the calibrated one, does to a model; all write the same file format.

    python scripts/accuracy.py MODEL --corpus wikitext=FILE             all variants
    python scripts/accuracy.py MODEL --only hqq                         this one beside rtn

Every variant is written as a checkpoint, loaded by stock transformers, and compared with the float model on texts that
are not calibrated on: the given files, Python's standard library, and what the model writes with another seed. Prints a
table and, with --json, every figure.
"""

from __future__ import annotations

import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import learned_rounding
import numpy as np
import torch
from safetensors.torch import load_file

from quantize import devices, methods, source
from quantize.formats.bitsandbytes.loading import upcast
from quantize.formats.bitsandbytes.packing import Packed
from quantize.methods import Job
from quantize.methods.calibration import calibration_text, quantizer
from quantize.methods.calibration.options import CalibratedOptions
from quantize.methods.calibration.quantizer import Ablation
from quantize.methods.calibration.resume import TOKENS
from quantize.methods.rounding.gptq import GptqOptions
from quantize.parity.models import load_tokenizer
from quantize.progress import Silent
from quantize.records import Checkout, Recipe

OWN_SEED, STDLIB_SEED, BOOTSTRAP_SEED = 1000, 1, 7
BOOTSTRAPS = 2000
BATCH, EPOCHS = 4, 2
TIMED_TOKENS, TIMED_RUNS = (512, 1), {"cpu": 3, "gpu": 30}
"""Of a forward pass, after one that is not timed."""
LEARNING_EPOCHS, LEARNING_RATE = 20, 0.003
PLAIN = Ablation(output_hessians=False, token_weights=False, bias_correction=False, temperatures=(1.0,))
ABSMAX = replace(PLAIN, gptq=GptqOptions(scale_grid=(1.0,), signed=False, passes=0))
SIGNED = replace(PLAIN, gptq=GptqOptions(passes=0))


@dataclass(frozen=True)
class Variant:
    """A recipe, and for the calibrated method which of its parts are used."""

    recipe: Recipe
    ablation: Ablation | None = None
    distilled: float | None = None
    """Learning rate at which norms and biases are then distilled on the calibration text."""
    learned: Callable[..., None] | None = None
    """Then learns the rounding of all matrices at once."""
    predicted: bool = False
    """Whether the divergence is predicted as well, from the error of each matrix."""


CALIBRATED = Recipe(name="calibrated")
FULL = Ablation()
THREE_PASSES = replace(FULL, gptq=GptqOptions(passes=3))
VARIANTS = {
    "rtn": Variant(Recipe(name="rtn")),
    "hqq": Variant(Recipe(name="hqq")),
    "GPTQ, scale = absmax": Variant(CALIBRATED, ABSMAX),
    "+ scale search, either sign": Variant(CALIBRATED, SIGNED),
    "+ one pass of coordinate descent": Variant(CALIBRATED, PLAIN),
    "+ bias correction": Variant(CALIBRATED, replace(PLAIN, bias_correction=True)),
    "+ token weights": Variant(CALIBRATED, replace(PLAIN, bias_correction=True, token_weights=True)),
    "+ output Hessian": Variant(
        CALIBRATED, replace(PLAIN, bias_correction=True, token_weights=True, output_hessians=True)
    ),
    "+ half the text at temperature 1.4: calibrated": Variant(CALIBRATED, FULL),
    "calibrated, all text at 1.4": Variant(CALIBRATED, replace(FULL, temperatures=(1.4,))),
    "calibrated, text at 1, 1.4 and 2": Variant(CALIBRATED, replace(FULL, temperatures=(1.0, 1.4, 2.0))),
    "calibrated, without output Hessian": Variant(CALIBRATED, replace(FULL, output_hessians=False)),
    "calibrated, groups of 256": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(group=256))),
    "calibrated, groups of 96": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(group=96))),
    "calibrated, H damped by 0.3 %": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(damping=0.003))),
    "calibrated, H damped by 3 %": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(damping=0.03))),
    "calibrated, A damped by 3 %": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(output_damping=0.03))),
    "calibrated, A damped by 30 %": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(output_damping=0.3))),
    "calibrated, without token weights": Variant(CALIBRATED, replace(FULL, token_weights=False)),
    "calibrated, groups of 128": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(group=128))),
    "calibrated, groups of 1024": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(group=1024))),
    "calibrated, three passes": Variant(CALIBRATED, THREE_PASSES),
    "calibrated, twice the text": Variant(methods.replace(CALIBRATED, calibration_windows=256), FULL),
    "calibrated, windows of 1024": Variant(methods.replace(CALIBRATED, calibration_length=1024), FULL),
    "calibrated, blocks of 32": Variant(CALIBRATED, replace(FULL, gptq=GptqOptions(block=32))),
    "calibrated, norms and biases distilled at 0.0001": Variant(CALIBRATED, FULL, 1e-4),
    "calibrated, norms and biases distilled at 0.001": Variant(CALIBRATED, FULL, 1e-3),
    "calibrated, rounding learned in 4 epochs": Variant(methods.replace(CALIBRATED, epochs=4), FULL),
    "calibrated, rounding learned in 8 epochs": Variant(methods.replace(CALIBRATED, epochs=8), FULL),
    "calibrated, rounding learned in 20 epochs": Variant(methods.replace(CALIBRATED, epochs=20), FULL),
    "calibrated, rounding learned on divergence": Variant(CALIBRATED, FULL, learned=learned_rounding.on_divergence),
    "twice the text, three passes": Variant(methods.replace(CALIBRATED, calibration_windows=256), THREE_PASSES),
    "twice the text, three passes, rounding learned in 4 epochs": Variant(
        methods.replace(CALIBRATED, calibration_windows=256, epochs=4), THREE_PASSES
    ),
    "twice the text, three passes, rounding learned in 8 epochs": Variant(
        methods.replace(CALIBRATED, calibration_windows=256, epochs=8), THREE_PASSES
    ),
    **{
        f"calibrated, {budget:.2f} x the bytes": Variant(
            methods.replace(CALIBRATED, size_budget=budget), FULL, predicted=True
        )
        for budget in (1.01, 1.02, 1.03, 1.05, 1.07, 1.10, 1.15, 1.20, 1.30, 1.40)
    },
    "rtn, mlp.c_proj in half precision": Variant(Recipe(name="rtn", skip_modules=("mlp.c_proj",))),
    "rtn, last two decoder layers in half precision": Variant(Recipe(name="rtn", skip_modules=("h.4", "h.5"))),
    "8 bits, stock": Variant(Recipe(name="rtn", bits=8)),
    **{
        f"8 bits, threshold {threshold:g}": Variant(
            Recipe(name="rtn", bits=8, options={"outlier_threshold": threshold})
        )
        for threshold in (4.0, 3.0, 2.0, 1.0, 0.5)
    },
    "8 bits, v_proj in half precision": Variant(Recipe(name="rtn", bits=8, skip_modules=("v_proj",))),
    "8 bits, chosen": Variant(Recipe(name="int8", bits=8)),
    "8 bits, chosen, threshold 6": Variant(Recipe(name="int8", bits=8, options={"outlier_threshold": 6.0})),
    "rtn fp4": Variant(Recipe(name="rtn", quant_type="fp4")),
    "calibrated fp4": Variant(replace(CALIBRATED, quant_type="fp4"), FULL),
}


@dataclass(frozen=True)
class Measured:
    """One variant: window means [windows] by text of KLD, of the change of the loss, and of the same top token."""

    name: str
    kld: dict[str, np.ndarray[Any, Any]]
    loss: dict[str, np.ndarray[Any, Any]]
    top: dict[str, np.ndarray[Any, Any]]
    weight_bytes: int
    seconds: float
    forward: dict[int, float]
    """Median seconds of a forward pass by its number of tokens."""
    predicted: float | None
    """KLD (nats) on calibration text, where a size was asked for."""


def stdlib_text(characters: int) -> str:
    """Sources of Python's standard library, whole files in a seeded order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = np.random.default_rng(STDLIB_SEED).permutation(len(files))
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        parts.append(files[order[len(parts)]].read_text("utf-8"))
    return "\n".join(parts)


def spread_windows(tokenizer: Any, text: str, windows: int, length: int) -> torch.Tensor:
    """`windows` windows of `length` tokens, evenly spread over the text."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    available = len(ids) // length
    chosen = [round(place * (available - 1) / max(windows - 1, 1)) for place in range(min(windows, available))]
    return torch.stack([ids[place * length : (place + 1) * length] for place in chosen])


def log_probabilities(model: Any, tokens: torch.Tensor, device: str) -> Iterator[torch.Tensor]:
    for part in torch.split(tokens, BATCH):
        with torch.no_grad():
            answer = torch.log_softmax(model(part.to(device)).logits[:, :-1].float(), -1)
        yield answer


def compare(reference: Any, candidate: Any, tokens: torch.Tensor, device: str) -> tuple[np.ndarray[Any, Any], ...]:
    columns: tuple[list[torch.Tensor], ...] = ([], [], [])
    pairs = zip(log_probabilities(reference, tokens, device), log_probabilities(candidate, tokens, device), strict=True)
    for (truth, guess), part in zip(pairs, torch.split(tokens, BATCH), strict=True):
        columns[0].append((truth.exp() * (truth - guess)).sum(-1).mean(1))
        right = part[:, 1:, None].to(device)
        columns[1].append((truth - guess).gather(-1, right)[..., 0].mean(1))
        columns[2].append((truth.argmax(-1) == guess.argmax(-1)).float().mean(1))
    return tuple(torch.cat(column).cpu().numpy() for column in columns)


def load(folder: Path, device: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"device_map": {"": device}, "local_files_only": True, "use_safetensors": True, **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def forward_seconds(model: Any, tokens: torch.Tensor, device: str) -> dict[int, float]:
    """Median seconds of forward passes of `model` as it is loaded, by their number of tokens."""
    seconds = {}
    for length in TIMED_TOKENS:
        window, runs = tokens[:1, :length].to(device), []
        for _ in range(1 + TIMED_RUNS[devices.kind(device)]):
            started = time.perf_counter()
            with torch.inference_mode():
                float(model(window).logits.flatten()[0])  # waits for the device
            runs.append(time.perf_counter() - started)
        seconds[window.shape[1]] = float(np.median(runs[1:]))
    return seconds


def distil(candidate: Any, reference: Any, text: torch.Tensor, rate: float, device: str) -> Any:
    """Train norms and biases on the KLD to the float model, twice over `text`, and round them to half precision."""
    trained = [parameter for parameter in candidate.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.Adam([parameter.requires_grad_(True) for parameter in trained], rate)
    parts = list(torch.split(text, BATCH)) * EPOCHS
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(parts))
    for part in parts:
        with torch.no_grad():
            truth = torch.log_softmax(reference(part.to(device)).logits, -1)
        guess = torch.log_softmax(candidate(part.to(device)).logits, -1)
        loss = (truth.exp() * (truth - guess)).sum(-1).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for parameter in trained:
        parameter.requires_grad_(False).copy_(parameter.half())
    return candidate


def packed_matrices(folder: Path, device: str) -> dict[str, Packed]:
    """The 4-bit matrices of a checkpoint, by the names of their modules."""
    tensors = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file, device).items()
    }
    modules = [name.removesuffix(".weight.absmax") for name in tensors if name.endswith(".weight.absmax")]
    parts = {module: [name for name in tensors if name.startswith(f"{module}.weight")] for module in modules}
    return {
        module: Packed.of({name.removeprefix(f"{module}."): tensors[name] for name in names})
        for module, names in parts.items()
    }


def measure(
    name: str,
    variant: Variant,
    checkout: Checkout,
    texts: dict[str, torch.Tensor],
    reference: Any,
    device: str,
    shared: Path,
) -> Measured:
    """Quantize, load and compare one variant; `seconds` are those of quantizing, and of what it does not find among the
    `shared` texts and gradients of other variants."""
    with tempfile.TemporaryDirectory(prefix="accuracy-") as place:
        folder = Path(place) / "package"
        folder.mkdir()
        resume = Path(place) / "work"
        started = time.monotonic()
        job = Job(checkout, folder, variant.recipe, device, Silent(), resume=resume, shared=shared)
        options, predicted = CalibratedOptions.of(variant.recipe), None
        if variant.ablation is None:
            methods.quantize(job)
        else:
            quantizer.quantize(job, options, variant.ablation)
        seconds = time.monotonic() - started
        if variant.predicted:
            predicted = quantizer.offers(job, options, variant.ablation).divergence(options.size_budget)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        candidate = load(folder, device)
        forward = forward_seconds(candidate, next(iter(texts.values())), device)
        if device == "cpu":
            upcast(candidate)
        elif variant.distilled or variant.learned:
            candidate.dequantize(dtype=torch.float32)
            candidate.float()
        candidate.requires_grad_(False)
        text = torch.empty(0)
        if variant.distilled or variant.learned:
            tokens = quantizer.shared_parts(job, options, variant.ablation or FULL).part(TOKENS)
            assert tokens is not None, "a calibrated variant has its text"
            text = load_file(tokens)["tokens"]
        if variant.distilled:
            candidate = distil(candidate, reference, text, variant.distilled, device)
        if variant.learned:
            packed = packed_matrices(folder, device)
            variant.learned(reference, candidate, packed, text, LEARNING_EPOCHS, LEARNING_RATE)
        figures = {text: compare(reference, candidate, tokens, device) for text, tokens in texts.items()}
    kld, loss, top = ({text: columns[index] for text, columns in figures.items()} for index in range(3))
    return Measured(name, kld, loss, top, size, seconds, forward, predicted)


def ratio(divergences: np.ndarray[Any, Any], base: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """The ratio of two means over the same windows, and its 95 % interval by a paired bootstrap."""
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(divergences), (BOOTSTRAPS, len(divergences)))
    ratios = divergences[drawn].mean(1) / base[drawn].mean(1)
    return float(divergences.mean() / base.mean()), float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))


def row(measured: Measured, base: Measured) -> dict[str, Any]:
    texts = {}
    for text in measured.kld:
        value, low, high = ratio(measured.kld[text], base.kld[text])
        texts[text] = {
            "kld": float(measured.kld[text].mean()),
            "ratio": value,
            "low": low,
            "high": high,
            "perplexity": math.exp(float(measured.loss[text].mean())),
            "same_top": float(measured.top[text].mean()),
        }
    return {
        "variant": measured.name,
        "weight_bytes": measured.weight_bytes,
        "seconds": round(measured.seconds, 1),
        "forward_seconds": measured.forward,
        "predicted": measured.predicted,
        "texts": texts,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["texts"])
    lines = [
        "| variant | weights | seconds | "
        + "".join(f"ms for {length} | " for length in rows[0]["forward_seconds"])
        + " | ".join(f"{name}: KLD, ratio to rtn, perplexity, same top" for name in names)
        + " |",
        f"|---|---:|---:|{'---:|' * len(rows[0]['forward_seconds'])}{'---|' * len(names)}",
    ]
    for variant in rows:
        cells = [
            f"{text['kld']:.5f}, {text['ratio']:.3f} ({text['low']:.3f} .. {text['high']:.3f}), "
            f"x {text['perplexity']:.4f}, {text['same_top']:.1%}"
            for text in variant["texts"].values()
        ]
        times = [f"{1000 * seconds:.1f}" for seconds in variant["forward_seconds"].values()]
        facts = [variant["variant"], f"{variant['weight_bytes']:,}", str(variant["seconds"]), *times, *cells]
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("model")
@click.option("--corpus", multiple=True, metavar="NAME=FILE", help="A text to measure on.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="These variants, beside rtn.")
@click.option("--windows", default=48, show_default=True, help="Windows of each text.")
@click.option("--length", default=512, show_default=True, help="Tokens in each.")
@click.option("--calibration-windows", type=int, help="Windows of calibration text; otherwise those of the recipe.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(
    model: str,
    corpus: tuple[str, ...],
    only: tuple[str, ...],
    windows: int,
    length: int,
    calibration_windows: int | None,
    device: str,
    json_file: Path | None,
) -> None:
    device = devices.choose(device)
    checkout = source.fetch(model, revision=None, trust_remote_code=False, progress=Silent())
    tokenizer = load_tokenizer(checkout.folder, False)
    reference = load(checkout.folder, device, dtype=torch.float32)
    length = min(length, int(reference.config.max_position_embeddings))
    given = {name: Path(file).read_text("utf-8") for name, _, file in (entry.partition("=") for entry in corpus)}
    texts = {name: spread_windows(tokenizer, text, windows, length) for name, text in given.items()}
    texts["stdlib"] = spread_windows(tokenizer, stdlib_text(2_000_000), windows, length)
    own = CalibratedOptions(calibration_windows=windows, calibration_seed=OWN_SEED)
    texts["own"] = calibration_text.generated(reference, own, length, device, False, Silent(), (1.0,))
    rows: list[dict[str, Any]] = []
    base: Measured | None = None
    with tempfile.TemporaryDirectory(prefix="accuracy-shared-") as shared:
        for name, variant in VARIANTS.items():
            if only and name not in (*only, "rtn"):
                continue
            if calibration_windows:
                changed = methods.replace(variant.recipe, calibration_windows=calibration_windows)
                variant = replace(variant, recipe=changed)
            measured = measure(name, variant, checkout, texts, reference, device, Path(shared))
            base = base or measured
            rows.append(row(measured, base))
            click.echo(markdown(rows).splitlines()[-1], err=True)
            if json_file:
                json_file.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    click.echo(markdown(rows))


if __name__ == "__main__":
    main()
