"""What the tests share: the pocket model, the command line in this process, one finished package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from quantize import pipeline
from quantize.progress import Silent
from quantize.records import EvaluationSettings, Recipe
from tests.models import shallow as shallow_model
from tests.publishing.workspace import QUICK_OPTIONS, Place, prepared

POCKET = Path(__file__).parent / "models" / "pocket-gpt2"
STOCK = Recipe(name="rtn")
QUICK = EvaluationSettings(max_windows=16, window=64, new_tokens=4, require="degraded")
__all__ = ["POCKET", "QUICK", "QUICK_OPTIONS", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def pocket() -> Path:
    return POCKET


@pytest.fixture
def pocket_copy(tmp_path: Path) -> Path:
    """A copy of the pocket model that a test may damage."""
    return Path(shutil.copytree(POCKET, tmp_path / "pocket-copy"))


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first block of the pocket model, for runs that are not about accuracy."""
    return shallow_model.save(tmp_path_factory.mktemp("shallow") / POCKET.name)


@pytest.fixture
def shallow_copy(shallow: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(shallow, tmp_path / "shallow-copy"))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process, as `quantize ARGUMENTS` would."""
    from quantize.cli import main

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One package of the pocket model; tests that change it take a copy."""
    output = tmp_path_factory.mktemp("packages") / "pocket-gpt2-bnb-4bit"
    request = pipeline.RunRequest(str(POCKET), output=output, recipe=STOCK, settings=QUICK, device="cpu")
    result = pipeline.run(request, Silent())
    assert result.package.evidence.verdict.passed, result.package.evidence.verdict
    return output


@pytest.fixture
def package_copy(finished: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.fixture(scope="session")
def place(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with prepared(tmp_path_factory.mktemp("place"), shallow) as ready:
        yield ready
