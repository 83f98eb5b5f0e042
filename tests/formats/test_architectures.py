"""docs/architectures.md says what becomes of the tiny models of transformers' architectures; here they are tried."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from quantize import methods, source
from quantize.errors import QuantizeError
from quantize.formats import experts, source_model
from quantize.formats.bitsandbytes import checks, coverage
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.progress import Silent
from quantize.records import Recipe
from tests.models import architectures, tiny
from tests.models.architectures import FALLS_BACK, REFUSED, WORKS, Notes, Trial

RECORD = json.loads(architectures.RECORD.read_text())
TRIALS = {row["name"]: Trial(**row) for row in RECORD["trials"]}
SELECTION = (
    *("llama", "gpt2", "qwen3", "gemma3", "gemma3n_text", "gemma4_text", "phi3", "openai-gpt", "falcon", "aria_text"),
    *("mamba", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "bamba", "zamba2", "nemotron_h", "lfm2", "llava"),
)
RTN = Recipe(name="rtn")
LARGE = ("evolla",)
"""Of which no tiny model can be made: the script tries it, and no test."""
CASES = [
    name if name in SELECTION else pytest.param(name, marks=pytest.mark.slow) for name in TRIALS if name not in LARGE
]


def test_the_page_follows_from_the_record() -> None:
    assert architectures.PAGE.read_text() == architectures.page(RECORD)
    assert set(SELECTION) <= TRIALS.keys()


@pytest.mark.skipif(
    any(RECORD["versions"][name] != version(name) for name in ("transformers", "bitsandbytes")),
    reason="the page was made with other versions",
)
@pytest.mark.filterwarnings("ignore")  # they come from the models' own code
@pytest.mark.parametrize("name", CASES)
def test_what_the_page_says(name: str, tmp_path: Path) -> None:
    trial, notes = TRIALS[name], Notes()
    if trial.state not in (WORKS, FALLS_BACK, REFUSED):
        pytest.skip(trial.reason)
    folder, output = tiny.save(name, tmp_path / name), tmp_path / "out"
    output.mkdir()
    try:
        checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
        source_model.check_tensors(checkout)
        coverage.require(experts.unstacked(source_model.skeleton(checkout)), RTN, name)
        methods.quantize(methods.Job(checkout, output, RTN, "cpu", notes))
    except QuantizeError as error:
        message = str(error).replace(f"{folder} ", "")
        assert (trial.state, trial.reason) == (REFUSED, architectures.without_name(message, name))
        return
    assert trial.state == (FALLS_BACK if notes.whole else WORKS)
    assert all(check.passed for check in checks.check_files(output, ExpectedConfig.of(RTN)))
