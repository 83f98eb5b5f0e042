"""A tiny model that reads pictures, with a processor of its own that takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.conftest import POCKET

IMAGE_TOKEN, IMAGE_ID = "<image>", 4095
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
IMAGES = {"height": 56, "width": 56}
PROCESSOR: dict[str, Any] = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE_TOKEN,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_processor": {"image_processor_type": "CLIPImageProcessor", "size": IMAGES, "crop_size": IMAGES},
}
TEMPLATE = (
    "{% for message in messages %}User: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def save(folder: Path) -> Path:
    """Random weights of a size at which pictures and 4 bits show in the logits; 17 tokens a picture."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llava",
        text_config={**TEXT, **LLAMA},
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=IMAGE_ID,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.6 * weight.shape[1] ** -0.5)
    model.half().save_pretrained(folder)
    _save_tokenizer(folder)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _save_tokenizer(folder: Path) -> None:
    """The pocket model's, whose last token makes room for that of an image."""
    shutil.copy(POCKET / "tokenizer_config.json", folder)
    content = json.loads((POCKET / "tokenizer.json").read_text("utf-8"))
    model = content["model"]
    (last,) = (token for token, number in model["vocab"].items() if number == IMAGE_ID)
    del model["vocab"][last]
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != last]
    content["added_tokens"].append({**content["added_tokens"][0], "id": IMAGE_ID, "content": IMAGE_TOKEN})
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
