"""What the libraries of one environment compute with a package, as JSON; scripts/consumers.py runs it in several."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LIBRARIES = ("transformers", "torch", "accelerate", "bitsandbytes")
WINDOW, WINDOWS, NEW_TOKENS = 128, 8, 24
PROMPT = "The file object has methods to"


def perplexity(model: Any, ids: list[int]) -> float:
    """Of the first windows of a text."""
    windows = torch.tensor(ids[: WINDOW * WINDOWS]).view(-1, WINDOW)
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return float(loss.exp())


def prompt(tokenizer: Any) -> list[int]:
    """A prompt in the model's own chat template, where it has one."""
    if tokenizer.chat_template is None:
        return [int(token) for token in tokenizer(PROMPT).input_ids]
    message = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]


def main(package: str, text: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(package)
    model: Any = AutoModelForCausalLM.from_pretrained(package, device_map={"": "cpu"}).eval()
    start = prompt(tokenizer)
    generated = model.generate(torch.tensor([start]), do_sample=False, max_new_tokens=NEW_TOKENS)
    result = {
        "versions": {name: version(name) for name in LIBRARIES},
        "perplexity": perplexity(model, tokenizer(Path(text).read_text("utf-8")).input_ids),
        "prompt": start,
        "ends": model.generation_config.eos_token_id,
        "generated": generated[0, len(start) :].tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
