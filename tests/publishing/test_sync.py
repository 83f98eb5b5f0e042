"""The scheduled job: a catalogue kept up to date on the loopback Hub, and the workflow that runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import WRITE_TOKEN, Fault
from tests.publishing.workspace import CATALOGUE, MODEL, TARGET, Place

WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "quantize.yml"
STRICT, ABSENT = "tester/too-strict", "tester/no-such-source"
THREE = f"""{CATALOGUE}
[[model]]
source = "{MODEL}"
repo = "{STRICT}"
require = "lossless"

[[model]]
source = "tester/nowhere"
repo = "{ABSENT}"
"""
SYNC = ("sync", "catalogue.toml", "--device", "cpu", "--json")


def states(report: str) -> dict[str, str]:
    return {one["repo"]: one["state"] for one in json.loads(report)["outcomes"]}


@pytest.fixture
def folder(place: Place, tmp_path: Path) -> Path:
    place.hub.delete_repo(STRICT)
    return place.fresh(tmp_path)


@pytest.mark.slow
def test_published_refused_and_failed_in_one_job(place: Place, folder: Path) -> None:
    (folder / "catalogue.toml").write_text(THREE)
    summary = folder / "summary.md"
    env = {"HF_TOKEN": WRITE_TOKEN, "GITHUB_STEP_SUMMARY": str(summary)}
    first = place.warm.run(*SYNC, cwd=folder, env=env)
    assert first.code == 1, first.err
    assert states(first.out) == {TARGET: "published", STRICT: "refused", ABSENT: "failed"}
    outcomes = {one["repo"]: one for one in json.loads(first.out)["outcomes"]}
    assert outcomes[TARGET]["commit"] == place.hub.head(TARGET) and "no such repo" in outcomes[ABSENT]["detail"]
    evidence = folder / "sync" / "evidence"
    assert {path.name for path in evidence.iterdir()} == {"tester--distilgpt2-bnb-4bit", "tester--too-strict"}
    kept = {path.name for path in (evidence / "tester--too-strict").iterdir()}
    assert {"parity.json", "provenance.json", "README.md", "figures"} <= kept and "model.safetensors" not in kept
    assert (evidence / "tester--distilgpt2-bnb-4bit" / "receipt.json").is_file()
    assert list((folder / "sync" / "packages").iterdir()) == []
    table = summary.read_text()
    assert f"| {TARGET} | {MODEL} | published |" in table and "| refused |" in table and "| failed |" in table
    with pytest.raises(LookupError):
        place.hub.head(STRICT)

    second = place.warm.run(*SYNC, "--only", TARGET, "--only", STRICT, cwd=folder, env=env)
    assert second.code == 3 and states(second.out) == {TARGET: "up to date", STRICT: "refused"}
    third = place.warm.run(*SYNC, "--only", TARGET, cwd=folder, env=env)
    assert third.code == 0 and len(place.commits()) == 1


@pytest.mark.slow
def test_a_refused_model_is_not_made_again(place: Place, folder: Path) -> None:
    (folder / "catalogue.toml").write_text(CATALOGUE.replace('"degraded"', '"lossless"'))
    shutil.rmtree(folder / "sync")
    first = place.quantize(*SYNC, folder=folder)
    again = place.quantize(*SYNC, "--quiet", folder=folder)
    assert (first.code, again.code) == (3, 3)
    assert "scoring" in first.err and "scoring" not in again.err and "was refused before" in again.out


@pytest.mark.slow
def test_what_is_up_to_date_is_made_again_by_force_only(place: Place, folder: Path) -> None:
    assert states(place.quantize(*SYNC, folder=folder).out) == {TARGET: "published"}
    assert states(place.quantize(*SYNC, folder=folder).out) == {TARGET: "up to date"}
    forced = place.quantize(*SYNC, "--force", "--dry-run", folder=folder)
    assert states(forced.out) == {TARGET: "would publish"}


@pytest.mark.slow
@pytest.mark.parametrize("left", ["of another source", "unreadable"])
def test_what_is_left_of_other_work_is_replaced(place: Place, folder: Path, left: str) -> None:
    package = folder / "sync" / "packages" / TARGET.replace("/", "--")
    record = json.loads((package / "provenance.json").read_text())
    record["source"]["repo_id"] = "somebody/else"
    (package / "provenance.json").write_text(json.dumps(record) if left == "of another source" else "{")
    ended = place.quantize(*SYNC, folder=folder)
    assert states(ended.out) == {TARGET: "published"} and "quantize to 4 bits" in ended.err
    place.require_whole()


def test_quiet_still_tells_what_failed(place: Place, folder: Path) -> None:
    ended = place.quantize(*SYNC[:-1], "--quiet", folder=folder, token="hf_wrong")
    assert ended.code == 1 and ended.err.startswith(f"failed: {TARGET}: the Hub refused")


@pytest.mark.slow
def test_what_cannot_be_kept_fails_its_entry_only(place: Place, folder: Path) -> None:
    """The evidence has no place to go, and the summary neither; the package is on the Hub all the same."""
    (folder / "sync" / "evidence").write_text("a file")
    env = {"HF_TOKEN": WRITE_TOKEN, "GITHUB_STEP_SUMMARY": str(folder / "absent" / "summary.md")}
    ended = place.warm.run(*SYNC, cwd=folder, env=env)
    assert ended.code == 1 and states(ended.out) == {TARGET: "failed"} and "no summary was written" in ended.err
    assert "the evidence cannot be kept" in ended.err and "Traceback" not in ended.err
    (folder / "sync" / "evidence").unlink()
    again = place.quantize(*SYNC, folder=folder)
    assert states(again.out) == {TARGET: "up to date"} and list((folder / "sync" / "packages").iterdir()) == []


def test_ctrl_c_ends_with_a_report(place: Place, folder: Path) -> None:
    place.hub.inject(Fault("POST", rf"^/api/models/{TARGET}/commit", kind="hang"))
    seen = len(place.hub.requests)
    child = place.warm.start(*SYNC, cwd=folder, env={"HF_TOKEN": WRITE_TOKEN})
    while not any(one.fault for one in place.hub.requests[seen:]):
        time.sleep(0.01)
    child.send(signal.SIGINT)
    ended = child.wait()
    assert ended.code == 130 and states(ended.out) == {TARGET: "interrupted"}


def test_a_dry_run_makes_nothing(place: Place, folder: Path) -> None:
    shutil.rmtree(folder / "sync")
    ended = place.quantize(*SYNC, "--dry-run", folder=folder)
    assert ended.code == 0 and states(ended.out) == {TARGET: "would publish"}
    assert not (folder / "sync").exists() and place.commits() == []


def test_former_names_in_a_catalogue_are_told(place: Place, folder: Path) -> None:
    former = CATALOGUE.replace("repo =", "target =").replace('"rtn"', '"stock"')
    (folder / "catalogue.toml").write_text(former)
    ended = place.quantize(*SYNC, "--dry-run", folder=folder)
    assert ended.code == 0 and states(ended.out) == {TARGET: "would publish"}
    notes = [line.strip() for line in ended.err.splitlines() if line.strip().startswith("note: ")]
    assert notes == [
        "note: catalogue.toml:3: stock is called rtn now",
        "note: catalogue.toml:11: target is called repo now",
    ]


@pytest.mark.slow
def test_what_is_over_the_limit_waits_for_the_next_time(place: Place, folder: Path) -> None:
    other = "tester/another-copy"
    place.hub.delete_repo(other)
    (folder / "catalogue.toml").write_text(f'{CATALOGUE}\n[[model]]\nsource = "{MODEL}"\nrepo = "{other}"\n')
    first = place.quantize(*SYNC, "--max-models", "1", folder=folder)
    assert states(first.out) == {TARGET: "published", other: "postponed"} and first.code == 0
    second = place.quantize(*SYNC, "--max-models", "1", folder=folder)
    assert states(second.out) == {TARGET: "up to date", other: "published"}


def test_a_source_over_its_limit_is_not_touched(place: Place, folder: Path) -> None:
    (folder / "catalogue.toml").write_text(CATALOGUE.replace("[[model]]", "[[model]]\nmax_source_gb = 0.001"))
    ended = place.quantize(*SYNC, folder=folder)
    assert ended.code == 1 and "more than the limit of 0.00 GB" in json.loads(ended.out)["outcomes"][0]["detail"]


def test_a_killed_job_goes_on_where_it_was(place: Place, folder: Path) -> None:
    """The package that was made before the kill is published by the next job without being made again."""
    made = (folder / "sync" / "packages" / TARGET.replace("/", "--") / "model.safetensors").stat().st_mtime_ns
    place.hub.inject(Fault("POST", rf"^/api/models/{TARGET}/commit", kind="hang"))
    seen = len(place.hub.requests)
    child = place.start("sync", folder)
    while not any(one.fault for one in place.hub.requests[seen:]):
        time.sleep(0.01)
    child.send(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    place.hub.clear_faults()
    package = folder / "sync" / "packages" / TARGET.replace("/", "--")
    assert (package / "model.safetensors").stat().st_mtime_ns == made
    again = place.quantize(*SYNC, folder=folder)
    assert states(again.out) == {TARGET: "published"} and len(place.commits()) == 1
    assert "reading weights" not in again.err
    place.require_whole()


def test_a_second_job_on_the_same_catalogue_is_refused(place: Place, folder: Path) -> None:
    place.hub.inject(Fault("GET", r"^/api/whoami-v2", kind="hang"))
    seen = len(place.hub.requests)
    child = place.start("sync", folder)
    while not any(one.fault for one in place.hub.requests[seen:]):
        time.sleep(0.01)
    refused = place.run("sync", folder)
    assert refused.code == 1 and "another job works on catalogue.toml" in refused.err
    place.hub.clear_faults()
    assert child.wait().code == 0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (CATALOGUE.replace("require", "requires"), (), "catalogue.toml:7: unknown key 'requires': is require meant?"),
        (CATALOGUE, ("--only", "tester/other"), "catalogue.toml has no repo tester/other"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(
    place: Place, folder: Path, text: str, options: tuple[str, ...], message: str
) -> None:
    (folder / "catalogue.toml").write_text(text)
    seen = len(place.hub.requests)
    ended = place.quantize(*SYNC, *options, folder=folder)
    assert ended.code == 1 and message in ended.err and len(place.hub.requests) == seen


def test_a_folder_of_the_same_name_is_not_taken_for_a_source(place: Place, folder: Path) -> None:
    (folder / MODEL).mkdir(parents=True)
    ended = place.quantize(*SYNC, folder=folder)
    assert ended.code == 1 and f"{MODEL} is also a folder here" in ended.err


def steps() -> list[dict[str, Any]]:
    return list(yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]["sync"]["steps"])


def test_the_workflow_is_pinned_and_keeps_its_secret() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    when = workflow[True]  # YAML takes the word `on` for a truth value
    assert when["schedule"][0]["cron"] and set(when["workflow_dispatch"]["inputs"]) == {"only", "dry_run"}
    assert workflow["permissions"] == {"contents": "read"} and not workflow["concurrency"]["cancel-in-progress"]
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", one) for one in used)
    assert [step["name"] for step in steps() if "secrets." in str(step)] == ["Sync"]
    assert "secrets." not in str({key: value for key, value in workflow.items() if key != "jobs"})
    assert not any("${{" in step.get("run", "") for step in steps())
    named = {step["name"]: step for step in steps() if "name" in step}
    taken, kept = named["Take up what was found out before"], named["Keep what was found out for the next run"]
    assert taken["with"]["path"] == kept["with"]["path"] == "sync/evidence" and kept["if"] == "always()"
    assert taken["with"]["key"] == kept["with"]["key"] and taken["with"]["key"].startswith(
        taken["with"]["restore-keys"]
    )
    evidence = next(step for step in steps() if step.get("name") == "Keep the evidence")
    assert evidence["if"] == "always()" and "sync/evidence" in evidence["with"]["path"]


@pytest.mark.slow
def test_the_workflow_s_commands_publish(place: Place, folder: Path) -> None:
    """The script of its step as GitHub would run it, with the loopback Hub in place of the real one."""
    step = next(step for step in steps() if step.get("name") == "Sync")
    values = {"secrets.HF_TOKEN": WRITE_TOKEN, "inputs.only": TARGET, "inputs.dry_run": "false"}
    values["runner.temp"] = str(folder / "temp")
    given = {
        name: re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda found: values[found[1]], text)
        for name, text in step["env"].items()
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    bin_folder = str(Path(sys.executable).parent)
    env = own | place.hub.env(home=folder / "home") | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    (folder / "summary.md").touch()
    env |= {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
    ended = subprocess.run(command, cwd=folder, env=env | given, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert states((folder / "report.json").read_text()) == {TARGET: "published"}
    assert (folder / "sync" / "evidence" / TARGET.replace("/", "--") / "parity.json").is_file()
    assert "published" in (folder / "summary.md").read_text() and len(place.commits()) == 1
    place.require_whole()
