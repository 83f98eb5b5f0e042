"""The command line, and scripts, in children of one warm process: real processes, without importing torch every time.

Run as a program it is that warm process: it reads one JSON order a line and answers with one line.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FASTER = 0.005
"""Waits between two attempts shrink to this share, the client's and ours alike: tests do not sit them out."""
DEADLINE = "1"
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

    def wait_for(self, words: str) -> None:
        """Until a line of stderr begins with `words`."""
        err, limit = self._folder / f"{self._name}.err", time.monotonic() + 300
        while not (err.exists() and any(line.startswith(words) for line in err.read_text("utf-8").splitlines())):
            assert time.monotonic() < limit, words
            time.sleep(0.002)

    def wait(self) -> Ended:
        status = int(self._warm.ask({"wait": self.pid}))
        out, err = (self._folder / f"{self._name}.{kind}" for kind in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(status), out.read_text("utf-8"), err.read_text("utf-8"))


class Warm:
    """Starts children of the warm process; what they print goes to files of `folder`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder, self._count = process, folder, 0

    def start(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        largest_file: int | None = None,
        script: str | None = None,
    ) -> Child:
        self._count += 1
        name = f"child-{self._count}"
        order = {"argv": arguments, "cwd": str(cwd), "env": dict(env or {}), "limit": largest_file, "script": script}
        pid = int(self.ask({**order, "out": f"{self._folder / name}.out", "err": f"{self._folder / name}.err"}))
        return Child(self, pid, self._folder, name)

    def run(self, *arguments: str, cwd: Path, **options: Any) -> Ended:
        return self.start(*arguments, cwd=cwd, **options).wait()

    def script(self, text: str, *arguments: str, cwd: Path, **options: Any) -> Ended:
        """Run Python code as `python -c TEXT ARGUMENTS` would."""
        return self.start(*arguments, cwd=cwd, script=text, **options).wait()

    def rehearse(self, *arguments: str, cwd: Path, env: Mapping[str, str]) -> None:
        """Let the warm process itself run a command: what it imports and builds, every child then has from birth.

        A command that computes with torch would leave threads behind that no child gets, and is none to rehearse.
        """
        order = {"argv": arguments, "cwd": str(cwd), "env": dict(env), "here": True}
        code = int(self.ask({**order, "out": os.devnull, "err": os.devnull}))
        assert code == 0, code

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
    alone = {"OMP_NUM_THREADS": "1"}  # threads that it started would be missing in its children
    everything = own | dict(env) | alone | {"QUANTIZE_HUB_TIMEOUT": DEADLINE}
    with subprocess.Popen(
        command, env=everything, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield Warm(process, folder)
        assert process.stdin
        process.stdin.close()


def _serve() -> None:
    import accelerate
    import matplotlib.pyplot
    import peft
    import scipy.stats
    import torch
    import transformers.models.gpt2.modeling_gpt2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import quantize.cli.console
    from quantize import serialization
    from quantize.formats.bitsandbytes import checkpoint
    from quantize.records import Recipe

    serialization.to_json(Recipe())  # makes its converter
    del accelerate, matplotlib, peft, scipy, torch, transformers, AutoModelForCausalLM, AutoTokenizer, quantize
    del serialization, checkpoint
    ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    for line in orders:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitpid(order["wait"], 0)[1]
        elif "here" in order:
            answer = _rehearsed(order)
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(_ended(order))  # taking the interpreter down would take longer than the work
        print(answer, file=answers)


def _rehearsed(order: dict[str, Any]) -> int:
    from huggingface_hub import close_session

    own, asleep = dict(os.environ), time.sleep
    code = _ended(order)
    close_session()  # two processes must not talk over one connection
    os.environ.clear()
    os.environ.update(own)
    time.sleep = asleep
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code


def _ended(order: dict[str, Any]) -> int:
    """The exit code of the command line, run as `quantize ARGV` in `cwd`, or of a script."""
    for number, path in ((1, order["out"]), (2, order["err"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    if order.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    asleep = time.sleep
    time.sleep = lambda seconds: asleep(float(seconds) * FASTER)
    from quantize.cli import main

    code = 0
    try:
        if order.get("script") is None:
            main(order["argv"])
        else:
            sys.argv = ["-c", *order["argv"]]
            exec(compile(order["script"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
