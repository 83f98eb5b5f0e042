"""A package becomes one commit on the Hub, and what arrived is compared with what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize import hub
from quantize.errors import AccessDenied, PublishError
from quantize.files import git_blob_id
from quantize.progress import Progress
from quantize.records import FileRecord, Receipt

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", "adapter_config.json")


def push(
    folder: Path,
    files: Sequence[FileRecord],
    repo_id: str,
    *,
    private: bool,
    message: str,
    progress: Progress,
) -> Receipt:
    """Send `files` of `folder` to `repo_id` in one commit, unless its head already holds them.

    Raises AccessDenied (no token, no right), PublishError (somebody else committed, or what arrived differs),
    or HubUnreachable.
    """
    if not hub.token_present():
        raise AccessDenied("no token for the Hub: log in with `hf auth login` or set HF_TOKEN")
    hub.create_repo(repo_id, private=private)
    head, remote = hub.resolve(repo_id, None)
    stale = _stale(repo_id, head, files, remote)
    if not stale and not _different(folder, files, remote):
        return Receipt(repo_id, head, f"{hub.endpoint()}/{repo_id}", False, tuple(files))
    progress.note(f"uploading {len(files)} files, {sum(file.size for file in files) / 1e6:.1f} MB")
    local = {file.path: folder / file.path for file in files}
    commit = hub.commit(repo_id, local, stale, parent=head, message=message)
    _, arrived = hub.resolve(repo_id, commit)
    if wrong := _different(folder, files, arrived):
        raise PublishError(f"{wrong[0]} arrived at {repo_id} with other content: push again")
    return Receipt(repo_id, commit, f"{hub.endpoint()}/{repo_id}/tree/{commit}", True, tuple(files))


def _stale(repo_id: str, head: str, files: Sequence[FileRecord], remote: Sequence[hub.RemoteFile]) -> list[str]:
    """Files of an earlier package that this one lacks; weights of any other origin are never touched.

    They would be loaded in place of the package's own: `model.safetensors` comes before shards.
    """
    new, there = {file.path for file in files}, {file.path for file in remote}
    earlier: set[str] = set()
    if "provenance.json" in there:
        listed = hub.read_json(repo_id, head, "provenance.json").get("files") or []
        earlier = {entry["path"] for entry in listed if isinstance(entry, dict) and "path" in entry}
    foreign = sorted(path for path in there - new - earlier if path.endswith(WEIGHTS))
    if foreign:
        raise PublishError(f"{repo_id} holds weights that no package put there ({foreign[0]}): push to another repo")
    return sorted((there & earlier) - new)


def _different(folder: Path, files: Sequence[FileRecord], remote: Sequence[hub.RemoteFile]) -> list[str]:
    """Paths that the repo lacks or holds with other content."""
    there = {file.path: file for file in remote}
    return [file.path for file in files if not _same(folder / file.path, file, there.get(file.path))]


def _same(path: Path, file: FileRecord, there: hub.RemoteFile | None) -> bool:
    if there is None:
        return False
    return there.sha256 == file.sha256 if there.sha256 else there.blob_id == git_blob_id(path)
