"""Publishes a model folder as distilbert/distilgpt2, with that repository's real list of files around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .loopback import LoopbackHub

DECOYS = (
    "64.tflite",
    "coreml/text-generation/float32_model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    "coreml/text-generation/float32_model.mlpackage/Manifest.json",
    "flax_model.msgpack",
    "onnx/config.json",
    "onnx/decoder_model.onnx",
    "onnx/decoder_model_merged.onnx",
    "onnx/decoder_with_past_model.onnx",
    "onnx/generation_config.json",
    "onnx/tokenizer.json",
    "pytorch_model.bin",
    "rust_model.ot",
    "tf_model.h5",
)
GENERATION = {"do_sample": True, "max_length": 50}
LICENSE = "distilgpt2 is licensed under the Apache License, Version 2.0.\nhttps://www.apache.org/licenses/LICENSE-2.0\n"
CARD = """\
---
language: en
tags:
- exbert
license: apache-2.0
datasets:
- openwebtext

model-index:
- name: distilgpt2
  results:
  - task:
      type: text-generation
      name: Text Generation
    dataset:
      type: wikitext
      name: WikiText-103
    metrics:
      - type: perplexity
        name: Perplexity
        value: 21.1

co2_eq_emissions: 149200
---

# DistilGPT2

A small English language model. It learned to continue text the way the smallest GPT-2 does, from that
larger model's own predictions, and has about 82 million parameters.

## What it is for

Drafting, autocompletion and play, in English. It states things that are not true and repeats the prejudices
of the web pages that it learned from, so nobody should take its text for facts.

## How to use it

```python
from transformers import pipeline, set_seed

generator = pipeline("text-generation", model="distilbert/distilgpt2")
set_seed(48)
generator("Hello, I'm a language model,", max_length=20, num_return_sequences=5)
```

## Training and evaluation

The training text was OpenWebText, an open reproduction of the text that GPT-2 learned from. On WikiText-103
the perplexity is 21.1 after fine-tuning on that corpus's training part.
"""


def seed_distilgpt2(hub: LoopbackHub, model_folder: Path, repo_id: str = "distilbert/distilgpt2") -> str:
    """Creates the repository; the folder's own files go before decoys, but not before the card."""
    files: dict[str, bytes | Path | None] = {path: decoy(path) for path in DECOYS}
    files["generation_config_for_text_generation.json"] = _json(GENERATION)
    files |= _bpe_files(model_folder / "tokenizer.json")
    own = [path for path in sorted(model_folder.rglob("*")) if path.is_file()]
    files |= {path.relative_to(model_folder).as_posix(): path for path in own}
    files |= {"README.md": CARD.encode(), "LICENSE": LICENSE.encode()}
    hub.create_repo(repo_id)
    return hub.commit(repo_id, files, "Add the model")


def decoy(path: str) -> bytes:
    """A few KB that no loader takes for what the name says."""
    line = f"DECOY: not a model file, and nothing should download {path}\n"
    return (line * (3000 // len(line))).encode()


def _bpe_files(tokenizer: Path) -> dict[str, bytes]:
    """vocab.json and merges.txt, as the older tokenizer classes read them."""
    if not tokenizer.is_file():
        return {}
    model: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8")).get("model", {})
    if model.get("type") != "BPE":
        return {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    return {"vocab.json": _json(model["vocab"]), "merges.txt": text.encode()}


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
