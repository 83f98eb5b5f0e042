"""What the options of publishing do, over real HTTP; kills, races, and what a failing run leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from quantize.records import Recipe
from tests.hub import WRITE_TOKEN, Fault
from tests.publishing.test_audit import Forged, weights_of
from tests.publishing.warm_process import Child
from tests.publishing.workspace import COMMANDS, MODEL, NAME, REPO, STEPS, TARGET, Place

RUN = COMMANDS["run --push-to"]
PUSH = COMMANDS["push"]


def card_of(folder: Path) -> str:
    return (folder / NAME / "README.md").read_text("utf-8")


def altered(folder: Path, name: str) -> Path:
    """Another package, sealed as well: it has one more file."""
    from quantize import package

    other = Path(shutil.copytree(folder / NAME, folder / name))
    (other / "EXTRA.txt").write_text(f"of {name}")
    package.seal(other, package.open_package(other).provenance)
    return other


def earlier_package(place: Place, folder: Path, files: dict[str, bytes], base: dict[str, bytes] | None = None) -> None:
    """A commit of an earlier package that had `files` only."""
    provenance = json.loads((folder / NAME / "provenance.json").read_text())
    provenance["files"] = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()
    ]
    place.hub.create_repo(TARGET)
    record = json.dumps(provenance).encode()
    place.hub.commit(TARGET, {**files, **(base or {}), "provenance.json": record}, message="an earlier package")


def test_what_an_earlier_package_left_goes_and_what_others_put_there_stays(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    files = {"model-00001-of-00002.safetensors": b"old", "chat_template.jinja": b"old", "NOTICE": b"old"}
    earlier_package(place, folder, files)
    place.hub.commit(TARGET, {"NOTES.md": b"mine", "NOTICE": b"somebody's own words"}, message="somebody else")
    assert place.quantize(*PUSH, folder=folder).code == 0
    there = place.hub.files(TARGET)
    assert {"NOTES.md", "NOTICE"} <= there.keys() and not (files.keys() - {"NOTICE"}) & there.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_weights_of_another_origin_are_never_touched(place: Place, tmp_path: Path, name: str) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    place.hub.commit(TARGET, {name: b"years of training"}, message="mine")
    for command in (PUSH, (*PUSH, "--branch", "next"), RUN):
        refused = place.quantize(*command, folder=folder)
        assert refused.code == 1 and f"holds weights that were not uploaded by quantize ({name})" in refused.err
    assert place.commits() == ["mine"] and "refs/heads/next" not in place.hub.refs(TARGET)


def test_the_source_itself_is_no_target(place: Place, tmp_path: Path) -> None:
    refused = place.quantize("run", "tester/own", "--push-to", "Tester/Own", folder=tmp_path)
    assert refused.code == 1 and "is the source itself" in refused.err


def test_a_new_branch_begins_at_main_and_loses_what_main_s_package_left(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    earlier_package(place, folder, {"model-00001-of-00002.safetensors": b"old"})
    done = place.quantize(*PUSH, "--branch", "next", folder=folder)
    assert done.code == 0, done.err
    place.require_whole("next")
    assert place.quantize(*PUSH, "--branch", "next", folder=folder).code == 0
    assert len(place.hub.log(TARGET, "next")) == 3 and len(place.commits()) == 1


def test_somebody_makes_the_repo_at_the_same_time(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)

    def another() -> None:
        place.hub.create_repo(TARGET)
        place.hub.commit(TARGET, {"model-00001-of-00002.safetensors": b"theirs"}, message="theirs")

    place.hub.inject(Fault("POST", r"^/api/repos/create", kind="none", meanwhile=another))
    refused = place.quantize(*PUSH, folder=folder)
    assert refused.code == 1 and "somebody else made" in refused.err and place.commits() == ["theirs"]


def test_a_dry_run_says_everything_and_changes_nothing(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    before = len(place.hub.requests)
    planned = json.loads(place.quantize(*PUSH, "--dry-run", "--json", folder=folder).out)
    assert planned["creates_repo"] and planned["head"] is None
    sizes = {path.relative_to(folder / NAME).as_posix(): path.stat().st_size for path in (folder / NAME).rglob("*.*")}
    changes = {change["path"]: change for change in planned["changes"]}
    assert all(changes[path] == {"action": "create", "path": path, "size": size} for path, size in sizes.items())
    asked = place.hub.requests[before:]
    assert {one.method for one in asked} <= {"GET", "HEAD"} | {"POST"}
    assert [one.path for one in asked if one.method == "POST"] == ["/api/validate-yaml"]
    assert place.commits() == []

    earlier_package(place, folder, {"old.safetensors": b"old"})
    place.hub.commit(TARGET, {"config.json": b"{}", "NOTES.md": b"mine"})
    shown = place.quantize(*PUSH, "--dry-run", folder=folder)
    assert re.search(r"delete +old.safetensors", shown.err) and re.search(r"replace +config.json", shown.err)
    assert "NOTES.md" not in shown.err and "nothing was changed" in shown.err
    pruned = place.quantize(*PUSH, "--dry-run", "--prune", folder=folder)
    assert re.search(r"delete +NOTES.md", pruned.err) and ".gitattributes" not in pruned.err
    assert len(place.commits()) == 2


def test_prune_deletes_what_nobody_packaged(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    place.hub.commit(TARGET, {"pytorch_model.bin": b"foreign", "NOTES.md": b"mine"})
    refused = place.quantize(*PUSH, folder=folder)
    assert refused.code == 1 and "--prune" in refused.err
    assert place.quantize(*PUSH, "--prune", folder=folder).code == 0
    assert not {"pytorch_model.bin", "NOTES.md"} & place.hub.files(TARGET).keys()
    place.require_whole()


def test_branch_tag_message_and_private(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    options = ("--branch", "next", "--tag", "v1", "--message", "For the reading room", "--private", "--json")
    receipt = json.loads(place.quantize(*PUSH, *options, folder=folder).out)
    refs = place.hub.refs(TARGET)
    assert refs["refs/heads/next"] == refs["refs/tags/v1"] == receipt["commit"] != refs["refs/heads/main"]
    assert place.hub.log(TARGET, "next")[0].title == "For the reading room"
    assert receipt["branch"] == "next" and receipt["tag"] == "v1" and receipt["started"] <= receipt["finished"]
    assert place.commits() == []
    place.require_whole("next")
    stranger = place.quantize(*PUSH, folder=folder, token="hf_loopback_read")
    assert stranger.code == 1 and "may only read" in stranger.err

    altered(folder, "second")
    taken = place.quantize("push", "second", "--to", TARGET, "--branch", "next", "--tag", "v1", folder=folder)
    assert taken.code == 1 and "has a tag v1 on another commit" in taken.err
    assert len(place.hub.log(TARGET, "next")) == 2
    again = place.quantize(*PUSH, *options, folder=folder)
    assert again.code == 0 and not json.loads(again.out)["created_commit"]


def test_one_pull_request_is_opened_and_then_updated(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    missing = place.quantize(*PUSH, "--pr", folder=folder)
    assert missing.code == 1 and "publish it without --pr" in missing.err
    place.hub.create_repo(TARGET)
    first = json.loads(place.quantize(*PUSH, "--pr", "--json", folder=folder).out)
    assert first["pull_request"].endswith(f"/{TARGET}/discussions/1") and place.commits() == []
    assert not json.loads(place.quantize(*PUSH, "--pr", "--json", folder=folder).out)["created_commit"]
    altered(folder, "second")
    second = json.loads(place.quantize("push", "second", "--to", TARGET, "--pr", "--json", folder=folder).out)
    assert second["pull_request"] == first["pull_request"] and second["created_commit"]
    assert place.hub.pull_requests(TARGET) == [1] and place.hub.refs(TARGET)["refs/pr/1"] == second["commit"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop-reply", "hang"])
def test_a_lost_reply_never_opens_a_second_pull_request(place: Place, tmp_path: Path, kind: str) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    applied = kind == "hang"
    place.hub.inject(Fault("POST", rf"^/api/models/{TARGET}/commit", kind=kind, applied=applied))  # type: ignore[arg-type]
    receipt = json.loads(place.quantize(*PUSH, "--pr", "--json", folder=folder).out)
    assert receipt["pull_request"].endswith("/discussions/1") and place.hub.pull_requests(TARGET) == [1]


def test_a_pull_request_is_not_tried_twice_when_nobody_can_tell(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    place.hub.inject(Fault("POST", rf"^/api/models/{TARGET}/commit", kind="drop-reply"))
    place.hub.inject(Fault("GET", rf"^/api/models/{TARGET}/discussions", skip=1, times=4))
    unsure = place.quantize(*PUSH, "--pr", folder=folder)
    assert unsure.code == 1 and place.hub.pull_requests(TARGET) == [1]
    place.hub.clear_faults()
    again = json.loads(place.quantize(*PUSH, "--pr", "--json", folder=folder).out)
    assert again["pull_request"].endswith("/discussions/1") and place.hub.pull_requests(TARGET) == [1]


@pytest.mark.slow
def test_what_was_published_is_fetched_loaded_and_scored(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    done = place.quantize(*PUSH, "--verify-download", "--json", folder=folder)
    assert done.code == 0, done.err
    proof = json.loads(done.out)["downloaded"]
    assert proof["sample_tokens"] > 50 and abs(proof["sample_nll"] - proof["package_nll"]) < 1e-3
    assert proof["files"] == sum(path.is_file() for path in (folder / NAME).rglob("*")) - 1 and proof["windows"] == 4
    assert json.loads((folder / NAME / "receipt.json").read_text()) == json.loads(done.out)
    place.hub.inject(Fault("GET", r"^/lfs/.*/model.safetensors", kind="corrupt", times=None))
    spoiled = place.quantize(*PUSH, "--verify-download", folder=folder)
    assert spoiled.code == 1 and "model.safetensors comes back from" in spoiled.err
    place.hub.clear_faults()


@pytest.mark.slow
def test_weights_of_another_recipe_are_found_by_measuring_again(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    forged = Forged(folder / NAME)
    weights_of(Recipe("hqq"), forged, place.source)
    forged.seal()
    ended = place.quantize(*PUSH, "--verify-download", "--device", "cpu", folder=folder)
    assert ended.code == 1 and "is not the one that was measured" in ended.err, ended.err


def test_a_package_under_another_name_gets_a_card_that_names_its_repo(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    other = "tester/by-another-name"
    place.hub.delete_repo(other)
    push = ("push", NAME, "--to", other)
    before = card_of(folder)
    planned = json.loads(place.quantize(*push, "--dry-run", "--json", folder=folder).out)
    assert card_of(folder) == before and TARGET in before
    done = place.quantize(*push, folder=folder)
    assert done.code == 0, done.err
    published = place.hub.files(other)
    card = published["README.md"].decode()
    assert f'model_id = "{other}"' in card and TARGET not in card and card == card_of(folder)
    assert json.loads(published["provenance.json"])["name"] == other
    sizes = {change["path"]: change["size"] for change in planned["changes"]}
    assert sizes == {path: len(data) for path, data in published.items() if path != ".gitattributes"}
    assert not json.loads(place.quantize(*push, "--json", folder=folder).out)["created_commit"]


def test_a_card_of_a_template_keeps_its_text_where_the_template_is_not_at_hand(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    template = folder / "mine.j2"
    template.write_text("# {{ package_name }}, in other words\n")
    assert place.quantize("card", NAME, "--card-template", str(template), folder=folder).code == 0
    done = place.quantize("push", NAME, "--to", "tester/of-a-template", folder=folder)
    assert done.code == 0 and "the card's text is that of your template" in done.err, done.err
    card = place.hub.files("tester/of-a-template")["README.md"].decode()
    assert f"# {TARGET}, in other words" in card and "name: tester/of-a-template" in card
    again = place.quantize(
        *("push", NAME, "--to", "tester/of-a-template", "--card-template", str(template)), folder=folder
    )
    assert again.code == 0, again.err
    assert b"# tester/of-a-template, in other words" in place.hub.files("tester/of-a-template")["README.md"]


@pytest.mark.slow
def test_an_up_to_date_repo_is_left_alone_without_downloading(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    shutil.rmtree(folder / NAME)
    shutil.rmtree(place.cache)
    seen = len(place.hub.requests)
    again = place.quantize(*RUN, "--json", folder=folder)
    assert again.code == 0 and json.loads(again.out)["state"] == "up to date"
    fetched = [one.path for one in place.hub.requests[seen:] if "/resolve/" in one.path or "/lfs/" in one.path]
    assert {path.rsplit("/", 1)[-1] for path in fetched} == {"provenance.json"}
    assert not (folder / NAME).exists() and len(place.commits()) == 1
    published = json.loads(place.hub.files(TARGET)["provenance.json"])
    card = place.hub.files(TARGET)["README.md"].decode()
    assert f"quantize_key: {published['key']}\n" in card and f'model_id = "{TARGET}"' in card

    differs = place.quantize(*RUN, "--dry-run", "--no-double-quant", "--json", folder=folder)
    assert json.loads(differs.out)["state"] == "would publish"
    stricter = place.quantize(*RUN[:-1], "good", "--dry-run", "--json", folder=folder)
    assert json.loads(stricter.out)["state"] == "would publish"
    for option in (("--seed", "1"), ("--controls",), ("--max-windows", "32"), ("--force",)):
        otherwise = place.quantize(*RUN, *option, "--dry-run", "--json", folder=folder)
        assert json.loads(otherwise.out)["state"] == "would publish", option
    config = place.hub.files(TARGET)["config.json"]
    place.hub.commit(TARGET, {"config.json": config.replace(b"nf4", b"fp4")}, message="tampered with, of equal size")
    tampered = place.quantize(*RUN, "--dry-run", "--json", folder=folder)
    assert json.loads(tampered.out)["state"] == "would publish"


@pytest.mark.slow
def test_small_files_of_a_record_without_git_names_are_fetched_and_hashed(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    record = json.loads(place.hub.files(TARGET)["provenance.json"])
    del record["blob_ids"]
    place.hub.commit(TARGET, {"provenance.json": json.dumps(record).encode()}, message="as versions before had it")
    again = place.quantize(*RUN, "--json", folder=folder)
    assert json.loads(again.out)["state"] == "up to date", again.err
    config = place.hub.files(TARGET)["config.json"]
    place.hub.commit(TARGET, {"config.json": config.replace(b"nf4", b"fp4")}, message="tampered with, of equal size")
    tampered = place.quantize(*RUN, "--dry-run", "--json", folder=folder)
    assert json.loads(tampered.out)["state"] == "would publish"


def test_a_file_that_changes_while_it_is_published_is_named(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    tokenizer = folder / NAME / "tokenizer_config.json"

    def another() -> None:
        tokenizer.write_bytes(tokenizer.read_bytes()[::-1])

    place.hub.inject(Fault("POST", r"^/api/validate-yaml", kind="none", meanwhile=another))
    ended = place.quantize(*PUSH, folder=folder)
    assert ended.code == 1 and "tokenizer_config.json was changed while it was published" in ended.err


@pytest.mark.slow
def test_what_else_was_asked_is_done_where_the_package_is_up_to_date(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    tagged = place.quantize(*RUN, "--tag", "v1", "--verify-download", folder=folder)
    assert tagged.code == 0 and "fetching" in tagged.err
    assert place.hub.refs(TARGET)["refs/tags/v1"] == place.hub.head(TARGET) and len(place.commits()) == 1
    place.hub.inject(Fault("GET", r"^/lfs/.*/model.safetensors", kind="corrupt", times=None))
    spoiled = place.quantize(*RUN, "--verify-download", folder=folder)
    assert spoiled.code == 1 and "model.safetensors comes back from" in spoiled.err
    place.hub.clear_faults()
    made = (folder / NAME / "provenance.json").stat().st_mtime_ns
    assert place.quantize(*RUN, "--force", folder=folder).code == 0
    assert (folder / NAME / "provenance.json").stat().st_mtime_ns != made


@pytest.mark.parametrize(
    "record", [b'{"files": 5}', b'{"files": [{"path": ["x"]}]}', b"[]", b"no JSON", b"[" * 100_000, b"\xff\xfe"]
)
def test_a_record_that_cannot_be_read_counts_as_none(place: Place, tmp_path: Path, record: bytes) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    place.hub.commit(TARGET, {"provenance.json": record, "README.md": b"\xff"})
    planned = place.quantize(*RUN, "--dry-run", "--refresh-card", "--json", folder=folder)
    assert json.loads(planned.out)["state"] == "would publish", planned.err
    assert place.quantize(*PUSH, folder=folder).code == 0
    place.require_whole()


def test_a_corrupt_record_is_fetched_again(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    shutil.rmtree(place.cache)
    place.hub.inject(Fault("GET", rf"^/{TARGET}/resolve/.*/provenance.json", kind="corrupt"))
    again = place.quantize(*RUN, "--json", folder=folder)
    assert json.loads(again.out)["state"] == "up to date", again.err


@pytest.mark.slow
def test_cards_that_others_touched(place: Place, tmp_path: Path) -> None:
    """An edited card is left alone by a refresh; a deleted one is not up to date."""
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    for text in (b"# By hand", b"\xff"):
        place.hub.commit(TARGET, {"README.md": text}, message="by hand")
        left = place.quantize(*RUN, "--refresh-card", folder=folder)
        assert left.code == 0 and "was edited on the Hub" in left.err
        assert place.hub.files(TARGET)["README.md"] == text
    place.hub.commit(TARGET, {"README.md": None}, message="gone")
    assert json.loads(place.quantize(*RUN, "--dry-run", "--json", folder=folder).out)["state"] == "would publish"


def test_a_token_with_foreign_letters_is_said_in_one_line(place: Place, tmp_path: Path) -> None:
    ended = place.quantize(*PUSH, folder=place.fresh(tmp_path), token="hf_\u2026")
    assert ended.code == 1 and "contains a non-ASCII character" in ended.err and "Traceback" not in ended.err


@pytest.mark.slow
def test_a_new_commit_of_the_source_makes_a_new_package(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    card = place.hub.files(MODEL)["README.md"] + b"\nOne line more.\n"
    newer = place.hub.commit(MODEL, {"README.md": card}, message="a better card")
    try:
        done = place.quantize(*RUN, "--json", folder=folder)
        assert done.code == 0, done.err
        assert json.loads(done.out)["source_commit"] == newer and len(place.commits()) == 2
        assert b"One line more." in place.hub.files(TARGET)["README.md"]
        place.require_whole()
    finally:
        place.restore_source()  # with another commit every later test would have to make its package anew


@pytest.mark.slow
def test_a_card_alone_is_refreshed(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    assert place.quantize(*RUN, folder=folder).code == 0
    template = folder / "mine.j2"
    template.write_text("# {{ package_name }}, in other words\n")
    weights = len([one for one in place.hub.requests if one.method == "PUT"])
    refresh = (*RUN, "--refresh-card", "--card-template", str(template), "--json")
    assert json.loads(place.quantize(*refresh, "--dry-run", folder=folder).out)["state"] == "would refresh"
    done = place.quantize(*refresh, folder=folder)
    assert json.loads(done.out)["state"] == "card refreshed", done.err
    assert f"# {TARGET}, in other words" in place.hub.files(TARGET)["README.md"].decode()
    assert place.commits()[0] == "Card rendered again" and len(place.commits()) == 2
    assert len([one for one in place.hub.requests if one.method == "PUT"]) == weights
    place.require_whole()
    assert json.loads(place.quantize(*refresh, folder=folder).out)["state"] == "up to date"
    assert len(place.commits()) == 2


@pytest.mark.slow
def test_a_refused_model_is_not_published(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    shutil.rmtree(folder / NAME)
    strict = (*RUN[:-1], "lossless")
    refused = place.quantize(*strict, folder=folder)
    assert refused.code == 3 and "the evidence is in" in refused.err
    assert place.commits() == [] and (folder / f"{NAME}-refused" / "parity.json").is_file()


def test_of_two_pushes_at_once_one_wins_and_nothing_is_mixed(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    place.hub.create_repo(TARGET)
    altered(folder, "second")
    waiting: list[float] = []

    def meet() -> None:
        """Hold the first commit until the second one is on its way as well."""
        waiting.append(time.monotonic())
        while len(waiting) < 2 and time.monotonic() < waiting[0] + 2:
            time.sleep(0.01)

    place.hub.inject(Fault("POST", rf"^/api/models/{TARGET}/commit", kind="none", times=2, meanwhile=meet))
    children = [
        place.warm.start("push", name, "--to", TARGET, cwd=folder, env={"HF_TOKEN": WRITE_TOKEN})
        for name in (NAME, "second")
    ]
    ended = [child.wait() for child in children]
    assert sorted(one.code for one in ended) == [0, 1], [one.err for one in ended]
    assert "somebody else committed" in next(one.err for one in ended if one.code)
    assert len(waiting) == 2 and len(place.commits()) == 1
    place.require_whole()


def test_ctrl_c_while_the_commit_is_on_its_way(place: Place, tmp_path: Path) -> None:
    folder = place.fresh(tmp_path)
    place.hub.inject(Fault("POST", rf"^/api/models/{TARGET}/commit", kind="hang", applied=True))
    child = place.start("push", folder)
    wait_for_fault(place)
    child.send(signal.SIGINT)
    ended = child.wait()
    assert ended.code == 130 and "run the same command again" in ended.err and "Traceback" not in ended.err
    place.hub.clear_faults()
    assert place.run("push", folder).code == 0 and len(place.commits()) == 1


def wait_for_fault(place: Place) -> None:
    seen = sum(one.fault is not None for one in place.hub.requests)
    limit = time.monotonic() + 30
    while sum(one.fault is not None for one in place.hub.requests) == seen and time.monotonic() < limit:
        time.sleep(0.01)


KILLED_AT = {
    "what the source is": Fault("GET", rf"^/api/models/{MODEL}"),
    **{name: Fault(*step) for name, step in STEPS.items()},
    "send the last large file": Fault(*STEPS["send a large file"], skip=4),
    "confirm the last large file": Fault(*STEPS["confirm a large file"], skip=4),
    "what is there after the commit": Fault("GET", rf"^{REPO}/revision"),
}
"""Every kind of request of a run, whose weights are made; of large files there are five."""


QUICK_KILLS = ("send a large file", "commit", "what is there after the commit")


@pytest.mark.parametrize(
    "request_name",
    [pytest.param(name, marks=[] if name in QUICK_KILLS else pytest.mark.slow) for name in KILLED_AT],
)
def test_sigkill_at_a_request(place: Place, tmp_path: Path, request_name: str) -> None:
    """The Hub still gets the request that was on its way; the rerun ends with one commit."""
    folder = place.fresh(tmp_path)
    children: list[Child] = []

    def kill() -> None:
        while not children:
            time.sleep(0.001)
        children[0].send(signal.SIGKILL)

    place.hub.inject(dataclasses.replace(KILLED_AT[request_name], kind="none", meanwhile=kill))
    children.append(place.start("run --push-to", folder))
    assert children[0].wait().code == -signal.SIGKILL
    again = place.run("run --push-to", folder)
    assert again.code == 0, again.err
    assert len(place.commits()) == 1
    place.require_whole()


@pytest.mark.slow
def test_sigkill_at_a_moment(place: Place, tmp_path: Path) -> None:
    """From fetching to publishing, at a random moment of the seconds that a whole run takes here."""
    folder = place.fresh(tmp_path)
    shutil.rmtree(folder / NAME)
    share = random.Random(30).random()
    child = place.start("run --push-to", folder)
    time.sleep(share * place.seconds)
    child.send(signal.SIGKILL)
    assert child.wait().code in (-signal.SIGKILL, 0)
    again = place.run("run --push-to", folder)
    assert again.code == 0, again.err
    assert len(place.commits()) == 1
    place.require_whole()
    assert {path.name for path in folder.iterdir()} <= {NAME, "catalogue.toml", "sync"}


@pytest.mark.slow
def test_no_secret_is_left_behind(place: Place, tmp_path: Path) -> None:
    """Runs that fail in the Hub, in parity and in a bug; then every file and every line is searched."""
    secret = "hf_SuperSecretTokenOfTheHeron"
    place.hub.add_user("tester", secret)
    folder = place.fresh(tmp_path)
    commit = Fault("POST", rf"^/api/models/{TARGET}/commit", status=500, times=None, message="internal error")
    bug = Fault("GET", r"^/api/whoami-v2", status=200, message="{}")
    said: list[str] = []
    for name, fault in (("run --push-to", commit), ("sync", commit), ("push", bug), ("sync", bug)):
        place.hub.inject(fault)
        ended = place.run(name, folder, token=secret)
        assert ended.code == 1, ended
        said += [ended.out, ended.err]
        place.hub.clear_faults()
    assert any("Traceback" in text for text in said)
    done = place.run("push", folder, token=secret)
    assert done.code == 0
    said += [done.out, done.err]
    assert not any(secret in text for text in said)
    everywhere = [path for root in (folder, place.cache.parent) for path in root.rglob("*") if path.is_file()]
    assert len(everywhere) > 20 and not [path for path in everywhere if secret.encode() in path.read_bytes()]
    assert not [data for data in place.hub.files(TARGET).values() if secret.encode() in data]


def test_no_option_takes_a_token() -> None:
    from quantize.cli.commands import cli

    options = {flag for one in cli.commands.values() for parameter in one.params for flag in parameter.opts}
    assert "--push-to" in options and not [flag for flag in options if "token" in flag and flag != "--new-tokens"]


@pytest.mark.slow
def test_a_hub_without_xet_is_said_in_one_line(place: Place, tmp_path: Path) -> None:
    """With Xet on, the client asks for an address that this Hub does not have: its own error type becomes a line."""
    folder = place.fresh(tmp_path)
    with_xet = (
        "import sys; from huggingface_hub import constants; from quantize.cli import main\n"
        "constants.HF_HUB_DISABLE_XET = False; main(sys.argv[1:])"
    )
    ended = place.warm.script(with_xet, *PUSH, "-q", cwd=folder, env={"HF_TOKEN": WRITE_TOKEN})
    assert ended.code == 1 and "Traceback" not in ended.err, ended.err
    assert "HF_HUB_DISABLE_XET=1" in ended.err and place.commits() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("push", "x", "--to", "just-a-name"), "is not a Hub id: write it as owner/name"),
        (("push", "x", "--to", "a/b", "--pr", "--branch", "c"), "--pr and --branch exclude each other"),
        (("run", "--tag", "v1"), "options about publishing need --push-to REPO"),
        (("run", "--refresh-card"), "--refresh-card needs --push-to REPO"),
    ],
)
def test_wrong_usage(place: Place, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ended = place.quantize(*arguments, folder=tmp_path)
    assert ended.code == 2 and message in ended.err
