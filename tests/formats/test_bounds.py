"""Bounds and masks are no damage; NaN, and infinity beside other numbers, are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.errors import CorruptModel, UnsupportedModel
from quantize.formats.bitsandbytes import checkpoint, checks
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.bounds import are_bounds
from quantize.progress import Silent
from quantize.records import Recipe
from tests.formats.test_writer import fetched, stream
from tests.models import tiny

INFINITY, NAN = float("inf"), float("nan")
RTN = Recipe(name="rtn")
CLIPPED = {"vision_config": {"use_clipped_linears": True}}


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        ([INFINITY], True),
        ([-INFINITY, INFINITY], True),
        ([0.0, -INFINITY], True),
        ([1.0, -INFINITY], False),
        ([NAN, -INFINITY], False),
        ([0.0, 0.0], False),
        ([], False),
    ],
)
def test_infinities_and_zeros_alone_are_bounds(values: list[float], bounds: bool) -> None:
    assert are_bounds(torch.tensor(values)) == bounds


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 whose towers have clip bounds that clip nothing, in float32."""
    return tiny.save("gemma4", tmp_path_factory.mktemp("sources") / "gemma4", "float32", **CLIPPED)


def test_clip_bounds_arrive_as_they_are(clipped: Path, tmp_path: Path) -> None:
    bounds = {name: held for name, held in load_file(clipped / "model.safetensors").items() if bool(held.isinf().all())}
    assert len(bounds) > 4
    stream(fetched(clipped), tmp_path / "out")
    packaged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(packaged[name].float(), held) for name, held in bounds.items())
    files = {check.name: check for check in checks.check_files(tmp_path / "out", ExpectedConfig.of(RTN))}
    assert files["finite"].passed and f"bounds and masks in {len(bounds)} of them" in files["finite"].detail


@pytest.mark.parametrize(
    ("value", "error"), [(NAN, CorruptModel), (1e39, UnsupportedModel)], ids=["no number", "too large"]
)
def test_what_is_no_bound_is_still_told(clipped: Path, tmp_path: Path, value: float, error: type) -> None:
    """A single finite number that is infinite in half precision is no bound."""
    folder = shutil.copytree(clipped, tmp_path / "source")
    held = load_file(folder / "model.safetensors")
    name = next(name for name in held if name.endswith("input_max"))
    held[name] = torch.tensor(min(value, 3e38))
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=name.replace(".", r"\.")):
        checkpoint.choose_dtype(fetched(folder), Recipe(name="rtn", compute_dtype="float16"), Silent())
