"""All repositories, accounts and pending uploads of one Hub, and the access rules between them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .accounts import Accounts, User
from .messages import Refusal
from .repository import Repository

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class PartedUpload:
    """A multipart upload under way."""

    kind: str
    repo_id: str
    sha256: str
    parts: dict[int, bytes] = field(default_factory=dict)


class Catalog:
    def __init__(self) -> None:
        self.accounts = Accounts()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.former_names: dict[str, str] = {}
        self.uploads: dict[str, PartedUpload] = {}
        self.lock = threading.RLock()
        self.endpoint = ""
        self.storage = ""
        self.multipart_over: int | None = None
        self.tells_content = True
        self.ignores_private = False

    def create(
        self, kind: str, repo_id: str, *, private: bool = False, gated: bool = False, author: str = "loopback"
    ) -> Repository:
        if repo_id.count("/") != 1:
            raise ValueError(f"a repo id is namespace/name, not {repo_id!r}")
        with self.lock:
            if (kind, repo_id) in self.repositories:
                raise Refusal(409, f"You already created this {kind} repo: {repo_id}")
            repository = Repository(kind, repo_id, private=private, gated=gated, author=author)
            self.repositories[kind, repo_id] = repository
            return repository

    def remove(self, kind: str, repo_id: str) -> None:
        with self.lock:
            self.repositories.pop((kind, repo_id), None)

    def known(self, kind: str, repo_id: str) -> Repository:
        """The repository, for the test itself: no access rules."""
        with self.lock:
            if (kind, repo_id) not in self.repositories:
                raise LookupError(f"no {kind} {repo_id} on this Hub")
            return self.repositories[kind, repo_id]

    def visible(self, kind: str, repo_id: str, user: User | None) -> Repository:
        """The repository, if the user may know that it exists; an absent and a hidden one look the same."""
        with self.lock:
            repository = self.repositories.get((kind, repo_id))
        if repository is not None:
            owner = user is not None and user.belongs_to(repository.namespace)
            if owner or not repository.private:
                return repository
        if user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def readable(self, kind: str, repo_id: str, user: User | None) -> Repository:
        """The repository, if the user may also read its files."""
        repository = self.visible(kind, repo_id, user)
        if repository.gated and not (user is not None and user.belongs_to(repository.namespace)):
            message = f"Access to {kind} {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(401 if user is None else 403, message, "GatedRepo")
        return repository

    def writable(self, kind: str, repo_id: str, user: User | None) -> Repository:
        repository = self.visible(kind, repo_id, user)
        if not signed_in(user).may_write(repository.namespace):
            raise Refusal(403, "You don't have the required permissions to perform this action")
        return repository

    def proposable(self, kind: str, repo_id: str, user: User | None) -> Repository:
        """The repository, if the user may open a pull request: for that, reading it is enough."""
        repository = self.readable(kind, repo_id, user)
        if signed_in(user).role != "write":
            raise Refusal(403, "This token has no right to open a pull request")
        return repository

    def page(self, repository: Repository) -> str:
        """The address of the repository's page."""
        folder = "" if repository.kind == "model" else f"{repository.kind}s/"
        return f"{self.endpoint}/{folder}{repository.repo_id}"


def signed_in(user: User | None) -> User:
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return user
