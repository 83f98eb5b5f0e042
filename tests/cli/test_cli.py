"""The command line: help for everything, wrong usage, start-up, and errors of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from quantize.cli.commands import cli
from tests.conftest import POCKET, Outcome


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    text = cli.commands[name].help or ""
    assert f"quantize {name}" in text, "an example that can be run"
    for parameter in cli.commands[name].params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_the_readme_documents_every_command(name: str) -> None:
    assert f"`quantize {name}" in (Path(__file__).parents[2] / "README.md").read_text()


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from quantize.cli.commands import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'scipy', 'rich', 'jinja2', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert outcome.stderr.strip() == "[]"
    assert "Exit codes" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--bits", "5"], "'5' is not one of 4, 8"),
        (["run", "--require", "failed"], "'failed' is not one of"),
        (["run", "--window", "3"], "not in the range"),
        (["push", "somewhere"], "Missing option '--to'"),
        (["verify"], "Missing argument 'CHECKPOINT'"),
        (["paint"], "No such command 'paint'"),
    ],
)
def test_wrong_usage_exits_with_2(command: Callable[..., Outcome], arguments: list[str], message: str) -> None:
    outcome = command(*arguments)
    assert outcome.code == 2 and message in outcome.err and outcome.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "./no-such-folder"], "no such folder: no-such-folder"),
        (["run", "a/b/c"], "'a/b/c' is neither a folder nor a Hub id"),
        (["run", str(POCKET), "--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["run", str(POCKET), "--device", "toaster"], "device 'toaster' cannot be used here"),
        (["run", str(POCKET), "--corpus", "no-such-text"], "no corpus 'no-such-text'"),
        (
            ["run", str(POCKET), "--recipe", "calibrated", "--bits", "8"],
            "leave it out with 8 bits",
        ),
        (["run", str(POCKET), "--recipe", "calibrated", "--calibration", "none.txt"], "no calibration text 'none.txt'"),
        (["verify", "./no-such-package"], "holds no model: it has no config.json"),
        (["card", "no-such-package"], "no such package: no-such-package"),
        (["push", "no-such-package", "--to", "a/b"], "no such package: no-such-package"),
    ],
)
def test_bad_input_is_one_line_and_exits_with_1(
    command: Callable[..., Outcome],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(*arguments, "--quiet")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1 and message in outcome.err and "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_errors_are_json_too(command: Callable[..., Outcome]) -> None:
    outcome = command("card", "no-such-package", "--json", "--quiet")
    assert json.loads(outcome.out) == {"error": "no such package: no-such-package", "kind": "PackageError"}


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize.cli import main

    monkeypatch.setattr("quantize.diagnostics.diagnose", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_doctor_tells_what_is_here(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_test")
    outcome = command("doctor", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0 and found["bitsandbytes_works"] == "yes" and found["token_present"] is True
    assert found["devices"][-1]["name"] == "cpu" and found["hub_cache_free"] > 0
    assert "hf_secret" not in outcome.out + outcome.err
    assert "4-bit on" in command("doctor").err


@pytest.mark.slow
def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    outcome = subprocess.run(
        [sys.executable, "-m", "quantize", "run", "--quiet"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: cannot reach the Hub at http://127.0.0.1:9 for distilbert/distilgpt2")
    assert outcome.stderr.count("\n") == 1
