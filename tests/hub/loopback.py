"""LoopbackHub: what a test holds in its hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from .accounts import Role, User
from .catalog import Catalog
from .faults import Fault, Faults
from .messages import Record
from .repository import Commit, Edit, Repository, is_lfs
from .routes import MainEndpoint
from .server import Log, Port
from .storage import StorageEndpoint

WRITE_TOKEN = "hf_loopback_write"
READ_TOKEN = "hf_loopback_read"


class LoopbackHub:
    """A Hub that lives as long as its `with` block; everything in it is in memory."""

    def __init__(self) -> None:
        self._catalog = Catalog()
        self._faults = Faults()
        self._log = Log()
        self._ports: list[Port] = []
        self.add_user("tester", WRITE_TOKEN)
        self.add_user("reader", READ_TOKEN, role="read")

    def __enter__(self) -> LoopbackHub:
        main = Port(MainEndpoint(self._catalog), self._faults, self._log)
        storage = Port(StorageEndpoint(self._catalog), self._faults, self._log)
        self._ports = [main, storage]
        self._catalog.endpoint = f"http://127.0.0.1:{main.number}"
        # Another name, not just another port: version 1 of the client sends a token to any port of a name.
        self._catalog.storage = f"http://localhost:{storage.number}"
        for port in self._ports:
            port.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._faults.clear()
        for port in self._ports:
            port.stop()
        if self._log.crashes and problem is None:
            raise RuntimeError("the loopback Hub itself failed") from self._log.crashes[0]

    @property
    def endpoint(self) -> str:
        return self._catalog.endpoint

    @property
    def storage(self) -> str:
        """The address of the LFS storage."""
        return self._catalog.storage

    @property
    def multipart_over(self) -> int | None:
        """Objects of more bytes than this are uploaded in parts of this size; None: never."""
        return self._catalog.multipart_over

    @multipart_over.setter
    def multipart_over(self, size: int | None) -> None:
        self._catalog.multipart_over = size

    @property
    def tells_content(self) -> bool:
        """Whether listings have sizes and hashes."""
        return self._catalog.tells_content

    @tells_content.setter
    def tells_content(self, tells: bool) -> None:
        self._catalog.tells_content = tells

    @property
    def ignores_private(self) -> bool:
        """Whether every new repo becomes public, whatever was asked for."""
        return self._catalog.ignores_private

    @ignores_private.setter
    def ignores_private(self, ignores: bool) -> None:
        self._catalog.ignores_private = ignores

    def is_private(self, repo_id: str) -> bool:
        return self._catalog.known("model", repo_id).private

    def env(self, token: str | None = WRITE_TOKEN, *, home: Path) -> dict[str, str]:
        """The variables that point a process at this Hub and at nothing else."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0" if token else "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add_user(
        self,
        name: str,
        token: str,
        role: Role = "write",
        *,
        orgs: Iterable[str] = (),
        reads: Iterable[str] = (),
        scope: tuple[str, ...] | None = None,
    ) -> None:
        """A user, or one more token for one; `orgs` names the organizations that the user belongs to.

        Those of `reads` it may not change; a fine-grained token changes only what belongs to its `scope`.
        """
        self._catalog.accounts.add(token, User(name, role, tuple(orgs), tuple(reads), scope))

    def create_repo(
        self, repo_id: str, *, private: bool = False, gated: bool = False, repo_type: str = "model"
    ) -> None:
        self._catalog.create(repo_type, repo_id, private=private, gated=gated)

    def delete_repo(self, repo_id: str, repo_type: str = "model") -> None:
        """Removes a repository, if it is there."""
        self._catalog.remove(repo_type, repo_id)

    def leave_former_name(self, former: str, repo_id: str) -> None:
        """Answers requests for a model's former name with where it is now, as the Hub does after a renaming."""
        self._catalog.former_names[former] = repo_id

    def pull_requests(self, repo_id: str) -> list[int]:
        """Numbers of all pull requests that were ever opened."""
        return [one.number for one in self._catalog.known("model", repo_id).discussions if one.is_pull_request]

    def refs(self, repo_id: str) -> dict[str, str]:
        """Every branch, tag and pull request by its full name, with its commit."""
        return dict(self._catalog.known("model", repo_id).refs)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path | None],
        message: str = "Update",
        *,
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Commits behind the client's back; a file that is None is deleted."""
        repository = self._catalog.known(repo_type, repo_id)
        edits = [_edit(repository, path, content) for path, content in files.items()]
        return repository.commit(revision, edits, title=message).sha

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        return self._catalog.known(repo_type, repo_id).resolve(revision).sha

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        tree = self._catalog.known(repo_type, repo_id).resolve(revision).tree
        return {path: file.data for path, file in tree.items()}

    def log(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Newest first."""
        return self._catalog.known(repo_type, repo_id).history(revision)

    @property
    def requests(self) -> list[Record]:
        with self._log.lock:
            return list(self._log.records)

    def downloaded(self, repo_id: str, repo_type: str = "model") -> set[str]:
        """The files of which at least a part was sent to somebody."""
        with self._log.lock:
            served = set(self._log.served)
        return {one.path for one in served if (one.kind, one.repo_id) == (repo_type, repo_id)}

    def inject(self, fault: Fault) -> None:
        self._faults.inject(fault)

    def clear_faults(self) -> None:
        """Forgets every fault; requests that hang lose their connection."""
        self._faults.clear()


def _edit(repository: Repository, path: str, content: bytes | Path | None) -> Edit:
    if content is None:
        return Edit("delete", path)
    data = content if isinstance(content, bytes) else content.read_bytes()
    if is_lfs(path, len(data)):
        return Edit("large-file", path, sha256=repository.store(data))
    return Edit("file", path, data)
