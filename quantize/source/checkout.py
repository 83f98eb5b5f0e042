"""A model reference becomes a pinned commit and a local folder that holds only what is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import hub
from quantize.documents import read_json
from quantize.errors import CorruptModel, PackageError, SourceChanged, SourceNotFound, UnsupportedModel, printable
from quantize.files import CARD, CONFIG, hash_file, require_space, stamp
from quantize.folders import expanded, listing, require_own
from quantize.formats import remote_code, safetensors
from quantize.formats.safetensors import INDEX, is_weights
from quantize.progress import Progress, ignore
from quantize.records import Checkout, FileRecord, Source, Stamp
from quantize.source.legal import linked_license
from quantize.source.selection import choose_files, is_settings, require_config, require_no_adapter
from quantize.source.support import check_config, check_model, runs_remote_code

TOKENIZER_CONFIG = "tokenizer_config.json"


def fetch(reference: str, *, revision: str | None, trust_remote_code: bool, progress: Progress) -> Checkout:
    """Resolve `reference` (a local folder or a Hub id) once, and bring what is needed to this machine.

    Raises SourceError, HubUnreachable or StorageError.
    """
    if is_local(reference):
        if revision is not None:
            raise SourceNotFound(f"{reference} is a local folder and has no revisions: leave --revision out")
        return _from_folder(expanded(reference), trust_remote_code, progress)
    return _from_hub(reference, revision, trust_remote_code, progress)


def refetch(source: Source, against: str | None, *, trust_remote_code: bool, progress: Progress) -> Checkout:
    """The checkout that a record describes: the same commit, or the folder `against` with the same hashes.

    The model's own code runs where it did, which has to be allowed again.
    """
    reference = against or source.repo_id
    if reference is None:
        raise SourceNotFound(f"{source.name} came from a local folder: say where it is with --against FOLDER")
    if source.remote_code and not trust_remote_code:
        raise UnsupportedModel(
            f"{source.name} was measured with code from its own repo: read that code, then allow it with "
            f"--trust-remote-code"
        )
    revision = None if is_local(reference) else source.commit
    checkout = fetch(reference, revision=revision, trust_remote_code=source.remote_code, progress=progress)
    if not _same_files(source, checkout.source):
        raise PackageError(f"{reference} is not the source that this package was made from")
    return checkout


def _same_files(recorded: Source, present: Source) -> bool:
    """Whether `present` has the recorded files; beside code of its own it may have more, since earlier versions took
    fewer of them."""
    recorded_files, present_files = recorded.fingerprint(), present.fingerprint()
    shared = recorded_files.keys() if recorded.remote_code else recorded_files.keys() | present_files.keys()
    return all(recorded_files.get(path) == present_files.get(path) for path in shared)


def fetch_checkpoint(
    reference: str, records: tuple[str, ...], progress: Progress, *, trust_remote_code: bool = False
) -> Path:
    """The folder of somebody's checkpoint: a local one as it is, a Hub repo's at its present commit.

    `records` are files to bring besides, where the repo has them, and with `trust_remote_code` its code, which nothing
    runs here. Nothing is said about what the checkpoint is.
    """
    if is_local(reference):
        return _local_checkpoint(expanded(reference))
    commit, files = hub.resolve(reference, None)
    remote = {file.path: file for file in files}
    index = hub.read_json(reference, commit, remote[INDEX]) if INDEX in remote else None
    chosen = {*choose_files(remote, index, reference, trust_remote_code), *(name for name in records if name in remote)}
    require_space(hub.cache_folder(), sum(remote[path].size for path in chosen), f"downloading {reference}")
    return _downloaded(reference, commit, [remote[path] for path in sorted(chosen)], progress)


@contextmanager
def watched(checkout: Checkout) -> Iterator[None]:
    """Work on a source whose files must stay as they were hashed.

    Raises SourceChanged at the end where one does not, also in place of an error that came of it.
    """
    try:
        yield
    except Exception:
        _require_unchanged(checkout)
        raise
    _require_unchanged(checkout)


def _require_unchanged(checkout: Checkout) -> None:
    """Hash again what has another stamp than when it was hashed."""
    for file in checkout.source.files:
        path = checkout.folder / file.path
        if not path.is_file():
            raise SourceChanged(f"{path} is gone since the run began: restore it, and run again")
        if stamp(path) != checkout.stamps.get(file.path) and hash_file(path)[1] != file.sha256:
            raise SourceChanged(f"{path} was changed while the run worked on it: run again when nothing writes there")


def _local_checkpoint(folder: Path) -> Path:
    """A folder whose settings and weights are files of its own, and whose settings can be read."""
    paths = [path for path in listing(folder) if "/" not in path] if folder.is_dir() else []
    require_no_adapter(paths, str(folder))
    loaded = [path for path in paths if is_settings(path) or is_weights(path)]
    require_own(folder, loaded, CorruptModel)
    _require_readable(folder, loaded)
    return folder


def is_local(reference: str) -> bool:
    """Whether a reference means a folder: it exists, or no Hub id is written like it."""
    return reference.startswith((".", "/", "~")) or Path(reference).is_dir()


def name_of(reference: str) -> str:
    """The last part of a model's name: `distilgpt2` for `distilbert/distilgpt2`."""
    return expanded(reference).resolve().name if is_local(reference) else reference.rsplit("/", 1)[-1]


def _from_folder(folder: Path, trust_remote_code: bool, progress: Progress) -> Checkout:
    if not folder.is_dir():
        raise SourceNotFound(f"no such folder: {folder} (a Hub id looks like distilbert/distilgpt2)")
    name, own_name = str(folder), folder.resolve().name
    if printable(own_name) != own_name:
        raise SourceNotFound(f"the name of {folder} is not plain text: rename that folder")
    paths = listing(folder)
    require_config(paths, name)
    config = _read_own(folder, CONFIG)
    tokenizer_config = _read_own(folder, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in paths else {}
    check_config(config, tokenizer_config, name, trust_remote_code)
    index = _read_own(folder, INDEX) if INDEX in paths else None
    code = _Code.of(config, tokenizer_config, trust_remote_code)
    require_own(folder, {CARD} & set(paths), CorruptModel)
    chosen = choose_files(paths, index, name, code.runs, linked_license(folder / CARD, None))
    require_own(folder, chosen, CorruptModel)
    with progress.task("hashing the original", sum((folder / path).stat().st_size for path in chosen), "B") as advance:
        files, stamps = _hashed(folder, chosen, advance)
    return Checkout(_describe(folder, config, files, own_name, code), folder, stamps)


def _from_hub(repo_id: str, revision: str | None, trust_remote_code: bool, progress: Progress) -> Checkout:
    held = hub.snapshot(repo_id, revision)
    repo_id, commit = held.repo_id, held.commit
    remote = {file.path: file for file in held.files}
    require_config(remote, repo_id)
    config = hub.read_json(repo_id, commit, remote[CONFIG])
    tokenizer_config = hub.read_json(repo_id, commit, remote[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in remote else {}
    check_config(config, tokenizer_config, repo_id, trust_remote_code)
    check_model(config, repo_id)
    index = hub.read_json(repo_id, commit, remote[INDEX]) if INDEX in remote else None
    code = _Code.of(config, tokenizer_config, trust_remote_code)
    chosen = choose_files(remote, index, repo_id, code.runs, _linked_license(repo_id, commit, remote))
    missing = sum(remote[path].size for path in chosen if not hub.is_cached(repo_id, commit, path))
    require_space(hub.cache_folder(), missing, f"downloading {repo_id}")
    folder = _downloaded(repo_id, commit, [remote[path] for path in chosen], progress)
    files, stamps = _hashed(folder, chosen, ignore)
    source = _describe(folder, config, files, repo_id.rsplit("/", 1)[-1], code)
    return Checkout(dataclasses.replace(source, repo_id=repo_id, revision=revision, commit=commit), folder, stamps)


def _hashed(
    folder: Path, paths: list[str], advance: Callable[[int], None]
) -> tuple[tuple[FileRecord, ...], dict[str, Stamp]]:
    """Records of the files, and their stamps, which are older than their hashes."""
    stamps = {path: stamp(folder / path) for path in paths}
    return tuple(FileRecord(path, *hash_file(folder / path, advance)) for path in paths), stamps


def _linked_license(repo_id: str, commit: str, remote: Mapping[str, hub.RemoteFile]) -> str | None:
    """The license's path as the card has it, for which the card is fetched before all else."""
    if CARD not in remote:
        return None
    return linked_license(hub.fetch(repo_id, commit, [remote[CARD]]) / CARD, repo_id)


def _downloaded(repo_id: str, commit: str, files: list[hub.RemoteFile], progress: Progress) -> Path:
    if untold := [file.path for file in files if not file.sha256 and not file.blob_id]:
        progress.note(f"not checked: the Hub tells no hash of {untold[0]} ({len(untold)} such files) of {repo_id}")
    with progress.task("checking the download", sum(file.size for file in files), "B") as advance:
        return hub.fetch(repo_id, commit, files, advance)


@dataclass(frozen=True)
class _Code:
    """Code of the model's own: whether it is run, and whether there is some that is not."""

    runs: bool
    left_out: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], trusted: bool) -> _Code:
        runs = trusted and runs_remote_code(config, tokenizer_config)
        named = remote_code.names_code(config) or remote_code.names_code(tokenizer_config)
        return cls(runs, left_out=named and not runs)


def _describe(folder: Path, config: Mapping[str, Any], files: tuple[FileRecord, ...], name: str, code: _Code) -> Source:
    _require_readable(folder, [file.path for file in files])
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
        remote_code=code.runs,
        code_left_out=code.left_out,
        transformers_version=str(config.get("transformers_version") or ""),
    )


def _require_readable(folder: Path, paths: Iterable[str]) -> None:
    """Raise CorruptModel for settings that transformers would read and that are no JSON object."""
    for path in filter(is_settings, paths):
        read_json(folder / path, f"{path} of {folder.name}", CorruptModel, finite=False)


def _weights_summary(folder: Path, paths: list[str]) -> tuple[dict[str, int], int]:
    """Parameters by type, and in all. Reading the headers also finds files that were cut short."""
    counts: dict[str, int] = {}
    for path in (path for path in paths if is_weights(path)):
        for entry in safetensors.entries(folder / path).values():
            counts[entry.kind] = counts.get(entry.kind, 0) + entry.numel
    if not sum(counts.values()):
        raise CorruptModel(f"{folder} holds weight files without a single tensor")
    unknown = sorted(counts.keys() - safetensors.TYPES.keys())
    if unknown:
        raise UnsupportedModel(
            f"{folder} holds tensors of the type {unknown[0]}: name a copy of the model in 16 or 32 bits"
        )
    return counts, sum(counts.values())


def _read_own(folder: Path, name: str) -> dict[str, Any]:
    require_own(folder, [name], CorruptModel)
    return read_json(folder / name, folder / name, CorruptModel, finite=False)
