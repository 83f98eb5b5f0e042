"""A package becomes one commit on the Hub, and what arrived is compared with what was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize import hub
from quantize.errors import (
    AccessDenied,
    Conflict,
    CorruptModel,
    HubUnreachable,
    PackageError,
    PublishError,
    SourceNotFound,
)
from quantize.files import git_blob_id
from quantize.hub.retries import retried
from quantize.progress import Progress
from quantize.publishing.records import Change, Plan, Receipt, Target
from quantize.records import FileRecord, Provenance
from quantize.serialization import from_json

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", "adapter_config.json")
PROVENANCE, CARD = "provenance.json", "README.md"
HUBS_OWN = ".gitattributes"
MARK = "[quantize]"
"""Ends the title of our pull requests, so that the next push finds and updates them."""


def require_access(target: Target) -> hub.Account:
    """Raise AccessDenied unless the token may publish to the target, without sending anything."""
    account = hub.account()
    if account.read_only:
        raise AccessDenied(f"the token of {account.name} may only read: log in with one that may write")
    if target.pull_request:
        return account
    try:
        hub.require_write(target.repo_id)
    except SourceNotFound:
        namespace = target.repo_id.split("/")[0]
        if namespace not in account.namespaces:
            raise AccessDenied(
                f"{target.repo_id} does not exist, and {account.name} cannot make it under {namespace}: "
                f"publish under {' or '.join(sorted(account.namespaces))}"
            ) from None
    return account


def require_room(target: Target, account: hub.Account) -> tuple[str, Provenance] | None:
    """The commit at which the target holds a whole package, and that package's provenance; None where it does not.

    Large files are compared by hash and small ones by size; the card may have been edited on the Hub, but not be gone.
    Raises PublishError where a package could not be published: weights or a tag are in the way.
    """
    if not _exists(target.repo_id):
        return None
    place = _look(target, account)
    there = {file.path: file for file in place.files}
    _require_ours(target, place, ())
    head, held = place.head, place.provenance
    if head is None or held is None or CARD not in there:
        return None
    sealed = [file for file in held.files if file.path != CARD]
    return (head, held) if all(_listed_as(file, there.get(file.path)) for file in sealed) else None


def plan(folder: Path, files: Sequence[FileRecord], target: Target, *, whole: bool = True) -> Plan:
    """What a push of `files` of `folder` would do, after every check that can be made before a byte is sent.

    `whole` says that these are all files of the package, so that others of an earlier one go. Raises AccessDenied,
    PublishError or HubUnreachable.
    """
    account = require_access(target)
    hub.validate_card(target.repo_id, (folder / CARD).read_text("utf-8"))
    exists = _exists(target.repo_id)
    if not exists and target.pull_request:
        raise PublishError(f"there is no {target.repo_id} to open a pull request against: publish it without --pr")
    place = _look(target, account) if exists else Place(target.branch, target.branch is not None, None, ())
    there = {file.path: file for file in place.files}
    if exists and whole:
        _require_ours(target, place, files)
    stale = _stale(target, place, files) if whole else ()
    changes = [_change(folder / file.path, file, there.get(file.path)) for file in files]
    planned = Plan(
        repo_id=target.repo_id,
        creates_repo=not exists,
        creates_branch=place.branch_is_new,
        revision=place.revision,
        pull_request=target.pull_request,
        head=place.head,
        changes=(*changes, *(Change("delete", path, 0) for path in stale)),
    )
    if target.tag and exists:
        _require_free_tag(target, place.head if planned.idle else None)
    return planned


def push(folder: Path, files: Sequence[FileRecord], target: Target, planned: Plan, progress: Progress) -> Receipt:
    """Carry out a plan in one commit, unless its head already holds everything, and check what arrived.

    Raises AccessDenied (no right), Conflict (somebody else committed), PublishError (what arrived differs), or
    HubUnreachable (a rerun finishes the work).
    """
    repo_id, opened = target.repo_id, None
    if planned.idle:
        commit = str(planned.head)
    else:
        sent = sum(change.size for change in planned.changes if change.action in ("create", "replace"))
        progress.note(f"uploading {sent / 1e6:.1f} MB in {len(planned.changes)} files")
        commit, opened = _publish(folder, files, target, planned)
    _require_arrived(folder, files, repo_id, commit)
    if target.tag:
        tag(target, commit)
    return Receipt(
        repo_id=repo_id,
        commit=commit,
        url=f"{hub.endpoint()}/{repo_id}/tree/{commit}",
        created_commit=not planned.idle,
        files=tuple(files),
        branch=planned.revision if not target.pull_request else None,
        pull_request=opened or _discussion(planned),
        tag=target.tag,
    )


@dataclass(frozen=True)
class Place:
    """Where a package is to go: the revision (None: main), and what is there now.

    A branch that does not exist yet starts at main's head, so it has main's files.
    """

    revision: str | None
    branch_is_new: bool
    head: str | None
    files: tuple[hub.RemoteFile, ...]
    provenance: Provenance | None = None


def _look(target: Target, account: hub.Account) -> Place:
    """The target as it is now, in a repo that exists."""
    revision = _revision(target, account)
    is_new = target.branch is not None and target.branch not in hub.refs(target.repo_id)[0]
    head, remote = hub.resolve(target.repo_id, None if is_new else revision)
    return Place(revision, is_new, head, remote, _provenance(target.repo_id, head, remote))


def _revision(target: Target, account: hub.Account) -> str | None:
    """The branch or our open pull request; None means main, or that no pull request is open yet."""
    if not target.pull_request:
        return target.branch
    number = hub.open_pull_request(target.repo_id, account.name, MARK)
    return f"refs/pr/{number}" if number else None


def _provenance(repo_id: str, head: str, remote: Sequence[hub.RemoteFile]) -> Provenance | None:
    """The record of the package that is there; one that cannot be read counts as none."""
    file = next((file for file in remote if file.path == PROVENANCE), None)
    if file is None:
        return None
    try:
        return from_json(Provenance, json.dumps(hub.read_json(repo_id, head, file)), f"{PROVENANCE} of {repo_id}")
    except (CorruptModel, PackageError):
        return None


def _exists(repo_id: str) -> bool:
    try:
        hub.head(repo_id, None)
    except SourceNotFound:
        return False
    return True


def _require_free_tag(target: Target, commit: str | None) -> None:
    """Raise PublishError where the tag exists on another commit than `commit`, None being one to come."""
    taken = hub.refs(target.repo_id)[1].get(str(target.tag))
    if taken not in (None, commit):
        raise PublishError(f"{target.repo_id} has a tag {target.tag} on another commit: choose another --tag")


def _require_ours(target: Target, place: Place, files: Sequence[FileRecord]) -> None:
    """Raise PublishError where weights are in the way that no package put there, unless they are to be pruned.

    They would be lost, or be loaded in place of the package's own: `model.safetensors` comes before shards.
    """
    ours = _earlier(place) | {file.path for file in files if _listed_as(file, _at(place, file.path), exactly=True)}
    foreign = sorted(file.path for file in place.files if file.path.endswith(WEIGHTS) and file.path not in ours)
    if foreign and not target.prune:
        raise PublishError(
            f"{target.repo_id} holds weights that no package put there ({foreign[0]}): push to another repo, or delete "
            f"what is not the package's with --prune"
        )


def _stale(target: Target, place: Place, files: Sequence[FileRecord]) -> tuple[str, ...]:
    """Files of an earlier package that this one lacks, and with `prune` everything else."""
    others = {file.path for file in place.files} - {file.path for file in files} - {HUBS_OWN}
    return tuple(sorted(others if target.prune else others & _earlier(place)))


def _earlier(place: Place) -> set[str]:
    """What a package put there, and nobody has changed since; the record of it is the package's own as well."""
    listed = place.provenance.files if place.provenance else ()
    unchanged = {file.path for file in listed if _listed_as(file, _at(place, file.path))}
    return unchanged | ({PROVENANCE} if place.provenance else set())


def _at(place: Place, path: str) -> hub.RemoteFile | None:
    return next((file for file in place.files if file.path == path), None)


def _change(path: Path, file: FileRecord, there: hub.RemoteFile | None) -> Change:
    if there is None:
        return Change("create", file.path, file.size)
    return Change("keep" if _same(path, file, there) else "replace", file.path, file.size)


def _publish(folder: Path, files: Sequence[FileRecord], target: Target, planned: Plan) -> tuple[str, str | None]:
    """Make what is missing and commit; the commit, and the address of a pull request that was opened."""
    repo_id, revision = target.repo_id, planned.revision
    parent = planned.head or _made(target)
    if revision and planned.creates_branch:
        hub.create_branch(repo_id, revision, parent)
    opens = target.pull_request and revision is None
    local = {change.path: folder / change.path for change in planned.changes if change.action in ("create", "replace")}
    deleted = tuple(change.path for change in planned.changes if change.action == "delete")
    operations = hub.operations(hub.Changes(local, deleted))
    hub.upload(repo_id, operations, revision=revision, pull_request=opens)
    wanted = {file.path: (folder / file.path, file) for file in files}

    def commit() -> tuple[str, str | None]:
        title = f"{target.message} {MARK}" if opens else str(target.message)
        try:
            return hub.commit(repo_id, operations, parent=parent, revision=revision, pull_request=opens, message=title)
        except (HubUnreachable, Conflict):
            landed = _landed(target, parent, revision, opens, wanted, deleted)
            if landed is None:
                raise
            return landed

    # A second commit on the same parent is harmless, since only one can win; a second pull request is not.
    return commit() if opens else retried(commit)()


def _made(target: Target) -> str:
    """Make the repo; its first commit. Raises Conflict where somebody else has made it and put something there."""
    hub.create_repo(target.repo_id, private=target.private)
    head, files = hub.resolve(target.repo_id, None)
    if any(file.path != HUBS_OWN for file in files):
        raise Conflict(f"somebody else made {target.repo_id} meanwhile: look at it and push again")
    return head


def _landed(
    target: Target,
    parent: str,
    revision: str | None,
    opens: bool,
    wanted: Mapping[str, tuple[Path, FileRecord]],
    deleted: Sequence[str],
) -> tuple[str, str | None] | None:
    """The commit that holds what was to be committed, when it was made although no good answer came."""
    if opens:
        number = hub.open_pull_request(target.repo_id, hub.account().name, MARK)
        if number is None:
            return None
        revision = f"refs/pr/{number}"
    for commit in hub.history(target.repo_id, revision):
        if commit == parent:
            return None
        _, remote = hub.resolve(target.repo_id, commit)
        there = {file.path: file for file in remote}
        if not there.keys() & set(deleted) and all(_same(*one, there.get(path)) for path, one in wanted.items()):
            return commit, _address(target.repo_id, revision)
    return None


def _require_arrived(folder: Path, files: Sequence[FileRecord], repo_id: str, commit: str) -> None:
    there = {file.path: file for file in hub.resolve(repo_id, commit)[1]}
    wrong = [file.path for file in files if not _same(folder / file.path, file, there.get(file.path))]
    if wrong:
        raise PublishError(f"{wrong[0]} arrived at {repo_id} with other content: push again")


def tag(target: Target, commit: str) -> None:
    """Make sure that the target's tag names the commit; raises PublishError where it names another one."""
    hub.create_tag(target.repo_id, str(target.tag), commit)
    _require_free_tag(target, commit)


def _same(path: Path, file: FileRecord, there: hub.RemoteFile | None) -> bool:
    """Whether the Hub holds these bytes: by sha256, or by git's id for what is stored without LFS."""
    if there is None:
        return False
    return there.sha256 == file.sha256 if there.sha256 else there.blob_id == git_blob_id(path)


def _listed_as(file: FileRecord, there: hub.RemoteFile | None, *, exactly: bool = False) -> bool:
    """Whether the Hub lists this file with this content: small ones are known by their size only, unless `exactly`."""
    if there is None or there.size != file.size:
        return False
    return there.sha256 == file.sha256 if there.sha256 or exactly else True


def _discussion(planned: Plan) -> str | None:
    return _address(planned.repo_id, planned.revision) if planned.pull_request else None


def _address(repo_id: str, revision: str | None) -> str | None:
    number = (revision or "").removeprefix("refs/pr/")
    return f"{hub.endpoint()}/{repo_id}/discussions/{number}" if number.isdigit() else None
