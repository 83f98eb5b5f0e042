"""`--unverified`: what nobody measured says so, is never published, and is measured as soon as somebody wants it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from quantize import package, pipeline
from quantize.progress import Silent
from quantize.records import Recipe
from tests.conftest import QUICK_OPTIONS
from tests.publishing.workspace import TARGET, Place


@pytest.fixture(scope="module")
def folder(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("unverified")
    ended = place.quantize("run", str(place.source), "-o", "out", "--device", "cpu", "--unverified", folder=made)
    assert ended.code == 0 and "not measured: only the files were checked" in ended.err, ended.err
    assert "verify against the original" not in ended.err
    return made


def test_the_card_and_the_evidence_say_that_nothing_was_measured(folder: Path) -> None:
    card = (folder / "out" / "README.md").read_text()
    assert "**Not measured.**" in card and "Nothing was scored." in card and "--unverified" in card.split("```sh")[-1]
    assert "perplexity ratio" not in card and "passed" not in card
    made = package.open_package(folder / "out")
    assert made.evidence.verdict.grade == "unmeasured" and not made.evidence.verdict.passed
    assert {"config", "quant_state", "finite", "tokenizer"} <= {check.name for check in made.evidence.checks}
    assert "outputs" not in {check.name for check in made.evidence.checks}
    assert [(one.recipe.name, one.grade) for one in made.evidence.attempts] == [("rtn", "unmeasured")]


def test_it_is_never_published(folder: Path, place: Place) -> None:
    pushed = place.quantize("push", "out", "--to", TARGET, folder=folder)
    assert pushed.code == 3 and "did not pass parity (unmeasured): it is not published" in pushed.err
    asked = place.quantize("run", str(place.source), "--unverified", "--push-to", TARGET, folder=folder)
    assert asked.code == 2 and "what is published has been measured" in asked.err


@pytest.mark.slow
def test_the_same_again_does_nothing_and_without_the_option_it_is_measured(folder: Path, place: Place) -> None:
    again = place.quantize(
        "run", str(place.source), "-o", "out", "--device", "cpu", "--unverified", "--json", folder=folder
    )
    assert again.code == 0 and json.loads(again.out)["created"] is False
    verified = place.quantize(
        "verify", "out", "--against", str(place.source), "--device", "cpu", *QUICK_OPTIONS[2:], folder=folder
    )
    assert verified.code == 0 and "passed" in verified.err


@pytest.mark.slow
def test_a_measured_package_takes_its_place(tmp_path: Path, shallow: Path) -> None:
    from tests.pipeline.test_run import SMALL

    recipe = Recipe(name="rtn")
    request = pipeline.RunRequest(str(shallow), output=tmp_path / "out", recipe=recipe, settings=SMALL, device="cpu")
    for unverified in (True, False):
        result = pipeline.run(dataclasses.replace(request, unverified=unverified), Silent())
        assert result.created and (result.package.evidence.verdict.grade == "unmeasured") is unverified
    assert not pipeline.run(dataclasses.replace(request, unverified=True), Silent()).created
