"""What a card says: facts in, README.md out. Knows nothing of how the facts came about."""

from model_card.facts import CardFacts, CardSample, Interval
from model_card.render import render

__all__ = ["CardFacts", "CardSample", "Interval", "render"]
