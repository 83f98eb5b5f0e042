"""What is uploaded to an index: the wheel works outside the checkout, and the sdist passes its own tests."""

from __future__ import annotations

import json
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
from tests.conftest import QUICK, QUICK_OPTIONS
from tests.hub import WRITE_TOKEN, LoopbackHub
from tests.hub.distilgpt2 import seed_distilgpt2
from tests.publishing.workspace import MODEL, NAME, TARGET

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SDIST_TESTS = (
    *("tests/cli/test_options.py", "tests/package/test_format_versions.py", "tests/model_card/test_escaping.py"),
    "tests/test_architecture.py",
)
NEEDED = {
    *("LICENSE", "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
}
"""What is fetched of the default model."""
LEFT_OUT = "not slow and not gpu and not network"


def called(*command: object, cwd: Path, **variables: str) -> str:
    outcome = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that holds the built wheel and nothing else, outside the checkout."""
    called("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {"quantize/py.typed", "quantize/parity/prompts.txt", "model_card/templates/card.md.j2"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"quantize", "model_card"}
    folder = tmp_path / "installed"
    called("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=tmp_path)
    where = "import quantize, model_card; print(quantize.__file__, model_card.__file__)"
    found = called("-c", where, cwd=tmp_path, PYTHONPATH=str(folder)).split()
    assert all(path.startswith(str(folder)) for path in found)
    return folder


LOADED = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
tokens = tokenizer("The function", return_tensors="pt")
print(model.is_loaded_in_4bit, model(**tokens).logits.shape[-1])
print(model.generate(**tokens, max_new_tokens=5).shape[-1] > 5, not {"quantize", "quantize.cli"} & sys.modules.keys())
"""


@pytest.mark.slow
def test_the_wheel_does_the_whole_job_outside_the_checkout(installed: Path, shallow: Path, tmp_path: Path) -> None:
    """As a person would, over HTTP: the default model is fetched, quantized, proved and published, templates and
    prompts travel with it; another process loads what was published with nothing but transformers."""
    work = tmp_path / "work"
    work.mkdir()
    with LoopbackHub() as hub:
        commit = seed_distilgpt2(hub, shallow)
        alone = {"PYTHONPATH": str(installed), **hub.env(home=tmp_path / "home")}
        run = ("-m", "quantize", "run", "--bits", "4", "--device", "cpu", "--push-to", TARGET, "--json", *QUICK_OPTIONS)
        said = called(*run, cwd=work, **alone)
        assert hub.downloaded(MODEL) == NEEDED
        folder = work / NAME
        assert json.loads(said)["package"] == NAME and json.loads(said)["commit"] == hub.head(TARGET)
        made = package.open_package(folder).provenance
        assert (made.source.repo_id, made.source.commit, made.settings) == (MODEL, commit, QUICK)
        card = (folder / "README.md").read_text()
        assert f"base_model: {MODEL}\nbase_model_relation: quantized" in card and commit in card
        sent = hub.files(TARGET)
        here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert {name for name in sent if name != ".gitattributes"} == set(here) - {"receipt.json"}
        assert all(sent[name] == here[name].read_bytes() for name in sent if name in here)
        assert WRITE_TOKEN not in said and not any(WRITE_TOKEN.encode() in path.read_bytes() for path in here.values())
        loaded = called("-c", LOADED, TARGET, cwd=tmp_path, **hub.env(home=tmp_path / "another-home"))
        assert loaded.split() == ["True", "4096", "True", "True"]


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
