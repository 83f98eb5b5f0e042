"""Packages on the Hub that another version of quantize published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize.files import PROVENANCE
from tests.publishing.workspace import TARGET, Place

OPTIONS = {"size_budget": 1.0, "sweeps": 1, "epochs": 0, "calibration": "self", "calibration_windows": 128}


def published_record(place: Place) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(place.hub.files(TARGET)[PROVENANCE])
    return content


def as_version_1(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a package that was rounded to nearest, as quantize wrote it in format version 1."""
    recipe = {key: value for key, value in record["recipe"].items() if key != "options"} | OPTIONS | {"name": "stock"}
    former = {"requested": "asked", "calibration_text": "calibrated", "standard_perplexities": "conventions"}
    former |= {"half_precision_modules": "spared", "block_32_modules": "fine"}

    def renamed(part: dict[str, Any]) -> dict[str, Any]:
        return {former.get(key, key): value for key, value in part.items()}

    parts = {"recipe": recipe, "quantized": renamed(record["quantized"]), "settings": renamed(record["settings"])}
    return renamed(record) | parts | {"key": "of version 1", "format_version": 1}


def test_a_package_of_version_1_is_up_to_date(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.run("run --push-to", folder).code == 0
    old = as_version_1(published_record(place))
    place.hub.commit(TARGET, {PROVENANCE: json.dumps(old).encode()}, message="as before")
    again = place.run("run --push-to", folder, "--refresh-card", "--json")
    assert json.loads(again.out)["state"] == "up to date", again.err
    assert place.commits()[0] == "as before"


def test_a_package_of_a_later_version_is_left_alone(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.run("run --push-to", folder).code == 0
    newer = published_record(place) | {"format_version": 3}
    place.hub.commit(TARGET, {PROVENANCE: json.dumps(newer).encode()}, message="from the future")
    for name in ("run --push-to", "push", "sync"):
        refused = place.run(name, folder, "--quiet")
        assert refused.code == 1 and len(refused.err.splitlines()) == 1, refused.err
        assert f"{PROVENANCE} of {TARGET} has format version 3" in refused.err and "--upgrade" in refused.err
    assert place.commits()[0] == "from the future"
