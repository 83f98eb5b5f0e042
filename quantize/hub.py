"""The one door to the Hub: what the client is asked, and what its many errors mean."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import AccessDenied, HubUnreachable, PublishError, SourceNotFound

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REQUEST_TIMEOUT = 30.0
"""Seconds for a question that is not a transfer."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as the Hub lists it: `sha256` is known for large files, the git `blob_id` for all."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None


def api() -> HfApi:
    """The client, at HF_ENDPOINT where that is set, with a token from huggingface_hub's usual places."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="quantize-bnb")


def endpoint() -> str:
    return str(api().endpoint)


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def token_present() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def resolve(repo_id: str, revision: str | None) -> tuple[str, tuple[RemoteFile, ...]]:
    """The commit that `revision` means now, and every file of it."""
    with translated(repo_id, revision):
        info = api().model_info(repo_id, revision=revision, files_metadata=True, timeout=REQUEST_TIMEOUT)
    return str(info.sha), tuple(_remote_file(sibling) for sibling in info.siblings or ())


def read_json(repo_id: str, commit: str, path: str) -> dict[str, Any]:
    """A small JSON file at a commit; it stays in the Hub's cache."""
    with translated(repo_id, commit):
        local = api().hf_hub_download(repo_id, path, revision=commit)
    try:
        content = json.loads(Path(local).read_text("utf-8"))
    except ValueError as error:
        raise SourceNotFound(f"{path} of {repo_id} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceNotFound(f"{path} of {repo_id} is not a JSON object")
    return content


def dataset_file(repo_id: str, path: str) -> tuple[str, Path]:
    """One file of a dataset at its present commit, and that commit."""
    with translated(repo_id):
        commit = str(api().dataset_info(repo_id, timeout=REQUEST_TIMEOUT).sha)
        return commit, Path(api().hf_hub_download(repo_id, path, repo_type="dataset", revision=commit))


def is_cached(repo_id: str, commit: str, path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, path, revision=commit), str)


def download(repo_id: str, commit: str, paths: Sequence[str]) -> Path:
    """The snapshot folder with exactly these files of the commit brought into the Hub's cache."""
    patterns = [glob.escape(path) for path in paths]
    with translated(repo_id, commit):
        return Path(api().snapshot_download(repo_id, revision=commit, allow_patterns=patterns))


def forget(path: Path) -> None:
    """Remove a damaged file and its blob from the Hub's cache, so that the next download fetches it."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def create_repo(repo_id: str, *, private: bool) -> None:
    """Make sure that a model repo of this name exists."""
    with translated(repo_id):
        api().create_repo(repo_id, private=private, exist_ok=True)


def commit(repo_id: str, files: Mapping[str, Path], deleted: Sequence[str], *, parent: str, message: str) -> str:
    """Add `files` (path in the repo: local path) and delete others in one commit on top of `parent`; its id."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=local) for path, local in files.items()),
        *(CommitOperationDelete(path_in_repo=path) for path in deleted),
    ]
    with translated(repo_id):
        info = api().create_commit(repo_id, operations, commit_message=message, parent_commit=parent)
    return str(info.oid)


@contextmanager
def translated(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one readable line each."""
    from huggingface_hub import errors

    transport = (errors.HTTPError, ConnectionError, TimeoutError)  # type: ignore[attr-defined]
    try:
        yield
    except errors.GatedRepoError as error:
        raise AccessDenied(
            f"{repo_id} is gated: accept its terms at {endpoint()}/{repo_id} and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceNotFound(f"{repo_id} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceNotFound(
            f"no such repo: {repo_id} (if it is private, log in with `hf auth login`; a local folder is "
            f"written with ./)"
        ) from error
    except errors.HFValidationError as error:
        raise SourceNotFound(f"{repo_id!r} is neither a folder nor a Hub id such as distilbert/distilgpt2") from error
    except errors.HfHubHTTPError as error:
        raise _from_status(repo_id, error) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, *transport) as error:
        raise HubUnreachable(
            f"cannot reach the Hub at {endpoint()} for {repo_id} ({type(error).__name__}): check the network and "
            f"run the same command again"
        ) from error


def _from_status(repo_id: str, error: Any) -> AccessDenied | HubUnreachable | PublishError:
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return AccessDenied(
            f"the Hub refused {repo_id} ({status}): the token is missing, expired or lacks the right; "
            f"log in with `hf auth login`"
        )
    if status == 412:
        return PublishError(f"somebody else committed to {repo_id} meanwhile: look at it and push again")
    reason = (error.server_message or "").strip().splitlines()
    return HubUnreachable(
        f"the Hub answered {status} for {repo_id}{': ' + reason[0] if reason else ''}: try again later"
    )


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    return RemoteFile(sibling.rfilename, int(sibling.size or 0), lfs.sha256 if lfs else None, sibling.blob_id)
