"""Every option, declared once.

click's options, the catalogue's rules, the command that a card prints and the tables in README.md and
docs/scheduled.md are made from these rows. A method's own rows stand in its file in quantize/methods; defaults stand in
the records that the options fill.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from quantize.grades import PASSING_GRADES
from quantize.records import EvaluationSettings, Recipe

DEFAULT_MODEL = "distilbert/distilgpt2"
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b(?<!\.git)", re.ASCII)
"""As the Hub's client checks it."""
LARGEST_SEED = 2**32 - 1


# What a value may be


@dataclass(frozen=True)
class Flag:
    """True or false."""

    words: str = "true or false"

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """One of a few values, of the type of the first one."""

    values: tuple[str, ...] | tuple[int, ...]

    @property
    def words(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"

    def accepts(self, value: object) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds, which belong to it."""

    low: int
    high: int | None = None

    @property
    def words(self) -> str:
        if self.high is None:
            return f"a whole number of at least {self.low}"
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        return type(value) is int and self.low <= value and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Number:
    """A finite number of at least `low`."""

    low: float

    @property
    def words(self) -> str:
        return f"a number from {self.low:g} on"

    def accepts(self, value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and self.low <= value < math.inf


@dataclass(frozen=True)
class Text:
    """One line of text; `metavar` is what a help text calls it."""

    metavar: str | None = None
    words: str = "one line of text"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value.strip() != "" and "\n" not in value


Kind = Flag | Choice | Whole | Number | Text


@dataclass(frozen=True)
class Option:
    """One option: `flag` as it is typed, the `field` of the record that it fills, whose default is `owner`'s.

    `former` are flags that did the same in earlier versions, `former_keys` keys of a catalogue, `former_values` earlier
    words for its values; all still work and say what to write instead. `repeated` ones may be given several times.
    `key` is what a catalogue calls it, where not as the field. `reproduced` ones are part of the command with which a
    card says how to make the package again.
    """

    flag: str
    field: str
    kind: Kind
    help: str
    owner: type
    former: tuple[str, ...] = ()
    former_keys: tuple[str, ...] = ()
    former_values: tuple[tuple[str, str], ...] = ()
    repeated: bool = False
    key: str = ""
    reproduced: bool = True

    @property
    def default(self) -> Any:
        """The default of the field."""
        (item,) = (item for item in fields(self.owner) if item.name == self.field)
        return item.default if item.default_factory is MISSING else item.default_factory()

    def words(self, value: Any) -> list[str]:
        """What is typed to give it this value."""
        if isinstance(self.kind, Flag):
            on, _, off = self.flag.partition("/")
            return [on if value else off]
        values = value if self.repeated else (value,)
        return [word for item in values for word in (self.flag, str(item))]

    @property
    def catalogue_key(self) -> str:
        return self.key or self.field


QUANT_TYPES = ("nf4", "fp4")
COMPUTE_DTYPES = ("auto", "float16", "bfloat16", "float32")

RECIPE = (
    Option(
        "--target",
        "target_grade",
        Choice(PASSING_GRADES),
        "The grade at which `auto` stops looking for a better recipe.",
        Recipe,
        reproduced=False,
    ),
    Option("--bits", "bits", Choice((4, 8)), "4 (NF4 or FP4) or 8 (LLM.int8).", Recipe),
    Option("--quant-type", "quant_type", Choice(QUANT_TYPES), "The table of 4-bit values.", Recipe),
    Option("--double-quant/--no-double-quant", "double_quant", Flag(), "Double quantization.", Recipe),
    Option(
        "--compute-dtype",
        "compute_dtype",
        Choice(COMPUTE_DTYPES),
        "dtype of matmuls (bnb_4bit_compute_dtype) and of unquantized layers; auto keeps the source's half precision.",
        Recipe,
    ),
    Option(
        "--skip-modules",
        "skip_modules",
        Text("NAME"),
        "Keep this module unquantized (the LM head always is). May be repeated.",
        Recipe,
        repeated=True,
    ),
)
"""Of Recipe, besides its name and what belongs to one method."""

SETTINGS = (
    Option("--corpus", "corpus", Text(), "'builtin', 'wikitext-2' or a text file.", EvaluationSettings),
    Option("--window", "window", Whole(16), "Tokens per window, at most the model's context.", EvaluationSettings),
    Option("--max-windows", "max_windows", Whole(8), "Score at most this many windows.", EvaluationSettings),
    Option("--new-tokens", "new_tokens", Whole(1), "Tokens generated per prompt.", EvaluationSettings),
    Option("--full", "full", Flag(), "Score every window, even after the verdict is certain.", EvaluationSettings),
    Option(
        "--controls",
        "controls",
        Flag(),
        "Measure the float16 source, int8 and NF4 rounded to nearest in the same run.",
        EvaluationSettings,
    ),
    Option(
        "--standard-perplexities",
        "standard_perplexities",
        Flag(),
        "Also report perplexities as published: sliding window, and lm-evaluation-harness.",
        EvaluationSettings,
        former=("--conventions",),
        former_keys=("conventions",),
    ),
    Option("--seed", "seed", Whole(0, LARGEST_SEED), "Random seed.", EvaluationSettings),
    Option("--require", "require", Choice(PASSING_GRADES), "The grade that a package must reach.", EvaluationSettings),
)
"""Of EvaluationSettings."""
