"""The options of the calibrated method."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from quantize.options import LARGEST_SEED, Number, Option, TextName, Whole
from quantize.records import Recipe

SELF = "self"
"""The calibration text that the source writes itself."""
CALIBRATION_TEXT = TextName((SELF,))


@dataclass(frozen=True)
class CalibratedOptions:
    """Size budget, passes, epochs and calibration text.

    Weights may take `size_budget` times the bytes of their plain 4-bit form, spent on block size 32 and half precision
    where that helps most. `passes` of coordinate descent follow the first one, and rounding is then learned in `epochs`
    over the text: `calibration_windows` of `calibration_length` tokens of `calibration`, which is SELF, a text file, or
    `owner/name:path` in a Hub data set.
    """

    size_budget: float = 1.0
    passes: int = 1
    epochs: int = 0
    calibration: str = SELF
    calibration_windows: int = 128
    calibration_length: int = 512
    calibration_seed: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> CalibratedOptions:
        """What a recipe of this method, or of `auto`, asks for; its values were checked by `methods.normalized`."""
        names = {item.name for item in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in recipe.options.items() if name in names}
        return cls(**values)


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
        CALIBRATION_TEXT,
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
