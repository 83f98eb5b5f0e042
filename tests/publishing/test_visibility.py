"""Who may read what is published: a restricted original stays so, and a private repo is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import WRITE_TOKEN
from tests.publishing.workspace import CATALOGUE, COMMANDS, MODEL, TARGET, Place

PUSH, RUN = COMMANDS["push"], COMMANDS["run --push-to"]
SYNC = COMMANDS["sync"]


@pytest.fixture(params=["private", "gated", "gone"])
def restricted(place: Place, request: pytest.FixtureRequest) -> Iterator[str]:
    """How the packages' original is kept from others."""
    place.hub.delete_repo(MODEL)
    if request.param != "gone":
        place.hub.create_repo(MODEL, private=request.param == "private", gated=request.param == "gated")
        place.hub.add_user("tester", WRITE_TOKEN, reads=["distilbert"])
    yield request.param
    place.hub.add_user("tester", WRITE_TOKEN)
    place.restore_source()


@pytest.mark.slow
def test_a_restricted_original_is_published_publicly_on_demand_only(
    place: Place, tmp_path: Path, restricted: str
) -> None:
    folder = place.fresh(tmp_path)
    words = "not visible" if restricted == "gone" else f"is {restricted}"
    for options in ((), ("--dry-run",), ("--pr",)):
        if options == ("--pr",):
            place.hub.create_repo(TARGET)
        refused = place.quantize(*PUSH, *options, folder=folder)
        assert refused.code == 1 and words in refused.err and "say --public" in refused.err, refused.err
    assert place.commits() == []
    allowed = place.quantize(*PUSH, "--public", folder=folder)
    assert allowed.code == 0 and not place.hub.is_private(TARGET), allowed.err
    place.hub.delete_repo(TARGET)
    hidden = place.quantize(*PUSH, "--private", folder=folder)
    assert hidden.code == 0 and place.hub.is_private(TARGET), hidden.err
    assert place.quantize(*PUSH, folder=folder).code == 0


def test_run_and_sync_find_out_before_any_work(place: Place, tmp_path: Path) -> None:
    secret = "tester/secret"
    place.hub.delete_repo(secret)
    place.hub.create_repo(secret, private=True)
    place.hub.commit(secret, {path.name: path.read_bytes() for path in place.source.iterdir() if path.is_file()})
    folder = place.fresh(tmp_path)
    shutil.rmtree(folder / "sync")
    run = ("run", secret, *RUN[2:])
    for command in (run, (*run, "--dry-run")):
        refused = place.quantize(*command, folder=folder)
        assert refused.code == 1 and f"the original {secret} is private" in refused.err and "4 bits" not in refused.err
    assert place.quantize(*run, "--private", "--dry-run", folder=folder).code == 0
    (folder / "catalogue.toml").write_text(CATALOGUE.replace(MODEL, secret))
    assert f"the original {secret} is private" in place.quantize(*SYNC, "--dry-run", folder=folder).err
    for key in ("private", "public"):
        (folder / "catalogue.toml").write_text(f"{CATALOGUE.replace(MODEL, secret)}{key} = true\n")
        assert place.quantize(*SYNC, "--dry-run", folder=folder).code == 0
    (folder / "catalogue.toml").write_text(f"{CATALOGUE}private = true\npublic = true\n")
    both = place.quantize(*SYNC, "--dry-run", folder=folder)
    assert both.code == 1 and "catalogue.toml:9: private and public exclude each other" in both.err


def test_private_is_not_granted_by_a_public_repo(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    for command in (PUSH, (*PUSH, "--dry-run"), RUN):
        refused = place.quantize(*command, "--private", folder=folder)
        assert refused.code == 1 and f"{TARGET} is public, and --private makes only a new repo private" in refused.err
    assert place.commits() == []
    assert place.quantize(*PUSH, "--private", "--public", folder=folder).code == 2


def test_who_may_read_a_new_repo_is_read_back(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.fresh(tmp_path)
    shown = place.quantize(*PUSH, folder=folder)
    assert f"{TARGET} was created and is public" in shown.err
    place.hub.delete_repo(TARGET)
    monkeypatch.setattr(place.hub, "ignores_private", True)
    refused = place.quantize(*PUSH, "--private", folder=folder)
    assert refused.code == 1 and "as a public repo although a private one was asked for" in refused.err
    assert place.commits() == []
    planned = json.loads(place.quantize(*PUSH, "--dry-run", "--json", folder=folder).out)
    assert planned["access"] == "public"
