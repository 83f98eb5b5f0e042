"""Records round-trip through JSON, and unreadable ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import PackageError
from quantize.evidence import Evidence
from quantize.grades import grade_at_least
from quantize.records import FileRecord, Provenance, Recipe, Source
from quantize.serialization import from_json, read_record, to_json

text = st.text(max_size=20)
sources = st.builds(
    Source,
    name=text,
    repo_id=st.none() | text,
    revision=st.none() | text,
    commit=st.none() | text,
    files=st.lists(st.builds(FileRecord, text, st.integers(0, 2**60), text), max_size=3).map(tuple),
    architecture=text,
    model_type=text,
    dtype=text,
    parameters=st.integers(0, 2**60),
    remote_code=st.booleans(),
)


@given(sources)
def test_records_round_trip(source: Source) -> None:
    assert from_json(Source, to_json(source), "source.json") == source


@given(st.builds(Recipe, skip_modules=st.lists(text).map(tuple)))
def test_recipes_round_trip(recipe: Recipe) -> None:
    assert from_json(Recipe, to_json(recipe), "recipe.json") == recipe


def test_evidence_of_a_real_package_round_trips(finished: Path) -> None:
    for kind, name in ((Evidence, "parity.json"), (Provenance, "provenance.json")):
        text = (finished / name).read_text("utf-8")
        assert to_json(from_json(kind, text, name)) == text


def test_unreadable_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text('{"scores": 3}')
    with pytest.raises(PackageError, match=r"parity\.json is not readable as Evidence"):
        read_record(Evidence, tmp_path / "parity.json")
    with pytest.raises(PackageError, match=r"is not a package: provenance\.json is missing"):
        read_record(Provenance, tmp_path / "provenance.json")


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"value": float("nan")})


def test_order_of_grades() -> None:
    assert grade_at_least("lossless", "good")
    assert grade_at_least("good", "good")
    assert not grade_at_least("degraded", "good")
    assert not grade_at_least("changed", "degraded")
