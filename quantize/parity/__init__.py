"""How two models are compared: corpus, scoring, statistics, generation, structure, verdict, figures.

The protocol is described in docs/parity.md.
"""

from quantize.parity.measure import measure

__all__ = ["measure"]
