"""Measures `quantize` against the obvious way to do the same, side by side in one run, as ratios.

    python scripts/benchmark.py parity                                  the pocket model, on the built-in corpus
    python scripts/benchmark.py parity --shape distilgpt2 --windows 8   random weights of distilgpt2's shape
    python scripts/benchmark.py parity FOLDER --corpus FILE --json      any model, any text
    python scripts/benchmark.py quantizing --shape 1b                   making the 4-bit files: time and memory
    python scripts/benchmark.py job --shape distilgpt2                  the whole of `quantize run`
    python scripts/benchmark.py rounding                                4-bit rounding on the CPU, against bitsandbytes
    python scripts/benchmark.py stages                                  where the time of `quantize run` goes

Each contender runs in a process of its own, so that one's memory is not another's, and they take turns.
"""

from __future__ import annotations

import json
import os
import shutil
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
import making
from making import Cost, Task

from quantize.progress import Silent
from quantize.records import EvaluationSettings, Recipe

QUIET = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
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
    """Progress that records when each task began."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        self.begun[title.split()[0]] = time.perf_counter()
        yield lambda amount: None


@contextmanager
def most_memory(device: str) -> Iterator[Callable[[], int]]:
    """Yields a function that gives the most bytes held on `device` in the block, beyond those held at its start."""
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
    from quantize.parity.windows import draw

    return draw(corpus.load(job.corpus), tokenizer, job.window, job.windows, seed=0)[0]


def ours(job: Job) -> Outcome:
    """All statistics of the protocol over the windows, by the project's own scoring."""
    from quantize import source
    from quantize.parity import models, scoring, statistics

    started = time.perf_counter()
    checkout = source.fetch(job.source, revision=None, trust_remote_code=False, progress=Silent())
    tokenizer = models.load_tokenizer(checkout.folder, False)
    with models.Pair(checkout, Path(job.candidate), job.device, trust=False, tokenizer=tokenizer, alone=False) as pair:
        windows = windows_of(job, tokenizer)
        reference = scoring.LiveReference.of(pair.reference, windows, job.device)
        if job.device == "cpu":
            pair.upcast()
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
    options = {"device_map": {"": job.device}}
    models = [AutoModelForCausalLM.from_pretrained(folder, **options).eval() for folder in (job.source, job.candidate)]
    text = windows_of(job, AutoTokenizer.from_pretrained(job.source)).reshape(1, -1)
    with torch.no_grad():
        for model in models:
            model(text[:, : job.window].to(job.device), labels=text[:, : job.window].to(job.device))
    with most_memory(job.device) as peak:
        begun = finished(job.device)
        results = [making.guide_loop(model, text, job.window, job.device, stride) for model in models]
        seconds = finished(job.device) - begun
        used = peak()
    return Outcome(seconds, begun - started, text.shape[1] - 1, used, {"ratio": results[1] / results[0]})


def verdict(job: Job) -> Outcome:
    """`quantize verify` from loading to the verdict on all that it needs; generation comes after that.

    It loads the models itself, so its peak counts them too.
    """
    from quantize import source
    from quantize.parity import measure

    checkout = source.fetch(job.source, revision=None, trust_remote_code=False, progress=Silent())
    watch, settings = Stopwatch(), EvaluationSettings(corpus=job.corpus, window=job.window, max_windows=job.windows)
    with most_memory(job.device) as peak:
        started = time.perf_counter()
        evidence = measure(checkout, Path(job.candidate), settings, job.device, watch)
        whole = time.perf_counter() - started
        begun, done, used = watch.begun["scoring"], watch.begun["generating"], peak()
    assert evidence.scores is not None and evidence.corpus is not None
    figures = {
        "ratio": evidence.scores.perplexity_ratio.value,
        "kld": evidence.scores.kld.mean.value,
        "windows": evidence.corpus.scored,
        "seconds with generation": whole,
    }
    return Outcome(done - begun, begun - started, evidence.corpus.scored_tokens, used, figures)


OURS, VERDICT = "ours, all statistics", "ours, to the verdict"
GUIDES: dict[str, Callable[[Job], Outcome]] = {
    "guide's loop, the same windows": lambda job: guide(job, job.window),
    "guide's loop, its stride of half a window": lambda job: guide(job, min(GUIDE_STRIDE, job.window // 2)),
}
CONTENDERS = {OURS: ours, **GUIDES, VERDICT: verdict}


def quantized(source_folder: Path, folder: Path, device: str) -> Path:
    """The source in NF4, rounded to nearest."""
    from quantize import methods, package, source

    checkout = source.fetch(str(source_folder), revision=None, trust_remote_code=False, progress=Silent())
    folder.mkdir()
    methods.quantize(methods.Job(checkout, folder, Recipe(name="rtn"), device, Silent()))
    package.copy_carried(checkout, source.carried_files(checkout.source), folder)
    return folder


def take_turns(job: Job, names: list[str], rounds: int) -> dict[str, list[Outcome]]:
    """Every contender once a round, each in a new process."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            click.echo(f"round {turn + 1} of {rounds}: {name}", err=True)
            command = [sys.executable, __file__, "contender", name, json.dumps(asdict(job))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            outcomes[name].append(Outcome(**json.loads(done.stdout.splitlines()[-1])))
    return outcomes


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
@click.argument("model", default=str(making.POCKET))
@click.option("--shape", type=click.Choice(list(making.SHAPES)), help="Random weights of this shape instead of MODEL.")
@click.option("--corpus", default=EvaluationSettings.corpus, show_default=True)
@click.option("--window", default=EvaluationSettings.window, show_default=True, help="Tokens, at most the context.")
@click.option("--windows", default=EvaluationSettings.max_windows, show_default=True, help="Windows at most.")
@click.option("--device", default="auto", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def parity(
    model: str, shape: str | None, corpus: str, window: int, windows: int, device: str, rounds: int, as_json: bool
) -> None:
    """Scoring a pair of models, and the way to a verdict, against the Hugging Face guide's loop for each of them."""
    from transformers import AutoConfig

    from quantize import devices

    chosen = devices.choose(device)
    with tempfile.TemporaryDirectory(prefix="quantize-benchmark-") as folder:
        original = making.made_up(shape, Path(folder) / shape) if shape else Path(model).resolve()
        candidate = quantized(original, Path(folder) / "nf4", chosen)
        context = AutoConfig.from_pretrained(original).max_position_embeddings
        job = Job(str(original), str(candidate), corpus, min(window, context), windows, chosen)
        runs = take_turns(job, list(CONTENDERS), rounds)
    work = {name: median(run.seconds for run in outcomes) for name, outcomes in runs.items()}
    whole = {name: median(run.seconds + run.loading for run in outcomes) for name, outcomes in runs.items()}
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
        for name, outcomes in runs.items()
    ]
    ratios = {
        **{f"scoring: {name}": round(work[name] / work[OURS], 2) for name in GUIDES},
        **{f"from loading to the verdict: {name}": round(whole[name] / whole[VERDICT], 2) for name in GUIDES},
    }
    report = {"model": shape or original.name, "window": job.window, **asdict(devices.describe(chosen))}
    if as_json:
        click.echo(json.dumps({**report, "rounds": rounds, "rows": rows, "times faster": ratios}, indent=2))
        return
    click.echo(f"{report['model']}, windows of {job.window} tokens, {report['device_name']}, {rounds} rounds")
    for row in rows:
        click.echo("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    for name, ratio in ratios.items():
        click.echo(f"{ratio:6.2f} x as fast as {name}")


@benchmark.command(hidden=True)
@click.argument("name")
@click.argument("task")
def maker(name: str, task: str) -> None:
    """One contender's one run, in this process."""
    click.echo(making.line(name, task))


def making_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("model", required=False),
        click.option("--shape", type=click.Choice(list(making.SHAPES)), default="distilgpt2", show_default=True),
        click.option("--device", default="auto", show_default=True),
        click.option("--rounds", default=3, show_default=True),
        click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False)),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@benchmark.command()
@making_options
@click.option("--only-ours", is_flag=True, help="Only ours, if the other would not fit.")
@click.option("--gpu-limit", default=0.0, help="Bytes of GPU memory that torch may take.")
def quantizing(
    model: str | None,
    shape: str,
    device: str,
    rounds: int,
    json_file: Path | None,
    only_ours: bool,
    gpu_limit: float,
) -> None:
    """The 4-bit files of MODEL, or of random weights: ours against from_pretrained and save_pretrained."""
    names = [making.OURS] if only_ours else [making.THREE_LINES, making.OURS]
    compare_makers(names, model, shape, device, rounds, json_file, gpu_limit=gpu_limit)


@benchmark.command()
@making_options
@click.option("--corpus", default=EvaluationSettings.corpus, show_default=True)
def job(model: str | None, shape: str, device: str, rounds: int, json_file: Path | None, corpus: str) -> None:
    """The whole job: against from_pretrained in 4 bits, save_pretrained, and the guide's loop for both models."""
    compare_makers([making.OBVIOUS, making.OUR_JOB], model, shape, device, rounds, json_file, corpus=corpus)


def compare_makers(
    names: list[str], model: str | None, shape: str, device: str, rounds: int, json_file: Path | None, **details: Any
) -> None:
    from quantize import devices

    chosen = devices.choose(device)
    with tempfile.TemporaryDirectory(prefix="quantize-benchmark-") as folder:
        original = Path(model).resolve() if model else making.made_up(shape, Path(folder) / shape)
        runs: dict[str, list[Cost]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names:
                click.echo(f"round {turn + 1} of {rounds}: {name}", err=True)
                output = Path(folder) / f"{names.index(name)}-{turn}"
                task = json.dumps(asdict(Task(str(original), str(output), chosen, **details)))
                command = [sys.executable, __file__, "maker", name, task]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[name].append(Cost(**json.loads(done.stdout.splitlines()[-1])))
                for finished_folder in Path(folder).glob(f"{output.name}*"):
                    shutil.rmtree(finished_folder)
    report = {"model": Path(model).name if model else shape, **asdict(devices.describe(chosen)), "rounds": rounds}
    costs = {name: {key: median(getattr(run, key) for run in all_) for key in KEYS} for name, all_ in runs.items()}
    first, last = costs[names[0]], costs[names[-1]]
    beyond = {name: cost["memory"] - cost["libraries"] for name, cost in costs.items()}
    ratios = {key: round(last[key] / first[key], 3) for key in KEYS if first[key]}
    ratios["memory beyond the libraries"] = round(beyond[names[-1]] / beyond[names[0]], 3)
    click.echo(f"{report['model']}, {report['device_name']}, median of {rounds} rounds")
    for name, cost in costs.items():
        words = ", ".join(f"{key} {value / 1e9:.3f} GB" for key, value in cost.items() if key != "seconds")
        click.echo(
            f"  {name}: {cost['seconds']:.2f} s, {words}, memory beyond the libraries {beyond[name] / 1e9:.3f} GB"
        )
    for key, ratio in ratios.items() if len(names) > 1 else ():
        click.echo(f"{ratio:7.3f} x the {key}")
    if json_file:
        json_file.write_text(json.dumps({**report, "costs": costs, "ratios": ratios}, indent=2) + "\n", "utf-8")


@benchmark.command()
@click.option("--rounds", default=5, show_default=True)
def rounding(rounds: int) -> None:
    """Rounding a matrix of 4096 x 4096 to nearest on the CPU: ours against bitsandbytes, in turns."""
    import torch

    from quantize.formats.bitsandbytes import cpu_kernel, packing

    weights = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    click.echo(f"{torch.get_num_threads()} threads; millions of weights a second, median of {rounds} rounds")
    for quant_type in ("nf4", "fp4"):
        values = packing.table(quant_type)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            matrix = weights.to(dtype)
            theirs, mine, same = [], [], True
            for _ in range(rounds):
                begun = time.perf_counter()
                reference = torch.ops.bitsandbytes.quantize_4bit.default(matrix, 64, quant_type, torch.uint8)
                between = time.perf_counter()
                own = cpu_kernel.quantize(matrix, values, 64)
                theirs.append(between - begun)
                mine.append(time.perf_counter() - between)
                same &= all(map(torch.equal, reference, own))
            speeds = [matrix.numel() / median(times) / 1e6 for times in (theirs, mine)]
            click.echo(
                f"  {quant_type} of {str(dtype)[6:]:8} bitsandbytes {speeds[0]:4.0f}, ours {speeds[1]:4.0f}: "
                f"{speeds[1] / speeds[0]:.1f} x as fast, {'the same bytes' if same else 'OTHER BYTES'}"
            )


class Ledger(Silent):
    """Progress that adds up the seconds of each task."""

    def __init__(self) -> None:
        self.tasks: dict[str, float] = {}

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        begun = time.time()
        yield lambda amount: None
        name = title.split(" up to ")[0]
        self.tasks[name] = self.tasks.get(name, 0.0) + time.time() - begun


@benchmark.command()
@click.argument("model", default=str(making.POCKET))
@click.option("--recipe", default=Recipe.name, show_default=True)
@click.option("--device", default="auto", show_default=True)
def stages(model: str, recipe: str, device: str) -> None:
    """Where the time of one `quantize run` goes, from the start of this process on."""
    import psutil

    from quantize import pipeline

    ledger, begun = Ledger(), psutil.Process().create_time()
    with tempfile.TemporaryDirectory(prefix="quantize-benchmark-") as folder:
        request = pipeline.RunRequest(model, output=Path(folder) / "out", recipe=Recipe(name=recipe), device=device)
        pipeline.run(request, ledger)
    whole = time.time() - begun
    work = sum(ledger.tasks.values())
    for name, seconds in sorted(ledger.tasks.items(), key=lambda item: -item[1]):
        click.echo(f"{seconds:8.2f} s  {seconds / whole:6.1%}  {name}")
    click.echo(f"{whole - work:8.2f} s  {1 - work / whole:6.1%}  everything else: start, loading models, checks, card")
    outside = whole - sum(seconds for name, seconds in ledger.tasks.items() if name != "generating side by side")
    click.echo(f"{whole:8.2f} s in all; {outside / whole:.1%} outside quantizing and scoring")


KEYS = ("seconds", "memory", "libraries", "gpu_memory", "read", "written", "size")


if __name__ == "__main__":
    benchmark()
