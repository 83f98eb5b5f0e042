"""What a method is: a name, its options, and the function that writes a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import ConfigError
from quantize.options import Option
from quantize.progress import Progress
from quantize.records import Checkout, Quantized, Recipe


@dataclass(frozen=True)
class Job:
    """What a method is asked to do: write `checkout`, quantized by `recipe` on `device`, into the folder `output`.

    A method that looks at text never looks at `corpus`, by which the result is judged. Finished parts are kept in the
    folder `resume`, and taken up from there; those that other attempts of the same run can use in the folder `shared`.
    """

    checkout: Checkout
    output: Path
    recipe: Recipe
    device: str
    progress: Progress
    corpus: str = ""
    resume: Path | None = None
    shared: Path | None = None

    @property
    def resume_folder(self) -> Path:
        assert self.resume is not None, "methods.quantize gives every job a folder for finished parts"
        return self.resume

    @property
    def shared_folder(self) -> Path:
        return self.shared or self.resume_folder / "shared"


def accept(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """The check of a method that works for every source and recipe."""


def no_attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    """Of a method that `auto` does not try."""
    return ()


def any_share(before: Recipe, then: Recipe) -> float:
    """Of a method of which it is not known how little one attempt may leave of another's divergence."""
    return 0.0


PREDICTION_ERROR = 1.15
"""How far off a prediction of one size from another may be: on the pocket model it was 12 % (docs/accuracy.md)."""


@dataclass(frozen=True)
class Larger:
    """A recipe for a file of so many `times` the plain bytes, in place of one of so many times `before`.

    It should leave a share `left` of that one's divergence. The `share` that was asked for needs `needed` times the
    bytes, which may be more than a file may have.
    """

    recipe: Recipe
    times: float
    before: float
    left: float
    share: float
    needed: float

    @property
    def within_reach(self) -> bool:
        """Whether it may do what was asked for, so far as such predictions were wrong."""
        return self.left <= PREDICTION_ERROR * self.share


def nothing(recipe: Recipe, quantized: Quantized) -> str:
    """Of a method about which a card says no more than its recipe."""
    return ""


@dataclass(frozen=True)
class Method:
    """A way to choose codes and scales.

    `options` are its rows, whose fields are those of its options record. `attempts` says what `auto` tries of it for a
    recipe, and methods are asked in their `order`; `least_left` is the share of one attempt's divergence that another
    one leaves at the least, as far as anybody saw. `resized` gives the smallest file that the recipe which was asked
    for allows, and that is predicted to diverge by a share of what the job's recipe does. `check` raises what stands
    against a recipe before any work. `describe` says on a card how codes were chosen. `improves_on` names the method
    whose result is measured on the same windows, so that the card shows the gain. `former_names` still work.
    """

    name: str
    summary: str
    quantize: Callable[[Job], Quantized]
    options: tuple[Option, ...] = ()
    order: int = 100
    bits: tuple[int, ...] = (4,)
    check: Callable[[Checkout, Recipe, str], None] = accept
    attempts: Callable[[Recipe], tuple[Recipe, ...]] = no_attempts
    least_left: Callable[[Recipe, Recipe], float] = any_share
    resized: Callable[[Job, float, Recipe], Larger | None] | None = None
    describe: Callable[[Recipe, Quantized], str] = nothing
    improves_on: str | None = None
    former_names: tuple[str, ...] = ()

    def require_bits(self, recipe: Recipe) -> None:
        """Raise ConfigError for a number of bits that the method cannot make."""
        if recipe.bits not in self.bits:
            allowed = " or ".join(map(str, self.bits))
            raise ConfigError(
                f"the recipe {self.name} makes {allowed}-bit weights: leave it out with {recipe.bits} bits"
            )
