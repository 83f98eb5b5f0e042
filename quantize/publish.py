"""A package becomes one commit on the Hub, and what arrived is compared with what was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantize import hub
from quantize.errors import AccessDenied, Conflict, HubUnreachable, PackageError, PublishError, SourceNotFound
from quantize.files import git_blob_id
from quantize.patience import patiently
from quantize.progress import Progress
from quantize.records import Change, FileRecord, Plan, Provenance, Receipt, Target, from_json

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


def published(target: Target, account: hub.Account) -> tuple[str, Provenance] | None:
    """The commit at which the target holds a whole package, and that package's provenance; None where it does not.

    Large files are compared by hash and small ones by size; the card may have been edited on the Hub.
    """
    try:
        _, head, remote = _present(target, account, _exists(target.repo_id))
        there = {file.path: file for file in remote}
        if head is None or PROVENANCE not in there:
            return None
        listed = json.dumps(hub.read_json(target.repo_id, head, PROVENANCE))
        provenance = from_json(Provenance, listed, f"{PROVENANCE} of {target.repo_id}")
    except PackageError:
        return None
    sealed = [file for file in provenance.files if file.path != CARD]
    return (head, provenance) if all(_listed_as(file, there.get(file.path)) for file in sealed) else None


def plan(folder: Path, files: Sequence[FileRecord], target: Target, *, whole: bool = True) -> Plan:
    """What a push of `files` of `folder` would do, after every check that can be made before a byte is sent.

    `whole` says that these are all files of the package, so that others of an earlier one go. Raises AccessDenied,
    PublishError or HubUnreachable.
    """
    account = require_access(target)
    hub.validate_card(target.repo_id, (folder / CARD).read_text("utf-8"))
    exists = _exists(target.repo_id)
    revision, head, remote = _present(target, account, exists)
    stale = _stale(target, head, files, remote) if whole and head else ()
    there = {file.path: file for file in remote}
    changes = [_change(folder / file.path, file, there.get(file.path)) for file in files]
    planned = Plan(
        repo_id=target.repo_id,
        creates_repo=not exists,
        revision=revision,
        pull_request=target.pull_request,
        head=head,
        changes=(*changes, *(Change("delete", path, 0) for path in stale)),
    )
    if target.tag and exists:
        _require_free_tag(target, head if planned.idle else None)
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
        _tag(target, commit)
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


def _present(
    target: Target, account: hub.Account, exists: bool
) -> tuple[str | None, str | None, tuple[hub.RemoteFile, ...]]:
    """The revision to write to, its head where it exists, and the files there."""
    if not exists and target.pull_request:
        raise PublishError(f"there is no {target.repo_id} to open a pull request against: publish it without --pr")
    if not exists or (target.branch and target.branch not in hub.refs(target.repo_id)[0]):
        return target.branch, None, ()
    revision = _revision(target, account)
    return revision, *hub.resolve(target.repo_id, revision)


def _revision(target: Target, account: hub.Account) -> str | None:
    """The branch or our open pull request; None means main, or that no pull request is open yet."""
    if not target.pull_request:
        return target.branch
    number = hub.open_pull_request(target.repo_id, account.name, MARK)
    return f"refs/pr/{number}" if number else None


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


def _stale(target: Target, head: str, files: Sequence[FileRecord], remote: Sequence[hub.RemoteFile]) -> tuple[str, ...]:
    """Files of an earlier package that this one lacks, and with `prune` everything else.

    Weights of any other origin are refused: they would be loaded in place of the package's own, since
    `model.safetensors` comes before shards.
    """
    there = {file.path for file in remote}
    others = there - {file.path for file in files} - {HUBS_OWN}
    if target.prune:
        return tuple(sorted(others))
    earlier: set[str] = set()
    if PROVENANCE in there:
        listed = hub.read_json(target.repo_id, head, PROVENANCE).get("files") or []
        earlier = {entry["path"] for entry in listed if isinstance(entry, dict) and "path" in entry}
    foreign = sorted(path for path in others - earlier if path.endswith(WEIGHTS))
    if foreign:
        raise PublishError(
            f"{target.repo_id} holds weights that no package put there ({foreign[0]}): push to another repo, or delete "
            f"what is not the package's with --prune"
        )
    return tuple(sorted(others & earlier))


def _change(path: Path, file: FileRecord, there: hub.RemoteFile | None) -> Change:
    if there is None:
        return Change("create", file.path, file.size)
    return Change("keep" if _same(path, file, there) else "replace", file.path, file.size)


def _publish(folder: Path, files: Sequence[FileRecord], target: Target, planned: Plan) -> tuple[str, str | None]:
    """Make what is missing and commit; the commit, and the address of a pull request that was opened."""
    repo_id, revision = target.repo_id, planned.revision
    if planned.creates_repo:
        hub.create_repo(repo_id, private=target.private)
    if revision and planned.head is None:
        hub.create_branch(repo_id, revision)
    parent = planned.head or hub.head(repo_id, revision)
    opens = target.pull_request and revision is None
    local = {change.path: folder / change.path for change in planned.changes if change.action in ("create", "replace")}
    deleted = tuple(change.path for change in planned.changes if change.action == "delete")
    operations = hub.operations(hub.Changes(local, deleted))
    hub.upload(repo_id, operations, revision=revision, pull_request=opens)
    wanted = {file.path: (folder / file.path, file) for file in files}

    def commit() -> tuple[str, str | None]:
        try:
            title = f"{target.message} {MARK}" if opens else str(target.message)
            return hub.commit(repo_id, operations, parent=parent, revision=revision, pull_request=opens, message=title)
        except (HubUnreachable, Conflict) as error:
            landed = _landed(target, parent, revision, opens, wanted, deleted)
            if landed is None:
                _give_up_where_unsure(error, opens)
                raise
            return landed

    return patiently(commit)()


def _give_up_where_unsure(error: Exception, opens: bool) -> None:
    """A second commit on the same parent is harmless, since only one can win; a second pull request is not."""
    if opens and isinstance(error, HubUnreachable):
        error.passing = False


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


def _tag(target: Target, commit: str) -> None:
    hub.create_tag(target.repo_id, str(target.tag), commit)
    _require_free_tag(target, commit)


def _same(path: Path, file: FileRecord, there: hub.RemoteFile | None) -> bool:
    """Whether the Hub holds these bytes: by sha256, or by git's id for what is stored without LFS."""
    if there is None:
        return False
    return there.sha256 == file.sha256 if there.sha256 else there.blob_id == git_blob_id(path)


def _listed_as(file: FileRecord, there: hub.RemoteFile | None) -> bool:
    return there is not None and there.size == file.size and there.sha256 in (None, file.sha256)


def _discussion(planned: Plan) -> str | None:
    return _address(planned.repo_id, planned.revision) if planned.pull_request else None


def _address(repo_id: str, revision: str | None) -> str | None:
    number = (revision or "").removeprefix("refs/pr/")
    return f"{hub.endpoint()}/{repo_id}/discussions/{number}" if number.isdigit() else None
