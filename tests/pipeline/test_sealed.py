"""What is sealed is what was measured: a source or a candidate that changes under a run never becomes a package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import package, pipeline
from quantize.errors import PackageError, SourceChanged
from quantize.progress import Silent
from quantize.records import EvaluationSettings, Recipe

SMALL = EvaluationSettings(max_windows=16, window=64, new_tokens=2, require="degraded")


class At(Silent):
    """Calls `act` when a stage begins."""

    def __init__(self, stage: str, act: object) -> None:
        self.awaited, self.act = stage, act

    def stage(self, title: str) -> None:
        if title.startswith(self.awaited):
            self.act()  # type: ignore[operator]


def request(model: Path, output: Path) -> pipeline.RunRequest:
    return pipeline.RunRequest(str(model), output=output, recipe=Recipe(name="rtn"), settings=SMALL, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["quantize", "verify"])
def test_a_source_that_is_replaced_under_a_run_is_named(shallow_copy: Path, tmp_path: Path, stage: str) -> None:
    weights = shallow_copy / "model.safetensors"

    def replace() -> None:
        other = load_file(weights)
        other["transformer.wpe.weight"] *= 0
        save_file(other, shallow_copy / "new", {"format": "pt"})
        (shallow_copy / "new").rename(weights)

    with pytest.raises(SourceChanged, match=r"model\.safetensors was changed while the run worked on it"):
        pipeline.run(request(shallow_copy, tmp_path / "out"), At(stage, replace))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.building*"))


@pytest.mark.slow
def test_a_candidate_that_is_written_to_after_it_was_measured_is_not_sealed(shallow_copy: Path, tmp_path: Path) -> None:
    """The evidence of one run is never sealed onto the weights of another."""

    def overwrite() -> None:
        config = tmp_path / "out.building" / "config.json"
        config.write_text(config.read_text().replace("nf4", "fp4"))

    with pytest.raises(PackageError, match=r"config\.json was changed after it was measured"):
        pipeline.run(request(shallow_copy, tmp_path / "out"), At("write card", overwrite))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_what_the_model_has_no_place_for_is_in_the_evidence_and_on_the_card(shallow_copy: Path, tmp_path: Path) -> None:
    tensors = load_file(shallow_copy / "model.safetensors")
    spare = {f"transformer.h.1.mlp.{part}.weight": torch.ones(4) for part in ("c_fc", "c_proj")}
    save_file({**tensors, **spare}, shallow_copy / "model.safetensors", {"format": "pt"})
    made = pipeline.run(request(shallow_copy, tmp_path / "out"), Silent()).package
    assert made.evidence.verdict.passed and made.evidence.unused_tensors == tuple(spare)
    assert json.loads((made.folder / "parity.json").read_text())["unused_tensors"] == list(spare)
    assert "They are not in this model: `transformer.h.1` (2 tensors)." in (made.folder / "README.md").read_text()
    assert package.open_package(made.folder).evidence == made.evidence
