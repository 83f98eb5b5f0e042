"""What a card says: facts in, README.md out. Knows nothing of how the facts came about."""

from model_card.facts import (
    CardAttempt,
    CardCalibration,
    CardControl,
    CardDataset,
    CardFacts,
    CardPublisher,
    CardSample,
    CardStandardPerplexity,
    Interval,
)
from model_card.metadata import forbids_derivatives
from model_card.page import page
from model_card.render import TemplateProblem, names, nats, parse, render
from model_card.source_card import split

__all__ = [
    "CardAttempt",
    "CardCalibration",
    "CardControl",
    "CardDataset",
    "CardFacts",
    "CardPublisher",
    "CardSample",
    "CardStandardPerplexity",
    "Interval",
    "TemplateProblem",
    "forbids_derivatives",
    "names",
    "nats",
    "page",
    "parse",
    "render",
    "split",
]
