"""Learned rounding: what it may change, that it never makes a layer worse, and that a killed run goes on."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import methods
from quantize.formats.bitsandbytes import packing
from quantize.formats.bitsandbytes.modules import laid_out, matrix
from quantize.formats.bitsandbytes.packing import Packed, ScaleGrid
from quantize.methods.calibration import quantizer
from quantize.methods.calibration.gradients import OutputGradient
from quantize.methods.calibration.layers import ActivationStream, DecoderLayers
from quantize.methods.calibration.quantizer import Ablation, Plan
from quantize.methods.calibration.resume import QuantizedLayer
from quantize.methods.rounding import learned_rounding
from quantize.methods.rounding.gptq import Levels
from quantize.methods.rounding.learned_rounding import Objective, RoundingVariables
from quantize.progress import ignore
from tests.conftest import POCKET
from tests.methods.test_calibrated import LITTLE, made, tiny

INSIDE = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LEARNING = methods.replace(LITTLE, epochs=8)


def matrix_and_packed(seed: int, shape: tuple[int, int], quant_type: str) -> tuple[torch.Tensor, Packed]:
    """A matrix, and codes near it under scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (weight.numel() // 64,), generator=generator)
    scales = weight.view(-1, 64).abs().amax(1) * signs
    grid = ScaleGrid.around(scales, 0.0)
    scales = grid.values(grid.codes(scales, torch.arange(len(scales))), torch.arange(len(scales)))
    levels = Levels.of(packing.table(quant_type))
    relative = weight / packing.expand_scales(scales, weight.shape)
    places = (levels.nearest(relative) + torch.randint(-1, 2, shape, generator=generator)).clamp(0, 15)
    return weight, Packed.build(levels.codes[places], scales, grid, quant_type, torch.float16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999),
    st.tuples(st.integers(1, 9), st.sampled_from([64, 128])),
    st.sampled_from(["nf4", "fp4"]),
)
def test_each_weight_chooses_between_the_levels_around_its_value(
    seed: int, shape: tuple[int, int], quant_type: str
) -> None:
    weight, packed = matrix_and_packed(seed, shape, quant_type)
    rounding = RoundingVariables.of(packed, weight)
    assert torch.allclose(rounding.values(), packed.weight(), atol=1e-6) and not rounding.round_up.any()
    moves = rounding.step != 0
    assert ((rounding.step > 0) == (weight > rounding.current))[moves].all()
    inside = weight.abs() < packing.expand_scales(packed.scales, weight.shape).abs()
    assert moves[inside & (weight != rounding.current)].all()
    with torch.no_grad():
        rounding.variables.copy_(torch.rand(shape, generator=torch.Generator().manual_seed(seed)))
    after = rounding.packed(packed)
    assert torch.allclose(after.weight(), rounding.values(), atol=1e-6)
    assert torch.equal(after.stored_scales, packed.stored_scales)
    assert torch.equal(after.codes != packed.codes, rounding.round_up & (rounding.other_codes != packed.codes))


def test_learning_is_pulled_by_the_gradient_of_what_is_chosen() -> None:
    """One weight between two levels, pulled to the other one: it rounds up, and only there."""
    weight, packed = matrix_and_packed(1, (1, 64), "nf4")
    rounding = RoundingVariables.of(packed, weight)
    target = rounding.current.clone()
    fraction = ((weight - rounding.current) / rounding.step)[0]
    position = int(torch.where((fraction > 0.4) & (fraction < 0.6))[0][0])
    target[0, position] += rounding.step[0, position]
    optimizer = torch.optim.Adam([rounding.variables], 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward((rounding.values() - target).square().sum())
        optimizer.step()
    assert torch.where(rounding.round_up[0])[0].tolist() == [position]


@pytest.fixture(scope="module")
def pocket() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(POCKET).float().eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("by_gradient", [True, False], ids=["by-gradient", "plain"])
def test_a_layer_comes_nearer_to_the_source_and_never_goes_away_from_it(
    pocket: Any, by_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_rounding, "TOKENS_A_STEP", 256)
    model = copy.deepcopy(pocket)
    tokens = torch.randint(0, model.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    names = [f"transformer.h.{index}.{name}" for index in range(2) for name in INSIDE]
    stream = ActivationStream(model, DecoderLayers.of(model, names), tokens, "cpu", 4, False)
    original, layer = ActivationStream(model, stream.decoder, tokens, "cpu", 4, False), stream.decoder.layers[0]
    targets = original.advance(0)
    weights = {name: matrix(layer.get_submodule(name)).clone() for name in INSIDE}
    block_sizes = {f"transformer.h.0.{name}": 64 for name in INSIDE}
    plan = Plan(LITTLE, "float16", Ablation(), {}, block_sizes)
    found = quantizer._quantize_layer(stream, 0, list(INSIDE), plan)
    half = torch.randn(256, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    hessian = half.T @ half / 256
    gradient = OutputGradient(torch.ones(1), torch.ones(()), hessian) if by_gradient else None
    objective = Objective(targets, weights, gradient)

    def error(chosen: dict[str, QuantizedLayer]) -> float:
        values = {
            f"{name}.weight": laid_out(layer.get_submodule(name), one.packed.weight()) for name, one in chosen.items()
        }
        offs = [stream.output(0, part, values) - target for part, target in enumerate(targets)]
        return sum(float((off * (off @ hessian if gradient else off)).mean()) for off in offs)

    passes: list[int] = []
    learned = learned_rounding.learn(stream, 0, found, objective, 12, passes.append)
    assert error(learned) < 0.95 * error(found) and passes == [1] * 12
    assert all(torch.equal(learned[name].packed.scales, found[name].packed.scales) for name in found)
    again = learned_rounding.learn(stream, 0, found, objective, 12, ignore)
    assert all(torch.equal(learned[name].packed.codes, again[name].packed.codes) for name in found)
    # with answers that cannot be approached nothing is gained, and then nothing may change
    exact = [stream.output(0, part, {}) for part in range(len(targets))]
    reached = Objective(exact, weights, gradient)
    kept = learned_rounding.learn(stream, 0, found, reached, 2, ignore)
    assert all(torch.equal(kept[name].packed.codes, found[name].packed.codes) for name in found)
    original.close()
    stream.close()


@pytest.mark.slow
def test_a_killed_run_that_learns_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_rounding, "TOKENS_A_STEP", 512)
    tiny("llama", tmp_path / "tiny")
    _, whole = made(tmp_path / "whole", LEARNING, tmp_path / "tiny")
    _, plain = made(tmp_path / "plain", LITTLE, tmp_path / "tiny")
    assert {name: one.shape for name, one in whole.items()} == {name: one.shape for name, one in plain.items()}
    changed = [name for name in whole if not torch.equal(whole[name], plain[name])]
    assert changed and all(name.endswith("proj.weight") for name in changed if ".0." in name)
    learn, calls = learned_rounding.learn, []

    def killed(stream: ActivationStream, index: int, *rest: Any) -> Any:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(stream, index, *rest)

    monkeypatch.setattr(learned_rounding, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", LEARNING, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "killed")
    _, tensors = made(tmp_path / "killed", LEARNING, tmp_path / "tiny")
    assert calls == [0, 1, 1]
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
