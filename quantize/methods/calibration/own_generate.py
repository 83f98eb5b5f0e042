"""What a model writes by its own `generate`, whatever it keeps of the tokens before: states, keys, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quantize import devices
from quantize.errors import UnsupportedModel, first_line
from quantize.methods.calibration import sampling
from quantize.methods.calibration.layers import autocast
from quantize.progress import Advance, ignore

CACHES = ("past_key_values", "cache_params", "state", "mems")
"""What transformers calls that which a model keeps, in its output."""
PROBE_WINDOWS, PROBE_TOKENS = 2, 5
"""Of the text by which a way to write is tried."""


@dataclass(frozen=True)
class Way:
    """How a model writes: with its cache, or reading everything before each token again; windows together, or alone."""

    use_cache: bool = False
    together: bool = False

    @classmethod
    def suiting(cls, model: Any, begin: int, draws: Draws, bfloat16: bool) -> Way:
        """The fastest way by which `model` writes what it writes without cache and company, which is not given.

        Raises UnsupportedModel where its generate fails.
        """
        few = draws.part(slice(PROBE_WINDOWS), PROBE_TOKENS)
        try:
            expected = cls().written(model, begin, few, bfloat16)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"the model writes no calibration text, since its generate fails ({first_line(error)}): name a text "
                f"with --calibration, or choose --recipe rtn"
            ) from error
        for way in (cls(use_cache=True, together=True), cls(use_cache=True), cls(together=True)):
            with contextlib.suppress(Exception):  # whatever a foreign `generate` raises
                if torch.equal(way.written(model, begin, few, bfloat16), expected):
                    return way
        return cls()

    def written(self, model: Any, begin: int, draws: Draws, bfloat16: bool, advance: Advance = ignore) -> torch.Tensor:
        """Tokens [windows, length] after the token `begin`."""
        windows, length = draws.share.shape
        rows = [slice(None)] if self.together else [slice(row, row + 1) for row in range(windows)]
        return torch.cat([self._generated(model, begin, draws.part(row, length), bfloat16, advance) for row in rows])

    def _generated(self, model: Any, begin: int, draws: Draws, bfloat16: bool, advance: Advance) -> torch.Tensor:
        from transformers import GenerationConfig

        (windows, length), device = draws.share.shape, draws.temperature.device
        config = GenerationConfig(max_new_tokens=length - 1, do_sample=False, use_cache=self.use_cache, pad_token_id=0)
        model.generation_config = GenerationConfig()  # its own may end texts, or bring penalties
        first = torch.full((windows, 1), begin, device=device)
        with torch.inference_mode(), autocast(device.type, bfloat16), devices.steady_attention():
            tokens: torch.Tensor = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                generation_config=config,
                logits_processor=[_Drawing(draws, advance)],
            )
        return tokens.cpu()


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn: by a random number `share` [windows, length] each, at a `temperature` [windows]."""

    temperature: torch.Tensor
    share: torch.Tensor

    def part(self, rows: slice | torch.Tensor, length: int) -> Draws:
        return Draws(self.temperature[rows], self.share[rows, :length])


def kept_bytes(output: Any) -> int:
    """Bytes of what a model keeps after it gave this `output`."""
    caches = (getattr(output, name, None) for name in CACHES)
    return sum(tensor.nbytes for cache in caches for tensor in _tensors(cache))


class _Drawing:
    """A logits processor that draws each token, and leaves `generate` no other choice."""

    def __init__(self, draws: Draws, advance: Advance) -> None:
        self.draws, self.advance = draws, advance

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(scores.float() / self.draws.temperature[:, None], -1)
        drawn = sampling.draw(chances, self.draws.share[:, input_ids.shape[1]])
        self.advance(len(drawn))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in whatever a model keeps."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _tensors(vars(value))
