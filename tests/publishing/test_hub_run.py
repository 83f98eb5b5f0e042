"""The whole job over real HTTP: default model from a loopback Hub, quantized, proved, pushed, loaded again."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import POCKET, QUICK_OPTIONS
from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault
from tests.publishing.warm_process import Ended
from tests.publishing.workspace import MEASURING, MODEL, NAME, TARGET, Place

RUN = ("run", MODEL, "--device", "cpu", *QUICK_OPTIONS, "-q")


def error_line(ended: Ended) -> str:
    """The one line that a known failure prints."""
    assert ended.code == 1, (ended.code, ended.err)
    assert "Traceback" not in ended.err
    (line,) = (line for line in ended.err.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture
def folder(place: Place, tmp_path: Path) -> Path:
    """An empty folder; the Hub's cache is empty as well."""
    place.fresh(tmp_path, fetched=False, made=False)
    (tmp_path / "catalogue.toml").unlink()
    return tmp_path


@pytest.mark.slow
def test_what_was_pushed_is_judged_and_not_pushed_twice(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.run("push", folder).code == 0
    before = len(place.hub.log(TARGET))
    again = place.run("push", folder)
    assert again.code == 0 and "already there, nothing to do" in again.err and WRITE_TOKEN not in again.err
    assert len(place.hub.log(TARGET)) == before

    options = ("--figures", "figures", "--device", "cpu", *MEASURING, "--json")
    judged = place.quantize("verify", TARGET, *options, folder=folder)
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["scores"] == json.loads((folder / NAME / "parity.json").read_text())["scores"]
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {path.name for path in (folder / NAME / "figures").iterdir()}

    (folder / NAME / "config.json").write_text("{}")
    assert "config.json is changed" in error_line(place.run("push", folder))
    assert len(place.hub.log(TARGET)) == before


@pytest.mark.slow
def test_a_revision_is_resolved_once_and_kept(place: Place, folder: Path) -> None:
    commit = place.hub.head(MODEL)
    place.hub.commit(MODEL, {"README.md": b"a later card"}, message="later")
    try:
        made = place.quantize(*RUN, "--revision", commit, folder=folder)
        assert made.code == 0, made.err
        provenance = json.loads((folder / NAME / "provenance.json").read_text())
        assert provenance["source"]["commit"] == commit != place.hub.head(MODEL)
        card = (folder / NAME / "README.md").read_text()
        assert "a later card" not in card
        verified = place.quantize("verify", NAME, "--device", "cpu", *MEASURING, "-q", folder=folder)
        assert verified.code == 0, verified.err
        seen = len(place.hub.requests)
        rendered = place.quantize("card", NAME, "-q", folder=folder)
        assert rendered.code == 0, rendered.err
        assert (folder / NAME / "README.md").read_text() == card
        assert not [one for one in place.hub.requests[seen:] if one.method == "GET" and "/resolve/" in one.path]
    finally:
        place.restore_source()


def test_refusals_name_their_reason(place: Place, folder: Path) -> None:
    hub = place.hub
    hub.create_repo("org/pickled")
    config = (POCKET / "config.json").read_bytes()
    hub.commit("org/pickled", {"config.json": config, "pytorch_model.bin": b"pickle", "tokenizer.json": b"{}"})
    hub.create_repo("org/gated", gated=True)
    hub.commit("org/gated", {"config.json": config, "model.safetensors": b"0" * 64, "tokenizer.json": b"{}"})
    hub.create_repo("org/secret", private=True)
    expected = {
        ("org/absent",): "no such repo: org/absent",
        ("org/secret",): "no such repo: org/secret",
        (MODEL, "--revision", "v9"): f"{MODEL} has no revision 'v9'",
        ("org/gated",): "org/gated is gated: accept its terms at",
        ("org/pickled",): "it has only pickle weights",
    }
    for arguments, message in expected.items():
        assert message in error_line(place.quantize("run", *arguments, "-q", folder=folder, token=READ_TOKEN))
    assert list(folder.iterdir()) == []


def test_push_needs_a_token_that_may_write(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    place.hub.add_user("stranger", "hf_stranger")
    expected = {
        "": "no token for the Hub",
        READ_TOKEN: "the token of reader may only read",
        "hf_stranger": "stranger cannot make it under tester with this token: publish under stranger",
    }
    for token, message in expected.items():
        assert message in error_line(place.run("push", folder, "-q", token=token))
    with pytest.raises(LookupError):
        place.hub.head(TARGET)


@pytest.mark.slow
def test_damage_on_the_way_is_noticed_and_mended(place: Place, folder: Path) -> None:
    """Bytes of the right number but wrong content arrive once: the second download counts."""
    place.hub.inject(Fault(method="GET", path=r"^/lfs/", times=1, kind="corrupt"))
    made = place.quantize(*RUN, folder=folder)
    assert made.code == 0, made.err
    files = json.loads((folder / NAME / "provenance.json").read_text())["source"]["files"]
    digest = hashlib.sha256(place.hub.files(MODEL)["model.safetensors"]).hexdigest()
    assert {file["path"]: file["sha256"] for file in files}["model.safetensors"] == digest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_download_that_is_stopped(place: Place, folder: Path, number: signal.Signals) -> None:
    """The weights never arrive; after the signal nothing is left but the Hub's cache, and the next run succeeds."""
    place.hub.inject(Fault(method="GET", path=r"^/lfs/", kind="hang", times=None))
    seen = len(place.hub.requests)
    child = place.warm.start(*RUN, cwd=folder, env={"HF_TOKEN": WRITE_TOKEN})
    while not any(request.fault for request in place.hub.requests[seen:]):
        time.sleep(0.01)
    child.send(number)
    place.hub.clear_faults()
    ended = child.wait()
    assert ended.code == (130 if number == signal.SIGINT else -signal.SIGKILL), ended.err
    assert "Traceback" not in ended.err
    assert not (folder / NAME).exists()
    again = place.quantize(*RUN, folder=folder)
    assert again.code == 0, again.err


def test_lasting_damage_is_refused(place: Place, folder: Path) -> None:
    place.hub.inject(Fault(method="GET", path=r"^/lfs/", times=None, kind="corrupt"))
    line = error_line(place.quantize("run", MODEL, "--device", "cpu", "-q", folder=folder))
    assert f"model.safetensors of {MODEL} arrives with a wrong hash" in line
