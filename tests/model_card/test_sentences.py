"""Every sentence of the card stands on it exactly where the facts bear it out, and every branch is rendered."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import model_card
from model_card import CardAttempt, CardFacts, CardPublisher, Interval
from model_card.render import _environment
from quantize.grades import CHANGED, GRADES
from tests.package.test_card import LINKS, full_facts

SENTENCES: list[tuple[str, Callable[[CardFacts], bool]]] = [
    (r"\*\*Grade: \w+\.\*\* This .* was measured against the original", lambda f: f.passed),
    (r"Only the grade `\w+` was required", lambda f: f.passed and f.grade != f.required_grade),
    (r"\*\*Not measured\.\*\* .* only its files and its tokenizer were checked", lambda f: f.grade == "unmeasured"),
    (r"`quantize verify` measures it", lambda f: f.grade == "unmeasured"),
    (r"\*\*Refused\.\*\* .* not meant for use", lambda f: not f.passed and f.grade != "unmeasured"),
    (r"was required, and its grade is `\w+`", lambda f: scored(f) and not f.passed),
    (r"was required, and it was not scored", lambda f: not scored(f) and f.grade == "failed"),
    (r"What would help:", lambda f: bool(f.advice) and not f.passed),
    (r"Measured on text and pictures", lambda f: f.pictures > 0),
    (r"\*\*Measured on text only", lambda f: f.reads_pictures and scored(f) and not f.pictures),
    (r"Nothing was scored", lambda f: not scored(f)),
    (r"Measured on [\d,]+ tokens", lambda f: scored(f)),
    (r"### What the grades mean", lambda f: scored(f)),
    (r"perplexity on text, lower is better", lambda f: scored(f)),
    (r"drawn at random until the verdict was certain", lambda f: f.stopped_early),
    (r"drawn at random;", lambda f: f.windows < f.corpus_windows and not f.stopped_early),
    (r"Intervals marked \* are of these windows alone", lambda f: scored(f) and f.optional_stopping),
    (r"\d \\\* \|", lambda f: scored(f) and f.optional_stopping),
    (r"The same text was scored once more", lambda f: f.chat_ratio is not None),
    (r"Pictures: `quantize` drew", lambda f: f.pictures > 0),
    (r"For comparison, other versions", lambda f: bool(f.controls)),
    (r"as papers report them", lambda f: bool(f.standard_perplexities)),
    (r"the same first 16", lambda f: bool(f.greedy_samples) and f.new_tokens >= 16),
    (r"the same first 32", lambda f: bool(f.greedy_samples) and f.new_tokens >= 32),
    (r"put through the chat template", lambda f: bool(f.greedy_samples) and f.chat),
    (r"tokenizer\.apply_chat_template", lambda f: f.chat),
    (r"processor\.apply_chat_template", lambda f: f.reads_pictures and f.processor and f.picture_chat),
    (r"processor\.image_token", lambda f: f.reads_pictures and f.processor and not f.picture_chat),
    (r"'?pillow'?\n", lambda f: f.reads_pictures and f.processor),
    (r'pipeline\("text-generation"', lambda f: not f.reads_pictures),
    (r"Only partly in \d bits", lambda f: f.quantized_share is not None and f.quantized_share < 0.5),
    (r"partly \d-bit model", lambda f: f.quantized_share is not None and f.quantized_share < 0.5),
    (r"\d % of all parameters\. Embed", lambda f: bool(f.quantized_share)),
    (r"Of all parameters, these stay in", lambda f: bool(f.kept_shares)),
    (r"hold tensors for which its architecture has no place", lambda f: bool(f.unused_tensors)),
    (r"block size 64", lambda f: f.bits == 4),
    (r"or 32 in the", lambda f: f.bits == 4 and f.block_32_modules > 0),
    (r"the scales are stored in 8 bits", lambda f: f.bits == 4 and f.double_quant),
    (r"sensitive layers stay in", lambda f: f.half_precision_modules > 0),
    (r"LLM\.int8", lambda f: f.bits == 8),
    (r"Byte-for-byte copies", lambda f: bool(f.copied_files)),
    (r"names code of its own, which was not allowed", lambda f: f.code_left_out),
    (r"The original runs code from its own repo", lambda f: f.remote_code),
    (r"\*\*Needs code\.", lambda f: bool(f.own_code)),
    (r"device_map=\"auto\", trust_remote_code=True\)", lambda f: bool(f.own_code)),
    (r"\*\*Not for CPUs with AVX-512", lambda f: f.misread_on_cpu > 0),
    (r"Recipe search", lambda f: len(f.attempts) > 1),
    (r"not made: out of memory", lambda f: any(attempt.failure for attempt in f.attempts)),
    (r"\nQuantized and measured on", lambda f: scored(f)),
    (r"\nQuantized on", lambda f: not scored(f)),
    (r"holds all measurements", lambda f: scored(f)),
    (r"changes beyond the figures above", lambda f: scored(f)),
    (r"here the changes were not evaluated", lambda f: not scored(f)),
    (r"from commit \[", lambda f: f.source_commit is not None),
    (r"Original model: a local folder", lambda f: f.source_repo_id is None),
    (r"\nQuantization made by", lambda f: f.publisher is not None),
    (r"\*\*License unknown", lambda f: "license:" not in str(f.source_card)),
    (r"\*\*Several licenses", lambda f: "license: [" in str(f.source_card)),
    (r"metadata could not be read", lambda f: "a: 1\na: 2" in str(f.source_card)),
    (r"The emissions that the original states", lambda f: "co2_eq_emissions" in str(f.source_card)),
    (r"\n<details>\n<summary>The original's card", lambda f: f.source_card is not None),
]
"""What a card may say, and when it is true."""

UNSCORED: dict[str, Any] = {
    **dict.fromkeys(("perplexity_ratio", "kld", "same_top", "delta_p_rms", "kld_median", "kld_p99", "corpus")),
    **dict.fromkeys(("reference_perplexity", "candidate_perplexity", "corpus_sha256", "corpus_dataset")),
    **dict.fromkeys(("scored_tokens", "windows", "corpus_windows"), 0),
    **dict.fromkeys(
        ("controls", "standard_perplexities", "greedy_samples", "sampled_samples", "attempts", "figures"), ()
    ),
    "stopped_early": False,
}
BROKEN = {**UNSCORED, "grade": "failed", "passed": False, "reasons": ("generation: nothing came",)}
UNMEASURED = {**UNSCORED, "grade": "unmeasured", "passed": False, "reasons": ("it was not measured",)}
MISSED = {"grade": "degraded", "passed": False, "reasons": ("mean KLD up to 0.09, good allows 0.06",)}
OTHER = {**MISSED, "grade": "changed", "advice": ("--recipe calibrated",)}
BETTER = {"grade": "parity", "required_grade": "good"}
ADVISED = {**MISSED, "advice": ("--size-budget 1.2",)}
OUTCOMES: list[dict[str, Any]] = [{}, BETTER, MISSED, ADVISED, OTHER, BROKEN, UNMEASURED]

INTERVAL = Interval(0.01, 0.005, 0.02)
ATTEMPTS = (
    CardAttempt("rtn", 2_600_000, INTERVAL, INTERVAL, INTERVAL, "failed", chosen=False, predicted=0.02),
    CardAttempt("calibrated", 2_600_000, INTERVAL, INTERVAL, INTERVAL, "good", chosen=True),
    CardAttempt("calibrated --epochs 3", 0, None, None, None, "", chosen=False, failure="out of memory while learning"),
)
CHAT = {"chat": True, "picture_chat": True}
FRAMED = {**CHAT, "chat_ratio": INTERVAL, "chat_kld": INTERVAL, "chat_windows": 16}
SEES = {"reads_pictures": True, "processor": True, "picture_chat": False}
ASKED = {**SEES, "pictures": 8, "pictures_sha256": "ab" * 32, "picture_tokens": 90}
ASKED |= {"picture_kld": INTERVAL, "picture_same_top": INTERVAL}
CARDS = {
    "license": "---\nlicense: mit\n---\n# Title\n",
    "none": None,
    "several": "---\nlicense: [mit, gpl]\nco2_eq_emissions: 5\n---\n# Title\n",
    "unreadable": "---\na: 1\na: 2\n---\n# Title\n",
}
SWITCHES: dict[str, list[dict[str, Any]]] = {
    "bits": [{}, {"bits": 8}, {"block_32_modules": 3, "half_precision_modules": 2}, {"double_quant": False}],
    "share": [{}, {"quantized_share": 0.3, "kept_shares": (("embeddings", 0.7),)}, {"quantized_share": 0.9}],
    "stopping": [
        {"stopped_early": True, "optional_stopping": True},
        {"stopped_early": False},
        {"stopped_early": False, "optional_stopping": False, "windows": 204},
    ],
    "pictures": [
        {},
        SEES,
        {**SEES, "processor": False, "pictures_left_out": "it has no processor"},
        ASKED,
        {**ASKED, "picture_chat": True},
    ],
    "tokens": [{"new_tokens": 4}, {"new_tokens": 16}, {"new_tokens": 32}],
    "attempts": [{"attempts": ()}, {"attempts": ATTEMPTS}, {"attempts": ATTEMPTS[:2]}],
    "controls": [{}, {"controls": (), "standard_perplexities": ()}],
    "code": [{}, {"own_code": "modeling_experts.py"}, {"remote_code": True}, {"code_left_out": True}],
    "source": [{}, {"source_repo_id": None, "source_commit": None}],
    "publisher": [{"publisher": None}, {"publisher": CardPublisher("Ada", tuple(LINKS.items()))}],
    "card": [{"source_card": text} for text in CARDS.values()],
    "chat": [{}, CHAT, FRAMED],
    "rest": [{}, {"unused_tensors": (("h.4", 2),), "copied_files": (), "misread_on_cpu": 2}],
    "outcome": OUTCOMES,
}


def scored(facts: CardFacts) -> bool:
    return facts.perplexity_ratio is not None


@functools.cache
def base() -> CardFacts:
    return full_facts()


def consistent(changes: dict[str, Any]) -> CardFacts:
    """Facts with some changed; what was not scored has no figures of chats and pictures either."""
    facts = dataclasses.replace(base(), **changes)
    if scored(facts):
        return facts
    return dataclasses.replace(facts, **UNSCORED, chat_ratio=None, chat_kld=None, pictures=0, picture_kld=None)


@functools.cache
def cards() -> tuple[str, ...]:
    """A card for each switch in each place, with all others as they are at first."""
    return tuple(model_card.render(consistent(change)) for places in SWITCHES.values() for change in places)


def check(facts: CardFacts) -> None:
    text = model_card.render(facts)
    for sentence, is_true in SENTENCES:
        assert bool(re.search(sentence, text)) == is_true(facts), sentence
    claim = re.search(r"is at most ([\d.]+) times the original's, .* by at most ([\d.]+) nats", text)
    assert bool(claim) == facts.passed
    if claim:
        assert (facts.grade, float(claim[1]), float(claim[2])) in facts.scale


@pytest.mark.parametrize("name", SWITCHES)
def test_what_a_card_says_is_true(name: str) -> None:
    for change in SWITCHES[name]:
        check(consistent(change))


@given(st.fixed_dictionaries({name: st.sampled_from(places) for name, places in SWITCHES.items()}))
@settings(max_examples=15, deadline=None)
def test_what_a_card_says_is_true_whatever_else_it_says(chosen: dict[str, dict[str, Any]]) -> None:
    check(consistent({field: value for change in chosen.values() for field, value in change.items()}))


def test_each_sentence_is_said_and_not_said() -> None:
    for sentence, _ in SENTENCES:
        assert {bool(re.search(sentence, text)) for text in cards()} == {True, False}, sentence


def test_every_branch_of_the_templates_is_rendered() -> None:
    """Each piece of text in them stands on a card of some facts."""
    rendered = "\n".join(cards())
    pieces = [
        line.strip()
        for file in resources.files("model_card").joinpath("templates").iterdir()
        for _, kind, text in _environment().lex(file.read_text("utf-8"))
        if kind == "data"
        for line in text.splitlines()
    ]
    assert len(pieces) > 100 and not [piece for piece in pieces if piece not in rendered]


def test_columns_hold_what_their_heads_say() -> None:
    """A row has as many cells as its head, a grade stands under a head that says so, and limits are numbers."""
    for text in cards():
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
            for row in rows:
                for name, cell in zip(head, row, strict=True):
                    assert cell.strip("`") not in (*GRADES, CHANGED) or name.startswith("grade"), (name, cell)
                    assert re.fullmatch(r"[\d.]*", cell) or not name.startswith("limit"), (name, cell)


def test_small_values_keep_their_digits() -> None:
    small = Interval(2.34e-6, 1.12e-6, 3.46e-6)
    text = model_card.render(dataclasses.replace(base(), delta_p_rms=small, kld=small))
    assert "| 0.00023 % | 0.00011 % to 0.00035 % " in text and "| 2.3e-06 | 1.1e-06 to 3.5e-06 |" in text
