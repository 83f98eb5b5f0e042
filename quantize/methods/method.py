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
    folder `resume`, and taken up from there.
    """

    checkout: Checkout
    output: Path
    recipe: Recipe
    device: str
    progress: Progress
    corpus: str = ""
    resume: Path | None = None

    @property
    def resume_folder(self) -> Path:
        assert self.resume is not None, "methods.quantize gives every job a folder for finished parts"
        return self.resume


def accept(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """The check of a method that works for every source and recipe."""


def no_attempts(recipe: Recipe) -> tuple[Recipe, ...]:
    """Of a method that `auto` does not try."""
    return ()


def nothing(recipe: Recipe, quantized: Quantized) -> str:
    """Of a method about which a card says no more than its recipe."""
    return ""


@dataclass(frozen=True)
class Method:
    """A way to choose codes and scales.

    `options` are its rows, whose fields are those of its options record. `attempts` says what `auto` tries of it for a
    recipe, and methods are asked in their `order`. `check` raises what stands against a recipe before any work.
    `describe` says on a card how codes were chosen. `improves_on` names the method whose result is measured on the same
    windows, so that the card shows the gain. `former_names` still work.
    """

    name: str
    summary: str
    quantize: Callable[[Job], Quantized]
    options: tuple[Option, ...] = ()
    order: int = 100
    bits: tuple[int, ...] = (4,)
    check: Callable[[Checkout, Recipe, str], None] = accept
    attempts: Callable[[Recipe], tuple[Recipe, ...]] = no_attempts
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
