"""Measure the tool against the obvious way to do the same, side by side in one run, as ratios.

    python scripts/benchmark.py parity                                  the pocket model, on the built-in corpus
    python scripts/benchmark.py parity --shape distilgpt2 --windows 8   random weights of distilgpt2's shape
    python scripts/benchmark.py parity FOLDER --corpus FILE --json      any model, any text

Each contender runs in a process of its own, so that one's memory is not another's, and they take turns.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from quantize.progress import Silent
from quantize.records import ParitySettings, Recipe

POCKET = Path(__file__).resolve().parents[1] / "tests" / "models" / "pocket-gpt2"
QUIET = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
SHAPES = {"distilgpt2": {"vocab_size": 50257, "n_embd": 768, "n_layer": 6, "n_head": 12, "n_positions": 1024}}
GUIDE_STRIDE = 512
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Job:
    """What the contenders of one benchmark have in common; `windows` at most are read."""

    source: str
    candidate: str
    corpus: str
    window: int
    windows: int
    device: str


@dataclass(frozen=True)
class Outcome:
    """Seconds from loaded models to the last figure, and of loading; tokens scored; most bytes beyond the models."""

    seconds: float
    loading: float
    tokens: int
    peak_bytes: int
    figures: dict[str, float]


class Stopwatch(Silent):
    """Progress that remembers when each task began."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        self.begun[title.split()[0]] = time.perf_counter()
        yield lambda amount: None


@contextmanager
def most_memory(device: str) -> Iterator[Callable[[], int]]:
    """Tells the most bytes that were held on `device` inside the block, beyond what was held at its begin."""
    import psutil
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    process, done, peaks = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peaks.append(process.memory_info().rss)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield lambda: max(*peaks, process.memory_info().rss) - before
    finally:
        done.set()
        watcher.join()


def finished(device: str) -> float:
    """The time at which the device has done all that it was asked for."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def windows_of(job: Job, tokenizer: Any) -> Any:
    from quantize.parity import corpus

    return corpus.windows_of(corpus.load(job.corpus), tokenizer, job.window, job.windows, seed=0)[0]


def ours(job: Job) -> Outcome:
    """All statistics of the protocol over the windows, by the project's own scoring."""
    from quantize import source
    from quantize.parity import loading, scoring, statistics

    started = time.perf_counter()
    checkout = source.fetch(job.source, revision=None, trust_remote_code=False, progress=Silent())
    tokenizer = loading.load_tokenizer(checkout.folder, False)
    with loading.Pair(checkout, Path(job.candidate), job.device, trust=False, tokenizer=tokenizer, alone=False) as pair:
        windows = windows_of(job, tokenizer)
        reference = scoring.LiveReference(pair.reference)
        if job.device == "cpu":
            pair.widen()
        warm = scoring.score(reference, pair.candidate, windows[:2], job.device, lambda amount: None)
        statistics.summarize(warm, seed=0)
        with most_memory(job.device) as peak:
            begun = finished(job.device)
            tokens = scoring.score(reference, pair.candidate, windows, job.device, lambda amount: None)
            scores = statistics.summarize(tokens, seed=0)
            seconds = finished(job.device) - begun
            used = peak()
    figures = {"ratio": scores.perplexity_ratio.value, "kld": scores.kld.mean.value}
    return Outcome(seconds, begun - started, windows.shape[0] * (windows.shape[1] - 1), used, figures)


def guide(job: Job, stride: int) -> Outcome:
    """Both models as from_pretrained loads them, and the Hugging Face guide's loop over the same text for each.

    With a stride of the whole window it reads the same windows as ours and no token twice.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    place = {"device_map": {"": job.device}}
    models = [AutoModelForCausalLM.from_pretrained(folder, **place).eval() for folder in (job.source, job.candidate)]
    text = windows_of(job, AutoTokenizer.from_pretrained(job.source)).reshape(1, -1)
    with torch.no_grad():
        for model in models:
            model(text[:, : job.window].to(job.device), labels=text[:, : job.window].to(job.device))
    with most_memory(job.device) as peak:
        begun = finished(job.device)
        results = [_guide_loop(model, text, job.window, stride, job.device) for model in models]
        seconds = finished(job.device) - begun
        used = peak()
    tokens = results[0][1]
    return Outcome(seconds, begun - started, tokens, used, {"ratio": results[1][0] / results[0][0]})


def _guide_loop(model: Any, text: Any, window: int, stride: int, device: str) -> tuple[float, int]:
    import torch

    total, counted, scored_until = 0.0, 0, 0
    for begin in range(0, text.shape[1], stride):
        end = min(begin + window, text.shape[1])
        tokens = text[:, begin:end].to(device)
        labels = tokens.clone()
        labels[:, : tokens.shape[1] - (end - scored_until)] = -100
        with torch.no_grad():
            loss = model(tokens, labels=labels).loss
        own = int((labels != -100).sum()) - 1
        total, counted, scored_until = total + float(loss) * own, counted + own, end
        if end == text.shape[1]:
            break
    return math.exp(total / counted), counted


def verdict(job: Job) -> Outcome:
    """`quantize verify` from loading to the verdict on all that it needs; generation comes after that.

    It loads the models itself, so its peak counts them too.
    """
    from quantize import source
    from quantize.parity import measure

    checkout = source.fetch(job.source, revision=None, trust_remote_code=False, progress=Silent())
    watch, settings = Stopwatch(), ParitySettings(corpus=job.corpus, window=job.window, max_windows=job.windows)
    with most_memory(job.device) as peak:
        started = time.perf_counter()
        parity = measure(checkout, Path(job.candidate), settings, job.device, watch)
        whole = time.perf_counter() - started
        begun, done, used = watch.begun["scoring"], watch.begun["generating"], peak()
    assert parity.scores is not None and parity.corpus is not None
    figures = {
        "ratio": parity.scores.perplexity_ratio.value,
        "kld": parity.scores.kld.mean.value,
        "windows": parity.corpus.scored,
        "seconds with generation": whole,
    }
    return Outcome(done - begun, begun - started, parity.corpus.scored * (parity.corpus.window - 1), used, figures)


OURS, VERDICT = "ours, all statistics", "ours, to the verdict"
GUIDES: dict[str, Callable[[Job], Outcome]] = {
    "guide's loop, the same windows": lambda job: guide(job, job.window),
    "guide's loop, its stride of half a window": lambda job: guide(job, min(GUIDE_STRIDE, job.window // 2)),
}
CONTENDERS = {OURS: ours, **GUIDES, VERDICT: verdict}


def made_up(shape: str, folder: Path) -> Path:
    """A model of random weights in float32, as distilgpt2 lies on the Hub, with the pocket model's tokenizer."""
    import shutil

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SHAPES[shape])).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder


def quantized(source_folder: Path, folder: Path, device: str) -> Path:
    """The source in plain NF4, as the stock recipe makes it."""
    from quantize import package, recipes, source

    checkout = source.fetch(str(source_folder), revision=None, trust_remote_code=False, progress=Silent())
    folder.mkdir()
    recipes.quantize(checkout, folder, Recipe(name="stock"), device, Silent())
    package.copy_carried(checkout, source.carried_files(checkout.source), folder)
    return folder


def take_turns(job: Job, names: list[str], rounds: int) -> dict[str, list[Outcome]]:
    """Every contender once a round, each in a new process."""
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            click.echo(f"round {turn + 1} of {rounds}: {name}", err=True)
            command = [sys.executable, __file__, "contender", name, json.dumps(asdict(job))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(Outcome(**json.loads(done.stdout.splitlines()[-1])))
    return found


@click.group()
def benchmark() -> None:
    """Measure the tool against the obvious way, side by side."""
    os.environ.update(QUIET)


@benchmark.command(hidden=True)
@click.argument("name")
@click.argument("job")
def contender(name: str, job: str) -> None:
    """One contender's one run, in this process."""
    click.echo(json.dumps(asdict(CONTENDERS[name](Job(**json.loads(job))))))


@benchmark.command()
@click.argument("model", default=str(POCKET))
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead of MODEL.")
@click.option("--corpus", default=ParitySettings.corpus, show_default=True)
@click.option("--window", default=ParitySettings.window, show_default=True, help="Tokens, at most the context.")
@click.option("--windows", default=ParitySettings.max_windows, show_default=True, help="Windows at most.")
@click.option("--device", default="auto", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def parity(
    model: str, shape: str | None, corpus: str, window: int, windows: int, device: str, rounds: int, as_json: bool
) -> None:
    """Scoring a pair of models, and the way to a verdict, against the Hugging Face guide's loop for each of them."""
    from transformers import AutoConfig

    from quantize import devices

    place = devices.choose(device)
    with tempfile.TemporaryDirectory(prefix="quantize-benchmark-") as folder:
        original = made_up(shape, Path(folder) / shape) if shape else Path(model).resolve()
        candidate = quantized(original, Path(folder) / "nf4", place)
        context = AutoConfig.from_pretrained(original).max_position_embeddings
        job = Job(str(original), str(candidate), corpus, min(window, context), windows, place)
        found = take_turns(job, list(CONTENDERS), rounds)
    work = {name: median(outcome.seconds for outcome in outcomes) for name, outcomes in found.items()}
    whole = {name: median(one.seconds + one.loading for one in outcomes) for name, outcomes in found.items()}
    rows = [
        {
            "contender": name,
            "seconds": round(work[name], 3),
            "with loading": round(whole[name], 3),
            "tokens": outcomes[0].tokens,
            "tokens per second": round(outcomes[0].tokens / work[name]),
            "peak MB beyond the models": round(max(outcome.peak_bytes for outcome in outcomes) / 1e6),
            **{key: round(value, 5) for key, value in outcomes[0].figures.items()},
        }
        for name, outcomes in found.items()
    ]
    ratios = {
        **{f"scoring: {name}": round(work[name] / work[OURS], 2) for name in GUIDES},
        **{f"from loading to the verdict: {name}": round(whole[name] / whole[VERDICT], 2) for name in GUIDES},
    }
    report = {"model": shape or original.name, "window": job.window, **asdict(devices.describe(place))}
    if as_json:
        click.echo(json.dumps({**report, "rounds": rounds, "rows": rows, "times faster": ratios}, indent=2))
        return
    click.echo(f"{report['model']}, windows of {job.window} tokens, {report['device_name']}, {rounds} rounds")
    for row in rows:
        click.echo("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    for name, ratio in ratios.items():
        click.echo(f"{ratio:6.2f} x as fast as {name}")


if __name__ == "__main__":
    benchmark()
