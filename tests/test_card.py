"""The card: metadata that the Hub's client accepts, numbers that are the evidence's, a snippet that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from model_card import source_card
from quantize import package
from quantize.card import command as reproduction
from quantize.records import ParitySettings, Recipe, Source
from tests.conftest import POCKET, Outcome


def test_metadata_loads_and_is_inherited(finished: Path) -> None:
    card = ModelCard.load(finished / "README.md")
    source = ModelCard.load(POCKET / "README.md")
    assert card.data.license == source.data.license == "apache-2.0"
    assert card.data.language == source.data.language
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"4-bit", "bitsandbytes", "nf4"} <= set(card.data.tags)
    assert card.data.base_model is None


def test_measured_numbers_on_the_card_are_the_evidence(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    scores = json.loads((finished / "parity.json").read_text())["scores"]
    row = next(line for line in card.splitlines() if line.startswith("| perplexity ratio"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    ratio = scores["perplexity_ratio"]
    assert cells[2] == f"{ratio['value']:.4f}"
    assert cells[3] == f"{ratio['low']:.4f} to {ratio['high']:.4f}"
    row = next(line for line in card.splitlines() if line.startswith("| mean KL divergence"))
    assert f"{scores['kld']['mean']['value']:.4f}" in row


def test_the_snippet_runs(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(from transformers.*?)```", card.split("## Original model")[0], re.DOTALL)
    outcome = subprocess.run([sys.executable, "-c", snippet], cwd=finished.parent, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "Hello, I'm a language model," in outcome.stdout


def test_the_original_text_is_quoted_whole(finished: Path) -> None:
    quoted = (finished / "README.md").read_text().split("## Original model description")[1]
    _, body = source_card.split((POCKET / "README.md").read_text())
    words = re.sub(r"[#\s]+", " ", body).strip()
    assert words in re.sub(r"[#\s]+", " ", quoted)


def test_rendering_again_changes_nothing_but_is_sealed(package_copy: Path, command: Callable[..., Outcome]) -> None:
    before = (package_copy / "README.md").read_text()
    outcome = command("card", package_copy, "--against", POCKET)
    assert outcome.code == 0, outcome.err
    assert (package_copy / "README.md").read_text() == before
    package.require_unchanged(package.open_package(package_copy))


def test_upstream_text_is_never_a_template() -> None:
    body = "{{ 7 * 7 }} {% raw %} {# gone? #}"
    assert source_card.quote(body, None) == body


@pytest.mark.parametrize(
    "front",
    ["- a\n- list", "key: [unclosed", "!!python/object/apply:os.system ['true']", "just words"],
)
def test_strange_front_matter_counts_as_none(front: str) -> None:
    metadata, body = source_card.split(f"---\n{front}\n---\ntext\n")
    assert metadata == {} and body == "text\n"


def test_cards_without_front_matter_keep_all_their_text() -> None:
    assert source_card.split("# Title\n\n---\n\nrule above\n") == ({}, "# Title\n\n---\n\nrule above\n")


def test_quoting_demotes_headings_and_makes_targets_absolute() -> None:
    base = "https://hub/org/m/{kind}/c0ffee"
    body = (
        "# Title\n![plot](figs/a.png) and [code](./src/x.py) and [abs](https://a.b/c) [top](#title)\n"
        '<img src="b.png"><a href="docs/">d</a>\n`[not](touched.md)`\n```md\n# not a heading\n[n](t.md)\n```\n'
        "###### deep"
    )
    assert source_card.quote(body, base).splitlines() == [
        "### Title",
        "![plot](https://hub/org/m/resolve/c0ffee/figs/a.png) and [code](https://hub/org/m/blob/c0ffee/src/x.py) and "
        "[abs](https://a.b/c) [top](#title)",
        '<img src="https://hub/org/m/resolve/c0ffee/b.png"><a href="https://hub/org/m/blob/c0ffee/docs/">d</a>',
        "`[not](touched.md)`",
        "```md",
        "# not a heading",
        "[n](t.md)",
        "```",
        "###### deep",
    ]


def test_an_open_fence_in_the_source_is_closed() -> None:
    assert source_card.quote("```\ncode", None) == "```\ncode\n```"


def test_the_reproduction_command_names_what_differs_from_the_defaults() -> None:
    source = Source("m", "org/m", "main", "c0ffee", (), "A", "a", "F16", 1, False)
    recipe = Recipe(quant_type="fp4", double_quant=False, skip_modules=("h.0",))
    assert reproduction(source, recipe, ParitySettings(require="parity", corpus="my text.txt")) == (
        "quantize run org/m --revision c0ffee --bits 4 --quant-type fp4 --no-double-quant --skip-modules h.0 "
        "--corpus 'my text.txt' --require parity"
    )


def test_an_unknown_license_is_shown(tmp_path: Path, package_copy: Path, pocket_copy: Path) -> None:
    from model_card import render
    from quantize.card import facts

    made = package.open_package(package_copy)
    text = render(facts("m", made.provenance, made.parity, "no front matter here", ()))
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"
    assert "**License unknown.**" in text
