"""Most memory that each stage of one `quantize run` takes, in a process of its own.

python scripts/memory.py MODEL                                   with the default options
python scripts/memory.py MODEL --limit 3 -- --recipe calibrated  exit 1 beyond 3 GB; other options follow --
python scripts/memory.py --shape smollm2-135m                    random weights of this shape instead of MODEL
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import click
import making
import psutil

SAMPLE_SECONDS = 0.02


@dataclass
class Peak:
    """Of one stage: seconds, most resident bytes, and most of these that are no pages of files."""

    seconds: float = 0.0
    resident: int = 0
    anonymous: int = 0

    def add(self, seconds: float, resident: int, anonymous: int) -> None:
        self.seconds += seconds
        self.resident = max(self.resident, resident)
        self.anonymous = max(self.anonymous, anonymous)


def stages(process: subprocess.Popen[str]) -> dict[str, Peak]:
    """The peaks of each stage that a run announces on stderr, in their order."""
    peaks: dict[str, Peak] = {}
    current = ["start"]
    watched = psutil.Process(process.pid)

    def sample() -> None:
        last = time.monotonic()
        while process.poll() is None:
            try:
                memory = watched.memory_info()
            except psutil.Error:
                return
            now = time.monotonic()
            peaks.setdefault(current[0], Peak()).add(now - last, memory.rss, memory.rss - memory.shared)
            last = now
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stderr is not None
    attempt = 0
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        attempt += line.startswith("==> quantize")
        if line.startswith(("==> ", "    ")) and not line.startswith("     "):
            current[0] = f"{attempt}: {line.strip(' =>').strip()[:60]}"
    sampler.join()
    return peaks


def table(peaks: dict[str, Peak]) -> str:
    """The peaks as Markdown."""
    rows = (
        f"| {title} | {peak.seconds:.1f} | {peak.resident / 1e9:.2f} | {peak.anonymous / 1e9:.2f} |"
        for title, peak in peaks.items()
    )
    return "\n".join(["| attempt: stage | seconds | GB | of which not files |", "|---|---:|---:|---:|", *rows])


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--shape", type=click.Choice(list(making.SHAPES)), help="Random weights of this shape instead of MODEL.")
@click.option("--limit", type=float, help="Most gigabytes that the run may take.")
def main(model: str | None, options: tuple[str, ...], shape: str | None, limit: float | None) -> None:
    """Run `quantize run MODEL OPTIONS` on the CPU and print what each of its stages took."""
    with tempfile.TemporaryDirectory() as folder:
        if shape:
            options, model = (*((model,) if model else ()), *options), str(making.made_up(shape, Path(folder) / shape))
        elif model is None:
            raise click.UsageError("name a MODEL or a --shape")
        output = Path(folder) / "out"
        command = [sys.executable, "-m", "quantize", "run", model, "-o", str(output), "--device", "cpu", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        peaks = stages(process)
        code = process.wait()
    print(table(peaks))
    largest = max(peak.resident for peak in peaks.values())
    print(f"\n{largest / 1e9:.2f} GB at most; exit {code}")
    if code not in (0, 3) or (limit is not None and largest > limit * 1e9):
        sys.exit(1)


if __name__ == "__main__":
    main()
