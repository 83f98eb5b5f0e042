"""Records round-trip through JSON, and unreadable ones are named."""

from __future__ import annotations

import copy
import functools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.errors import NewerFormat, PackageError
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
@settings(deadline=None)
def test_records_round_trip(source: Source) -> None:
    assert from_json(Source, to_json(source), "source.json") == source


@given(st.builds(Recipe, skip_modules=st.lists(text).map(tuple)))
@settings(deadline=None)
def test_recipes_round_trip(recipe: Recipe) -> None:
    assert from_json(Recipe, to_json(recipe), "recipe.json") == recipe


def test_evidence_of_a_real_package_round_trips(finished: Path) -> None:
    for kind, name in ((Evidence, "parity.json"), (Provenance, "provenance.json")):
        text = (finished / name).read_text("utf-8")
        assert to_json(from_json(kind, text, name)) == text


Place = tuple[str | int, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a document that holds no others, and where it stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield place, value
    for name, item in inner or ():
        yield from leaves(item, (*place, name))


def replaced(document: Any, place: Place, value: Any) -> str:
    changed = copy.deepcopy(document)
    holder = functools.reduce(operator.getitem, place[:-1], changed)
    holder[place[-1]] = value
    return json.dumps(changed)


@pytest.mark.parametrize(("kind", "name"), [(Evidence, "parity.json"), (Provenance, "provenance.json")])
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_is_converted_to_fit(finished: Path, kind: type, name: str, data: st.DataObject) -> None:
    document = json.loads((finished / name).read_text("utf-8"))
    places = [(place, value) for place, value in leaves(document) if "format_version" not in place]
    place, value = data.draw(st.sampled_from(places))
    wrong: list[Any] = [
        [value],
        *([] if value is None else [{}]),
        *([] if value is None or isinstance(value, str) else [json.dumps(value)]),
    ]
    wrong += [float("nan"), float("inf")] if isinstance(value, float) else []
    wrong += [1, "x"] if isinstance(value, bool) else [True] if value is not None else []
    with pytest.raises(PackageError, match=f"{name} is not readable") as raised:
        from_json(kind, replaced(document, place, data.draw(st.sampled_from(wrong))), name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("verdict", "passed"), "false", "verdict.passed is true or false, not 'false'"),
        (("verdict", "grade"), None, "verdict.grade is text, not None"),
        (("scores", "kld", "mean", "high"), "0.1", "scores.kld.mean.high is a finite number, not '0.1'"),
        (("checks",), "all", "checks is a list, not 'all'"),
        (("checks", 0), [], r"checks\[0\] is an object, not \[\]"),
        (("sizes",), {}, "sizes.bits_per_parameter is missing"),
    ],
)
def test_a_misfit_is_named(finished: Path, place: Place, value: Any, words: str) -> None:
    document = json.loads((finished / "parity.json").read_text("utf-8"))
    with pytest.raises(PackageError, match=words):
        from_json(Evidence, replaced(document, place, value), "parity.json")


def test_numbers_that_json_does_not_have(finished: Path) -> None:
    text = (finished / "parity.json").read_text("utf-8")
    seconds = json.loads(text)["seconds"]
    for number in ("NaN", "-Infinity", "1e999"):
        with pytest.raises(PackageError, match="is not readable as Evidence"):
            from_json(Evidence, text.replace(f'"seconds": {seconds}', f'"seconds": {number}'), "parity.json")
    assert from_json(Evidence, text.replace(f'"seconds": {seconds}', '"seconds": 3'), "parity.json").seconds == 3.0


def test_a_field_that_this_version_does_not_know_is_named(finished: Path) -> None:
    document = json.loads((finished / "parity.json").read_text("utf-8"))
    document["verdict"]["waived"] = True
    with pytest.raises(NewerFormat, match=r"there is no field verdict\.waived; take it out, or update"):
        from_json(Evidence, json.dumps(document), "parity.json")


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
