"""Which files of a model a run needs, and which of them a package copies unchanged."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from quantize.errors import CorruptModel, UnsupportedModel
from quantize.files import CARD, CONFIG, GENERATION_CONFIG
from quantize.formats.safetensors import INDEX, SINGLE_FILE
from quantize.records import Source

PICKLE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")

TOKENIZER_MODELS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tekken.json",
)
TOKENIZER_FILES = (
    *TOKENIZER_MODELS,
    "tokenizer_config.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
CARRIED_FILES = (*TOKENIZER_FILES, *LEGAL_FILES, GENERATION_CONFIG)
"""Copied into the package as they are: saving them anew would rewrite them."""
OTHER_FILES = (CONFIG, CARD)
NOT_FOR_CODE = (
    *(CONFIG, CARD, INDEX, ".*", "*.safetensors", "*.index.json"),
    *(*PICKLE_WEIGHTS, "*.pkl", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.gguf", "*.npz"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf", "*.zip", "*.tar*"),
)
"""What a model's own code is not given. All else at the top it may read: its vocabulary may have any name."""


def choose_files(paths: Iterable[str], index: Mapping[str, Any] | None, name: str, remote_code: bool) -> list[str]:
    """The files that a run needs out of all that a model has; raises UnsupportedModel when some are absent."""
    available = set(paths)
    weights = _choose_weights(available, index, name)
    if not remote_code and not any(_matches(path, TOKENIZER_MODELS) for path in available):
        raise UnsupportedModel(
            f"{name} has no tokenizer: add its tokenizer.json beside config.json; one that is code of the model's own "
            f"needs --trust-remote-code"
        )
    others = (path for path in available if _matches(path, OTHER_FILES) or _is_carried(path, remote_code))
    return sorted({*weights, *others})


def carried_files(source: Source) -> tuple[str, ...]:
    """Names of the files that a package copies from its source unchanged."""
    return tuple(file.path for file in source.files if _is_carried(file.path, source.remote_code))


def _is_carried(path: str, remote_code: bool) -> bool:
    for_code = remote_code and "/" not in path and not _matches(path, NOT_FOR_CODE)
    return for_code or _matches(path, CARRIED_FILES)


def _choose_weights(available: set[str], index: Mapping[str, Any] | None, name: str) -> set[str]:
    if SINGLE_FILE in available:
        return {SINGLE_FILE}
    if index is not None:
        shards = set((index.get("weight_map") or {}).values())
        absent = sorted(shards - available)
        if absent or not shards:
            raise CorruptModel(f"{name}: {INDEX} names {absent[0] if absent else 'no shard'}, which is missing")
        return {INDEX, *shards}
    if any(_matches(path, PICKLE_WEIGHTS) for path in available):
        raise UnsupportedModel(
            f"{name} has only pickle weights, which can run code: convert them to safetensors first "
            f"(huggingface.co/spaces/safetensors/convert)"
        )
    raise UnsupportedModel(f"{name} has no {SINGLE_FILE}")


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Patterns without a folder mean files at the top: `onnx/tokenizer.json` is another model's."""
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)
