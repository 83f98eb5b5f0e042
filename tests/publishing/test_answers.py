"""What the Hub says is done or told: how long to wait, what the token may do, why not, and what it does not say."""

from __future__ import annotations

import datetime
import email.utils
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize import hub
from tests.hub import Fault
from tests.publishing.workspace import COMMANDS, MODEL, STEPS, TARGET, Place

SOURCE = ("GET", rf"^/api/models/{MODEL}")
PUSH, RUN = COMMANDS["push"], COMMANDS["run --push-to"]


# How long to wait


@pytest.mark.parametrize("step", ["announce files", "commit", "what is there", "send a large file"])
def test_a_push_goes_on_after_the_wait_that_the_hub_names(place: Place, tmp_path: Path, step: str) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    place.hub.inject(Fault(*STEPS[step], status=429, rate_limit=15))
    seen = len(place.hub.requests)
    done = place.quantize(*PUSH, folder=folder)
    assert done.code == 0 and "the Hub asks to wait 16 s" in done.err, done.err
    assert len([one for one in place.hub.requests[seen:] if one.status == 429]) == 1


def in_seconds(seconds: int) -> str:
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(until, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "least"),
    [({"rate_limit": 250}, 250), ({"retry_after": 40}, 40), ({"retry_after": "a time of day"}, 60), ({}, 0)],
)
def test_it_waits_as_long_as_either_header_says(
    place: Place, monkeypatch: pytest.MonkeyPatch, headers: dict[str, Any], least: float
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    for name, value in place.hub.env(home=place.cache.parent).items():
        monkeypatch.setenv(name, value)
    place.hub.clear_faults()
    if headers.get("retry_after") == "a time of day":
        headers = {"retry_after": in_seconds(100)}
    place.hub.inject(Fault(*SOURCE, status=429, **headers))
    assert hub.access(MODEL) == hub.PUBLIC
    assert least <= naps[0] <= max(least, 100) + 1 and len(naps) == 1


@pytest.mark.parametrize("step", ["announce files", "commit", "send a large file"])
def test_a_wait_longer_than_allowed_is_told(place: Place, tmp_path: Path, step: str) -> None:
    folder = place.fresh(tmp_path)
    place.hub.inject(Fault(*STEPS[step], status=429, rate_limit=3000, times=None))
    started = time.monotonic()
    ended = place.quantize(*PUSH, "--hub-wait", "20", folder=folder)
    assert ended.code == 1 and "(it asks to wait 3001 s, which is more than --hub-wait 20 leaves)" in ended.err
    assert time.monotonic() - started < 20 and place.commits() == []


@pytest.mark.parametrize("status", [501, 507])
def test_what_another_attempt_cannot_change_is_not_tried_again(place: Place, tmp_path: Path, status: int) -> None:
    folder = place.fresh(tmp_path)
    place.hub.inject(Fault(*STEPS["commit"], status=status, times=None, message="Insufficient storage"))
    seen = len(place.hub.requests)
    ended = place.quantize(*PUSH, folder=folder)
    assert ended.code == 1 and f"the Hub answered {status}" in ended.err and "will not help" in ended.err
    assert len([one for one in place.hub.requests[seen:] if one.status == status]) == 1


# What the token may do


@pytest.mark.parametrize(
    ("rights", "advice"),
    [
        ({"reads": ["herons"]}, "publish under member"),
        ({"orgs": ["herons"], "scope": ("member",)}, "publish under member"),
        ({"orgs": ["herons"], "scope": ("cranes",)}, "log in with a token that may"),
    ],
)
def test_rights_to_create_a_repo_are_asked_before_work(
    place: Place, tmp_path: Path, rights: dict[str, Any], advice: str
) -> None:
    place.hub.add_user("member", "hf_member", **rights)
    folder = place.fresh(tmp_path)
    for command in (("push", PUSH[1], "--to", "herons/new"), ("run", MODEL, "--push-to", "herons/new", *RUN[4:])):
        refused = place.quantize(*command, folder=folder, token="hf_member")
        assert refused.code == 1 and f"cannot make it under herons with this token: {advice}" in refused.err
        assert "4 bits" not in refused.err


def test_a_fine_grained_token_publishes_within_its_scope(place: Place, tmp_path: Path) -> None:
    place.hub.delete_repo("herons/new")
    place.hub.add_user("member", "hf_scoped", orgs=["herons"], scope=("herons",))
    ended = place.quantize("push", PUSH[1], "--to", "herons/new", folder=place.fresh(tmp_path), token="hf_scoped")
    assert ended.code == 0, ended.err


# Why not


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Private repository storage limit reached, please upgrade your plan", "free some of the account's storage"),
        ("Access to this resource is disabled.", "ask the Hub's staff why"),
        ("Discussions are disabled for this repo", "turn on discussions"),
        ("This repo is being moved", "(403: This repo is being moved)"),
        ("You don't have the required permissions to perform this action", "the token is missing, expired or lacks"),
        ("", "the token is missing, expired or lacks"),
    ],
)
def test_a_403_is_told_as_what_it_says(place: Place, tmp_path: Path, message: str, words: str) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    for step in ("announce large files", "commit"):
        place.hub.inject(Fault(*STEPS[step], status=403, message=message))
        ended = place.quantize(*PUSH, folder=folder)
        assert ended.code == 1 and words in ended.err and message.rstrip(".") in ended.err, ended.err
        assert ("log in" in ended.err) == ("token" in words)


# What it does not say


@pytest.fixture
def silent(place: Place) -> Iterator[Place]:
    """A Hub that tells neither sizes and hashes nor whether a token may write."""
    place.hub.tells_content = False
    yield place
    place.hub.tells_content = True


@pytest.mark.slow
def test_what_a_hub_does_not_tell_is_named_and_no_reason_to_stop(silent: Place, tmp_path: Path) -> None:
    folder = silent.fresh(tmp_path)
    silent.hub.inject(Fault("GET", r"/auth-check", status=404, times=None, message="no such route"))
    silent.hub.create_repo(TARGET)
    planned = json.loads(silent.quantize(*PUSH, "--dry-run", "--json", folder=folder).out)
    assert planned["notes"] == [f"not checked: this Hub does not tell whether the token may write to {TARGET}"]
    done = silent.quantize(*PUSH, folder=folder)
    assert done.code == 0 and "this Hub does not tell whether" in done.err, done.err
    assert "not checked: the Hub tells no hash of" in done.err and "--verify-download" in done.err
    assert silent.quantize(*PUSH, "--verify-download", folder=folder).code == 0
    again = silent.quantize(*RUN, "--json", folder=folder)
    assert json.loads(again.out)["state"] == "up to date" and "not checked: the Hub tells no hash" in again.err
    silent.require_whole()


@pytest.mark.slow
def test_a_source_whose_hashes_are_not_told_is_said_to_be_unchecked(silent: Place, tmp_path: Path) -> None:
    folder = silent.fresh(tmp_path, fetched=False, made=False)
    done = silent.quantize(*RUN, folder=folder)
    assert done.code == 0 and "not checked: the Hub tells no hash of" in done.err, done.err


def test_weights_of_unknown_origin_are_not_touched_on_a_silent_hub(silent: Place, tmp_path: Path) -> None:
    folder = silent.fresh(tmp_path)
    silent.hub.create_repo(TARGET)
    silent.hub.commit(TARGET, {"model.safetensors": b"years of training"})
    refused = silent.quantize(*PUSH, folder=folder)
    assert refused.code == 1 and "holds weights that were not uploaded by quantize" in refused.err
