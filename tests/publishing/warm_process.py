"""The command line in children of one warm process: real processes to kill, without importing torch every time.

Run as a program it is that warm process: it reads one JSON order a line and answers with one line.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FASTER = 0.02
"""Waits between two attempts shrink to this share, the client's and ours alike: tests do not sit them out."""
DEADLINE = "2"
"""Seconds for an answer from the loopback Hub."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; what it printed."""

    code: int
    out: str
    err: str


class Child:
    def __init__(self, warm: Warm, pid: int, folder: Path, name: str) -> None:
        self.pid, self._warm, self._folder, self._name = pid, warm, folder, name

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        status = int(self._warm.ask({"wait": self.pid}))
        out, err = (self._folder / f"{self._name}.{kind}" for kind in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(status), out.read_text("utf-8"), err.read_text("utf-8"))


class Warm:
    """Starts children of the warm process; what they print goes to files of `folder`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder, self._count = process, folder, 0

    def start(
        self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, largest_file: int | None = None
    ) -> Child:
        self._count += 1
        name = f"child-{self._count}"
        order = {"argv": arguments, "cwd": str(cwd), "env": dict(env or {}), "limit": largest_file}
        pid = int(self.ask({**order, "out": f"{self._folder / name}.out", "err": f"{self._folder / name}.err"}))
        return Child(self, pid, self._folder, name)

    def run(self, *arguments: str, cwd: Path, **options: Any) -> Ended:
        return self.start(*arguments, cwd=cwd, **options).wait()

    def ask(self, order: dict[str, Any]) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextmanager
def warm_process(env: Mapping[str, str], folder: Path) -> Iterator[Warm]:
    """A warm process under the environment `env`, whose HF_ variables hold for all its children."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "tests.publishing.warm_process"]
    everything = own | dict(env) | {"QUANTIZE_HUB_TIMEOUT": DEADLINE, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        command, env=everything, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield Warm(process, folder)
        assert process.stdin
        process.stdin.close()


def _serve() -> None:
    import accelerate
    import matplotlib.pyplot
    import scipy.stats
    import torch
    import transformers.models.gpt2.modeling_gpt2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import quantize.cli.console
    from quantize.formats.bitsandbytes import checkpoint

    del accelerate, matplotlib, scipy, torch, transformers, AutoModelForCausalLM, AutoTokenizer, quantize, checkpoint
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitpid(order["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                _become(order)
        print(answer, flush=True)


def _become(order: dict[str, Any]) -> None:
    """The child: the command line, as `quantize ARGV` in `cwd` would run."""
    for number, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    if order["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    asleep = time.sleep
    time.sleep = lambda seconds: asleep(float(seconds) * FASTER)
    from quantize.cli import main

    try:
        main(order["argv"])
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code or 0))  # taking the interpreter down would take longer than the work


if __name__ == "__main__":
    _serve()
