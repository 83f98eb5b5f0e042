"""What the Hub holds now: the right to publish, the repo's files, and the package among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize import hub
from quantize.errors import AccessDenied, CorruptModel, NewerFormat, PackageError, SourceNotFound
from quantize.files import CARD, LARGEST_BLOB, PROVENANCE, git_blob_id, hash_file
from quantize.publishing.records import Destination
from quantize.records import FileRecord, Provenance
from quantize.serialization import from_json

PULL_REQUEST_MARK = "[quantize]"
"""Ends the title of our pull requests, so that the next push finds and updates them."""


@dataclass(frozen=True)
class RemoteState:
    """A repo as it is now, at the revision that a package is to go to (None: main).

    A branch that does not exist yet starts at main's head, so it has main's files. `head`, and `access` (who may read
    it), are None where the repo does not exist.
    """

    revision: str | None
    branch_is_new: bool
    head: str | None
    files: dict[str, hub.RemoteFile]
    provenance: Provenance | None = None
    access: str | None = None

    @property
    def exists(self) -> bool:
        return self.head is not None

    def unchanged_files(self) -> set[str]:
        """Paths that a package put there and nobody has changed since; the record of it belongs to them."""
        if self.provenance is None:
            return set()
        listed = self.provenance.files
        return {PROVENANCE} | {file.path for file in listed if self.holds(file) is not False}

    def holds(self, file: FileRecord) -> bool | None:
        """Whether the repo has this file of its package with the recorded content; None where the Hub cannot tell."""
        ids = self.provenance.blob_ids if self.provenance else {}
        return same_content(file, ids.get(file.path), self.files.get(file.path))


@dataclass(frozen=True)
class PublishedPackage:
    """A whole package on the Hub: the commit that holds it, and what it says about itself.

    `unchecked` are files whose content the Hub does not tell.
    """

    commit: str
    provenance: Provenance
    unchecked: tuple[str, ...] = ()


def require_access(destination: Destination, note: Callable[[str], None]) -> hub.Account:
    """Raise AccessDenied unless the token may publish to the destination, without sending anything.

    `note` is told where the Hub cannot be asked.
    """
    account = hub.account()
    if account.read_only:
        raise AccessDenied(f"the token of {account.name} may only read: log in with one that may write")
    if destination.pull_request:
        return account
    try:
        if not hub.require_write(destination.repo_id):
            hub.access(destination.repo_id)
            note(f"not checked: this Hub does not tell whether the token may write to {destination.repo_id}")
    except SourceNotFound:
        _require_creator(account, destination.repo_id)
    return account


def _require_creator(account: hub.Account, repo_id: str) -> None:
    namespace = repo_id.split("/")[0]
    if namespace in account.namespaces:
        return
    others = " or ".join(sorted(account.namespaces))
    advice = f"publish under {others}" if others else "log in with a token that may"
    raise AccessDenied(
        f"{repo_id} does not exist, and {account.name} cannot make it under {namespace} with this token: {advice}"
    ) from None


def remote_state(destination: Destination, account: hub.Account) -> RemoteState:
    """The destination as it is now. Raises NewerFormat where a newer version of quantize published there."""
    access = _access(destination.repo_id)
    if access is None:
        return RemoteState(destination.branch, destination.branch is not None, None, {})
    revision = _revision(destination, account)
    is_new = destination.branch is not None and destination.branch not in hub.refs(destination.repo_id)[0]
    head, listing = hub.resolve(destination.repo_id, None if is_new else revision)
    files = {file.path: file for file in listing}
    provenance = _provenance(destination.repo_id, head, files.get(PROVENANCE))
    return RemoteState(revision, is_new, head, files, provenance, access)


def published_package(repo_id: str, state: RemoteState) -> PublishedPackage | None:
    """The package that a repo holds as a whole; None where it does not.

    Files are compared by their hashes; the card may have been edited on the Hub, but not be gone. Small files of a
    package whose record has no git names of them are fetched for that.
    """
    if state.head is None or state.provenance is None or CARD not in state.files:
        return None
    sealed = [file for file in state.provenance.files if file.path != CARD]
    told = {file.path: state.holds(file) for file in sealed}
    if False in told.values():
        return None
    untold = [file for file in sealed if told[file.path] is None]
    fetched = [file for file in untold if state.files[file.path].blob_id]
    if fetched and not _same_when_fetched(repo_id, state.head, fetched, state.files):
        return None
    return PublishedPackage(state.head, state.provenance, tuple(file.path for file in untold if file not in fetched))


def same_content(file: FileRecord, blob_id: str | None, remote: hub.RemoteFile | None) -> bool | None:
    """Whether the Hub lists a file with the recorded content, by sha256 or by git's name of it.

    None where it lists neither size nor hash, as old servers and mirrors do, or where `blob_id` would be needed.
    """
    if remote is None or (remote.size and remote.size != file.size):
        return False
    if remote.sha256:
        return remote.sha256 == file.sha256
    return remote.blob_id == blob_id if remote.blob_id and blob_id else None


def same_bytes(path: Path, file: FileRecord, remote: hub.RemoteFile | None) -> bool | None:
    """The same for a file that lies at `path`: what is recorded counts, not what may have become of it meanwhile."""
    small = remote is not None and remote.sha256 is None and file.size <= LARGEST_BLOB
    return same_content(file, git_blob_id(path) if small and _is_as_recorded(path, file) else None, remote)


def untold(repo_id: str, paths: Sequence[str]) -> str:
    """What is said of files whose content the Hub does not tell."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"not checked: the Hub tells no hash of {paths[0]}{more} of {repo_id}"


def _is_as_recorded(path: Path, file: FileRecord) -> bool:
    if hash_file(path) != (file.size, file.sha256):
        raise PackageError(f"{path} was changed while it was published: restore it, or make the package again")
    return True


def _same_when_fetched(
    repo_id: str, commit: str, files: list[FileRecord], listing: Mapping[str, hub.RemoteFile]
) -> bool:
    folder = hub.fetch(repo_id, commit, [listing[file.path] for file in files])
    return all(hash_file(folder / file.path)[1] == file.sha256 for file in files)


def _revision(destination: Destination, account: hub.Account) -> str | None:
    """The branch or our open pull request; None means main, or that no pull request is open yet."""
    if not destination.pull_request:
        return destination.branch
    number = hub.open_pull_request(destination.repo_id, account.name, PULL_REQUEST_MARK)
    return f"refs/pr/{number}" if number else None


def _provenance(repo_id: str, head: str, file: hub.RemoteFile | None) -> Provenance | None:
    """The record of the package that a repo holds; one that cannot be read counts as none."""
    if file is None:
        return None
    try:
        return from_json(Provenance, json.dumps(hub.read_json(repo_id, head, file)), f"{PROVENANCE} of {repo_id}")
    except NewerFormat:
        raise
    except (CorruptModel, PackageError):
        return None


def _access(repo_id: str) -> str | None:
    """Who may read a repo, None where it does not exist."""
    try:
        return hub.access(repo_id)
    except SourceNotFound:
        return None
