"""Bytes beyond the plain 4-bit ones: how they are shared out, and what a package with them is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize import methods, search, source
from quantize.errors import ConfigError
from quantize.formats.bitsandbytes.sizes import BLOCK
from quantize.methods.calibration import allocation
from quantize.methods.calibration.allocation import HALF_PRECISION, SMALL_BLOCK, STEP, Offers, StorageOption
from quantize.progress import Silent
from tests.conftest import POCKET

costs = st.integers(0, 1000).map(lambda cost: cost / 1000)
matrices = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.integers(20, 500), costs, costs).map(
        lambda one: [
            StorageOption(block, allocation.stored_bytes(one[0], 64, block, True), cost)
            for block, cost in ((BLOCK, one[1]), (SMALL_BLOCK, one[2]), (HALF_PRECISION, 0.0))
        ]
    ),
    min_size=1,
    max_size=8,
)


@given(matrices, st.integers(0, 200_000))
def test_no_more_is_spent_than_there_is_and_never_for_the_worse(
    offers: dict[str, list[StorageOption]], extra: int
) -> None:
    chosen = allocation.spend(offers, extra)
    assert chosen.keys() == offers.keys()
    assert sum(option.size for option in chosen.values()) <= sum(one[0].size for one in offers.values()) + extra
    assert all(chosen[name].divergence <= offers[name][0].divergence for name in offers)


@given(matrices)
def test_with_bytes_for_all_nothing_diverges_and_with_none_all_stay_plain(
    offers: dict[str, list[StorageOption]],
) -> None:
    assert not any(option.divergence for option in allocation.spend(offers, 1e9).values())
    assert {option.block for option in allocation.spend(offers, 0).values()} == {BLOCK}


@given(matrices, st.floats(0, 1))
def test_the_smallest_budget_that_keeps_a_divergence(offers: dict[str, list[StorageOption]], share: float) -> None:
    """A step less would diverge more."""
    ways = Offers({name: tuple(options) for name, options in offers.items()}, 10_000)
    limit = share * ways.divergence(1)
    times = ways.smallest(limit)
    assert times >= 1 and ways.divergence(times) <= limit
    assert times == 1 or ways.divergence(times - STEP) > limit


def test_auto_spends_its_budget_last() -> None:
    refined = {"calibration_windows": 256, "epochs": 8, "passes": 3}
    attempts = search.attempts(methods.recipe_of({"size_budget": 1.2}))
    assert [(one.name, one.options) for one in attempts] == [
        *(("rtn", {}), ("calibrated", {}), ("calibrated", refined), ("calibrated", refined | {"size_budget": 1.2})),
    ]


def test_a_budget_that_nothing_could_spend() -> None:
    with pytest.raises(ConfigError, match="the recipe rtn has no --size-budget"):
        methods.recipe_of({"name": "rtn", "size_budget": 1.1})
    recipe = methods.recipe_of({"bits": 8, "size_budget": 1.1})
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    with pytest.raises(ConfigError, match="a size budget is for 4-bit weights"):
        methods.check(checkout, recipe, "")
