"""What an upload would do to a repo, after every check that can be made before a byte is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quantize import hub
from quantize.errors import PublishError
from quantize.files import CARD
from quantize.formats.safetensors import SUFFIX
from quantize.publishing.records import Change, Destination, Plan
from quantize.publishing.remote_state import RemoteState, remote_state, require_access, same_bytes, same_content
from quantize.publishing.visibility import require_wished
from quantize.records import FileRecord

LOADED_FILES = (SUFFIX, f"{SUFFIX}.index.json", ".bin", "adapter_config.json")
"""Endings of files that transformers would load in place of the package's own, or beside them."""
HUBS_OWN = ".gitattributes"


def upload_plan(
    local: Mapping[str, Path],
    files: Sequence[FileRecord],
    destination: Destination,
    source_repo: str | None,
    *,
    whole: bool = True,
) -> Plan:
    """What an upload of `files`, made from `source_repo` where that is on the Hub, would do.

    `local` says where they lie.

    `whole` says that these are all files of the package, so that others of an earlier one are deleted. Raises
    AccessDenied, PublishError, NewerFormat or HubUnreachable.
    """
    notes: list[str] = []
    account = require_access(destination, notes.append)
    hub.validate_card(destination.repo_id, local[CARD].read_bytes().decode("utf-8"))
    state = remote_state(destination, account)
    require_wished(destination, state, source_repo)
    if not state.exists and destination.pull_request:
        raise PublishError(f"there is no {destination.repo_id} to open a pull request against: publish it without --pr")
    if whole:
        require_no_foreign_weights(destination, state, files)
    deleted = _outdated_files(destination, state, files) if whole else ()
    changes = [_change(local[file.path], file, state.files.get(file.path)) for file in files]
    plan = Plan(
        repo_id=destination.repo_id,
        creates_repo=not state.exists,
        creates_branch=state.branch_is_new,
        revision=state.revision,
        pull_request=destination.pull_request,
        head=state.head,
        changes=(*changes, *(Change("delete", path, 0) for path in deleted)),
        access=state.access,
        notes=tuple(notes),
    )
    if destination.tag and state.exists:
        require_free_tag(destination, state.head if plan.idle else None)
    return plan


def require_no_foreign_weights(destination: Destination, state: RemoteState, files: Sequence[FileRecord] = ()) -> None:
    """Raise PublishError where the repo holds weights that quantize did not upload, unless they are to be pruned.

    They would be lost, or be loaded in place of the package's own: `model.safetensors` comes before shards.
    """
    own = {file.path for file in files if same_content(file, None, state.files.get(file.path))}
    own |= state.unchanged_files()
    foreign = sorted(path for path in state.files if path.endswith(LOADED_FILES) and path not in own)
    if foreign and not destination.prune:
        raise PublishError(
            f"{destination.repo_id} holds weights that were not uploaded by quantize ({foreign[0]}): push to another "
            f"repo, or delete what is not the package's with --prune"
        )


def require_free_tag(destination: Destination, commit: str | None) -> None:
    """Raise PublishError where the tag exists on another commit than `commit`, None being one to come."""
    tagged = hub.refs(destination.repo_id)[1].get(str(destination.tag))
    if tagged not in (None, commit):
        raise PublishError(f"{destination.repo_id} has a tag {destination.tag} on another commit: choose another --tag")


def _outdated_files(destination: Destination, state: RemoteState, files: Sequence[FileRecord]) -> tuple[str, ...]:
    """Files of an earlier package that this one lacks, and with `prune` everything else."""
    others = state.files.keys() - {file.path for file in files} - {HUBS_OWN}
    return tuple(sorted(others if destination.prune else others & state.unchanged_files()))


def _change(path: Path, file: FileRecord, remote: hub.RemoteFile | None) -> Change:
    if remote is None:
        return Change("create", file.path, file.size)
    return Change("keep" if same_bytes(path, file, remote) else "replace", file.path, file.size)
