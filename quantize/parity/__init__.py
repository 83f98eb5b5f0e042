"""How two models are compared: corpus, scoring, statistics, generation, structure, verdict, figures.

The protocol is described in docs/parity.md.
"""

from quantize.parity.corpus import corpus_text
from quantize.parity.measure import check_inputs, measure
from quantize.parity.sample import sample_loss

__all__ = ["check_inputs", "corpus_text", "measure", "sample_loss"]
