"""Ctrl-C and SIGKILL in every stage: no half package, nothing but finished parts, and the next run ends well."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from quantize import package
from tests.conftest import QUICK_OPTIONS
from tests.publishing.warm_process import Child, Ended
from tests.publishing.workspace import Place

STAGES = ("==> source", "==> quantize", "==> verify", "    scoring", "    generating", "==> write card")


def start(place: Place, folder: Path) -> Child:
    arguments = ("run", str(place.source), "-o", str(folder / "out"), "--device", "cpu", *QUICK_OPTIONS)
    return place.warm.start(*arguments, cwd=folder)


def stop_at(place: Place, stage: str, folder: Path, number: signal.Signals) -> Ended:
    """Start a run, send the signal as soon as `stage` is announced, and tell how it ended."""
    child = start(place, folder)
    child.wait_for(stage)
    child.send(number)
    return child.wait()


@pytest.mark.parametrize(
    "stage",
    [pytest.param(one, marks=[] if one in ("==> quantize", "    scoring") else pytest.mark.slow) for one in STAGES],
)
def test_ctrl_c_leaves_finished_parts_only_and_says_so(place: Place, stage: str, tmp_path: Path) -> None:
    ended = stop_at(place, stage, tmp_path, signal.SIGINT)
    assert ended.code == 130, ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in ended.err
    require_finished_parts_only(tmp_path)
    if (tmp_path / f"out{package.UNFINISHED}").exists():
        assert re.search(rf"kept in {tmp_path}/out\.unfinished \(\d+\.\d MB\)", ended.err.splitlines()[-1]), ended.err


def require_finished_parts_only(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {f"out{package.UNFINISHED}"}
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
def test_sigterm_leaves_finished_parts_only(place: Place, tmp_path: Path) -> None:
    ended = stop_at(place, "    scoring", tmp_path, signal.SIGTERM)
    assert ended.code == 128 + signal.SIGTERM, ended.err
    require_finished_parts_only(tmp_path)


@pytest.mark.slow
def test_sigkill_in_each_stage_leaves_no_half_package_and_the_next_run_starts_clean(
    place: Place, tmp_path: Path
) -> None:
    for stage in STAGES:
        assert stop_at(place, stage, tmp_path, signal.SIGKILL).code == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    ended = start(place, tmp_path).wait()
    assert ended.code == 0, ended.err
    package.require_unchanged(package.open_package(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
