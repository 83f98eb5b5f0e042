"""A few of the recorded windows are scored again, which shows that a checkpoint is the one that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize.errors import CorpusError
from quantize.evidence import CorpusRecord, WindowFigures
from quantize.parity import scoring, sequential, structure
from quantize.parity.corpus import load
from quantize.parity.measure import source_tokenizer
from quantize.parity.models import Pair
from quantize.parity.windows import draw
from quantize.progress import Progress
from quantize.records import Checkout, EvaluationSettings

ABSOLUTE, RELATIVE = 0.002, 0.05
"""By how much (nats, and share) a window's figures may differ on another device: noise of its kernels."""


def figures_again(
    checkout: Checkout,
    folder: Path,
    settings: EvaluationSettings,
    record: CorpusRecord,
    indices: Sequence[int],
    device: str,
    progress: Progress,
) -> WindowFigures:
    """The figures of the windows at these places in the order of reading, of the checkpoint in `folder`.

    Raises CorpusError where the text is another than the recorded one.
    """
    text = load(settings.corpus)
    if text.sha256 != record.sha256:
        raise CorpusError(f"the text {text.name} is not the one that was measured on")
    trust = structure.trusts(checkout, folder)
    tokenizer = source_tokenizer(checkout)
    with Pair(checkout, folder, device, trust=trust, tokenizer=tokenizer, alone=False) as pair:
        windows, _ = draw(text, tokenizer, record.window, settings.max_windows, settings.seed)
        if device == "cpu":
            pair.upcast()
        chosen = windows[list(indices)]
        reference = scoring.LiveReference.of(pair.reference, chosen, pair.device)
        with progress.task("scoring recorded windows again", len(indices), "windows") as advance:
            tokens = scoring.score(reference, pair.candidate, chosen, pair.device, advance)
    return sequential.figures_of(tokens.without_prefix(record.prefix))


def differs(recorded: float, again: float) -> bool:
    """Whether two figures of one window are further apart than devices are."""
    return not abs(recorded - again) <= ABSOLUTE + RELATIVE * abs(recorded)
