"""The store: git-style objects, LFS objects, commits, refs; a commit is atomic and checks its parent."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Literal

from .messages import Refusal

LFS_SUFFIXES = {
    *(".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"),
    *(".bin", ".ckpt", ".h5", ".joblib", ".mlmodel", ".model", ".msgpack"),
    *(".onnx", ".ot", ".pb", ".pt", ".pth"),
    *(".arrow", ".npy", ".npz", ".parquet", ".safetensors", ".tflite"),
    *(".gif", ".jpg", ".mp4", ".pdf", ".png", ".webp"),
}
LFS_OVER = 1_000_000
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))
SHA = re.compile(r"[0-9a-f]{5,40}")

Tree = Mapping[str, "File"]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (PurePosixPath(path).suffix.lower() in LFS_SUFFIXES or size > LFS_OVER)


@dataclass(frozen=True)
class File:
    """A file of a tree: its bytes, its blob id (of the pointer, for LFS) and for LFS its sha256."""

    data: bytes = field(repr=False)
    blob_id: str
    sha256: str | None = None
    pointer_size: int = 0

    @classmethod
    def plain(cls, data: bytes) -> File:
        return cls(data, git_oid("blob", data))

    @classmethod
    def large(cls, data: bytes, sha256: str) -> File:
        version = "https://git-lfs.github.com/spec/v1"
        pointer = f"version {version}\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        return cls(data, git_oid("blob", pointer), sha256, len(pointer))

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    tree: Tree = field(repr=False)

    @property
    def message(self) -> str:
        return f"{self.title}\n\n{self.description}" if self.description else self.title


@dataclass(frozen=True)
class Edit:
    """One operation of a commit; a large file's bytes are already among the repository's objects."""

    action: Literal["file", "large-file", "delete", "delete-folder"]
    path: str
    data: bytes = b""
    sha256: str = ""

    def __post_init__(self) -> None:
        parts = self.path.removesuffix("/").split("/")
        if any(part in ("", ".", "..", ".git") for part in parts):
            raise Refusal(400, f"Invalid path: {self.path!r}")


@dataclass
class Discussion:
    number: int
    title: str
    author: str
    is_pull_request: bool
    status: str
    created: str = field(default_factory=now)
    events: list[dict[str, object]] = field(default_factory=list)


class Repository:
    def __init__(self, kind: str, repo_id: str, *, private: bool, gated: bool, author: str) -> None:
        self.kind, self.repo_id, self.private, self.gated = kind, repo_id, private, gated
        self.created = now()
        self.lock = threading.RLock()
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.discussions: list[Discussion] = []
        attributes = {".gitattributes": File.plain(ATTRIBUTES.encode())}
        self.refs["refs/heads/main"] = self._record(None, attributes, "initial commit", "", author).sha

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        with self.lock:
            name = self._ref(revision)
            sha = self.refs[name] if name is not None else self._expand(revision)
            if sha is None:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        with self.lock:
            found = [self.resolve(revision)]
            while (parent := found[-1].parent) is not None:
                found.append(self.commits[parent])
            return found

    def store(self, data: bytes, expected_sha256: str | None = None) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if expected_sha256 not in (None, sha256):
            raise Refusal(400, "The content's sha256 is not the one that was announced")
        with self.lock:
            self.objects[sha256] = data
        return sha256

    def commit(
        self,
        revision: str,
        edits: Iterable[Edit],
        *,
        title: str,
        description: str = "",
        author: str = "loopback",
        parent: str | None = None,
    ) -> Commit:
        """Moves a branch or a pull request by one commit; with `parent`, only if that is its head still."""
        with self.lock:
            head = self.resolve(revision)
            if parent is not None and not head.sha.startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            name = self._ref(revision)
            if name is None or name.startswith("refs/tags/"):
                raise Refusal(400, f"Only a branch or a pull request takes commits: {revision}")
            commit = self._record(head.sha, self._edited(head.tree, edits), title, description, author)
            self.refs[name] = commit.sha
            return commit

    def propose(self, base: str, edits: Iterable[Edit], title: str, note: str, author: str) -> Discussion:
        """A new pull request of one commit on top of `base`."""
        with self.lock:
            head = self.resolve(base)
            commit = self._record(head.sha, self._edited(head.tree, edits), title, note, author)
            return self.discuss(title, author, "open", pull_request=commit.sha)

    def discuss(self, title: str, author: str, status: str, pull_request: str | None = None) -> Discussion:
        with self.lock:
            number = len(self.discussions) + 1
            discussion = Discussion(number, title, author, pull_request is not None, status)
            if pull_request is not None:
                self.refs[f"refs/pr/{number}"] = pull_request
            self.discussions.append(discussion)
            return discussion

    def add_ref(self, name: str, start: str) -> None:
        with self.lock:
            sha = self.resolve(start).sha
            if name in self.refs:
                raise Refusal(409, f"Reference already exists: {name}")
            self.refs[name] = sha

    def remove_ref(self, name: str) -> None:
        with self.lock:
            if name == "refs/heads/main":
                raise Refusal(403, "The default branch cannot be deleted")
            if self.refs.pop(name, None) is None:
                raise Refusal(404, f"Reference does not exist: {name}", "RevisionNotFound")

    def _ref(self, revision: str) -> str | None:
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def _expand(self, revision: str) -> str | None:
        found = [sha for sha in self.commits if sha.startswith(revision)] if SHA.fullmatch(revision) else []
        return found[0] if len(found) == 1 else None

    def _edited(self, before: Tree, edits: Iterable[Edit]) -> dict[str, File]:
        tree = dict(before)
        for edit in edits:
            match edit.action:
                case "file":
                    tree[edit.path] = File.plain(edit.data)
                case "large-file" if edit.sha256 in self.objects:
                    tree[edit.path] = File.large(self.objects[edit.sha256], edit.sha256)
                case "large-file":
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {edit.path}")
                case "delete" | "delete-folder":
                    folder = edit.path.removesuffix("/") + "/"
                    inside = {path for path in tree if path.startswith(folder)}
                    gone = {edit.path} & tree.keys() if edit.action == "delete" else inside
                    if not gone:
                        raise Refusal(404, f"{edit.path} does not exist", "EntryNotFound")
                    tree = {path: file for path, file in tree.items() if path not in gone}
        return tree

    def _record(self, parent: str | None, tree: Tree, title: str, description: str, author: str) -> Commit:
        listing = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(tree.items()))
        # The number takes the place of git's time stamp: no two commits are the same.
        place = f"{self.kind}s/{self.repo_id} {len(self.commits)} {parent}"
        text = f"{place}\n{listing}\n{title}\n\n{description}"
        commit = Commit(git_oid("commit", text.encode()), parent, title, description, author, now(), tree)
        self.commits[commit.sha] = commit
        return commit
