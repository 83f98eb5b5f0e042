"""What publishing is asked for, plans to do and has done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.records import FileRecord, Publisher

if TYPE_CHECKING:
    from quantize.package import Package
    from quantize.pipeline import RunRequest


@dataclass(frozen=True)
class Destination:
    """Where on the Hub a package goes, and how.

    `private` makes a new repo private, and refuses a public one that is there; `public` says that a private or gated
    source may become a public copy. `branch` None means main; `prune` also deletes files that were not uploaded by
    quantize.
    """

    repo_id: str
    private: bool = False
    public: bool = False
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
    """What a push would do. `head` is the commit that it goes on top of, None where the repo is created first.

    `revision` None means main. With `pull_request` and no `revision`, a new pull request is opened. `access` is who may
    read the repo now, `notes` what could not be checked.
    """

    repo_id: str
    creates_repo: bool
    creates_branch: bool
    revision: str | None
    pull_request: bool
    head: str | None
    changes: tuple[Change, ...]
    access: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether the repo holds everything already."""
        return not self.creates_branch and all(change.action == "keep" for change in self.changes)


@dataclass(frozen=True)
class Downloaded:
    """The proof by download: what was fetched into an empty cache, and the loss (nats a token) of a sample text.

    `sample_nll` is that of the model from the Hub, `package_nll` that of the local package on the same device, None
    where there is no local package. So many `windows` of those on record were scored again, and gave the same figures.
    """

    files: int
    bytes: int
    sample_tokens: int
    sample_nll: float
    package_nll: float | None
    seconds: float
    windows: int = 0


@dataclass(frozen=True)
class Verification:
    """How what was published is proved by download.

    The model runs on `device`. `corpus` is the text that it was measured on, and `against` the original, where these
    lie on this machine only.
    """

    device: str = "auto"
    corpus: str | None = None
    against: str | None = None


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


@dataclass(frozen=True)
class PublishRequest:
    """What is to be on the Hub: a package of this source by this recipe, made by `run` where it is missing.

    `largest_source` is a limit in bytes of weights; `refused_before` is the folder with the evidence of an earlier
    refused package, where there is one.
    """

    run: RunRequest
    destination: Destination
    refresh_card: bool = False
    verify_download: bool = False
    dry_run: bool = False
    largest_source: float | None = None
    refused_before: Path | None = None


@dataclass(frozen=True)
class Delivery:
    """The outcome of a PublishRequest.

    `state` is `up to date`, `card refreshed`, `would publish`, `would refresh` or `published`; `commit` is the repo's,
    None where it holds no package yet.
    """

    state: str
    source: str
    source_commit: str | None
    repo: str
    commit: str | None = None
    package: Package | None = None
    receipt: Receipt | None = None

    def summary(self) -> dict[str, object]:
        """What `--json` prints: the evidence lies in the package."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"package": str(self.package.folder) if self.package else None}


@dataclass(frozen=True)
class SyncRequest:
    """What one `quantize sync` was asked for; `only` are repos of the catalogue, none meaning all."""

    catalogue: Path
    folder: Path
    only: tuple[str, ...] = ()
    max_models: int | None = None
    dry_run: bool = False
    refresh_card: bool = False
    verify_download: bool = False
    device: str = "auto"
    force: bool = False
    publisher: Publisher | None = None


@dataclass(frozen=True)
class SyncOutcome:
    """The outcome of one entry: a state of a Delivery, or `postponed`, `refused`, `failed`, `interrupted`, and why."""

    repo: str
    source: str
    state: str
    detail: str
    source_commit: str | None
    commit: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing of this entry needs a look."""
        return self.state not in ("refused", "failed", "interrupted")


@dataclass(frozen=True)
class SyncReport:
    """The outcomes of all entries. `exit_code`: 0, 1 where some failed, 3 where some were refused, 130 when stopped."""

    catalogue: str
    started: str
    finished: str
    outcomes: tuple[SyncOutcome, ...]
    exit_code: int
