"""Logits made in slices are those that a model gives at once, and a model that cannot be cut is read whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from quantize.logits import SlicedLogits

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 1.5},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.25},
    "mamba": {"state_size": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "phi": {},
    "mixtral": {"num_local_experts": 2},
}


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind]))
    return model.eval().requires_grad_(False)


def some_tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def joined(sliced: SlicedLogits, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Slices of 11 positions, put together."""
    slices = list(sliced.slices(states, tokens, 11 * len(tokens) * VOCABULARY))
    assert [part.stop - part.start for part, _ in slices] == [11, 11, 11, 7]
    return torch.cat([logits for _, logits in slices], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_the_whole(kind: str) -> None:
    """Softcapping and scale factors after the head included."""
    model, tokens = tiny(kind), some_tokens()
    sliced = SlicedLogits.of(model, tokens)
    assert sliced.decoder is not None
    with torch.inference_mode():
        together = joined(sliced, sliced.states(tokens), tokens)
        torch.testing.assert_close(together, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_logits_that_are_no_numbers_are_sliced_as_well(value: float) -> None:
    model, tokens = tiny("llama"), some_tokens()
    only_in_first = sorted({*tokens[0].tolist()} - {*tokens[1].tolist()})
    model.get_input_embeddings().weight[only_in_first[0]] = value
    sliced = SlicedLogits.of(model, tokens)
    assert sliced.decoder is not None
    together = joined(sliced, sliced.states(tokens), tokens)
    assert together.isnan().any() and together.isfinite().any()
    torch.testing.assert_close(together, model(tokens).logits, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_model_is_left_as_it_was() -> None:
    model, tokens = tiny("llama"), some_tokens()
    before = set(vars(model.base_model))
    sliced = SlicedLogits.of(model, tokens)
    sliced.logits(sliced.states(tokens)[:, :3], tokens[:, :3])
    assert set(vars(model.base_model)) == before and not model.base_model._forward_hooks


class _CenteredModel(torch.nn.Module):
    """A model that subtracts from the logits at each position their mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = _Decoder()
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> CausalLMOutput:
        logits = self.head(self.base_model(tokens)[0])
        return CausalLMOutput(logits=logits - logits.mean(1, keepdim=True))


class _Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embedding(tokens),)


def test_what_cannot_be_cut_is_read_whole() -> None:
    model, tokens = _CenteredModel().requires_grad_(False), some_tokens()
    sliced = SlicedLogits.of(model, tokens)
    assert sliced.decoder is None
    together = joined(sliced, sliced.states(tokens), tokens)
    torch.testing.assert_close(together, model(tokens, use_cache=False).logits)


def test_gradients_pass_through_slices() -> None:
    """The loss of slices, one after the other, has the gradient that the loss of all has."""
    model, tokens = tiny("gemma2"), some_tokens()
    sliced = SlicedLogits.of(model, tokens)
    states = sliced.states(tokens).requires_grad_(True)
    for _, logits in sliced.slices(states, tokens, 2000):
        torch.autograd.backward(logits.logsumexp(-1).sum())
    by_slices, states.grad = states.grad, None
    torch.autograd.backward(sliced.logits(states, tokens).logsumexp(-1).sum())
    torch.testing.assert_close(by_slices, states.grad)
