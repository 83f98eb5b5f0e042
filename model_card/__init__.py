"""What a card says: facts in, README.md out. Knows nothing of how the facts came about."""

from model_card.escape import visible_json
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
from model_card.licenses import forbids_derivatives, linked_file
from model_card.metadata import inherited
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
    "inherited",
    "linked_file",
    "names",
    "nats",
    "page",
    "parse",
    "render",
    "split",
    "visible_json",
]
