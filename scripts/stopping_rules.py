"""Compare rules for stopping early by simulation, and write their table into docs/parity.md.

python scripts/stopping_rules.py

A window's loss is stated in multiples of the limit. Models that are simulated on the limit may pass in at most 5 % of
all runs; honest ones should need few windows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from quantize.parity import betting, sequential

Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Values]
Decision = tuple[NDArray[np.bool_], NDArray[np.int64]]
Rule = Callable[[Values], Decision]
PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
BEGIN, END = "<!-- stopping rules -->", "<!-- end of stopping rules -->"
LARGEST, ERROR = sequential.LARGEST_LOSS, sequential.ERROR


def mixture(share: float, factor: float) -> Draw:
    """A `share` of windows `factor` times as bad as the others, the mean on the limit."""

    def draw(random: np.random.Generator, shape: tuple[int, int]) -> Values:
        return np.where(random.random(shape) < share, factor, 1.0) / (1 + share * (factor - 1))

    return draw


def lognormal(mean: float, sigma: float) -> Draw:
    return lambda random, shape: mean * random.lognormal(-(sigma**2) / 2, sigma, shape)


ON_THE_LIMIT: dict[str, Draw] = {
    "2 % of windows 51 times as bad": mixture(0.02, 51),
    "5 %, 21 times": mixture(0.05, 21),
    "10 %, 11 times": mixture(0.10, 11),
    "lognormal, sigma 1.5": lognormal(1.0, 1.5),
    "lognormal, sigma 0.6": lognormal(1.0, 0.6),
    "normal, sigma 0.3": lambda random, shape: random.normal(1.0, 0.3, shape),
}
HONEST: dict[str, Draw] = {f"{mean} of the limit": lognormal(mean, 0.5) for mean in (0.2, 0.4, 0.6)}


def decided(
    values: Values, looks: tuple[int, ...], passes: Callable[[int], NDArray[np.bool_]], last: float
) -> Decision:
    """Who passes at one of the early `looks`, or else by plain intervals of error `last`, and after how many windows.

    Refusals are left out: they are the same by all rules.
    """
    count = values.shape[1]
    passed = np.zeros(len(values), bool)
    needed = np.full(len(values), count)
    for windows in looks:
        new = passes(windows) & ~passed
        passed |= new
        needed[new] = windows
    return passed | (sequential.bounds(values, last)[1] <= 1.0), needed


def early_looks(count: int, first: int = sequential.FIRST_LOOK, growth: float = sequential.GROWTH) -> tuple[int, ...]:
    looks = []
    while first < count:
        looks.append(first)
        first = math.ceil(first * growth)
    return tuple(looks)


def plain(first: Callable[[int], int]) -> Rule:
    """Plain intervals at every look, among which half of the error is divided: the rule up to now."""

    def rule(values: Values) -> Decision:
        looks = early_looks(values.shape[1], first(values.shape[1]), 1.5)
        error = ERROR / 2 / len(looks)
        return decided(values, looks, lambda count: sequential.bounds(values[:, :count], error)[1] <= 1.0, ERROR / 2)

    return rule


def empirical_bernstein(values: Values) -> Decision:
    """The predictable plug-in empirical-Bernstein confidence sequence (Waudby-Smith and Ramdas 2024, theorem 2)."""
    scaled, error = np.minimum(values / LARGEST, 1.0), ERROR / 2
    number = np.arange(1, values.shape[1] + 1)
    mean, variance = running(scaled, 0.5, 0.25)
    stake = np.minimum(np.sqrt(2 * math.log(1 / error) / (variance * number * np.log1p(number))), 0.5)
    spread = (scaled - mean) ** 2 * (-np.log1p(-stake) - stake)
    total = stake.cumsum(axis=1)
    high = ((stake * scaled).cumsum(axis=1) + math.log(1 / error) + spread.cumsum(axis=1)) / total
    return decided(values, early_looks(values.shape[1]), lambda count: high[:, count - 1] * LARGEST <= 1.0, ERROR)


def adaptive_stakes(values: Values) -> Decision:
    """A betting confidence sequence whose stake follows mean and variance so far (aGRAPA, the same paper)."""
    scaled, limit = np.minimum(values / LARGEST, 1.0), 1 / LARGEST
    mean, variance = running(scaled, limit, limit**2)
    stake = np.clip((limit - mean) / (variance + (limit - mean) ** 2), 0.0, 0.99 / (1 - limit))
    capital = np.log1p(stake * (limit - scaled)).cumsum(axis=1)
    least = math.log(2 / ERROR)
    return decided(values, early_looks(values.shape[1]), lambda count: capital[:, count - 1] >= least, ERROR)


def running(values: Values, mean: float, variance: float) -> tuple[Values, Values]:
    """Mean and variance of the values before each one, with one value of prior belief."""
    number = np.arange(1, values.shape[1] + 1)
    means = (mean + values.cumsum(axis=1)) / (number + 1)
    variances = (variance + ((values - means) ** 2).cumsum(axis=1)) / (number + 1)
    first = np.ones((len(values), 1))
    return np.hstack([mean * first, means[:, :-1]]), np.hstack([variance * first, variances[:, :-1]])


def largest_stake(values: Values) -> Decision:
    """The rule that is used."""

    def passes(count: int) -> NDArray[np.bool_]:
        return np.asarray(betting.upper_bound(values[:, :count], LARGEST, ERROR / 2) <= 1.0)

    return decided(values, early_looks(values.shape[1]), passes, ERROR)


def without_replacement(values: Values) -> Decision:
    """The same for the mean of this corpus alone, whose windows are drawn once each."""
    count, clipped = values.shape[1], np.minimum(values, LARGEST)
    before = np.hstack([np.zeros((len(values), 1)), clipped.cumsum(axis=1)[:, :-1]])
    limit = np.minimum((count - before) / (count - np.arange(count)), LARGEST * (1 - 1e-9))
    with np.errstate(divide="ignore"):
        capital = np.log((LARGEST - clipped) / (LARGEST - limit)).cumsum(axis=1)
    least = math.log(2 / ERROR)
    return decided(values, early_looks(count), lambda windows: capital[:, windows - 1] >= least, ERROR)


RULES: dict[str, Rule] = {
    "plain intervals from 16 windows on": plain(lambda count: sequential.FIRST_LOOK),
    "plain intervals from half of the corpus on": plain(lambda count: count // 2),
    "empirical Bernstein": empirical_bernstein,
    "betting, adaptive stake": adaptive_stakes,
    "**betting, largest stake** (used)": largest_stake,
    "the same without replacement": without_replacement,
}


def table(windows: int, trials: int) -> str:
    """Rules by rows: false passes in % of models on the limit, and mean windows that honest ones need."""
    random = np.random.default_rng(0)
    bad = {name: draw(random, (trials, windows)) for name, draw in ON_THE_LIMIT.items()}
    honest = {name: draw(random, (trials, windows)) for name, draw in HONEST.items()}
    lines = [f"| of {windows} windows | {' | '.join([*bad, *honest])} |", f"|---|{'---:|' * len([*bad, *honest])}"]
    for name, rule in RULES.items():
        errors = [f"{100 * rule(values)[0].mean():.1f} %" for values in bad.values()]
        needed = [f"{rule(values)[1].mean():.0f}" for values in honest.values()]
        lines.append(f"| {name} | {' | '.join([*errors, *needed])} |")
    return "\n".join(lines)


@click.command()
@click.option("--trials", default=10_000, show_default=True, help="Simulated runs of each kind.")
@click.option("--print", "only_print", is_flag=True, help="Print the tables, and leave docs/parity.md as it is.")
def main(trials: int, only_print: bool) -> None:
    """Write the tables of stopping rules into docs/parity.md."""
    tables = "\n\n".join(table(windows, trials) for windows in (204, 512))
    if only_print:
        click.echo(tables)
        return
    page = PAGE.read_text("utf-8")
    pattern = f"{re.escape(BEGIN)}.*?{re.escape(END)}"
    PAGE.write_text(re.sub(pattern, f"{BEGIN}\n\n{tables}\n\n{END}", page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
