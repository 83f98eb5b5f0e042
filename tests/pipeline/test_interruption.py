"""Ctrl-C and SIGKILL in every stage: no half package, nothing but finished parts, and the next run ends well."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantize import package
from tests.conftest import POCKET, QUICK_OPTIONS

STAGES = ("==> source", "==> quantize", "==> verify", "    scoring", "    generating", "==> write card")


def start(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "quantize", "run", str(POCKET), "-o", str(output), "--device", "cpu"]
    return subprocess.Popen([*command, *QUICK_OPTIONS], stderr=subprocess.PIPE, text=True)


def stop_at(stage: str, output: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a run, send the signal as soon as `stage` is announced, and tell how it ended."""
    with start(output) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage):
                process.send_signal(number)
                break
        rest = process.stderr.read()
    return process.returncode, rest


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_finished_parts_only_and_says_so(stage: str, tmp_path: Path) -> None:
    code, said = stop_at(stage, tmp_path / "out", signal.SIGINT)
    assert code == 130, said
    assert said.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in said
    require_finished_parts_only(tmp_path)


def require_finished_parts_only(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {f"out{package.UNFINISHED}"}
    assert not list(folder.rglob("*.part"))


def test_sigterm_leaves_finished_parts_only(tmp_path: Path) -> None:
    code, said = stop_at("    scoring", tmp_path / "out", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    require_finished_parts_only(tmp_path)


def test_sigkill_in_each_stage_leaves_no_half_package_and_the_next_run_starts_clean(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for stage in STAGES:
        code, _ = stop_at(stage, output, signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert not output.exists()
    with start(output) as process:
        process.communicate()
    assert process.returncode == 0
    package.require_unchanged(package.open_package(output))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
