"""What publishing is asked for, plans to do and has done."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.records import FileRecord


@dataclass(frozen=True)
class Target:
    """Where on the Hub a package goes, and how.

    `branch` None means main; `private` matters for a new repo only; `prune` also deletes files that no package put
    there.
    """

    repo_id: str
    private: bool = False
    branch: str | None = None
    pull_request: bool = False
    tag: str | None = None
    message: str | None = None
    prune: bool = False


@dataclass(frozen=True)
class Change:
    """What a push does to one path: `create`, `replace`, `delete` or `keep`; sizes in bytes, 0 for a deletion."""

    action: str
    path: str
    size: int


@dataclass(frozen=True)
class Plan:
    """What a push would do. `head` is the commit that it goes on top of, None where the repo is made first.

    `revision` None means main. With `pull_request` and no `revision`, a new pull request is opened.
    """

    repo_id: str
    creates_repo: bool
    creates_branch: bool
    revision: str | None
    pull_request: bool
    head: str | None
    changes: tuple[Change, ...]

    @property
    def idle(self) -> bool:
        """Whether everything is there already."""
        return not self.creates_branch and all(change.action == "keep" for change in self.changes)


@dataclass(frozen=True)
class Downloaded:
    """The proof by download: what was fetched into an empty cache, and the loss (nats a token) of a sample text.

    `sample_nll` is that of the model from the Hub, `package_nll` that of the local package on the same device, None
    where there is none.
    """

    files: int
    bytes: int
    sample_tokens: int
    sample_nll: float
    package_nll: float | None
    seconds: float


@dataclass(frozen=True)
class Receipt:
    """What a push did: the commit that holds the package now, and whether this push made it. Times are in UTC."""

    repo_id: str
    commit: str
    url: str
    created_commit: bool
    files: tuple[FileRecord, ...]
    key: str = ""
    branch: str | None = None
    pull_request: str | None = None
    tag: str | None = None
    started: str = ""
    finished: str = ""
    downloaded: Downloaded | None = None
