"""What the Hub holds now: the right to publish, the repo's files, and the package among them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from quantize import hub
from quantize.errors import AccessDenied, CorruptModel, NewerFormat, PackageError, SourceNotFound
from quantize.files import CARD, PROVENANCE, git_blob_id
from quantize.publishing.records import Destination
from quantize.records import FileRecord, Provenance
from quantize.serialization import from_json

PULL_REQUEST_MARK = "[quantize]"
"""Ends the title of our pull requests, so that the next push finds and updates them."""


@dataclass(frozen=True)
class RemoteState:
    """A repo as it is now, at the revision that a package is to go to (None: main).

    A branch that does not exist yet starts at main's head, so it has main's files. `head` is None where the repo does
    not exist.
    """

    revision: str | None
    branch_is_new: bool
    head: str | None
    files: dict[str, hub.RemoteFile]
    provenance: Provenance | None = None

    @property
    def exists(self) -> bool:
        return self.head is not None

    def unchanged_files(self) -> set[str]:
        """Paths that a package put there and nobody has changed since; the record of it belongs to them."""
        if self.provenance is None:
            return set()
        listed = self.provenance.files
        return {PROVENANCE} | {file.path for file in listed if listed_as(file, self.files.get(file.path))}


@dataclass(frozen=True)
class PublishedPackage:
    """A whole package on the Hub: the commit that holds it, and what it says about itself."""

    commit: str
    provenance: Provenance


def require_access(destination: Destination) -> hub.Account:
    """Raise AccessDenied unless the token may publish to the destination, without sending anything."""
    account = hub.account()
    if account.read_only:
        raise AccessDenied(f"the token of {account.name} may only read: log in with one that may write")
    if destination.pull_request:
        return account
    try:
        hub.require_write(destination.repo_id)
    except SourceNotFound:
        namespace = destination.repo_id.split("/")[0]
        if namespace not in account.namespaces:
            raise AccessDenied(
                f"{destination.repo_id} does not exist, and {account.name} cannot make it under {namespace}: "
                f"publish under {' or '.join(sorted(account.namespaces))}"
            ) from None
    return account


def remote_state(destination: Destination, account: hub.Account) -> RemoteState:
    """The destination as it is now. Raises NewerFormat where a newer version of quantize published there."""
    if not _exists(destination.repo_id):
        return RemoteState(destination.branch, destination.branch is not None, None, {})
    revision = _revision(destination, account)
    is_new = destination.branch is not None and destination.branch not in hub.refs(destination.repo_id)[0]
    head, listing = hub.resolve(destination.repo_id, None if is_new else revision)
    files = {file.path: file for file in listing}
    return RemoteState(revision, is_new, head, files, _provenance(destination.repo_id, head, files.get(PROVENANCE)))


def published_package(state: RemoteState) -> PublishedPackage | None:
    """The package that a repo holds as a whole; None where it does not.

    Large files are compared by hash and small ones by size; the card may have been edited on the Hub, but not be gone.
    """
    if state.head is None or state.provenance is None or CARD not in state.files:
        return None
    sealed = [file for file in state.provenance.files if file.path != CARD]
    if not all(listed_as(file, state.files.get(file.path)) for file in sealed):
        return None
    return PublishedPackage(state.head, state.provenance)


def same_bytes(path: Path, file: FileRecord, remote: hub.RemoteFile | None) -> bool:
    """Whether the Hub holds these bytes: by sha256, or by git's id for what is stored without LFS."""
    if remote is None:
        return False
    return remote.sha256 == file.sha256 if remote.sha256 else remote.blob_id == git_blob_id(path)


def listed_as(file: FileRecord, remote: hub.RemoteFile | None, *, exactly: bool = False) -> bool:
    """Whether the Hub lists this file with this content: small ones are known by their size only, unless `exactly`."""
    if remote is None or remote.size != file.size:
        return False
    return remote.sha256 == file.sha256 if remote.sha256 or exactly else True


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


def _exists(repo_id: str) -> bool:
    try:
        hub.head(repo_id, None)
    except SourceNotFound:
        return False
    return True
