"""What the libraries of one environment compute with a package, as JSON; scripts/consumers.py runs it in several."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

LIBRARIES = ("transformers", "torch", "accelerate", "bitsandbytes")
WINDOW, WINDOWS, NEW_TOKENS = 128, 8, 24
PROMPT = "The file object has methods to"
TRUST = {"trust_remote_code": True}
"""Packages of experts hold code of `quantize` itself; in the others there is none."""


def perplexity(model: Any, ids: list[int], before: dict[str, Any]) -> float:
    """Of the first windows of a text, each of them after a picture and its question where there is one."""
    prompt = before.get("input_ids", torch.empty(1, 0, dtype=torch.long))
    picture = {name: value for name, value in before.items() if name == "pixel_values"}
    losses = []
    for window in torch.tensor(ids[: WINDOW * WINDOWS]).view(-1, 1, WINDOW):
        with torch.inference_mode():
            logits = model(input_ids=torch.cat([prompt, window], 1), **picture).logits[0, prompt.shape[1] : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.double(), window[0, 1:]))
    return float(torch.stack(losses).mean().exp())


def prompt(tokenizer: Any) -> dict[str, Any]:
    """A prompt in the model's own chat template, where it has one."""
    if tokenizer.chat_template is None:
        ids = tokenizer(PROMPT).input_ids
    else:
        message = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    return {"input_ids": torch.tensor([[int(token) for token in ids]])}


def question_of_a_picture(package: str) -> dict[str, Any]:
    """A picture of coloured stripes with a question, through the package's processor."""
    from PIL import Image

    processor: Any = AutoProcessor.from_pretrained(package)
    stripes = np.stack([np.full((56, 56), 200), np.tile(np.arange(56) * 4, (56, 1)), np.eye(56) * 255], -1)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=Image.fromarray(stripes.astype(np.uint8)), return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def main(package: str, text: str) -> None:
    sees = hasattr(AutoConfig.from_pretrained(package, **TRUST), "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(package)
    model: Any = kind.from_pretrained(package, device_map={"": "cpu"}, **TRUST).eval()
    start = question_of_a_picture(package) if sees else prompt(tokenizer)
    generated = model.generate(**start, do_sample=False, max_new_tokens=NEW_TOKENS)
    result = {
        "versions": {name: version(name) for name in LIBRARIES},
        "perplexity": perplexity(model, tokenizer(Path(text).read_text("utf-8")).input_ids, start if sees else {}),
        "prompt": start["input_ids"][0].tolist(),
        "ends": model.generation_config.eos_token_id,
        "generated": generated[0, start["input_ids"].shape[1] :].tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
