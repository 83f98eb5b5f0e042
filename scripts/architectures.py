"""Tries both recipes on a tiny model of every architecture of transformers, and writes docs/architectures.md.

scripts/architectures [NAME ...]     only those named, beside what was found before
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from tests.models import tiny
from tests.models.architectures import FAILS, PAGE, RECORD, Trial, line, page, trial

SECONDS, MEMORY = 180, 8 << 30
"""That one architecture may take."""
PROCESSES = multiprocessing.get_context("forkserver")
"""A process that has imported a lot and computed nothing: torch's threads do not survive a fork."""
IMPORTS = [
    "tests.models.architectures",
    "quantize.pipeline",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
]
LIBRARIES = ("transformers", "bitsandbytes", "torch")


def main(names: list[str]) -> None:
    unknown = set(names) - set(tiny.architectures())
    if unknown:
        sys.exit(f"transformers {version('transformers')} has no {', '.join(sorted(unknown))}")
    names = names or list(tiny.architectures())
    held = {trial.name: trial for trial in read()}
    PROCESSES.set_forkserver_preload(IMPORTS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(tried, names):
            held[result.name] = result
            print(line(result), flush=True)
            write(held.values())


def tried(name: str) -> Trial:
    """What comes of an architecture, in a process of its own: some end theirs."""
    with tempfile.TemporaryDirectory(prefix="quantize-architectures-") as place:
        child = PROCESSES.Process(target=_try, args=(name, Path(place)))
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            return Trial(name, FAILS, reason=f"takes more than {SECONDS} s")
        result = Path(place) / "trial.json"
        if not result.is_file():
            return Trial(name, FAILS, reason=f"the process ended with {child.exitcode}")
        return Trial(**json.loads(result.read_text()))


def _try(name: str, place: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    (place / "trial.json").write_text(json.dumps(dataclasses.asdict(trial(name, place))))


def read() -> list[Trial]:
    """What was found before."""
    return [Trial(**row) for row in json.loads(RECORD.read_text())["trials"]] if RECORD.is_file() else []


def write(trials: Iterable[Trial]) -> None:
    ordered = sorted(trials, key=lambda trial: trial.name)
    record = {
        "versions": {name: version(name) for name in LIBRARIES},
        "total": len(tiny.architectures()),
        "trials": [dataclasses.asdict(trial) for trial in ordered],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main(sys.argv[1:])
