"""Packages of format version 1 are read, and those of a later version are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize import package
from quantize.errors import NewerFormat, PackageError
from quantize.evidence import Evidence
from quantize.files import CARD, CONFIG, PARITY, PROVENANCE, hash_file
from quantize.records import Provenance, Recipe, Scalar
from quantize.serialization import from_json, read_record, to_json
from tests.conftest import POCKET, Outcome

DATA = Path(__file__).parents[1] / "data"
RTN, CALIBRATED = DATA / "package-v1", DATA / "package-v1-calibrated"
"""Recorded by quantize 0.1.0 before format version 2: the records of a stock package, and of one that `auto` made."""
ASKED: dict[str, Scalar] = {"size_budget": 1.2, "passes": 2, "epochs": 1}
ASKED_TEXT: dict[str, Scalar] = {"calibration_windows": 16, "calibration_length": 64, "calibration_seed": 3}

both = pytest.mark.parametrize("recorded", [RTN, CALIBRATED], ids=["rtn", "calibrated"])


def document(recorded: Path, name: str) -> dict[str, Any]:
    """What stands in a recorded file."""
    content: dict[str, Any] = json.loads((recorded / name).read_text("utf-8"))
    return content


def provenance_of(recorded: Path) -> Provenance:
    return read_record(Provenance, recorded / PROVENANCE)


def evidence_of(recorded: Path) -> Evidence:
    return read_record(Evidence, recorded / PARITY)


def old_package(folder: Path, recorded: Path) -> Path:
    """A sealed folder with recorded evidence of format version 1."""
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    (folder / CARD).write_text("the card of then")
    (folder / PARITY).write_bytes((recorded / PARITY).read_bytes())
    provenance = document(recorded, PROVENANCE)
    provenance["files"] = [
        dict(zip(("path", "size", "sha256"), (name, *hash_file(folder / name)), strict=True))
        for name in sorted((CARD, CONFIG, PARITY))
    ]
    (folder / PROVENANCE).write_text(json.dumps(provenance))
    return folder


@both
def test_new_names_hold_the_old_values(recorded: Path) -> None:
    old, provenance = document(recorded, PROVENANCE), provenance_of(recorded)
    quantized, settings = old["quantized"], old["settings"]
    assert provenance.quantized.modules == tuple(quantized["modules"])
    assert provenance.quantized.half_precision_modules == tuple(quantized.get("spared", ()))
    assert provenance.quantized.block_32_modules == tuple(quantized.get("fine", ()))
    assert provenance.settings.standard_perplexities == settings["conventions"]
    assert provenance.settings.max_windows == settings["max_windows"]
    old, evidence = document(recorded, PARITY), evidence_of(recorded)
    assert evidence.reference_devices == tuple(old["reference_places"])
    assert [one.name for one in evidence.standard_perplexities] == [one["name"] for one in old["conventions"]]
    assert [one.chosen for one in evidence.attempts] == [one["chosen"] for one in old.get("rungs", ())]
    assert evidence.scores is not None
    assert evidence.scores.kld.mean.value == old["scores"]["kld"]["mean"]["value"]


@both
def test_nothing_but_renamed_keys_is_lost(recorded: Path) -> None:
    renamed = {"asked", "reference_places", "conventions", "rungs"}
    for kind, name in ((Provenance, PROVENANCE), (Evidence, PARITY)):
        old, new = document(recorded, name), json.loads(to_json(read_record(kind, recorded / name)))
        assert old.keys() - renamed <= new.keys()
        untouched = old.keys() - renamed - {"recipe", "quantized", "settings", "key", "format_version"}
        assert all(holds(new[key], old[key]) for key in untouched)


def holds(new: Any, old: Any) -> bool:
    """Whether a document still says what it said, whatever keys were added since."""
    if isinstance(old, dict):
        return all(key in new and holds(new[key], value) for key, value in old.items())
    if isinstance(old, list):
        return len(new) == len(old) and all(map(holds, new, old))
    return bool(new == old)


def test_the_recipe_of_a_stock_package() -> None:
    recipe = provenance_of(RTN).recipe
    assert recipe == Recipe(name="rtn")


def test_options_of_a_calibrated_recipe_are_its_options_now() -> None:
    provenance = provenance_of(CALIBRATED)
    refined = ASKED_TEXT | {"passes": 3, "epochs": 8, "calibration_windows": 32}
    assert provenance.requested_recipe == Recipe("auto", target_grade="lossless", options=ASKED | ASKED_TEXT)
    assert provenance.recipe == Recipe("calibrated", target_grade="lossless", options=refined | {"size_budget": 1.2})
    text = provenance.quantized.calibration_text
    assert text is not None and (text.windows, text.length, text.seed) == (32, 64, 3)
    tried = [(attempt.recipe.name, dict(attempt.recipe.options)) for attempt in evidence_of(CALIBRATED).attempts]
    assert tried == [
        ("rtn", {}),
        ("calibrated", ASKED_TEXT | {"passes": 2, "epochs": 1}),
        ("calibrated", refined),
        ("calibrated", refined | {"size_budget": 1.2}),
    ]


def test_the_key_is_the_one_of_this_version() -> None:
    provenance = provenance_of(CALIBRATED)
    asked = Recipe("auto", target_grade="lossless", options=ASKED | ASKED_TEXT)
    assert provenance.demand.recipe == asked
    assert provenance.key == provenance.demand.key("pocket-gpt2", provenance.source.pinned)
    assert provenance.key != document(CALIBRATED, PROVENANCE)["key"]
    assert provenance_of(RTN).key == ""  # a package from before there were keys


@both
def test_written_again_they_are_of_version_2(recorded: Path) -> None:
    for kind, name in ((Provenance, PROVENANCE), (Evidence, PARITY)):
        record = read_record(kind, recorded / name)
        assert json.loads(to_json(record))["format_version"] == 2
        assert from_json(kind, to_json(record), name) == record


@both
def test_the_card_can_be_rendered_again(recorded: Path, command: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = old_package(tmp_path / "old-bnb-4bit", recorded)
    ended = command("card", folder, "--against", POCKET, "--quiet")
    assert ended.code == 0, ended.err
    card = (folder / CARD).read_text("utf-8")
    assert f"--recipe {provenance_of(recorded).recipe.name}" in card
    assert "--recipe stock" not in card and "--sweeps" not in card
    assert document(folder, PROVENANCE)["format_version"] == 2
    assert command("card", folder, "--against", POCKET, "--quiet").code == 0


@pytest.mark.parametrize("name", [PROVENANCE, PARITY])
@pytest.mark.parametrize("version", [3, 10**9, "2", True, 2.0, None, 0, -1])
def test_no_other_version_is_read(tmp_path: Path, name: str, version: object) -> None:
    folder = old_package(tmp_path / "other-bnb-4bit", CALIBRATED)
    (folder / name).write_text(json.dumps(document(folder, name) | {"format_version": version}))
    kind = Provenance if name == PROVENANCE else Evidence
    newer = type(version) is int and version > 2
    with pytest.raises(PackageError, match="pip install --upgrade" if newer else "as its format version") as raised:
        read_record(kind, folder / name)
    assert isinstance(raised.value, NewerFormat) == newer and "\n" not in str(raised.value)


@pytest.mark.parametrize("version", [3, "2", True])
def test_commands_refuse_it_in_one_line(tmp_path: Path, command: Callable[..., Outcome], version: object) -> None:
    folder = old_package(tmp_path / "newer-bnb-4bit", CALIBRATED)
    newer = document(folder, PROVENANCE) | {"format_version": version}
    (folder / PROVENANCE).write_text(json.dumps(newer))
    for arguments in (
        ("run", POCKET, "--output", folder, "--device", "cpu"),
        ("verify", folder, "--against", POCKET, "--device", "cpu"),
        ("card", folder, "--against", POCKET),
        ("push", folder, "--to", "tester/newer-bnb-4bit"),
    ):
        ended = command(*arguments, "--quiet")
        assert ended.code == 1 and len(ended.err.splitlines()) == 1, (arguments, ended.err)
        assert ended.err.startswith(f"error: {folder / PROVENANCE} has ") and "format version" in ended.err
    assert document(folder, PROVENANCE) == newer and (folder / CARD).read_text() == "the card of then"


def test_a_broken_file_of_version_1_is_named(tmp_path: Path) -> None:
    for content in ({"format_version": 1}, {"recipe": 5}, {"rungs": [5]}, {}):
        (tmp_path / PROVENANCE).write_text(json.dumps(content))
        with pytest.raises(PackageError, match=r"provenance\.json is not readable as Provenance"):
            read_record(Provenance, tmp_path / PROVENANCE)
        with pytest.raises(PackageError, match="is not readable as Evidence"):
            read_record(Evidence, tmp_path / PROVENANCE)


@both
def test_what_nobody_can_judge_again_is_made_again(recorded: Path, tmp_path: Path) -> None:
    folder = old_package(tmp_path / "out", recorded)
    opened = package.open_package(folder)
    source, demand = opened.provenance.source, opened.provenance.demand
    with pytest.raises(PackageError, match=r"before figures of single windows were recorded.*replace it with --force"):
        package.finished(folder, source, demand)
    assert package.finished(folder, source, demand, outdated=True) is None
