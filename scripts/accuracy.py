"""Measure how close ways of choosing 4-bit codes and scales come to the float model, all in the same file format.

    python scripts/accuracy.py MODEL --corpus wikitext=FILE --work FOLDER            every variant
    python scripts/accuracy.py MODEL --work FOLDER --only nearest --only sweeps      some

Calibration text is what the model itself writes, sampled with a seed. Nothing is calibrated on what is measured.
GPT-2's shape only: the blocks and their four matrices are walked by name.
"""

from __future__ import annotations

import json
import math
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional

from quantize.recipes import packing, rounding
from quantize.recipes.packing import Packed
from quantize.recipes.rounding import Moments, Search

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BATCH = 4
Figures = dict[str, dict[str, torch.Tensor]]
"""By text and kind, means of windows [windows]."""
ONE_SWEEP = Search()
FINE = Search(
    factors=tuple(0.70 + 0.04 * step for step in range(11)),
    steps=(0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, -0.95, -1.0, -1.05),
)


@dataclass(frozen=True)
class Variant:
    """One way to quantize. `calibration` names the text; `pull` is how far targets move from the float weights to
    what gives the float model's outputs on the quantized model's inputs; `importance` weighs tokens by the energy of
    the loss's gradient at the layer's output; `coupled` shapes errors across rows by that gradient's moments;
    `centred` takes covariances, and biases make up for the means."""

    search: Search | None
    calibration: str = "plain"
    quant_type: str = "nf4"
    pull: float = 0.0
    importance: float = 0.0
    coupled: float = 0.0
    centred: bool = False
    block: int = 64


VARIANTS: dict[str, Variant] = {
    "nearest": Variant(None),
    "absmax": Variant(replace(FINE, factors=(1.0,), signed=False, sweeps=0)),
    "signed": Variant(replace(FINE, sweeps=0)),
    "sweep": Variant(FINE),
    "three sweeps": Variant(replace(FINE, sweeps=3)),
    "importance": Variant(ONE_SWEEP, centred=True, importance=1.0),
    "coupled": Variant(ONE_SWEEP, centred=True, importance=1.0, coupled=0.1),
    "coupled mixed": Variant(ONE_SWEEP, "mixed", centred=True, importance=1.0, coupled=0.1),
    "coupled 0.01": Variant(ONE_SWEEP, centred=True, importance=1.0, coupled=0.01),
    "coupled unweighted": Variant(ONE_SWEEP, centred=True, coupled=0.1),
    "coupled pull": Variant(ONE_SWEEP, centred=True, importance=1.0, coupled=0.1, pull=1.0),
    "coupled mixed pull": Variant(ONE_SWEEP, "mixed", centred=True, importance=1.0, coupled=0.1, pull=1.0),
    "mixed": Variant(ONE_SWEEP, "mixed"),
    "pull": Variant(ONE_SWEEP, centred=True, pull=1.0),
    "pull importance": Variant(ONE_SWEEP, centred=True, pull=1.0, importance=1.0),
    "centred": Variant(ONE_SWEEP, centred=True),
}


def sample(model: Any, windows: int, length: int, seed: int, temperature: float, width: int = 96) -> torch.Tensor:
    """Text that the model writes after its end-of-text token: [windows, length], sampled from the whole vocabulary."""
    torch.manual_seed(seed)
    parts = []
    for start in range(0, windows, width):
        tokens, state = [torch.full((min(width, windows - start), 1), model.config.eos_token_id)], None
        with fast():
            while len(tokens) < length:
                answer = model(tokens[-1], past_key_values=state, use_cache=True)
                state = answer.past_key_values
                chances = torch.softmax(answer.logits[:, -1].float() / temperature, -1)
                tokens.append(torch.multinomial(chances, 1))
        parts.append(torch.cat(tokens, 1))
    return torch.cat(parts)


def stdlib_text(seed: int, characters: int) -> str:
    """Sources of Python's standard library, whole files in a seeded order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    text, parts = 0, []
    for place in order:
        parts.append(files[place].read_text(encoding="utf-8"))
        text += len(parts[-1])
        if text > characters:
            break
    return "\n".join(parts)


def windows_of(tokenizer: Any, text: str, windows: int, length: int) -> torch.Tensor:
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    stride = max(length, len(tokens) // windows // length * length)
    return torch.stack([tokens[start : start + length] for start in range(0, stride * windows, stride)])


def log_probabilities(model: Any, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in torch.split(tokens, BATCH):
        yield torch.log_softmax(model(part).logits[:, :-1], -1)


@dataclass
class Texts:
    """What is measured on: tokens by name, and the float model's log-probabilities there, kept on disk."""

    tokens: dict[str, torch.Tensor]
    bench: Bench

    def reference(self, name: str) -> torch.Tensor:
        file = self.bench.work / f"reference-{name}-{self.bench.windows}-{self.bench.length}.pt"
        if not file.exists():
            torch.save(torch.cat(list(log_probabilities(self.bench.model, self.tokens[name]))), file)
        kept: torch.Tensor = torch.load(file, mmap=True)
        return kept

    def measure(self, model: Any) -> Figures:
        """Per text, window means [windows] of KLD, of the loss's difference and of the same top choice."""
        result = {}
        for name, tokens in self.tokens.items():
            columns: dict[str, list[torch.Tensor]] = {"kld": [], "loss": [], "top": []}
            truths = torch.split(self.reference(name), BATCH)
            for candidate, truth, right in zip(
                log_probabilities(model, tokens), truths, torch.split(tokens, BATCH), strict=True
            ):
                columns["kld"].append((truth.exp() * (truth - candidate)).sum(-1).mean(1))
                moved = (truth - candidate).gather(-1, right[:, 1:, None])[..., 0]
                columns["loss"].append(moved.mean(1))
                columns["top"].append((truth.argmax(-1) == candidate.argmax(-1)).float().mean(1))
            result[name] = {key: torch.cat(values) for key, values in columns.items()}
        return result


@dataclass(frozen=True)
class Gradients:
    """Per matrix, from the loss at tokens drawn from the float model itself: the squared length of its gradient at
    the layer's output for each calibration token, mean 1, and the second moments over outputs."""

    energy: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def gradients(model: Any, tokens: torch.Tensor, seed: int) -> Gradients:
    torch.manual_seed(seed)
    energy: dict[str, list[torch.Tensor]] = {}
    moments: dict[str, Moments] = {}

    def watch(name: str) -> Callable[..., None]:
        def keep(_: Any, __: Any, grads: tuple[torch.Tensor, ...]) -> None:
            flat = grads[0].reshape(-1, grads[0].shape[-1]).float()
            energy.setdefault(name, []).append(flat.square().sum(1))
            moments.setdefault(name, Moments(flat.shape[1])).add(flat)

        return keep

    hooks = [module.register_full_backward_hook(watch(name)) for name, module in matrices(model)]
    embedding = model.transformer.wte.weight
    embedding.requires_grad_(True)
    for part in torch.split(tokens, BATCH):
        with torch.enable_grad():
            with fast():
                logits = model(part).logits
            logits = logits.float()
            drawn = torch.multinomial(torch.softmax(logits.detach(), -1).flatten(0, 1), 1)[:, 0]
            loss = functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum")
            torch.autograd.backward(loss)
        embedding.grad = None
    embedding.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    flat = {name: torch.cat(parts) for name, parts in energy.items()}
    return Gradients({k: v / v.mean() for k, v in flat.items()}, {k: m.mean for k, m in moments.items()})


def matrices(model: Any) -> list[tuple[str, Any]]:
    return [
        (f"{place}.{name}", block.get_submodule(name))
        for place, block in enumerate(model.transformer.h)
        for name in MATRICES
    ]


def fast() -> torch.autocast:
    """Calibration reads in bfloat16, measuring in float32."""
    return torch.autocast("cpu", torch.bfloat16)


class _Reached(Exception):
    """The matrix whose inputs are wanted has been reached; the rest of the block need not run."""


def run_block(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The block's output [windows, length, width]."""
    with fast():
        answers = [block(part) for part in torch.split(hidden, BATCH)]
    return torch.cat([answer[0] if isinstance(answer, tuple) else answer for answer in answers]).float()


def inputs_of(block: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """What the matrix `name` of a block gets, [tokens, inputs]."""
    caught = []

    def catch(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        caught.append(arguments[0].flatten(0, -2).float())
        raise _Reached

    hook = block.get_submodule(name).register_forward_pre_hook(catch)
    for part in torch.split(hidden, BATCH):
        with suppress(_Reached), fast():
            block(part)
    hook.remove()
    return torch.cat(caught)


@dataclass
class Truth:
    """What the float model's matrices get on a calibration text, found when first asked for."""

    model: Any
    tokens: torch.Tensor
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def inputs(self, key: str) -> torch.Tensor:
        if not self.kept:
            hidden = embed(self.model, self.tokens)
            for place, block in enumerate(self.model.transformer.h):
                self.kept |= {f"{place}.{name}": inputs_of(block, name, hidden) for name in MATRICES}
                hidden = run_block(block, hidden)
        return self.kept[key]


def embed(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    embedded: torch.Tensor = model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(tokens.shape[1]))
    return embedded


def quantize(model: Any, truth: Truth, variant: Variant, gradient: Gradients | None) -> dict[str, Packed]:
    """Change `model` in place, matrix after matrix in forward order."""
    hidden, packed = embed(model, truth.tokens), {}
    for place, block in enumerate(model.transformer.h):
        for name in MATRICES:
            module, key = block.get_submodule(name), f"{place}.{name}"
            caught = inputs_of(block, name, hidden) if variant.search else hidden[:0]
            meant = truth.inputs(key) if variant.pull else caught
            importance = gradient.energy[key] ** variant.importance if gradient and variant.importance else None
            coupling = gradient.moments[key] if gradient and variant.coupled else None
            packed[key], bias = choose(module.weight.T, module.bias, caught, meant, variant, importance, coupling)
            module.weight.data = packed[key].weight().T.contiguous()
            module.bias.data = bias.half().float()
        hidden = run_block(block, hidden) if variant.search else hidden
    return packed


def choose(
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    truth: torch.Tensor,
    variant: Variant,
    importance: torch.Tensor | None,
    coupling: torch.Tensor | None,
) -> tuple[Packed, torch.Tensor]:
    """The 4-bit form of `weight` [rows, inputs] and the bias that goes with it."""
    if variant.search is None:
        return packing.nearest(weight, variant.quant_type, True, variant.block), bias
    share = torch.ones(len(inputs)) if importance is None else importance
    share = (share / share.sum())[:, None]
    mean, true_mean = ((share * inputs).sum(0), (share * truth).sum(0)) if variant.centred else (0.0, 0.0)
    seen, meant = inputs - mean, truth - true_mean
    moments = (share * seen).T @ seen
    target = weight
    if variant.pull:
        drift = (share * (meant - seen)).T @ seen
        target = weight + variant.pull * torch.linalg.solve(rounding.damped(moments, 0.01), (weight @ drift).T).T
    search = replace(variant.search, block=variant.block, output_damping=variant.coupled)
    packed = packing.compensated(target, moments, variant.quant_type, True, torch.float16, search, coupling)
    if variant.centred:
        bias = bias + weight @ (true_mean if variant.pull else mean) - packed.weight() @ mean
    return packed, bias


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model.requires_grad_(False)


@dataclass
class Bench:
    """One model with its texts; whatever takes long is kept in the folder `work`."""

    model: Any
    work: Path
    windows: int
    calibration_windows: int
    length: int
    truths: dict[str, Truth] = field(default_factory=dict)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        file = self.work / f"{name}-{self.length}.pt"
        if not file.exists():
            torch.save(make(), file)
        return torch.load(file)

    def sampled(self, seed: int, count: int, temperature: float) -> torch.Tensor:
        name = f"sample-{seed}-{count}-{temperature}"
        tokens: torch.Tensor = self.kept(name, lambda: sample(self.model, count, self.length, seed, temperature))
        return tokens

    def calibration(self, name: str) -> torch.Tensor:
        """Text by name: "plain" is sampled at temperature 1, half of "mixed" at 1.4."""
        plain = self.sampled(1, self.calibration_windows, 1.0)
        half = len(plain) // 2
        return plain if name == "plain" else torch.cat([plain[:half], self.sampled(3, half, 1.4)])

    def truth(self, name: str) -> Truth:
        return self.truths.setdefault(name, Truth(self.model, self.calibration(name)))

    def gradient(self, name: str) -> Gradients:
        key = f"gradients-{name}-{self.calibration_windows}"
        return Gradients(**self.kept(key, lambda: asdict(gradients(self.model, self.calibration(name), 2))))

    def texts(self, tokenizer: Any, corpus: tuple[str, ...]) -> Texts:
        pairs = [item.split("=", 1) for item in corpus]
        texts = {name: Path(file).read_text(encoding="utf-8") for name, file in pairs}
        texts["stdlib"] = stdlib_text(1, 4_000_000)
        tokens = {name: windows_of(tokenizer, text, self.windows, self.length) for name, text in texts.items()}
        return Texts(tokens | {"own": self.sampled(1000, self.windows, 1.0)}, self)


def interval(kld: torch.Tensor, base: torch.Tensor) -> tuple[float, float, float]:
    """mean `kld` / mean `base` with the 95 % percentile interval over resampled windows, both [windows]."""
    picks = torch.randint(0, len(kld), (9999, len(kld)), generator=torch.Generator().manual_seed(0))
    low, high = (kld[picks].mean(1) / base[picks].mean(1)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(kld.mean() / base.mean()), low, high


def report(name: str, figures: Figures, base: Figures, seconds: float) -> None:
    cells = []
    for text, columns in figures.items():
        kld, loss, top = (float(columns[key].mean()) for key in ("kld", "loss", "top"))
        ratio, low, high = interval(columns["kld"], base[text]["kld"])
        cells.append(
            f"{text} {kld:.5f} ({ratio:.3f}x, {low:.3f} .. {high:.3f}) ppl {math.expm1(loss):+.2%} top {top:.1%}"
        )
    click.echo(f"{name:24s} " + " | ".join(cells) + f" | {seconds:.0f} s")


def save(source: Path, output: Path, packed: dict[str, Packed], model: Any) -> None:
    """The folder `output` that stock `from_pretrained` loads, from what `quantize` returned and changed."""
    from safetensors.torch import load_file, save_file
    from transformers import BitsAndBytesConfig

    shutil.copytree(source, output, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    for key, one in packed.items():
        place, name = key.split(".", 1)
        layer = f"transformer.h.{place}.{name}."
        tensors[f"{layer}bias"] = model.get_submodule(layer.removesuffix(".")).bias.half()
        tensors |= {f"{layer}{part}": value for part, value in one.tensors().items()}
    (output / "model.safetensors").unlink()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=next(iter(packed.values())).quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ).to_dict()
    (output / "config.json").unlink()
    (output / "config.json").write_text(json.dumps(config, indent=2))


def measure_loaded(folder: Path, measured: Texts) -> Figures:
    """The figures of a saved folder as stock `from_pretrained` loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return measured.measure(model)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--corpus", multiple=True, metavar="NAME=FILE", help="A text to measure on.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keeps samples, gradients, results.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Beside nearest rounding.")
@click.option("--windows", default=16, show_default=True, help="Windows measured of each text.")
@click.option("--calibration-windows", default=96, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a window.")
@click.option(
    "--save", "saved", type=click.Path(path_type=Path), help="Save each as FOLDER/VARIANT, measure it loaded."
)
def main(
    model: Path,
    corpus: tuple[str, ...],
    work: Path,
    only: tuple[str, ...],
    windows: int,
    calibration_windows: int,
    length: int,
    saved: Path | None,
) -> None:
    from transformers import AutoTokenizer

    work.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        bench = Bench(load(model), work, windows, calibration_windows, length)
        measured = bench.texts(AutoTokenizer.from_pretrained(model, local_files_only=True), corpus)
        base: Figures = {}
        for name in ["nearest", *(name for name in VARIANTS if name in only)]:
            variant, started = VARIANTS[name], time.monotonic()
            gradient = bench.gradient(variant.calibration) if variant.importance or variant.coupled else None
            candidate, before = load(model), time.monotonic()
            packed = quantize(candidate, bench.truth(variant.calibration), variant, gradient)
            seconds = time.monotonic() - before
            if saved:
                save(model, saved / name, packed, candidate)
                figures = measure_loaded(saved / name, measured)
            elif name == "nearest":
                figures = bench.kept(f"nearest-{windows}", partial(measured.measure, candidate))
            else:
                figures = measured.measure(candidate)
            base = base or figures
            report(name, figures, base, seconds)
            record(work / "results.jsonl", name, bench, figures, base, seconds, before - started)


def record(file: Path, name: str, bench: Bench, figures: Figures, base: Figures, seconds: float, before: float) -> None:
    means = {text: {key: float(value.mean()) for key, value in columns.items()} for text, columns in figures.items()}
    ratios = {text: interval(columns["kld"], base[text]["kld"]) for text, columns in figures.items()}
    setting = {"windows": bench.windows, "calibration": bench.calibration_windows, "length": bench.length}
    with file.open("a", encoding="utf-8") as log:
        log.write(
            json.dumps(
                {"name": name, "seconds": seconds, "preparing": before} | setting | {"means": means, "ratios": ratios}
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
