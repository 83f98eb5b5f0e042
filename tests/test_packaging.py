"""What is uploaded to an index: the wheel works outside the checkout, and the sdist passes its own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from quantize import package
from tests.conftest import POCKET, QUICK, QUICK_OPTIONS

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SDIST_TESTS = (
    *("tests/cli/test_options.py", "tests/package/test_records.py", "tests/formats/test_safetensors.py"),
    *("tests/parity/test_verdict.py", "tests/test_architecture.py"),
)
LEFT_OUT = "not slow and not gpu and not network"


def called(*command: object, cwd: Path, **variables: str) -> str:
    outcome = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.mark.slow
def test_the_wheel_does_the_same_job_outside_the_checkout(tmp_path: Path) -> None:
    """Built, unpacked into a folder of its own, and run from elsewhere: templates and prompts travel with it."""
    called("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {"quantize/py.typed", "quantize/parity/prompts.txt", "model_card/templates/card.md.j2"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"quantize", "model_card"}
    installed = tmp_path / "installed"
    called("-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
    where = "import quantize, model_card; print(quantize.__file__, model_card.__file__)"
    found = called("-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert all(path.startswith(str(installed)) for path in found)
    run = ("-m", "quantize", "run", POCKET, "--device", "cpu", "--json", *QUICK_OPTIONS)
    called(*run, cwd=tmp_path, PYTHONPATH=str(installed))
    assert package.open_package(tmp_path / "pocket-gpt2-bnb-4bit").provenance.settings == QUICK


@pytest.mark.slow
def test_the_sdist_passes_its_own_tests(tmp_path: Path) -> None:
    """A selection of them, with every file that any test reads on board."""
    called("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for path in ("catalogue.toml", ".github/workflows/quantize.yml", "docs/reliability.md", "scripts/constraints.txt"):
        assert (unpacked / path).is_file(), path
    tests = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", LEFT_OUT, *SDIST_TESTS)
    assert " passed" in called(*tests, cwd=unpacked, PYTHONPATH=str(unpacked))


def test_an_index_can_show_where_the_project_lives() -> None:
    project = PROJECT["project"]
    assert {"Homepage", "Documentation", "Changelog", "Issues", "Source"} <= project["urls"].keys()
    assert all(address.startswith("https://") for address in project["urls"].values())


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    mark = "Programming Language :: Python :: 3."
    promised = [name.split()[-1] for name in PROJECT["project"]["classifiers"] if name.startswith(mark)]
    job = yaml.safe_load((WORKFLOWS / "tests.yml").read_text("utf-8"))["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == promised
    assert PROJECT["project"]["requires-python"] == f">={promised[0]}"


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
        for step in job["steps"]:
            assert re.search(r"@[0-9a-f]{40}$", step["uses"]) if "uses" in step else step["run"]
