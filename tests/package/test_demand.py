"""What a package was asked to be: measured how, on which texts, and nothing about where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize import package
from quantize.errors import CorpusError
from quantize.records import EvaluationSettings, Recipe
from tests.conftest import POCKET, QUICK_OPTIONS, Outcome

OTHERWISE: dict[str, Any] = {
    "corpus": "wikitext-2",
    "window": 512,
    "max_windows": 100,
    "new_tokens": 32,
    "seed": 1,
    "full": True,
    "controls": True,
    "standard_perplexities": True,
}


def text_file(folder: Path, name: str, words: str = "a heron waits") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(words)
    return folder / name


def key(recipe: Recipe, settings: EvaluationSettings) -> str:
    return package.demanded(recipe, settings).key("owner/model", "commit")


def test_the_key_says_how_it_was_measured() -> None:
    assert OTHERWISE.keys() == {item.name for item in dataclasses.fields(EvaluationSettings)} - {"require"}
    keys = [key(Recipe(), EvaluationSettings(**{name: value})) for name, value in OTHERWISE.items()]
    assert len({key(Recipe(), EvaluationSettings()), *keys}) == len(keys) + 1
    assert key(Recipe(), EvaluationSettings(require="parity")) == key(Recipe(), EvaluationSettings())


@pytest.mark.parametrize("field", ["corpus", "calibration"])
def test_texts_count_by_their_content_and_name_not_by_their_folder(tmp_path: Path, field: str) -> None:
    def asked(path: Path) -> tuple[Recipe, EvaluationSettings]:
        if field == "corpus":
            return Recipe("rtn"), EvaluationSettings(corpus=str(path))
        return Recipe("calibrated", options={"calibration": str(path)}), EvaluationSettings()

    first = text_file(tmp_path / "acme", "contracts.txt")
    moved, other = text_file(tmp_path / "heron", "contracts.txt"), text_file(tmp_path / "x", "contracts.txt", "another")
    assert key(*asked(first)) == key(*asked(moved)) != key(*asked(other))
    demand = package.demanded(*asked(first))
    assert demand.texts.keys() == {field} and str(tmp_path) not in repr(demand)
    assert "./contracts.txt" in (demand.settings.corpus, demand.recipe.options.get("calibration"))


def test_texts_that_are_no_files_are_named_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("builtin", "wikitext-2", "self"):
        text_file(tmp_path, name)
    recipe = Recipe("calibrated", options={"calibration": "owner/data:train.txt"})
    for corpus in ("builtin", "wikitext-2", "absent.txt", "x" * 5000, "a\0b"):
        demand = package.demanded(recipe, EvaluationSettings(corpus=corpus))
        assert (demand.recipe, demand.settings.corpus, dict(demand.texts)) == (recipe, corpus, {})


@pytest.mark.parametrize("name", ["builtin", "Builtin", "wikitext-2"])
def test_a_file_does_not_pass_for_a_corpus_of_ours(tmp_path: Path, command: Callable[..., Outcome], name: str) -> None:
    path = text_file(tmp_path, name)
    for arguments in (("run", POCKET, "-o", tmp_path / "out"), ("verify", POCKET, "--against", POCKET)):
        ended = command(*arguments, "--corpus", path, "--device", "cpu", "-q")
        assert ended.code == 1 and ended.err.startswith(f"error: {path} is called like the text"), ended.err
    with pytest.raises(CorpusError, match="is called like the text 'self'"):
        package.demanded(
            Recipe("calibrated", options={"calibration": str(text_file(tmp_path, "self"))}), EvaluationSettings()
        )


@pytest.mark.slow
def test_no_file_of_a_package_names_a_folder(tmp_path: Path, shallow: Path, command: Callable[..., Outcome]) -> None:
    words = " ".join(path.read_text("utf-8") for path in sorted(Path(package.__file__).parents[2].glob("docs/*.md")))
    corpus = text_file(tmp_path / "customer-acme", "contracts.txt", words)
    output = tmp_path / "out"
    options = ("--corpus", corpus, "--device", "cpu", *QUICK_OPTIONS, "-q", "-o", output)
    assert command("run", shallow, *options).code in (0, 3)
    (made,) = (folder for folder in (output, package.refused_folder(output)) if folder.exists())
    texts = {path.name: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert not [name for name, data in texts.items() if b"customer-acme" in data or str(tmp_path).encode() in data]
    assert b"--corpus ./contracts.txt" in texts["README.md"]
    again = command("run", shallow, *options)
    assert "scoring" not in again.err and (again.code == 0 or made.name.endswith("-refused"))
