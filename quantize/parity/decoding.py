"""How a model writes and reads token by token: by its own `generate`, and so through whatever cache it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.errors import first_line
from quantize.parity import scoring

if TYPE_CHECKING:
    import torch

TEMPERATURE, TOP_K, TOP_P = 1.0, 50, 0.95
READ_LOGITS = 1 << 25
"""Logits of texts that are read side by side: 128 MB in float32."""
PADDING_SHIFT = 1e-3
"""Mean KLD (nats) up to which padding before a prompt is taken not to show."""
PROBE_TOKENS = 2


class NotFinite(Exception):
    """The logits of a model hold NaN or infinity."""


class CannotGenerate(Exception):
    """A model's own `generate` fails; the message says how."""


@dataclass(frozen=True)
class Decoder:
    """How texts are continued: each until the first of the tokens `ends`, side by side or one after the other.

    Where `generate` fails with the model's cache, for the reason `cache_failure`, all of a text is read again for every
    token.
    """

    ends: tuple[int, ...] = ()
    side_by_side: bool = True
    cache_failure: str = ""

    @classmethod
    def suiting(cls, model: Any, prompts: Sequence[torch.Tensor], ends: tuple[int, ...]) -> Decoder:
        """What `model` can do: padding shows in the states of recurrent models, and some have no cache that works.

        Raises CannotGenerate.
        """
        shortest, longest = (choose(prompts, key=lambda ids: ids.shape[1]) for choose in (min, max))
        probe = shortest[0, :PROBE_TOKENS].tolist()
        decoder = cls(ends, side_by_side=False)
        try:
            alone = next(decoder.read(model, [shortest], [probe]))
        except CannotGenerate as failure:
            decoder = dataclasses.replace(decoder, cache_failure=str(failure))
            alone = next(decoder.read(model, [shortest], [probe]))
        together = dataclasses.replace(decoder, side_by_side=True)
        try:
            padded = next(together.read(model, [shortest, longest], [probe, probe]))
        except CannotGenerate:
            return decoder
        return together if scoring.mean_kld(alone, padded) <= PADDING_SHIFT else decoder

    def write(self, model: Any, prompts: Sequence[torch.Tensor], limit: int, seed: int | None) -> list[list[int]]:
        """Up to `limit` new tokens after each of `prompts` [1, length]: greedily, or sampled where there is a seed.

        Raises CannotGenerate or NotFinite.
        """
        batches = [list(prompts)] if self.side_by_side else [[ids] for ids in prompts]
        return [
            self._until_end(tokens)
            for batch in batches
            for tokens in self._generate(model, batch, limit, _require_finite, seed, self.ends)
        ]

    def read(
        self, model: Any, prompts: Sequence[torch.Tensor], texts: Sequence[Sequence[int]]
    ) -> Iterator[torch.Tensor]:
        """Logits [tokens, vocabulary] by which `model` would choose each token of a text after its prompt.

        One text after the other, though they may be read side by side. Raises CannotGenerate.
        """
        longest = max(1, *map(len, texts))
        rows = max(1, READ_LOGITS // (longest * scoring.vocabulary_of(model))) if self.side_by_side else 1
        for start in range(0, len(texts), rows):
            forcing = _Forcing(texts[start : start + rows])
            self._generate(model, prompts[start : start + rows], max(map(len, forcing.texts)), forcing)
            yield from forcing.logits()

    def _until_end(self, tokens: list[int]) -> list[int]:
        first = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: first + 1]

    def _generate(
        self,
        model: Any,
        prompts: Sequence[torch.Tensor],
        limit: int,
        processor: Any,
        seed: int | None = None,
        ends: tuple[int, ...] = (),
    ) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig, set_seed

        sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
        config = GenerationConfig(
            max_new_tokens=limit,
            use_cache=not self.cache_failure,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
            **({"do_sample": False} if seed is None else sampling),
        )
        longest = max(ids.shape[1] for ids in prompts)
        gaps = [(longest - ids.shape[1], 0) for ids in prompts]
        padded = [torch.nn.functional.pad(ids, gap) for ids, gap in zip(prompts, gaps, strict=True)]
        masks = [torch.nn.functional.pad(torch.ones_like(ids), gap) for ids, gap in zip(prompts, gaps, strict=True)]
        if seed is not None:
            set_seed(seed)
        with torch.inference_mode(), _failures_of_generate():
            output = model.generate(
                torch.cat(padded),
                attention_mask=torch.cat(masks),
                generation_config=config,
                logits_processor=[processor],
            )
        return [row[longest:].tolist() for row in output]


@contextmanager
def _failures_of_generate() -> Iterator[None]:
    """Turn what foreign code raises into CannotGenerate; want of memory is not its fault."""
    import torch

    try:
        yield
    except (NotFinite, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CannotGenerate(first_line(error)) from error


def _require_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that raises NotFinite."""
    if not bool(scores.isfinite().all()):
        raise NotFinite
    return scores


class _Forcing:
    """A logits processor that makes a model write given texts, and keeps its logits at each position."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = texts
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        position = len(self.steps)
        self.steps.append(scores)
        forced = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.texts):
            forced[row, text[min(position, len(text) - 1)]] = 0.0
        return forced

    def logits(self) -> Iterator[torch.Tensor]:
        """Of each text, [tokens, vocabulary]."""
        import torch

        for row, text in enumerate(self.texts):
            yield torch.stack([step[row] for step in self.steps[: len(text)]])
