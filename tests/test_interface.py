"""The Python interface: cheap to import, typed, and documented by examples that run."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantize
from tests.publishing.workspace import Place

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
TOKEN = "hf_loopback_yours"


def examples() -> str:
    """The Python code of the page, as one script."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE))


def test_every_name_is_there() -> None:
    for name in quantize.__all__:
        assert getattr(quantize, name) is not None
    assert {*quantize.__all__} <= {*dir(quantize)}
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        quantize.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_every_error_is_part_of_it() -> None:
    errors = importlib.import_module("quantize.errors")
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert raised <= {*quantize.__all__}


def test_the_page_shows_every_function_and_request() -> None:
    page = PAGE.read_text("utf-8")
    for name in quantize.__all__:
        if name in ("run", "verify", "card", "push", "sync") or name.endswith("Request"):
            assert f"quantize.{name}(" in page, name


def test_importing_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, quantize\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'huggingface_hub', 'matplotlib', 'click', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "quantize.Recipe, quantize.QuantizeError, quantize.EvaluationSettings\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert outcome.stdout.splitlines() == ["[]", "[]"], outcome.stderr


@pytest.mark.slow
def test_the_examples_are_typed(tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(examples() + "\nreveal_type(receipt.url)\nreveal_type(evidence.verdict)\n")
    check = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    outcome = subprocess.run(
        [*check, str(tmp_path / "consumer.py")], capture_output=True, text=True, cwd=ROOT, env={**os.environ}
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert '"str"' in outcome.stdout and '"quantize.evidence.Verdict"' in outcome.stdout


@pytest.mark.slow
def test_the_examples_run(place: Place, tmp_path: Path) -> None:
    (tmp_path / "tests" / "models").mkdir(parents=True)
    (tmp_path / "tests" / "models" / "pocket-gpt2").symlink_to(place.source)
    place.hub.add_user("your-name", TOKEN)
    ended = place.warm.script(examples(), cwd=tmp_path, env={"HF_TOKEN": TOKEN})
    assert ended.code == 0, ended.err
    assert place.hub.log("your-name/pocket-gpt2-bnb-4bit")[0].title == "pocket-gpt2 in 4 bits"
    assert "your-name/distilgpt2-bnb-4bit would publish" in ended.out
    assert "SourceNotFound: " in ended.out and "==> verify on cpu" in ended.out
