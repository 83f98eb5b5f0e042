"""What the stock file looks like is known in one folder: no other module imports bitsandbytes or spells its names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import model_card
import quantize

HOME = Path("formats", "bitsandbytes")
NAMES = re.compile(
    r"import bitsandbytes|from bitsandbytes|integrations\.bitsandbytes"
    r"|absmax\"|\.absmax|quant_map|quant_state|quant_storage|\bSCB\b|weight_format\b|\.nested_|\"nested_"
    r"|load_in_[48]bit|bnb_4bit_|llm_int8_|quantization_config|BitsAndBytesConfig"
    r"|Linear4bit|Linear8bitLt|Params4bit|Int8Params|QuantState|Conv1D"
)
EXPLAINED = {"options.py": "(bnb_4bit_compute_dtype)", "support.py": "with quantization_config="}
"""A help text that says which of transformers' settings an option is, and advice how to load an original."""


def lines_that_know_it(package: Path) -> list[str]:
    return [
        f"{file.relative_to(package)}:{number}: {line.strip()}"
        for file in sorted(package.rglob("*"))
        if file.suffix in (".py", ".j2") and HOME not in file.relative_to(package).parents
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if NAMES.search(line.replace(EXPLAINED.get(file.name, "\n"), ""))
    ]


@pytest.mark.parametrize("package", [quantize, model_card], ids=["quantize", "model_card"])
def test_nothing_outside_knows_the_file(package: object) -> None:
    (folder,) = package.__path__  # type: ignore[attr-defined]
    assert lines_that_know_it(Path(folder)) == []


def test_the_names_are_those_that_the_folder_spells() -> None:
    """So that the search would find something."""
    home = Path(quantize.__path__[0]) / HOME
    text = "".join(file.read_text("utf-8") for file in home.glob("*.py"))
    assert len(set(NAMES.findall(text))) > 15
