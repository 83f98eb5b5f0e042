"""Eight bits without loss: what is chosen, that stock libraries read it, and that nothing is chosen without need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantize import methods, search, source
from quantize.errors import ConfigError, DeviceError
from quantize.formats.bitsandbytes import checkpoint, int8, recount
from quantize.formats.safetensors import weight_bytes
from quantize.methods.outliers.choice import MAX_GROWTH, MAX_SHARE, THRESHOLDS, Sensitivity, choose
from quantize.progress import Silent
from quantize.records import Checkout, Quantized, Recipe
from tests.conftest import POCKET

INT8, RTN = Recipe(name="int8", bits=8), Recipe(name="rtn", bits=8)
SHRUNK, WIDE = 1 / 16, 5
"""All channels but one in so many are made small, with weights that make up for it."""


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.methods.int8.LENGTH", 48)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model with the same function, but with a few large channels among small ones, all below 6."""
    folder = tmp_path_factory.mktemp("uneven")
    for file in POCKET.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        for norm, matrix in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            factor = torch.full_like(tensors[f"transformer.h.{layer}.{norm}.weight"], SHRUNK)
            factor[:WIDE] = 1
            for part in ("weight", "bias"):
                tensors[f"transformer.h.{layer}.{norm}.{part}"] *= factor
            tensors[f"transformer.h.{layer}.{matrix}.weight"] /= factor[:, None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(output: Path, recipe: Recipe, model: Path) -> tuple[Checkout, Quantized]:
    output.mkdir(parents=True)
    checkout = source.fetch(str(model), revision=None, trust_remote_code=False, progress=Silent())
    job = methods.Job(checkout, output, methods.normalized(recipe), "cpu", Silent(), "", output.with_name("work"))
    return checkout, methods.quantize(job)


def divergence(source_folder: Path, folder: Path) -> float:
    """Of the checkpoint in `folder`, as stock transformers loads it, on seeded tokens."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 4000, (2, 32), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32).eval()
    candidate = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval()
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(tokens).logits.float(), -1) for model in (reference, candidate))
    return float((p.exp() * (p - q)).sum(-1).mean())


def settings(folder: Path) -> dict[str, Any]:
    configured: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return configured


@pytest.fixture(scope="module")
def chosen(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Checkout, Quantized]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.methods.int8.LENGTH", 48)
        folder = tmp_path_factory.mktemp("chosen") / "package"
        yield folder, *written(folder, INT8, uneven)


@pytest.mark.slow
def test_uneven_channels_get_a_lower_threshold_that_stock_reads(
    chosen: tuple[Path, Checkout, Quantized], uneven: Path, tmp_path: Path
) -> None:
    folder, _, quantized = chosen
    assert quantized.outlier_threshold is not None and quantized.outlier_threshold < 6
    assert settings(folder)["llm_int8_threshold"] == quantized.outlier_threshold
    assert quantized.calibration_text is not None and quantized.calibration_text.windows == 8
    written(tmp_path / "stock", RTN, uneven)
    assert settings(tmp_path / "stock")["llm_int8_threshold"] == 6.0
    assert divergence(uneven, folder) < 0.5 * divergence(uneven, tmp_path / "stock")


@pytest.mark.slow
def test_the_same_is_chosen_again_and_taken_up_from_a_killed_run(
    chosen: tuple[Path, Checkout, Quantized], uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, quantized = chosen
    written(tmp_path / "first", INT8, uneven)
    monkeypatch.setattr("quantize.methods.int8._measured", None)
    written(tmp_path / "second", INT8, uneven)
    for other in (tmp_path / "first", tmp_path / "second"):
        for name in ("config.json", "model.safetensors"):
            assert (other / name).read_bytes() == (folder / name).read_bytes()
    assert quantized.outlier_threshold == settings(tmp_path / "second")["llm_int8_threshold"]


@pytest.mark.slow
def test_a_config_with_another_threshold_contradicts_the_record(
    chosen: tuple[Path, Checkout, Quantized], tmp_path: Path
) -> None:
    folder, checkout, quantized = chosen
    parameters = checkout.source.parameters
    assert list(recount.contradictions(folder, INT8, quantized, parameters)) == []
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text("utf-8"))
    config["quantization_config"]["llm_int8_threshold"] = 6.0
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    (sentence,) = recount.contradictions(other, INT8, quantized, parameters)
    assert sentence == (f"config.json says llm_int8_threshold 6.0, and the record {quantized.outlier_threshold}")


@pytest.mark.slow
def test_where_nothing_is_gained_all_is_as_in_stock(tmp_path: Path) -> None:
    checkout, quantized = written(tmp_path / "chosen", INT8, POCKET)
    written(tmp_path / "stock" / "package", RTN, POCKET)
    assert (quantized.outlier_threshold, quantized.half_precision_modules) == (6.0, ())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "chosen" / name).read_bytes() == (tmp_path / "stock" / "package" / name).read_bytes()
    held, predicted = weight_bytes(tmp_path / "chosen"), checkpoint.plain_bytes(checkout, Recipe(bits=8))
    assert predicted < held < 1.01 * predicted


@pytest.mark.slow
def test_a_threshold_that_is_given_stays(uneven: Path, tmp_path: Path) -> None:
    recipe = methods.replace(INT8, outlier_threshold=2.5)
    _, quantized = written(tmp_path / "package", recipe, uneven)
    assert quantized.outlier_threshold == settings(tmp_path / "package")["llm_int8_threshold"] == 2.5


def test_what_cannot_be_measured_is_made_as_in_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: object) -> None:
        raise DeviceError("no memory")

    monkeypatch.setattr("quantize.methods.int8._measured", without_memory)
    _, quantized = written(tmp_path / "package", INT8, POCKET)
    assert (quantized.outlier_threshold, quantized.calibration_text) == (6.0, None)


def test_only_eight_bits_have_a_threshold() -> None:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    assert [attempt.name for attempt in search.attempts(Recipe(bits=8))] == ["int8"]
    assert "int8" not in [attempt.name for attempt in search.attempts(Recipe())]
    with pytest.raises(ConfigError, match="for 8-bit weights"):
        methods.check(checkout, methods.replace(Recipe(), outlier_threshold=3.0), "")
    with pytest.raises(ConfigError, match="makes 8-bit weights"):
        methods.check(checkout, Recipe(name="int8"), "")


def test_products_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.nn import Linear8bitLt

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).half()
    inputs = torch.randn(9, 64, generator=generator).half()
    inputs[2, 7], inputs[5, 11] = 8.0, -4.0
    for threshold in (6.0, 3.0, 0.5):
        stock = Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=threshold)
        stock.load_state_dict({"weight": weight})
        expected = stock.to("cpu").eval()(inputs.clone()).float()
        seen, columns = int8.read(inputs.float(), threshold)
        assert bool(columns[7]) and bool(columns[11]) is (threshold < 4)
        assert torch.allclose(seen @ int8.stored(weight).T, expected, atol=0.02)


amounts = st.floats(0, 1e-2)
matrices = st.builds(
    lambda rows, losses, shares: Sensitivity(
        size=rows * 64,
        saved=rows * 63,
        products=rows * 64,
        divergence=dict(zip(THRESHOLDS, losses, strict=True)),
        share=dict(zip(THRESHOLDS, sorted(shares), strict=True)),
    ),
    st.integers(1, 500),
    st.lists(amounts, min_size=len(THRESHOLDS), max_size=len(THRESHOLDS)),
    st.lists(st.floats(0, 1), min_size=len(THRESHOLDS), max_size=len(THRESHOLDS)),
)


@given(st.lists(matrices, min_size=1, max_size=8), st.floats(1e-5, 1e-2))
def test_a_choice_keeps_its_limits_and_takes_no_bytes_without_need(held: list[Sensitivity], target: float) -> None:
    named = {str(number): matrix for number, matrix in enumerate(held)}
    choice = choose(named, THRESHOLDS, target)
    assert choice.growth <= MAX_GROWTH * sum(matrix.size for matrix in held)
    assert choice.threshold == THRESHOLDS[0] or choice.share <= MAX_SHARE
    assert choice.growth == sum(named[name].saved for name in choice.half_precision)
    if sum(matrix.divergence[THRESHOLDS[0]] for matrix in held) <= target:
        assert (choice.threshold, choice.half_precision) == (THRESHOLDS[0], ())
    for threshold in THRESHOLDS:
        fixed = choose(named, (threshold,), target)
        if threshold == THRESHOLDS[0] or fixed.share <= MAX_SHARE:
            assert max(choice.divergence, target) <= max(fixed.divergence, target)
