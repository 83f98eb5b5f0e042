"""Which files of a model a run needs, and which of them a package copies unchanged."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from quantize.errors import CorruptModel, UnsupportedModel
from quantize.files import CARD, CONFIG
from quantize.formats.safetensors import INDEX, SINGLE_FILE, is_weights
from quantize.records import Source
from quantize.source.legal import is_legal

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
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
"""Copied into the package byte for byte: saving them anew would rewrite them."""
OTHER_FILES = (CONFIG, CARD)


def choose_files(
    paths: Iterable[str], index: Mapping[str, Any] | None, name: str, remote_code: bool, license_path: str | None = None
) -> list[str]:
    """The files that a run needs out of all that a model has; raises UnsupportedModel when some are absent.

    `license_path` is the file that the model's card links as its license.
    """
    available = set(paths)
    weights = _choose_weights(available, index, name)
    if not any(_matches(path, TOKENIZER_MODELS) for path in available):
        raise UnsupportedModel(f"{name} has no tokenizer: add its tokenizer.json beside config.json")
    patterns = (*OTHER_FILES, *CARRIED_FILES, "*.py") if remote_code else (*OTHER_FILES, *CARRIED_FILES)
    legal = {path for path in available if is_legal(path) or path == license_path}
    return sorted({*weights, *legal, *(path for path in available if _matches(path, patterns))})


def carried_files(source: Source) -> tuple[str, ...]:
    """Names of the files that a package copies from its source unchanged."""
    return tuple(
        file.path for file in source.files if file.path not in (*OTHER_FILES, INDEX) and not is_weights(file.path)
    )


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
