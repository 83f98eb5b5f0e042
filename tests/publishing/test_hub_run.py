"""The whole job over real HTTP: default model from a loopback Hub, quantized, proved, pushed, loaded again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.conftest import POCKET, QUICK_OPTIONS
from tests.hub import Fault, LoopbackHub
from tests.hub.distilgpt2 import seed_distilgpt2
from tests.publishing.workspace import MEASURING

MODEL = "distilbert/distilgpt2"
TARGET = "tester/distilgpt2-bnb-4bit"
TOKEN = "hf_loopback_write"
NEEDED = {
    *("LICENSE", "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def commit(hub: LoopbackHub) -> str:
    return seed_distilgpt2(hub, POCKET)


def quantize(
    hub: LoopbackHub, folder: Path, *arguments: str, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder` as a person would, against the loopback Hub."""
    command = [sys.executable, "-m", "quantize", *arguments]
    env = environment(hub, folder, token)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def environment(hub: LoopbackHub, folder: Path, token: str | None) -> dict[str, str]:
    """This process's environment, with the loopback Hub in place of the real one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return own | hub.env(token=token, home=folder / "hf-home")


def error_line(outcome: subprocess.CompletedProcess[str]) -> str:
    """The one line that a known failure prints."""
    assert outcome.returncode == 1, (outcome.returncode, outcome.stderr)
    assert "Traceback" not in outcome.stderr
    (line,) = (line for line in outcome.stderr.splitlines() if line.startswith("error: "))
    return line


def test_run_and_push_over_http(hub: LoopbackHub, commit: str, tmp_path: Path) -> None:
    made = quantize(hub, tmp_path, "run", "--bits", "4", "--device", "cpu", *QUICK_OPTIONS, "--json")
    assert made.returncode == 0, made.stderr
    assert hub.downloaded(MODEL) == NEEDED
    folder = tmp_path / "distilgpt2-bnb-4bit"
    assert json.loads(made.stdout)["package"] == "distilgpt2-bnb-4bit"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["source"]["repo_id"] == MODEL
    assert provenance["source"]["commit"] == commit
    card = (folder / "README.md").read_text()
    assert f"base_model: {MODEL}\nbase_model_relation: quantized" in card and commit in card

    rendered = quantize(hub, tmp_path, "card", folder.name)
    assert rendered.returncode == 0, rendered.stderr
    assert (folder / "README.md").read_text() == card and hub.downloaded(MODEL) == NEEDED

    pushed = quantize(hub, tmp_path, "push", folder.name, "--to", TARGET, "--json")
    assert pushed.returncode == 0, pushed.stderr
    receipt = json.loads(pushed.stdout)
    assert receipt["commit"] == hub.head(TARGET)
    sent = hub.files(TARGET)
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert {name for name in sent if name != ".gitattributes"} == set(here) - {"receipt.json"}
    assert all(sent[name] == here[name].read_bytes() for name in sent if name in here)
    before = len(hub.log(TARGET))
    again = quantize(hub, tmp_path, "push", folder.name, "--to", TARGET)
    assert again.returncode == 0 and "already there, nothing to do" in again.stderr
    assert len(hub.log(TARGET)) == before
    assert TOKEN not in made.stderr + pushed.stderr + pushed.stdout + again.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in here.values())

    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(model.is_loaded_in_4bit, model(**tokens('The function', return_tensors='pt')).logits.shape[-1])"
    )
    fresh = environment(hub, tmp_path / "fresh", TOKEN)
    loaded = subprocess.run([sys.executable, "-c", script, TARGET], env=fresh, capture_output=True, text=True)
    assert loaded.stdout.split() == ["True", "4096"], loaded.stderr

    figures = tmp_path / "figures"
    judged = quantize(
        *(hub, tmp_path, "verify", TARGET, "--figures", str(figures), "--device", "cpu", *MEASURING, "--json")
    )
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout)["scores"] == json.loads((folder / "parity.json").read_text())["scores"]
    assert {path.name for path in figures.iterdir()} == {path.name for path in (folder / "figures").iterdir()}

    (folder / "config.json").write_text("{}")
    assert "config.json is changed" in error_line(quantize(hub, tmp_path, "push", folder.name, "--to", TARGET))
    assert len(hub.log(TARGET)) == before


def test_a_revision_is_resolved_once_and_kept(hub: LoopbackHub, commit: str, tmp_path: Path) -> None:
    hub.commit(MODEL, {"README.md": b"a later card"}, message="later")
    made = quantize(hub, tmp_path, "run", "--revision", commit, "--device", "cpu", *QUICK_OPTIONS, "-q")
    assert made.returncode == 0, made.stderr
    provenance = json.loads((tmp_path / "distilgpt2-bnb-4bit" / "provenance.json").read_text())
    assert provenance["source"]["commit"] == commit != hub.head(MODEL)
    assert "a later card" not in (tmp_path / "distilgpt2-bnb-4bit" / "README.md").read_text()
    verified = quantize(hub, tmp_path, "verify", "distilgpt2-bnb-4bit", "--device", "cpu", *MEASURING, "-q")
    assert verified.returncode == 0, verified.stderr
    rendered = quantize(hub, tmp_path, "card", "distilgpt2-bnb-4bit", "-q")
    assert rendered.returncode == 0, rendered.stderr


def test_refusals_name_their_reason(hub: LoopbackHub, commit: str, tmp_path: Path) -> None:
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
        ("org/pickled",): "org/pickled has only pickle weights",
    }
    for arguments, message in expected.items():
        line = error_line(quantize(hub, tmp_path, "run", *arguments, "-q", token="hf_loopback_read"))
        assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"hf-home"}


def test_push_needs_a_token_that_may_write(hub: LoopbackHub, finished: Path, tmp_path: Path) -> None:
    without = error_line(quantize(hub, tmp_path, "push", str(finished), "--to", TARGET, "-q", token=None))
    assert "no token for the Hub" in without
    reader = error_line(quantize(hub, tmp_path, "push", str(finished), "--to", TARGET, "-q", token="hf_loopback_read"))
    assert "the token of reader may only read" in reader
    hub.add_user("stranger", "hf_stranger")
    stranger = error_line(quantize(hub, tmp_path, "push", str(finished), "--to", TARGET, "-q", token="hf_stranger"))
    assert "stranger cannot make it under tester: publish under stranger" in stranger
    with pytest.raises(LookupError):
        hub.head(TARGET)


def test_damage_on_the_way_is_noticed_and_mended(hub: LoopbackHub, commit: str, tmp_path: Path) -> None:
    """Bytes of the right number but wrong content arrive once: the second download counts."""
    hub.inject(Fault(method="GET", path=r"^/lfs/", times=1, kind="corrupt"))
    made = quantize(hub, tmp_path, "run", "--device", "cpu", *QUICK_OPTIONS, "-q")
    assert made.returncode == 0, made.stderr
    siblings = HfApi(endpoint=hub.endpoint).model_info(MODEL, files_metadata=True).siblings or []
    expected = {one.rfilename: one.lfs.sha256 for one in siblings if one.lfs}
    files = json.loads((tmp_path / "distilgpt2-bnb-4bit" / "provenance.json").read_text())["source"]["files"]
    assert {file["path"]: file["sha256"] for file in files}["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_is_stopped(hub: LoopbackHub, commit: str, tmp_path: Path, number: signal.Signals) -> None:
    """The weights never arrive; after the signal nothing is left but the Hub's cache, and the next run succeeds."""
    hub.inject(Fault(method="GET", path=r"^/lfs/", kind="hang"))
    arguments = ("run", "--device", "cpu", *QUICK_OPTIONS, "-q")
    with subprocess.Popen(
        [sys.executable, "-m", "quantize", *arguments],
        cwd=tmp_path,
        env=environment(hub, tmp_path, TOKEN),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not any(request.fault for request in hub.requests):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        hub.clear_faults()
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    assert not (tmp_path / "distilgpt2-bnb-4bit").exists()
    assert quantize(hub, tmp_path, *arguments).returncode == 0


def test_lasting_damage_is_refused(hub: LoopbackHub, commit: str, tmp_path: Path) -> None:
    hub.inject(Fault(method="GET", path=r"^/lfs/", times=99, kind="corrupt"))
    line = error_line(quantize(hub, tmp_path, "run", "--device", "cpu", "-q"))
    assert "model.safetensors of distilbert/distilgpt2 arrives with a wrong hash" in line
