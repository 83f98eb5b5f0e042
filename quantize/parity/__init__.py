"""How two models are compared: corpus, scoring, statistics, generation, structure, verdict, figures.

The protocol is described in docs/parity.md.
"""

from quantize.parity.corpus import corpus_text
from quantize.parity.measure import check_inputs, measure, unmeasured
from quantize.parity.picture_prompts import problem as picture_problem
from quantize.parity.remeasure import differs, figures_again
from quantize.parity.sample import sample_loss
from quantize.parity.verdict import gate, headroom, judged

__all__ = [
    "check_inputs",
    "corpus_text",
    "differs",
    "figures_again",
    "gate",
    "headroom",
    "judged",
    "measure",
    "picture_problem",
    "sample_loss",
    "unmeasured",
]
