"""The original answers questions about drawn pictures, and both models read its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize import devices
from quantize.errors import first_line
from quantize.evidence import Check, PictureFigures, Pictures
from quantize.parity import picture_prompts, pictures, scoring, sequential
from quantize.parity.models import Pair
from quantize.parity.picture_prompts import NoPictures, Prompter
from quantize.parity.pictures import Picture
from quantize.progress import Progress
from quantize.records import EvaluationSettings

if TYPE_CHECKING:
    import torch

PICTURES, ANSWER_TOKENS = 64, 32
CHECK = "pictures"


@dataclass(frozen=True)
class Answered:
    """What asking about pictures gave: the record, or why pictures could not be put to the original, and a check."""

    record: Pictures | None = None
    left_out: str = ""
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """A picture, the original's greedy answer in tokens, and the file with the original's logits for each of them."""

    picture: Picture
    tokens: list[int]
    logits: Path


def number_of(settings: EvaluationSettings) -> int:
    """How many pictures are asked about: always as many, and no more than windows are scored."""
    return min(PICTURES, settings.max_windows)


def longest_answer(settings: EvaluationSettings) -> int:
    """Tokens that an answer may have: questions are answered in a sentence."""
    return min(ANSWER_TOKENS, settings.new_tokens)


def compare(pair: Pair, settings: EvaluationSettings, error: float, progress: Progress) -> Answered:
    """Ask about a fixed number of pictures; nothing for a model of text alone.

    Each picture is one reading, whose figures are means over the tokens of its answer. One at a time is in memory.
    """
    if not picture_prompts.sees(pair.checkout):
        return Answered()
    drawn = pictures.draw(number_of(settings), settings.seed)
    title = f"answering questions about {len(drawn)} pictures"
    try:
        prompter = Prompter.of(pair.checkout)
        with progress.task(title, len(drawn), "pictures") as advance, devices.steady_attention():
            readings = []
            for reading in _readings(pair, prompter, drawn, longest_answer(settings)):
                readings.append(reading)
                advance(1)
    except NoPictures as reason:
        progress.note(f"pictures are not measured: {reason}")
        return Answered(left_out=str(reason))
    except _CandidateFails as failure:
        return Answered(checks=(Check(CHECK, False, f"this model cannot read pictures: {failure}"),))
    figures = PictureFigures(
        kinds=tuple(item.kind for item in drawn),
        tokens=tuple(tokens for tokens, _, _ in readings),
        kld=sequential.rounded(kld for _, kld, _ in readings),
        same_top=sequential.rounded(share for _, _, share in readings),
    )
    if not np.isfinite(figures.kld).all():
        return Answered(checks=(Check(CHECK, False, "a model's outputs overflow to NaN or infinity on pictures"),))
    kld, same_top = sequential.of_pictures(figures, settings.seed, error)
    sha256 = pictures.digest(drawn)
    record = Pictures(settings.seed, sha256, longest_answer(settings), prompter.chat, figures, kld, same_top)
    detail = f"{len(drawn)} pictures were asked about, and answered in {sum(figures.tokens)} tokens"
    return Answered(record, checks=(Check(CHECK, True, detail),))


class _CandidateFails(Exception):
    """The candidate fails where the original did not."""


def _readings(
    pair: Pair, prompter: Prompter, drawn: Sequence[Picture], limit: int
) -> Iterator[tuple[int, float, float]]:
    """Of each picture the number of its answer's tokens, their mean KLD, and the share of equal most likely tokens.

    With one model at a time in memory the original answers all before the other begins.
    """
    groups = [drawn] if pair.alone else [[item] for item in drawn]
    with TemporaryDirectory(prefix="quantize-answers-") as folder:
        for group in groups:
            answers = [
                _answered(pair, prompter, item, limit, Path(folder) / str(place)) for place, item in enumerate(group)
            ]
            for answer in answers:
                yield _compared(pair, prompter, answer)


def _answered(pair: Pair, prompter: Prompter, picture: Picture, limit: int, file: Path) -> _Answer:
    """The original's answer, with its logits kept in `file`; raises NoPictures where it cannot give one."""
    from safetensors.torch import save_file

    inputs = prompter.inputs(picture)
    length = inputs["input_ids"].shape[1]
    room = min(limit, pair.context - length)
    if room < 1:
        raise NoPictures(f"a picture takes {length} tokens, and the original's context has {pair.context}")
    try:
        tokens = _written(pair, inputs, room)
        logits = _logits(pair.reference, _placed(inputs, pair.reference, pair.device), tokens)
    except Exception as error:
        _raise_if_out_of_memory(error)
        raise NoPictures(f"the original cannot read pictures: {first_line(error)}") from error
    save_file({"logits": logits.cpu().contiguous()}, file)
    return _Answer(picture, tokens, file)


def _compared(pair: Pair, prompter: Prompter, answer: _Answer) -> tuple[int, float, float]:
    import torch
    from safetensors.torch import load_file

    reference = load_file(answer.logits)["logits"]
    answer.logits.unlink()
    try:
        inputs = _placed(prompter.inputs(answer.picture), pair.candidate, pair.device)
        candidate = _logits(pair.candidate, inputs, answer.tokens)
    except Exception as error:
        _raise_if_out_of_memory(error)
        raise _CandidateFails(first_line(error)) from error
    targets = torch.tensor(answer.tokens, device=candidate.device)
    _, _, kld, same_top, _ = scoring.compare_logits(reference.to(candidate.device), candidate, targets)
    return len(answer.tokens), float(kld.mean().clamp_min(0.0)), float(same_top.double().mean())


def _written(pair: Pair, inputs: Any, limit: int) -> list[int]:
    """The original's greedy answer of up to `limit` tokens, its end included."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=list(pair.ends) or None,
        pad_token_id=pair.ends[0] if pair.ends else 0,
    )
    placed = _placed(inputs, pair.reference, pair.device)
    with torch.inference_mode():
        output = pair.reference.generate(**placed, generation_config=config)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def _logits(model: Any, inputs: dict[str, Any], answer: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] in float32 by which a model would choose each token of an answer after its inputs."""
    import torch

    shape = inputs["input_ids"].shape
    extended = {
        name: _longer(value, len(answer)) if getattr(value, "shape", ())[:2] == shape else value
        for name, value in inputs.items()
    }
    extended["input_ids"][0, -len(answer) :] = torch.tensor(answer)
    with torch.inference_mode(), _head_of_last(model, len(answer) + 1):
        logits: torch.Tensor = model(**extended, use_cache=False).logits
    return logits[0, -len(answer) - 1 : -1].float()


def _longer(value: torch.Tensor, count: int) -> torch.Tensor:
    """Values for each position of a prompt, that of the last repeated `count` times: masks, types of tokens."""
    import torch

    return torch.cat([value, value[:, -1:].repeat_interleave(count, dim=1)], dim=1)


@contextmanager
def _head_of_last(model: Any, count: int) -> Iterator[None]:
    """Let a model's head see the last `count` positions alone: pictures take thousands, and no logits are needed."""

    def cut(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states, *rest = arguments
        return (states[:, -count:], *rest)

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(cut) if head is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _placed(inputs: Any, model: Any, device: str) -> dict[str, Any]:
    """A processor's output on the device, its pixels in the type that the model's weights have."""
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return dict(inputs.to(device, dtype=dtype))


def _raise_if_out_of_memory(error: Exception) -> None:
    """Raise what is no fault of a model."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError | NoPictures):
        raise error
