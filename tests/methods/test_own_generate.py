"""Models that keep something else than keys and values write their calibration text by their own `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantize.methods.calibration import calibration_text, own_generate, sampling
from quantize.methods.calibration.options import CalibratedOptions
from quantize.progress import Silent
from tests.models import tiny

OPTIONS = CalibratedOptions(calibration_windows=8, calibration_length=16)
TEMPERATURES = (1.0, 1.4)


def generated(model: Any) -> torch.Tensor:
    return calibration_text.generated(model, OPTIONS, 16, "cpu", False, Silent(), TEMPERATURES)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv", "recurrent_gemma", "openai-gpt", "jamba", "xlstm"])
def test_each_token_is_drawn_from_what_the_model_says_after_all_before_it(kind: str) -> None:
    model = tiny.build(kind, "float32")
    tokens, shares = generated(model), sampling.shares(8, 16, 0)
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits / torch.tensor(TEMPERATURES).repeat(4)[:, None, None]
    drawn = torch.stack(
        [sampling.draw(logits[:, place - 1].softmax(-1), shares[:, place]) for place in range(1, 16)], 1
    )
    assert tokens.shape == (8, 16)
    assert (drawn == tokens[:, 1:]).float().mean() > 0.98  # a number at the very border may fall on either side


def test_it_is_the_text_of_the_loop_for_models_that_keep_keys_and_values() -> None:
    model = tiny.build("llama", "float32")
    shares, temperature = sampling.shares(8, 16, 0), torch.tensor(TEMPERATURES).repeat(4)
    draws = own_generate.Draws(temperature, shares)
    way = own_generate.Way.suiting(model, 0, draws, False)
    assert way == own_generate.Way(use_cache=True, together=True)
    assert torch.equal(way.written(model, 0, draws, False), generated(model))


def test_states_do_not_count_for_each_token() -> None:
    """So that more windows are written side by side."""
    one, two = (
        own_generate.kept_bytes(
            tiny.build("mamba", "float32")(torch.zeros(1, count, dtype=torch.int64), use_cache=True)
        )
        for count in (1, 2)
    )
    assert one == two > 0


@pytest.mark.parametrize(
    ("own", "whole", "first"),
    [
        ((5, 6), (None, None), 5),
        ((None, [8, 9]), (None, None), 8),
        ((None, 6), (4, None), 4),
        ((None, None), (None, None), 0),
    ],
)
def test_a_text_begins_with_some_token_even_where_none_is_named(own: Any, whole: Any, first: int) -> None:
    class Config:
        def __init__(self, ids: tuple[Any, Any], text: Any = None) -> None:
            self.bos_token_id, self.eos_token_id = ids
            self.text = text

        def get_text_config(self) -> Any:
            return self.text

    assert calibration_text._beginning(Config(whole, Config(own))) == first
