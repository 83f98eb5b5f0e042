"""A plan becomes one commit on the Hub, and what arrived is compared with what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize import hub
from quantize.errors import Conflict, HubUnreachable, PublishError
from quantize.hub.retries import retried
from quantize.progress import Progress
from quantize.publishing.records import Destination, Plan, Receipt
from quantize.publishing.remote_state import PULL_REQUEST_MARK, same_bytes, untold
from quantize.publishing.upload_plan import HUBS_OWN, require_free_tag
from quantize.publishing.visibility import require_created
from quantize.records import FileRecord


@dataclass(frozen=True)
class Commit:
    """A commit that holds the package, and the address of the pull request that it opened."""

    id: str
    pull_request: str | None = None


def upload(
    folder: Path, files: Sequence[FileRecord], destination: Destination, plan: Plan, progress: Progress
) -> Receipt:
    """Carry out a plan in one commit, unless its head already holds everything, and check what arrived.

    Raises AccessDenied (no right), Conflict (somebody else committed), PublishError (what arrived differs), or
    HubUnreachable (a rerun finishes the work).
    """
    repo_id = destination.repo_id
    for note in plan.notes:
        progress.note(note)
    if plan.idle:
        commit = Commit(str(plan.head))
    else:
        sent = sum(change.size for change in plan.changes if change.action in ("create", "replace"))
        progress.note(f"uploading {sent / 1e6:.1f} MB in {len(plan.changes)} files")
        commit = _commit(folder, files, destination, plan, progress)
    _require_arrived(folder, files, repo_id, commit.id, progress)
    if destination.tag:
        ensure_tag(destination, commit.id)
    return Receipt(
        repo_id=repo_id,
        commit=commit.id,
        url=f"{hub.endpoint()}/{repo_id}/tree/{commit.id}",
        created_commit=not plan.idle,
        files=tuple(files),
        branch=plan.revision if not destination.pull_request else None,
        pull_request=commit.pull_request or (_discussion(repo_id, plan.revision) if plan.pull_request else None),
        tag=destination.tag,
    )


def ensure_tag(destination: Destination, commit: str) -> None:
    """Make sure that the destination's tag names the commit; raises PublishError where it names another one."""
    hub.create_tag(destination.repo_id, str(destination.tag), commit)
    require_free_tag(destination, commit)


def _commit(
    folder: Path, files: Sequence[FileRecord], destination: Destination, plan: Plan, progress: Progress
) -> Commit:
    """Create the repo or branch that is missing, send the large files and commit."""
    repo_id, revision = destination.repo_id, plan.revision
    parent = plan.head or _create_repo(destination, progress)
    if revision and plan.creates_branch:
        hub.create_branch(repo_id, revision, parent)
    opens = destination.pull_request and revision is None
    local = {change.path: folder / change.path for change in plan.changes if change.action in ("create", "replace")}
    deleted = tuple(change.path for change in plan.changes if change.action == "delete")
    operations = hub.operations(hub.Changes(local, deleted))
    hub.upload(repo_id, operations, revision=revision, pull_request=opens)
    expected = {file.path: (folder / file.path, file) for file in files}
    title = f"{destination.message} {PULL_REQUEST_MARK}" if opens else str(destination.message)

    def commit() -> Commit:
        try:
            return Commit(
                *hub.commit(repo_id, operations, parent=parent, revision=revision, pull_request=opens, message=title)
            )
        except (HubUnreachable, Conflict):
            earlier = _landed(destination, parent, revision, opens, expected, deleted)
            if earlier is None:
                raise
            return earlier

    # A second commit on the same parent is harmless, since only one can win; a second pull request is not.
    return commit() if opens else retried(commit)()


def _create_repo(destination: Destination, progress: Progress) -> str:
    """Create the repo; its first commit. Raises Conflict where somebody else created it and put something there."""
    wish = True if destination.private else False if destination.public else None
    hub.create_repo(destination.repo_id, private=wish)
    progress.note(f"{destination.repo_id} was created and is {require_created(destination)}")
    head, files = hub.resolve(destination.repo_id, None)
    if any(file.path != HUBS_OWN for file in files):
        raise Conflict(f"somebody else made {destination.repo_id} meanwhile: look at it and push again")
    return head


def _landed(
    destination: Destination,
    parent: str,
    revision: str | None,
    opens: bool,
    expected: Mapping[str, tuple[Path, FileRecord]],
    deleted: Sequence[str],
) -> Commit | None:
    """The commit that holds what was to be committed, when it was made although no good answer came."""
    if opens:
        number = hub.open_pull_request(destination.repo_id, hub.account().name, PULL_REQUEST_MARK)
        if number is None:
            return None
        revision = f"refs/pr/{number}"
    for commit in hub.history(destination.repo_id, revision):
        if commit == parent:
            return None
        remote = {file.path: file for file in hub.resolve(destination.repo_id, commit)[1]}
        complete = all(same_bytes(path, file, remote.get(name)) is not False for name, (path, file) in expected.items())
        if complete and not remote.keys() & set(deleted):
            return Commit(commit, _discussion(destination.repo_id, revision))
    return None


def _require_arrived(folder: Path, files: Sequence[FileRecord], repo_id: str, commit: str, progress: Progress) -> None:
    """Raise PublishError where the Hub lists other content than was sent; say where it does not tell."""
    remote = {file.path: file for file in hub.resolve(repo_id, commit)[1]}
    arrived = {file.path: same_bytes(folder / file.path, file, remote.get(file.path)) for file in files}
    wrong = [path for path, same in arrived.items() if same is False]
    if wrong:
        raise PublishError(f"{wrong[0]} arrived at {repo_id} with other content: push again")
    if unchecked := [path for path, same in arrived.items() if same is None]:
        progress.note(f"{untold(repo_id, unchecked)}; --verify-download fetches and compares them")


def _discussion(repo_id: str, revision: str | None) -> str | None:
    """The address of a pull request's page, None for a branch."""
    number = (revision or "").removeprefix("refs/pr/")
    return f"{hub.endpoint()}/{repo_id}/discussions/{number}" if number.isdigit() else None
