"""What the calibrated method may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.options import LARGEST_SEED, Number, Option, Text, Whole

SELF = "self"
"""The calibration text that the source writes itself."""


@dataclass(frozen=True)
class CalibratedOptions:
    """How much text is read and how hard is searched.

    Weights may take `size_budget` times the bytes of their plain 4-bit form, for blocks of 32 and half precision where
    that helps most. `passes` of coordinate descent follow the first one, and rounding is then learned in `epochs` over
    the text: `calibration_windows` of `calibration_length` tokens of `calibration`, which is SELF, a text file, or
    `owner/name:path` in a Hub data set.
    """

    size_budget: float = 1.0
    passes: int = 1
    epochs: int = 0
    calibration: str = SELF
    calibration_windows: int = 128
    calibration_length: int = 512
    calibration_seed: int = 0


OPTIONS = (
    Option(
        "--size-budget",
        "size_budget",
        Number(1),
        "Size limit as a multiple of plain 4-bit (1.1 = 10 % larger).",
        CalibratedOptions,
    ),
    Option(
        "--passes",
        "passes",
        Whole(0),
        "Passes of coordinate descent over each matrix after its first rounding.",
        CalibratedOptions,
        former=("--sweeps",),
        former_keys=("sweeps",),
    ),
    Option(
        "--epochs",
        "epochs",
        Whole(0),
        "Epochs of learned rounding over the calibration text, one decoder layer at a time.",
        CalibratedOptions,
    ),
    Option(
        "--calibration",
        "calibration",
        Text("TEXT"),
        "Calibration text: self (the original writes it), a text file, or owner/name:path in a Hub data set.",
        CalibratedOptions,
    ),
    Option(
        "--calibration-windows",
        "calibration_windows",
        Whole(8),
        "Number of calibration windows.",
        CalibratedOptions,
    ),
    Option(
        "--calibration-length",
        "calibration_length",
        Whole(16),
        "Tokens per calibration window, at most the model's context.",
        CalibratedOptions,
    ),
    Option(
        "--calibration-seed",
        "calibration_seed",
        Whole(0, LARGEST_SEED),
        "Random seed of calibration text and gradients.",
        CalibratedOptions,
    ),
)
