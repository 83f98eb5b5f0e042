"""A package becomes one commit on the Hub, and what arrived is compared with what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize import hub
from quantize.errors import AccessDenied, PublishError
from quantize.files import git_blob_id
from quantize.progress import Progress
from quantize.records import FileRecord, Receipt


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
    if not _different(folder, files, remote):
        return Receipt(repo_id, head, f"{hub.endpoint()}/{repo_id}", False, tuple(files))
    progress.note(f"uploading {len(files)} files, {sum(file.size for file in files) / 1e6:.1f} MB")
    commit = hub.commit(repo_id, {file.path: folder / file.path for file in files}, parent=head, message=message)
    _, arrived = hub.resolve(repo_id, commit)
    if wrong := _different(folder, files, arrived):
        raise PublishError(f"{wrong[0]} arrived at {repo_id} with other content: push again")
    return Receipt(repo_id, commit, f"{hub.endpoint()}/{repo_id}/tree/{commit}", True, tuple(files))


def _different(folder: Path, files: Sequence[FileRecord], remote: Sequence[hub.RemoteFile]) -> list[str]:
    """Paths that the repo lacks or holds with other content."""
    there = {file.path: file for file in remote}
    return [file.path for file in files if not _same(folder / file.path, file, there.get(file.path))]


def _same(path: Path, file: FileRecord, there: hub.RemoteFile | None) -> bool:
    if there is None:
        return False
    return there.sha256 == file.sha256 if there.sha256 else there.blob_id == git_blob_id(path)
