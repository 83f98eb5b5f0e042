"""Chat models are scored as plain text and as answers in their chat template, and the worse of the two decides."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from quantize.errors import CorpusError
from quantize.evidence import Estimate, Evidence, Scores
from quantize.parity import corpus, framing, judged
from quantize.parity.models import load_tokenizer
from quantize.parity.verdict import gate
from quantize.parity.windows import draw
from quantize.publishing.audit import require_sound
from quantize.serialization import read_record
from tests.conftest import POCKET
from tests.package.test_card import EVIDENCE, snippets
from tests.parity.test_generation import TEMPLATE
from tests.pipeline.test_run import SMALL, small_run
from tests.publishing.workspace import Place

REQUIRED = "degraded"


@pytest.fixture
def scores() -> Scores:
    """Of a real run."""
    scores = read_record(Evidence, EVIDENCE / "parity.json").scores
    assert scores is not None
    return scores


def of_ratio(scores: Scores, ratio: float) -> Scores:
    return dataclasses.replace(scores, perplexity_ratio=Estimate(ratio, ratio, ratio))


def of_kld(scores: Scores, kld: float) -> Scores:
    mean = Estimate(kld, kld, kld)
    return dataclasses.replace(scores, kld=dataclasses.replace(scores.kld, mean=mean))


def test_the_worse_framing_decides(scores: Scores) -> None:
    good = of_ratio(of_kld(scores, 0.01), 1.002)
    alone = gate([], good, REQUIRED)
    assert alone.passed and alone.grade == "parity"
    assert gate([], good, REQUIRED, good) == alone
    for other in (of_kld(good, 0.5), of_ratio(good, 1.3)):
        for verdict in (gate([], good, REQUIRED, other), gate([], other, REQUIRED, good)):
            assert not verdict.passed and verdict.grade == "failed" and len(verdict.reasons) == 1
    assert "in the chat template" in gate([], good, REQUIRED, of_kld(good, 0.5)).reasons[0]
    assert gate([], good, REQUIRED, of_kld(good, 0.05)).grade == "good"
    assert gate([], good, REQUIRED, of_ratio(good, 0.5)).grade == "changed"


def test_windows_stand_behind_the_template() -> None:
    tokenizer, text = load_tokenizer(POCKET, False), corpus.load("builtin")
    tokenizer.chat_template = TEMPLATE
    frame = tuple(framing.turn(tokenizer, framing.REQUEST))
    windows, record = draw(text, tokenizer, 128, 9, 0, frame)
    assert record.prefix == len(frame) and windows.shape == (9, 128)
    assert all(tuple(window[: len(frame)].tolist()) == frame for window in windows)
    with pytest.raises(CorpusError, match="leaves no room"):
        draw(text, tokenizer, len(frame) + 1, 9, 0, frame)


@pytest.mark.slow
def test_a_chat_model_is_scored_in_both_framings_and_its_card_asks_it(place: Place, tmp_path: Path) -> None:
    source = Path(shutil.copytree(POCKET, tmp_path / "chat"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    made = small_run(tmp_path / "out", source, dataclasses.replace(SMALL, window=256))
    require_sound(made)
    evidence = made.evidence
    assert evidence.chat and evidence.chat_framing is not None and evidence.corpus is not None
    assert evidence.corpus.prefix == 0 < evidence.chat_framing.corpus.prefix
    assert evidence.chat_framing.scores.kld.mean.value != evidence.scores.kld.mean.value  # type: ignore[union-attr]
    assert "chat framing" in {check.name for check in evidence.checks}
    assert judged(evidence, evidence.verdict.required) == evidence
    card = (made.folder / "README.md").read_text()
    assert "mean KL divergence (nats), in the chat template" in card and "apply_chat_template" in card
    uses, _ = snippets(made.folder)
    used = place.warm.script(uses, cwd=made.folder.parent)
    assert used.code == 0 and "torch.Size([1, " in used.out, used.err
