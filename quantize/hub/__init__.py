"""Everything that is asked of the Hub goes through this module."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize import documents
from quantize.errors import CREDENTIALS, AccessDenied, CorruptModel, PublishError, StorageError, storage_errors
from quantize.files import git_blob_id, hash_file
from quantize.hub.retries import ENDPOINT, address, retried, set_deadlines, translated
from quantize.progress import Advance, ignore

if TYPE_CHECKING:
    from huggingface_hub import HfApi

READ_ONLY, FINE_GRAINED = "read", "fineGrained"
WRITING = {"repo.write"}
NO_SUCH_QUESTION = (404, 405, 501)
PUBLIC, PRIVATE, GATED = "public", "private", "gated"
"""Who may read a repo."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as the Hub lists it: `sha256` is known for large files, the git `blob_id` for all."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Snapshot:
    """A repo at a commit; `repo_id` is another one than was asked for where the repo was renamed."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Account:
    """Whose token it is, the namespaces under which it may create repos, and whether the token may only read."""

    name: str
    namespaces: frozenset[str]
    read_only: bool


@dataclass(frozen=True)
class Changes:
    """One commit's worth of changes: files to add (path in the repo: local path) and paths to delete."""

    files: Mapping[str, Path]
    deleted: tuple[str, ...]


def api() -> HfApi:
    """The client, at HF_ENDPOINT where that is set, with a token from huggingface_hub's usual places."""
    from huggingface_hub import HfApi

    address()
    set_deadlines()
    return HfApi(endpoint=os.environ.get(ENDPOINT) or None, library_name="quantize-bnb")


def endpoint() -> str:
    """Where the Hub is, as it may be shown and recorded."""
    return address()


def cache_folder() -> Path:
    """The Hub's cache on this machine; raises StorageError where nobody knows of a place for it."""
    from huggingface_hub import constants

    if constants.HF_HUB_CACHE.startswith("~"):
        raise StorageError("there is no home folder for the Hub's cache: set HOME, or HF_HOME to a folder")
    return Path(constants.HF_HUB_CACHE)


def token_present() -> bool:
    return _token() is not None


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def account() -> Account:
    """Whom the token belongs to; raises AccessDenied where there is none or it is not valid."""
    token = _token()
    if token is None:
        raise AccessDenied("no token for the Hub: log in with `hf auth login` or set HF_TOKEN")
    if not token.isascii():
        raise AccessDenied("the token for the Hub contains a non-ASCII character: copy it again")

    @retried
    def ask() -> dict[str, Any]:
        with translated("the account"):
            return dict(api().whoami())

    answer = ask()
    token_rights = (answer.get("auth") or {}).get("accessToken") or {}
    groups = {str(group.get("name")) for group in answer.get("orgs") or () if group.get("roleInOrg") != READ_ONLY}
    namespaces = {str(answer["name"]), *groups} & (_scope(token_rights) or {str(answer["name"]), *groups})
    return Account(str(answer["name"]), frozenset(namespaces), token_rights.get("role") == READ_ONLY)


def _scope(token_rights: Mapping[str, Any]) -> set[str] | None:
    """The namespaces whose repos a fine-grained token may write; None for a token without such limits."""
    if token_rights.get("role") != FINE_GRAINED:
        return None
    scopes = (token_rights.get("fineGrained") or {}).get("scoped") or ()
    return {str(scope.get("entity", {}).get("name")) for scope in scopes if WRITING & set(scope.get("permissions", ()))}


@retried
def require_write(repo_id: str) -> bool:
    """Raise AccessDenied unless the token may write to this repo; False where this Hub cannot be asked that."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    with translated(repo_id):
        try:
            api().auth_check(repo_id, write=True)
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in NO_SUCH_QUESTION:
                raise
            return False
    return True


@retried
def access(repo_id: str) -> str:
    """Who may read a repo: PUBLIC, PRIVATE or GATED; raises SourceNotFound where it is not there, or not for us."""
    with translated(repo_id):
        info = api().model_info(repo_id)
    return PRIVATE if info.private else GATED if info.gated else PUBLIC


def resolve(repo_id: str, revision: str | None) -> tuple[str, tuple[RemoteFile, ...]]:
    """The commit that `revision` means now, and every file of it."""
    held = snapshot(repo_id, revision)
    return held.commit, held.files


@retried
def snapshot(repo_id: str, revision: str | None) -> Snapshot:
    """What a repo holds at the commit that `revision` means now, under the name that the repo has now."""
    with translated(repo_id, revision):
        info = api().model_info(repo_id, revision=revision, files_metadata=True)
    return Snapshot(info.id or repo_id, str(info.sha), tuple(_remote_file(sibling) for sibling in info.siblings or ()))


@retried
def refs(repo_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """Branches and tags, each with its commit."""
    with translated(repo_id):
        listing = api().list_repo_refs(repo_id)
    return (
        {branch.name: branch.target_commit for branch in listing.branches},
        {tag.name: tag.target_commit for tag in listing.tags},
    )


@retried
def history(repo_id: str, revision: str | None) -> tuple[str, ...]:
    """Commits of a branch or a pull request, newest first."""
    with translated(repo_id, revision):
        return tuple(commit.commit_id for commit in api().list_repo_commits(repo_id, revision=revision))


@retried
def open_pull_request(repo_id: str, author: str, mark: str) -> int | None:
    """The number of the author's open pull request whose title ends with `mark`."""
    with translated(repo_id):
        discussions = api().get_repo_discussions(
            repo_id, author=author, discussion_type="pull_request", discussion_status="open"
        )
        return next((request.num for request in discussions if request.title.endswith(mark)), None)


def read_json(repo_id: str, commit: str, file: RemoteFile) -> dict[str, Any]:
    """A small JSON file at a commit, as the Hub lists it; it stays in the Hub's cache. Raises CorruptModel."""
    where = f"{file.path} of {repo_id}"
    if file.size > documents.LARGEST:
        raise CorruptModel(f"{where} has {file.size:,} bytes, and may have {documents.LARGEST:,}")
    return documents.read_json(fetch(repo_id, commit, [file]) / file.path, where, CorruptModel, finite=False)


def fetch(
    repo_id: str, commit: str, files: Sequence[RemoteFile], advance: Advance = ignore, cache: Path | None = None
) -> Path:
    """The snapshot folder with exactly these files of a commit, whose hashes agree with what the Hub lists.

    What arrived damaged is fetched once more; raises CorruptModel where that does not help.
    """
    paths = [file.path for file in files]
    folder = download(repo_id, commit, paths, cache)
    damaged = [file.path for file in files if not _arrived(folder / file.path, file, advance)]
    if damaged:
        for path in damaged:
            forget(folder / path)
        folder = download(repo_id, commit, paths, cache)
        damaged = [file.path for file in files if not _arrived(folder / file.path, file, ignore)]
    if damaged:
        raise CorruptModel(f"{damaged[0]} of {repo_id} arrives with a wrong hash: try again on another network")
    return folder


def _arrived(path: Path, expected: RemoteFile, advance: Advance) -> bool:
    if not path.is_file():
        return False
    if expected.sha256 is not None:
        return hash_file(path, advance)[1] == expected.sha256
    advance(path.stat().st_size)
    return expected.blob_id in (None, git_blob_id(path))


@retried
def dataset_file(repo_id: str, path: str) -> tuple[str, Path]:
    """One file of a dataset at its present commit, and that commit."""
    with translated(repo_id), storage_errors(cache_folder()):
        commit = str(api().dataset_info(repo_id).sha)
        return commit, Path(api().hf_hub_download(repo_id, path, repo_type="dataset", revision=commit))


def is_cached(repo_id: str, commit: str, path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, path, revision=commit), str)


@retried
def download(repo_id: str, commit: str, paths: Sequence[str], cache: Path | None = None) -> Path:
    """The snapshot folder with exactly these files of the commit brought into the Hub's cache, or another one."""
    patterns = [glob.escape(path) for path in paths]
    with translated(repo_id, commit), storage_errors(cache or cache_folder()):
        return Path(api().snapshot_download(repo_id, revision=commit, allow_patterns=patterns, cache_dir=cache))


def forget(path: Path) -> None:
    """Remove a damaged file and its blob from the Hub's cache, so that the next download fetches it."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@retried
def validate_card(repo_id: str, text: str) -> None:
    """Let the Hub check a card's metadata; raises PublishError.

    The client's own function asks huggingface.co in some versions, 1.33 among them, wherever the Hub is.
    """
    from huggingface_hub import get_session, hf_raise_for_status

    body, headers = {"repoType": "model", "content": text}, {"Accept": "text/plain"}
    with translated(repo_id):
        response = get_session().post(f"{api().endpoint}/api/validate-yaml", json=body, headers=headers)
        if response.status_code == 400:
            raise PublishError(f"the Hub refuses the card: {' '.join(response.text.split())}")
        hf_raise_for_status(response)


@retried
def create_repo(repo_id: str, *, private: bool | None) -> None:
    """Make sure that a model repo of this name exists; with None its owner's default says who may read it."""
    with translated(repo_id):
        api().create_repo(repo_id, private=private, exist_ok=True)


@retried
def create_branch(repo_id: str, branch: str, start: str) -> None:
    """Make sure that a branch of this name exists; a new one starts at the commit `start`."""
    with translated(repo_id):
        api().create_branch(repo_id, branch=branch, revision=start, exist_ok=True)


@retried
def create_tag(repo_id: str, tag: str, commit: str) -> None:
    """Make sure that a tag of this name exists; a new one points to `commit`."""
    with translated(repo_id):
        api().create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)


def operations(changes: Changes) -> list[Any]:
    """A commit's operations as the client has them; they remember which files were sent."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    return [
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=local) for path, local in changes.files.items()),
        *(CommitOperationDelete(path_in_repo=path) for path in changes.deleted),
    ]


@retried
def upload(repo_id: str, changes: list[Any], *, revision: str | None, pull_request: bool) -> None:
    """Send the large files; nothing shows in the repo before the commit, and what arrived is not sent again."""
    additions = [change for change in changes if hasattr(change, "path_or_fileobj")]
    with translated(repo_id, revision):
        api().preupload_lfs_files(
            repo_id, additions, revision=revision, create_pr=pull_request, free_memory=False, num_threads=2
        )


def commit(
    repo_id: str, changes: list[Any], *, parent: str, revision: str | None, pull_request: bool, message: str
) -> tuple[str, str | None]:
    """One commit on top of `parent`: its id, and the address of the pull request that it opened.

    Asked once only: whoever calls it finds out after an error whether the commit was made. Raises Conflict.
    """
    with translated(repo_id, revision), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the card's metadata was checked before
        info = api().create_commit(
            repo_id,
            changes,
            commit_message=message,
            parent_commit=parent,
            revision=revision,
            create_pr=pull_request,
            num_threads=2,
        )
    return str(info.oid), CREDENTIALS.sub("", info.pr_url) if info.pr_url else None


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    return RemoteFile(sibling.rfilename, int(sibling.size or 0), lfs.sha256 if lfs else None, sibling.blob_id)
