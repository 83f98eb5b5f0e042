"""Which files of a model a run needs, and which of them a package copies unchanged."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

from quantize.errors import CorruptModel, UnsupportedModel, printable
from quantize.files import CARD, CONFIG, GENERATION_CONFIG, PROCESSOR_FILES
from quantize.formats.safetensors import INDEX, SINGLE_FILE, is_weights
from quantize.records import Source
from quantize.source.legal import is_legal

PICKLE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER = "adapter_config.json"
MERGE = "merge that into its base model with peft's merge_and_unload, and quantize what comes out"
ORIGINAL = "name the original model, which that was made from"
OTHER_WEIGHTS = (
    ((ADAPTER, "adapter_model.*"), "only an adapter ({})", MERGE),
    (("model_index.json",), "a pipeline of diffusers ({})", "only causal language models can be quantized here"),
    (("*.gguf",), "GGUF weights ({})", ORIGINAL),
    (
        ("model.*.safetensors", "model.*.safetensors.index.json"),
        "only a variant of the weights ({})",
        f"save the model without a variant, so that they are called {SINGLE_FILE}",
    ),
    (
        ("consolidated*.safetensors", "consolidated*.pth", "params.json"),
        "weights in their author's own layout ({})",
        "convert them to that of transformers, or name a repo that has it",
    ),
    (("model-*-of-*.safetensors",), "parts of weights ({}) without the list of them", f"add {INDEX}"),
    (("*.safetensors",), "weights under another name ({})", f"call them {SINGLE_FILE} if they are those of the model"),
    (
        PICKLE_WEIGHTS,
        "only pickle weights, which can run code ({})",
        "convert them to safetensors first (huggingface.co/spaces/safetensors/convert)",
    ),
    (("*/*.safetensors",), "weights in a folder of their own ({})", "name that folder, with its own config.json"),
    (("*.npz", "*.onnx", "onnx/*.onnx"), "weights of another program ({})", ORIGINAL),
    (("tf_model.h5", "*.msgpack", "*.ot", "*.tflite", "*.nemo"), "weights of another program ({})", ORIGINAL),
)
"""Files that are no weights to be quantized, what they are, and what to do about it; the likeliest first."""

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
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
TOKENIZER_LIBRARIES = {
    "*.model": SENTENCEPIECE,
    "*.tiktoken": {"tiktoken": "tiktoken"},
    "tekken.json": {"mistral-common": "mistral_common"},
}
"""Packages, each with its module, without which a tokenizer cannot be read from such a file."""
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
CARRIED_FILES = (*TOKENIZER_FILES, *PROCESSOR_FILES, GENERATION_CONFIG)
"""Copied into the package as they are: saving them anew would rewrite them."""
OTHER_FILES = (CONFIG, CARD)
NOT_FOR_CODE = (
    *(CONFIG, CARD, INDEX, ".*", "*.safetensors", "*.index.json"),
    *(*PICKLE_WEIGHTS, "*.pkl", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.gguf", "*.npz"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf", "*.zip", "*.tar*"),
)
"""What a model's own code is not given. All else at the top it may read: its vocabulary may have any name."""


def choose_files(
    paths: Iterable[str], index: Mapping[str, Any] | None, name: str, remote_code: bool, license_path: str | None = None
) -> list[str]:
    """The files that a run needs out of all that a model has; raises UnsupportedModel when some are absent.

    `license_path` is the file that the model's card links as its license.
    """
    available = set(paths)
    require_no_adapter(available, name)
    weights = _choose_weights(available, index, name)
    if not remote_code:
        _require_tokenizer(available, name)
    legal = {path for path in available if is_legal(path) or path == license_path}
    others = {path for path in available if _matches(path, (*OTHER_FILES, *CARRIED_FILES))}
    for_code = {path for path in available if remote_code and "/" not in path and not _matches(path, NOT_FOR_CODE)}
    chosen = sorted({*weights, *legal, *others, *for_code})
    _require_plain_names(chosen, name)
    return chosen


def require_config(paths: Iterable[str], name: str) -> None:
    """Raise UnsupportedModel for what is no model of transformers, saying what lies there instead."""
    available = set(paths)
    if CONFIG not in available:
        raise UnsupportedModel(
            f"{name} has no {CONFIG}: it is not a transformers model{_instead(available - {SINGLE_FILE})}"
        )


def carried_files(source: Source) -> tuple[str, ...]:
    """Names of the files that a package copies from its source unchanged."""
    return tuple(
        file.path for file in source.files if file.path not in (*OTHER_FILES, INDEX) and not is_weights(file.path)
    )


def is_settings(path: str) -> bool:
    """Whether transformers reads a file of that name as a JSON object: not the long ones, which tokenizers reads."""
    return path.endswith(".json") and not _matches(path, TOKENIZER_MODELS)


def _choose_weights(available: set[str], index: Mapping[str, Any] | None, name: str) -> set[str]:
    if SINGLE_FILE in available:
        return {SINGLE_FILE}
    if index is not None:
        shards = _shards(index, name)
        absent = sorted(shards - available)
        if absent or not shards:
            raise CorruptModel(f"{name}: {INDEX} names {absent[0] if absent else 'no shard'}, which is missing")
        return {INDEX, *shards}
    raise UnsupportedModel(f"{name} has no {SINGLE_FILE}{_instead(available)}")


def _shards(index: Mapping[str, Any], name: str) -> set[str]:
    """The weight files that an index names."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptModel(f"{name}: weight_map in {INDEX} is to say for each tensor which file holds it")
    other = sorted(file for file in weight_map.values() if not is_weights(file))
    if other:
        raise CorruptModel(f"{name}: {INDEX} names {other[0]}, which is no safetensors file")
    return set(weight_map.values())


def _instead(available: set[str]) -> str:
    """What a model has in place of weights that can be read here, and what to do about it."""
    for patterns, what, advice in OTHER_WEIGHTS:
        present = sorted(path for path in available if _matches(path, patterns))
        if present:
            return f"; it has {what.format(present[0])}: {advice}"
    return ""


def _require_plain_names(paths: Iterable[str], name: str) -> None:
    for path in paths:
        if printable(path) != path or ".." in path.split("/") or path.startswith("/"):
            raise CorruptModel(f"{name} has a file whose name is not plain text below its folder ({path}): rename it")


def require_no_adapter(paths: Iterable[str], name: str) -> None:
    """Raise UnsupportedModel for an adapter beside weights: who has peft loads both, and others the weights alone."""
    available = set(paths)
    if ADAPTER in available and available & {SINGLE_FILE, INDEX}:
        raise UnsupportedModel(
            f"{name} has an adapter ({ADAPTER}) beside its weights, which would be loaded with them or not: merge it "
            f"with peft's merge_and_unload, or take {ADAPTER} away where the weights contain it already"
        )


def _require_tokenizer(available: set[str], name: str) -> None:
    present = [path for path in available if _matches(path, TOKENIZER_MODELS)]
    if not present:
        raise UnsupportedModel(
            f"{name} has no tokenizer: add its tokenizer.json beside {CONFIG}; one that is code needs "
            f"--trust-remote-code"
        )
    libraries = {path: _absent_libraries(path) for path in sorted(present)}
    if all(libraries.values()):
        path, absent = next(iter(libraries.items()))
        raise UnsupportedModel(
            f"{name} has its tokenizer as {path} only, which cannot be read without {' and '.join(absent)}: install "
            f"that with pip, or add tokenizer.json"
        )


def _absent_libraries(path: str) -> tuple[str, ...]:
    """What transformers needs to read a tokenizer from this file, and is not installed."""
    needed = next((names for pattern, names in TOKENIZER_LIBRARIES.items() if fnmatch.fnmatchcase(path, pattern)), {})
    return tuple(package for package, module in needed.items() if not _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it belongs to
        return False


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Patterns without a folder mean files at the top: `onnx/tokenizer.json` is another model's."""
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)
