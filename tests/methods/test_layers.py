"""The walk through the decoder layers gives each micro-batch what the model itself would give it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from quantize.errors import UnsupportedModel
from quantize.formats.bitsandbytes.modules import linear_names
from quantize.methods.calibration.layers import ActivationStream, DecoderLayers, check_walk, on_device

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "llama": {},
    "gemma3n_text": {**PER_LAYER, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 16},
    "gemma4_text": {
        **PER_LAYER,
        "global_head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "adapter_rank": 4,
    },
}


def tiny(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **KINDS[kind]})
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def decoder_of(model: Any) -> DecoderLayers:
    linear = [name for name, module in model.named_modules() if hasattr(module, "weight") and ".layers." in f".{name}"]
    return DecoderLayers.of(model, linear or [name for name, _ in model.named_modules() if ".h." in name])


def held_forwards() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "_HeldForward"]


def windows(count: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 256, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_get_their_own_arguments(kind: str) -> None:
    """Per-layer inputs, shared keys and values, and original hidden states come from the micro-batch's own tokens."""
    model = tiny(kind)
    check_walk(model, decoder_of(model), windows(), "cpu", False)
    assert not held_forwards()


def test_the_walk_finds_the_language_model_beside_a_larger_tower() -> None:
    """With `--quantize-towers` the tower has more linear modules."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 12}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **SHAPE},
        vision_config={**tower, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    )
    model = AutoModelForImageTextToText.from_config(config).float().eval().requires_grad_(False)
    linear = [name for name in linear_names(model) if name != "lm_head"]
    assert sum("vision_tower" in name for name in linear) > sum("language_model" in name for name in linear)
    decoder = DecoderLayers.of(model, linear)
    assert decoder.layers is model.get_decoder().layers
    check_walk(model, decoder, windows(), "cpu", False)


def test_a_quantized_layer_reaches_what_later_layers_share() -> None:
    """Gemma 4's last layers read keys and values of earlier ones: after a change there they must read the changed."""
    model = tiny("gemma4_text")
    decoder, tokens = decoder_of(model), windows(4)
    with ActivationStream(model, decoder, tokens, "cpu", 2, False) as stream:
        for index, layer in enumerate(decoder.layers):
            for parameter in layer.parameters():
                parameter.data *= 1.1
            outputs = stream.advance(index)
    expected: list[torch.Tensor] = []
    hook = decoder.layers[-1].register_forward_hook(lambda _, __, output: expected.append(output))
    model(tokens, use_cache=False)
    hook.remove()
    last = expected[0][0] if isinstance(expected[0], tuple) else expected[0]
    assert torch.allclose(torch.cat(outputs), last, rtol=1e-4, atol=1e-5)


def test_a_model_that_runs_its_layers_in_another_order_is_refused() -> None:
    model = tiny("llama")
    decoder = decoder_of(model)
    turned = DecoderLayers(decoder.path, torch.nn.ModuleList(reversed(list(decoder.layers))))
    with pytest.raises(UnsupportedModel, match="one after another"):
        check_walk(model, turned, windows(), "cpu", False)
    assert not held_forwards()


def test_a_walk_that_differs_from_the_model_is_refused() -> None:
    """A layer that counts how often it ran gives the walk, which comes second, another output."""
    model = tiny("llama")
    decoder = decoder_of(model)
    runs: list[int] = []

    def count(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return output * len(runs)

    decoder.layers[1].register_forward_hook(count)
    with pytest.raises(UnsupportedModel, match="differ from the model's own"):
        check_walk(model, decoder, windows(), "cpu", False)


def test_a_failure_in_the_model_is_raised_where_the_walk_was_asked_for() -> None:
    model = tiny("llama")
    decoder = decoder_of(model)

    def broken(*_: Any) -> None:
        raise ValueError("broken layer")

    hook = decoder.layers[1].register_forward_pre_hook(broken)
    with (
        ActivationStream(model, decoder, windows(2), "cpu", 2, False) as stream,
        pytest.raises(ValueError, match="broken"),
        on_device(decoder.layers[0], "cpu"),
    ):
        stream.advance(0)
    hook.remove()
    assert not held_forwards()
