"""Models that read pictures: the language model is quantized, what pictures come in by is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize import pipeline
from quantize.errors import UnsupportedModel
from quantize.formats.bitsandbytes import modules
from quantize.grades import GRADES
from quantize.progress import Silent
from quantize.records import EvaluationSettings, Recipe
from tests.conftest import POCKET
from tests.vision import TEXT, TOWER

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"model_type": "gemma3_text"}, {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}, {"image_token_index": 5}),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
        {"depth": 2, "num_heads": 4, "out_hidden_size": 64},
        {},
    ),
}
PROCESSOR = {"preprocessor_config.json": '{"size": 28}', "processor_config.json": "{}"}


def build(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, tower, rest = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, text_config={**TEXT, **text}, vision_config={**TOWER, "image_size": 28, **tower}, **rest
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float16)


def save(kind: str, folder: Path) -> None:
    build(kind).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(content)


def linear4bit(folder: Path) -> list[str]:
    """Of the package as stock transformers loads it."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_is_quantized_and_the_tower_is_not(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    settings = EvaluationSettings(max_windows=16, window=64, new_tokens=4, require=GRADES[-2])
    request = pipeline.RunRequest(
        str(tmp_path / "model"), output=tmp_path / "package", recipe=Recipe(name="rtn"), settings=settings, device="cpu"
    )
    package = pipeline.run(request, Silent()).package
    failed = [check for check in package.evidence.checks if not check.passed]
    assert not failed, failed
    names = linear4bit(package.folder)
    assert len(names) == 14 and all("language_model" in name for name in names)
    assert all((package.folder / name).read_text() == content for name, content in PROCESSOR.items())
    assert package.evidence.modalities.startswith("text only: the original's processor ")


def test_towers_are_quantized_where_that_is_asked_for() -> None:
    model = build("gemma3")
    default, every = (modules.to_quantize(model, Recipe(quantize_towers=asked), "x") for asked in (False, True))
    assert set(default) < set(every)
    assert all("vision_tower" in name for name in set(every) - set(default))


def test_a_model_whose_towers_cannot_be_told_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model("git", num_hidden_layers=1, vision_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedModel, match="cannot be told"):
        modules.towers(model)
