"""Models of every kind of cache, and of none, write and read as they do without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantize.parity import scoring
from quantize.parity.decoding import CannotGenerate, Decoder, NotFinite

SHAPE = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "rwkv": {"context_length": 64, "attention_hidden_size": 32},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "num_heads": 2, "num_blocks": 2},
}
PADDING_SHOWS = {"rwkv", "recurrent_gemma", "xlstm"}
PROMPTS = [torch.tensor([[5, 9, 33, 60, 2, 7]]), torch.tensor([[11, 3, 80]])]


def model_of(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **KINDS[kind]}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def plainly(model: Any, prompt: torch.Tensor, limit: int) -> list[int]:
    """Greedy decoding that reads everything again for each token."""
    ids = prompt
    for _ in range(limit):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return list(ids[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_any_cache_writes_and_reads_what_none_does(kind: str) -> None:
    model = model_of(kind)
    decoder = Decoder.suiting(model, PROMPTS, ())
    assert not decoder.cache_failure and decoder.side_by_side == (kind not in PADDING_SHOWS)
    texts = decoder.write(model, PROMPTS, 6, seed=None)
    assert texts == [plainly(model, prompt, 6) for prompt in PROMPTS]
    for prompt, text, read in zip(PROMPTS, texts, decoder.read(model, PROMPTS, texts), strict=True):
        with torch.inference_mode():
            at_once = model(torch.cat([prompt, torch.tensor([text])], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        assert read.shape == at_once.shape and scoring.mean_kld(at_once, read) < 1e-6


def test_texts_end_with_their_first_end() -> None:
    model = model_of("llama")
    whole = Decoder().write(model, PROMPTS, 8, seed=None)
    ends = (whole[0][3], whole[1][5])
    short = Decoder(ends).write(model, PROMPTS, 8, seed=None)
    assert all(text[-1] in ends or len(text) == 8 for text in short)
    assert not any(set(text[:-1]) & set(ends) for text in short)
    assert all(text == full[: len(text)] for text, full in zip(short, whole, strict=True))


def test_sampling_follows_its_seed() -> None:
    model = model_of("gpt2")
    first, again, other = (Decoder().write(model, PROMPTS, 8, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_cache_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    plain = plainly(model, PROMPTS[0], 4)
    forward = type(model).forward

    def only_uncached(self: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("use_cache"):
            raise AttributeError("'DynamicCache' object has no attribute 'seen_tokens'")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", only_uncached)
    decoder = Decoder.suiting(model, PROMPTS, ())
    assert "seen_tokens" in decoder.cache_failure
    assert decoder.write(model, PROMPTS, 4, seed=None)[0] == plain


def test_a_model_that_cannot_generate_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(CannotGenerate, match="division by zero"):
        Decoder.suiting(model, PROMPTS, ())


@pytest.mark.parametrize("seed", [None, 0])
def test_overflow_while_writing_is_told(seed: int | None) -> None:
    model = model_of("llama")
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(NotFinite):
        Decoder().write(model, PROMPTS, 4, seed)
