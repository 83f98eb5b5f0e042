"""The calibrated recipe rounds each expert for the tokens that are sent to it, or for all where those are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantize import methods, source
from quantize.formats import modeling_experts
from quantize.methods.calibration import expert_hessians
from quantize.methods.calibration.expert_hessians import RoutedExperts
from quantize.methods.calibration.gradients import output_gradients
from quantize.methods.calibration.layers import ActivationStream, DecoderLayers
from quantize.progress import Silent
from quantize.records import Recipe
from tests.mixtures import mixture, saved

LITTLE = methods.recipe_of({"name": "calibrated", "calibration_windows": 16, "calibration_length": 128})
TOKENS = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
PATH = "model.layers.1.mlp.experts"


@pytest.fixture
def linear() -> Any:
    return modeling_experts.unstack(mixture("qwen3_moe", vocab_size=256)).requires_grad_(False)


def seen(model: Any, name: str) -> torch.Tensor:
    """The inputs of a module, in a forward pass of the whole model over all tokens."""
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return torch.cat(inputs)


def routed(model: Any) -> tuple[ActivationStream, RoutedExperts]:
    decoder = DecoderLayers.of(model, [name for name, _ in model.named_modules() if "_proj" in name])
    assert decoder.path == "model.layers"
    stream = ActivationStream(model, decoder, TOKENS, "cpu", 2, False)
    stream.advance(0)
    return stream, RoutedExperts(stream, 1, "mlp.experts")


@pytest.mark.parametrize("few", [False, True])
def test_hessians_are_those_of_the_tokens_that_count(linear: Any, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_hessians, "LEAST_TOKENS_PER_INPUT", 1000 if few else 0)
    stream, part = routed(linear)
    names = [f"mlp.experts.{number}.{name}" for number in range(4) for name in ("gate_proj", "up_proj", "down_proj")]
    ((first, last),) = part.together(names)
    assert last == [name for name in names if "down" in name]
    with stream:
        entering = part.entering(first, {})
        leaving = part.leaving(last, entering.shared, {})
    assert entering.shared == (frozenset(range(4)) if few else frozenset())
    module = linear.get_submodule(PATH)
    every = seen(linear, PATH)
    for name in names:
        own = seen(linear, f"model.layers.1.{name}")
        number = int(name.split(".")[2])
        whole = module.gated(number, every) if "down" in name else every
        expected = whole if few else own
        hessian = {**entering.hessians, **leaving}[name].hessian
        assert torch.allclose(hessian, expected.T @ expected / len(expected), rtol=1e-4, atol=1e-6)


def test_experts_that_do_not_fit_together_wait(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_hessians, "MAX_HESSIAN_BYTES", 2 * 4 * 3 * 64**2)
    stream, part = routed(linear)
    stream.close()
    names = [f"mlp.experts.{number}.{name}" for number in range(4) for name in ("gate_proj", "up_proj", "down_proj")]
    assert [len(first) for first, _ in part.together(names)] == [4, 4]


def test_token_weights_follow_the_routing(linear: Any) -> None:
    names = [f"{PATH}.{number}.up_proj" for number in range(4)]
    choices: list[torch.Tensor] = []
    hook = linear.get_submodule(PATH).register_forward_pre_hook(lambda _, given: choices.append(given[1]))
    with torch.no_grad():
        linear(TOKENS)
    hook.remove()
    gradients = dict(output_gradients(linear, linear.model.layers, names, TOKENS, "cpu", 2, False, 0, Silent()))
    for number, name in enumerate(names):
        weights = gradients[name].token_weights
        sent = (choices[0] == number).any(1)
        assert len(weights) == TOKENS.numel()
        assert float(weights[sent].mean()) == pytest.approx(1.0, rel=1e-4)
        assert bool((weights[~sent] == 1).all()) and not bool((weights[sent] == 1).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_it_diverges_less_than_nearest_rounding(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(family, tmp_path / "source")
    checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
    model, errors = mixture(family), {}
    tokens = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(1))
    tried = {"rtn": Recipe(name="rtn"), "calibrated": LITTLE, "learned": methods.replace(LITTLE, epochs=2)}
    for name, recipe in tried.items():
        output = tmp_path / name
        output.mkdir()
        job = methods.Job(checkout, output, methods.normalized(recipe), "cpu", Silent(), "", tmp_path / f"{name}-work")
        quantized = methods.quantize(job)
        loaded = AutoModelForCausalLM.from_pretrained(output, local_files_only=True, trust_remote_code=True)
        four_bit = [module for module in loaded.modules() if type(module).__name__ == "Linear4bit"]
        assert len(four_bit) == len(quantized.modules) > 12
        loaded.dequantize(dtype=torch.float32)
        with torch.no_grad():
            truth, guess = model(tokens).logits.log_softmax(-1), loaded.float()(tokens).logits.log_softmax(-1)
        errors[name] = float((truth.exp() * (truth - guess)).sum(-1).mean())
    assert errors["calibrated"] < errors["rtn"] and errors["learned"] < errors["rtn"], errors
