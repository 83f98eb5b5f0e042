"""What lies beside the weights: each thing that is deleted or changed is named, and what stock saves anew passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.evidence import Check
from quantize.parity import companions
from quantize.parity.models import load_tokenizer
from tests.conftest import POCKET

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
PROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}


@pytest.fixture(scope="module")
def chat_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's small files."""
    folder = tmp_path_factory.mktemp("sources") / "chat"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    edit(folder / "generation_config.json", eos_token_id=[0, 7], do_sample=True, temperature=0.6)
    edit(folder / "preprocessor_config.json", **PROCESSOR)
    edit(folder / "processor_config.json", image_seq_length=16)
    return folder


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def checked(source: Path, folder: Path) -> dict[str, Check]:
    found = companions.checks(source, load_tokenizer(source, False), folder, False)
    return {check.name: check for check in found}


def add_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["lstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "template deleted": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
    "template changed": (lambda folder: (folder / "chat_template.jinja").write_text(f"{TEMPLATE} "), "chat template"),
    "eos token": (lambda folder: edit(folder / "tokenizer_config.json", eos_token="!"), "eos tokens"),
    "padding token": (lambda folder: edit(folder / "tokenizer_config.json", pad_token="!"), "special tokens"),
    "eos list": (lambda folder: edit(folder / "generation_config.json", eos_token_id=0), "eos tokens"),
    "sampling": (lambda folder: edit(folder / "generation_config.json", temperature=0.7), "generation settings"),
    "settings deleted": (lambda folder: (folder / "generation_config.json").unlink(), "generation settings"),
    "settings damaged": (lambda folder: (folder / "generation_config.json").write_text("["), "generation settings"),
    "added token": (add_token, "added tokens"),
    "processor deleted": (lambda folder: (folder / "preprocessor_config.json").unlink(), "processor files"),
    "processor changed": (
        lambda folder: edit(folder / "preprocessor_config.json", size={"height": 28, "width": 28}),
        "processor files",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_deleted_or_changed_fails_by_name(chat_source: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(chat_source, tmp_path / "copy"))
    assert all(check.passed for check in checked(chat_source, folder).values())
    alter, name = CHANGES[change]
    alter(folder)
    assert not checked(chat_source, folder)[name].passed


def test_the_detail_shows_both_values(chat_source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_source, tmp_path / "copy"))
    edit(folder / "generation_config.json", eos_token_id=5)
    check = checked(chat_source, folder)["eos tokens"]
    assert check.detail == "eos_token_id of generate is [0, 7] in the source and [5] here"


def test_what_stock_saves_anew_passes(chat_source: Path, tmp_path: Path) -> None:
    """Saving rewrites the tokenizer's files, leaves defaults out of settings, and puts all processors in one file."""
    from transformers import GenerationConfig

    load_tokenizer(chat_source, False).save_pretrained(tmp_path)
    GenerationConfig.from_pretrained(chat_source).save_pretrained(tmp_path)
    shutil.copy(chat_source / "config.json", tmp_path)
    edit(tmp_path / "processor_config.json", image_processor=PROCESSOR, image_seq_length=16, processor_class="Own")
    assert [check for check in checked(chat_source, tmp_path).values() if not check.passed] == []


def test_settings_that_stand_in_the_config_alone_are_found(tmp_path: Path) -> None:
    """Stock writes a generation_config.json from them, which says the same."""
    from transformers import AutoConfig, GenerationConfig

    source, saved = (Path(shutil.copytree(POCKET, tmp_path / name)) for name in ("source", "saved"))
    (source / "generation_config.json").unlink()
    edit(source / "config.json", eos_token_id=5)
    GenerationConfig.from_model_config(AutoConfig.from_pretrained(source)).save_pretrained(saved)
    assert checked(source, saved)["eos tokens"].passed
    assert not checked(source, POCKET)["eos tokens"].passed
