"""Most memory that each stage of one `quantize run` takes, in a process of its own.

python scripts/memory.py MODEL                                   with the default options
python scripts/memory.py MODEL --limit 3 -- --recipe calibrated  exit 1 beyond 3 GB; other options follow --
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

SAMPLE_SECONDS = 0.02


def stages(process: subprocess.Popen[str]) -> dict[str, tuple[float, int]]:
    """Seconds and most resident bytes of each stage that a run announces on stderr, in their order."""
    peaks: dict[str, tuple[float, int]] = {}
    current = ["start"]
    watched = psutil.Process(process.pid)

    def sample() -> None:
        last = time.monotonic()
        while process.poll() is None:
            try:
                resident = watched.memory_info().rss
            except psutil.Error:
                return
            now, title = time.monotonic(), current[0]
            seconds, most = peaks.get(title, (0.0, 0))
            peaks[title] = seconds + now - last, max(most, resident)
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


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--limit", type=float, help="Most gigabytes that the run may take.")
def main(model: str, options: tuple[str, ...], limit: float | None) -> None:
    """Run `quantize run MODEL OPTIONS` on the CPU and print what each of its stages took."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [sys.executable, "-m", "quantize", "run", model, "-o", str(output), "--device", "cpu", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        peaks = stages(process)
        code = process.wait()
    for title, (seconds, most) in peaks.items():
        print(f"{most / 1e9:6.2f} GB {seconds:8.1f} s  {title}")
    largest = max(most for _, most in peaks.values())
    print(f"{largest / 1e9:6.2f} GB at most; exit {code}")
    if code not in (0, 3) or (limit is not None and largest > limit * 1e9):
        sys.exit(1)


if __name__ == "__main__":
    main()
