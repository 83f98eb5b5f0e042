"""A model reference becomes a pinned commit and a local folder that holds only what is needed."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantize import hub
from quantize.errors import CorruptModel, PackageError, SourceNotFound, UnsupportedModel
from quantize.files import hash_file, require_space
from quantize.formats import safetensors
from quantize.formats.bitsandbytes.config import is_quantized
from quantize.formats.safetensors import INDEX, SINGLE_FILE, is_weights
from quantize.progress import Progress
from quantize.records import Checkout, FileRecord, Source

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
CARRIED_FILES = (*TOKENIZER_FILES, *LEGAL_FILES, "generation_config.json")
"""Copied into the package byte for byte: saving them anew would rewrite them."""
CARD = "README.md"
OTHER_FILES = ("config.json", CARD)


def fetch(reference: str, *, revision: str | None, trust_remote_code: bool, progress: Progress) -> Checkout:
    """Resolve `reference` (a local folder or a Hub id) once, and bring what is needed to this machine.

    Raises SourceError, HubUnreachable or StorageError.
    """
    if is_local(reference):
        if revision is not None:
            raise SourceNotFound(f"{reference} is a local folder and has no revisions: leave --revision out")
        return _from_folder(Path(reference).expanduser(), trust_remote_code, progress)
    return _from_hub(reference, revision, trust_remote_code, progress)


def refetch(source: Source, against: str | None, *, trust_remote_code: bool, progress: Progress) -> Checkout:
    """The checkout that a record describes: the same commit, or the folder `against` with the same hashes."""
    reference = against or source.repo_id
    if reference is None:
        raise SourceNotFound(f"{source.name} came from a local folder: say where it is with --against FOLDER")
    revision = None if is_local(reference) else source.commit
    found = fetch(reference, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    if found.source.fingerprint() != source.fingerprint():
        raise PackageError(f"{reference} is not the source that this package was made from")
    return found


def fetch_checkpoint(reference: str, records: tuple[str, ...], progress: Progress) -> Path:
    """The folder of somebody's checkpoint: a local one as it is, a Hub repo's at its present commit.

    `records` are files to bring besides, where the repo has them. Nothing is said about what the checkpoint is.
    """
    if is_local(reference):
        return Path(reference).expanduser()
    commit, listing = hub.resolve(reference, None)
    remote = {file.path: file for file in listing}
    index = hub.read_json(reference, commit, remote[INDEX]) if INDEX in remote else None
    chosen = [*choose_files(remote, index, reference, remote_code=False), *(name for name in records if name in remote)]
    require_space(hub.cache_folder(), sum(remote[path].size for path in chosen), f"downloading {reference}")
    return _downloaded(reference, commit, [remote[path] for path in chosen], progress)


def is_local(reference: str) -> bool:
    """Whether a reference means a folder: it exists, or no Hub id is written like it."""
    return Path(reference).expanduser().is_dir() or reference.startswith((".", "/", "~"))


def name_of(reference: str) -> str:
    """The last part of a model's name: `distilgpt2` for `distilbert/distilgpt2`."""
    return Path(reference).expanduser().resolve().name if is_local(reference) else reference.rsplit("/", 1)[-1]


def read_card(source: Source, against: str | None) -> str | None:
    """The card of a recorded source, from its commit on the Hub or the folder `against`; nothing else is fetched.

    Raises SourceNotFound, PackageError (another card than the recorded one), HubUnreachable or CorruptModel.
    """
    recorded = next((file for file in source.files if file.path == CARD), None)
    if recorded is None:
        return None
    reference = against or source.repo_id
    if reference is None:
        raise SourceNotFound(f"{source.name} came from a local folder: say where it is with --against FOLDER")
    if is_local(reference):
        path = Path(reference).expanduser() / CARD
    else:
        path = hub.download(reference, source.commit or "main", [CARD]) / CARD
    if not path.is_file() or hash_file(path)[1] != recorded.sha256:
        raise PackageError(f"{reference} is not the source that this package was made from: its {CARD} differs")
    return _decoded(path)


def card_text(checkout: Checkout) -> str | None:
    """The source's README.md, where it has one."""
    path = checkout.folder / CARD
    return _decoded(path) if path.is_file() else None


def _decoded(path: Path) -> str:
    """A card's text; bytes that are not UTF-8 are an error with their line, never mojibake."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CorruptModel(f"the source's README.md is not UTF-8 (line {line}): mend it at the source") from error


def carried_files(source: Source) -> tuple[str, ...]:
    """Names of the files that a package copies from its source unchanged."""
    patterns = (*CARRIED_FILES, "*.py") if source.remote_code else CARRIED_FILES
    return tuple(file.path for file in source.files if _matches(file.path, patterns))


def choose_files(paths: Iterable[str], index: Mapping[str, Any] | None, name: str, remote_code: bool) -> list[str]:
    """The files that a run needs out of all that a model has; raises UnsupportedModel when some are absent."""
    available = set(paths)
    weights = _choose_weights(available, index, name)
    if not any(_matches(path, TOKENIZER_MODELS) for path in available):
        raise UnsupportedModel(f"{name} has no tokenizer: add its tokenizer.json beside config.json")
    patterns = (*OTHER_FILES, *CARRIED_FILES, "*.py") if remote_code else (*OTHER_FILES, *CARRIED_FILES)
    return sorted({*weights, *(path for path in available if _matches(path, patterns))})


def check_config(config: Mapping[str, Any], name: str, trust_remote_code: bool) -> None:
    """Raise UnsupportedModel for a model that cannot be quantized, saying what to do about it."""
    architectures = config.get("architectures") or []
    if not config.get("model_type") or not architectures:
        raise UnsupportedModel(f"{name}: config.json names no model_type and architectures; it needs both")
    if is_quantized(config):
        raise UnsupportedModel(f"{name} is already quantized: name the original model instead")
    if needs_remote_code(config):
        if not trust_remote_code:
            raise UnsupportedModel(
                f"{name} needs code from its own repo: read that code, then allow it with --trust-remote-code"
            )
    elif not set(architectures) & _causal_architectures():
        raise UnsupportedModel(
            f"{name} is not a causal language model ({', '.join(architectures)}): only those can be quantized here"
        )


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself cannot build this model and the repo brings code that can."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    brings_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    return brings_code and config.get("model_type") not in CONFIG_MAPPING_NAMES


def _from_folder(folder: Path, trust_remote_code: bool, progress: Progress) -> Checkout:
    name = str(folder)
    if not folder.is_dir():
        raise SourceNotFound(f"no such folder: {folder} (a Hub id looks like distilbert/distilgpt2)")
    config = _read_config(folder)
    check_config(config, name, trust_remote_code)
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    index = _read_json(folder / INDEX) if INDEX in paths else None
    chosen = choose_files(paths, index, name, needs_remote_code(config))
    with progress.task("hashing the source", sum((folder / path).stat().st_size for path in chosen), "B") as advance:
        files = tuple(FileRecord(path, *hash_file(folder / path, advance)) for path in chosen)
    return Checkout(_describe(folder, config, files, folder.resolve().name), folder)


def _from_hub(repo_id: str, revision: str | None, trust_remote_code: bool, progress: Progress) -> Checkout:
    commit, listing = hub.resolve(repo_id, revision)
    remote = {file.path: file for file in listing}
    if "config.json" not in remote:
        raise UnsupportedModel(f"{repo_id} has no config.json: it is not a transformers model")
    config = hub.read_json(repo_id, commit, remote["config.json"])
    check_config(config, repo_id, trust_remote_code)
    index = hub.read_json(repo_id, commit, remote[INDEX]) if INDEX in remote else None
    chosen = choose_files(remote, index, repo_id, needs_remote_code(config))
    missing = sum(remote[path].size for path in chosen if not hub.is_cached(repo_id, commit, path))
    require_space(hub.cache_folder(), missing, f"downloading {repo_id}")
    folder = _downloaded(repo_id, commit, [remote[path] for path in chosen], progress)
    files = tuple(FileRecord(path, *hash_file(folder / path)) for path in chosen)
    source = _describe(folder, config, files, repo_id.rsplit("/", 1)[-1])
    return Checkout(dataclasses.replace(source, repo_id=repo_id, revision=revision, commit=commit), folder)


def _downloaded(repo_id: str, commit: str, files: list[hub.RemoteFile], progress: Progress) -> Path:
    with progress.task("checking the download", sum(file.size for file in files), "B") as advance:
        return hub.fetch(repo_id, commit, files, advance)


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


def _describe(folder: Path, config: Mapping[str, Any], files: tuple[FileRecord, ...], name: str) -> Source:
    dtypes, parameters = _weights_summary(folder, [file.path for file in files])
    return Source(
        name=name,
        repo_id=None,
        revision=None,
        commit=None,
        files=files,
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        dtype=max(dtypes, key=lambda dtype: dtypes[dtype]),
        parameters=parameters,
        remote_code=needs_remote_code(config),
    )


def _weights_summary(folder: Path, paths: list[str]) -> tuple[dict[str, int], int]:
    """Parameters by type, and in all. Reading the headers also finds files that were cut short."""
    counts: dict[str, int] = {}
    for path in filter(is_weights, paths):
        for entry in safetensors.entries(folder / path).values():
            counts[entry.kind] = counts.get(entry.kind, 0) + entry.numel
    if not counts:
        raise CorruptModel(f"{folder} holds weight files without a single tensor")
    return counts, sum(counts.values())


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json: it is not a transformers model")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptModel(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptModel(f"{path} is not a JSON object")
    return content


def _causal_architectures() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {name for value in NAMES.values() for name in ((value,) if isinstance(value, str) else value)}


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Patterns without a folder mean files at the top: `onnx/tokenizer.json` is another model's."""
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)
