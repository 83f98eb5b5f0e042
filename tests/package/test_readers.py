"""The card names versions that read the package, and no earlier ones than were tried."""

from __future__ import annotations

import dataclasses

import pytest

import model_card
from quantize.package.readers import OLDEST_TRIED, least_versions
from tests.package.test_card import pocket_facts, recorded

VERSIONS = {"transformers": "5.23.0", "bitsandbytes": "0.50.2"}


@pytest.mark.parametrize(
    ("written_by", "least"),
    [
        ("4.42.3", OLDEST_TRIED["transformers"]),
        ("4.9.0", OLDEST_TRIED["transformers"]),
        ("4.57.1", "4.57.1"),
        ("5.3.0.dev0", "5.3.0"),
        ("", VERSIONS["transformers"]),
        ("# a heading", VERSIONS["transformers"]),
    ],
)
def test_a_config_is_read_from_the_version_on_that_wrote_it(written_by: str, least: str) -> None:
    provenance, _ = recorded()
    source = dataclasses.replace(provenance.source, transformers_version=written_by)
    assert least_versions(source, provenance.quantized, VERSIONS) == {**OLDEST_TRIED, "transformers": least}


def test_blocks_of_32_need_the_bitsandbytes_that_made_them() -> None:
    provenance, _ = recorded()
    quantized = dataclasses.replace(provenance.quantized, block_32_modules=("h.0.attn.c_attn",))
    assert least_versions(provenance.source, quantized, VERSIONS)["bitsandbytes"] == VERSIONS["bitsandbytes"]


def test_the_card_says_that_code_was_left_out() -> None:
    facts = pocket_facts()
    assert "code of its own" not in model_card.render(facts)
    assert "code of its own" in model_card.render(dataclasses.replace(facts, code_left_out=True))
