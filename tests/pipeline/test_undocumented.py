"""What was made and measured is kept when documenting it fails, and the next command goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import package, pipeline
from quantize.errors import ConfigError
from quantize.parity import figures
from quantize.progress import Silent
from quantize.records import Recipe
from tests.conftest import QUICK, QUICK_OPTIONS, Outcome

RUN = ("--device", "cpu", *QUICK_OPTIONS)


@pytest.fixture(scope="module")
def undocumented(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves whose card's template names something that no card has."""
    folder = tmp_path_factory.mktemp("undocumented")
    template = folder / "own.md.j2"
    template.write_text("{{ nothing }}")
    request = pipeline.RunRequest(
        str(shallow), output=folder / "out", recipe=Recipe("rtn"), settings=QUICK, device="cpu", card_template=template
    )
    with pytest.raises(ConfigError, match=r"'nothing' is undefined.*; the measured package is kept in .*undocumented"):
        pipeline.run(request, Silent())
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["out-undocumented"]
    return folder / "out-undocumented"


@pytest.fixture
def kept(undocumented: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undocumented, tmp_path / undocumented.name))


def test_it_is_sealed_and_not_published(kept: Path, command: Callable[..., Outcome]) -> None:
    package.require_unchanged(package.open_package(kept))
    assert not (kept / "README.md").exists() and not (kept / "figures").exists()
    outcome = command("push", kept, "--to", "someone/pocket")
    assert outcome.code == 1 and "has no card yet: `quantize card" in outcome.err


def test_the_same_run_goes_on_from_it(
    kept: Path, shallow: Path, finished: Path, command: Callable[..., Outcome]
) -> None:
    outcome = command("run", shallow, *RUN, "-o", kept.with_name("out"))
    assert outcome.code == 0 and "==> quantize" not in outcome.err and "scoring" not in outcome.err, outcome.err
    assert [path.name for path in kept.parent.iterdir()] == ["out"]
    whole = package.open_package(kept.with_name("out"))
    package.require_unchanged(whole)
    assert whole.provenance.name == "out"
    names = {file.path for file in package.open_package(finished).provenance.files}
    assert {file.path for file in whole.provenance.files} == names


@pytest.mark.slow
def test_another_run_makes_its_own(kept: Path, shallow: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("run", shallow, *RUN, "--quant-type", "fp4", "-o", kept.with_name("out"))
    assert outcome.code in (0, 3) and "==> quantize" in outcome.err
    assert not kept.exists()


def test_quantize_card_documents_it(kept: Path, shallow: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("card", kept, "--against", shallow)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in kept.parent.iterdir()] == [
        "out"
    ] and f"{kept.with_name('out')}/README.md" in outcome.err
    whole = package.open_package(kept.with_name("out"))
    package.require_unchanged(whole)
    assert (whole.folder / "figures" / "perplexity-ratio.png").exists()


def test_a_changed_one_is_not_taken_up(kept: Path, shallow: Path, command: Callable[..., Outcome]) -> None:
    (kept / "config.json").write_text("{}")
    outcome = command("run", shallow, *RUN, "-o", kept.with_name("out"))
    assert outcome.code == 1 and "config.json is changed" in outcome.err and kept.exists()


def test_a_bug_in_a_figure_keeps_traceback_and_work(
    kept: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(figures, "draw", broken)
    request = pipeline.RunRequest(
        str(shallow), output=kept.with_name("out"), recipe=Recipe("rtn"), settings=QUICK, device="cpu"
    )
    with pytest.raises(ZeroDivisionError):
        pipeline.run(request, Silent())
    package.require_unchanged(package.open_package(kept))


def test_a_template_that_cannot_be_parsed_is_refused_at_once(
    tmp_path: Path, shallow: Path, command: Callable[..., Outcome]
) -> None:
    (tmp_path / "own.md.j2").write_text("{% if %}")
    outcome = command("run", shallow, *RUN, "-o", tmp_path / "out", "--card-template", tmp_path / "own.md.j2")
    assert outcome.code == 1 and "line 1: Expected an expression" in outcome.err and "==> quantize" not in outcome.err
