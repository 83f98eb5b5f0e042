"""A loopback Hub with a source, a warm process that talks to it, and a package that is ready to be published."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hub import WRITE_TOKEN, LoopbackHub
from tests.hub.distilgpt2 import seed_distilgpt2
from tests.publishing.warm_process import Child, Ended, Warm, warm_process

MEASURING = ("--max-windows", "16", "--window", "64", "--new-tokens", "4", "--require", "degraded")
QUICK_OPTIONS = ("--recipe", "rtn", *MEASURING)
EXPIRED_TOKEN = "hf_loopback_expired"
MODEL, TARGET = "distilbert/distilgpt2", "tester/distilgpt2-bnb-4bit"
NAME = "distilgpt2-bnb-4bit"
CATALOGUE = f"""
[defaults]
recipe = "rtn"
max_windows = 16
window = 64
new_tokens = 4
require = "degraded"

[[model]]
source = "{MODEL}"
repo = "{TARGET}"
"""
COMMANDS = {
    "push": ("push", NAME, "--to", TARGET),
    "run --push-to": ("run", MODEL, "--push-to", TARGET, "--device", "cpu", *QUICK_OPTIONS),
    "sync": ("sync", "catalogue.toml", "--device", "cpu"),
}

REPO = f"/api/models/{TARGET}"
STEPS = {
    "who am I": ("GET", r"^/api/whoami-v2"),
    "right to write": ("GET", rf"^{REPO}/auth-check"),
    "what is there": ("GET", rf"^{REPO}(\?|/revision|$)"),
    "is the card valid": ("POST", r"^/api/validate-yaml"),
    "make the repo": ("POST", r"^/api/repos/create"),
    "announce files": ("POST", rf"^{REPO}/preupload"),
    "announce large files": ("POST", r"\.git/info/lfs/objects/batch"),
    "send a large file": ("PUT", r"^/lfs/"),
    "confirm a large file": ("POST", r"\.git/info/lfs/objects/verify"),
    "commit": ("POST", rf"^{REPO}/commit"),
}
"""What publishing asks the Hub, by method and path, in this order."""


@dataclass(frozen=True)
class Place:
    """What a test of publishing works with: `cache` is the Hub's cache, `package` is sealed and passed; `seconds`
    is what making and publishing it took; `source` is the folder that the Hub's model came from.
    """

    hub: LoopbackHub
    warm: Warm
    cache: Path
    package: Path
    seconds: float
    source: Path

    def fresh(self, folder: Path, *, fetched: bool = True, made: bool = True) -> Path:
        """A folder to work in as a command leaves it before it publishes.

        Without `fetched` the Hub's cache is empty, without `made` there is no package yet.
        """
        self.hub.clear_faults()
        self.hub.delete_repo(TARGET)
        (folder / "catalogue.toml").write_text(CATALOGUE)
        if not fetched:
            shutil.rmtree(self.cache, ignore_errors=True)
        if made:
            shutil.copytree(self.package, folder / NAME)
            shutil.copytree(self.package, folder / "sync" / "packages" / TARGET.replace("/", "--"))
        return folder

    def run(self, name: str, folder: Path, *options: str, token: str = WRITE_TOKEN, limit: int | None = None) -> Ended:
        return self.warm.run(*COMMANDS[name], *options, cwd=folder, env={"HF_TOKEN": token}, largest_file=limit)

    def commits(self) -> list[str]:
        """Titles of the commits that somebody made to the target, newest first."""
        try:
            return [commit.title for commit in self.hub.log(TARGET)][:-1]
        except LookupError:
            return []

    def restore_source(self) -> None:
        """The source's repo as it was in the beginning: the same commits."""
        self.hub.delete_repo(MODEL)
        seed_distilgpt2(self.hub, self.source)

    def start(self, name: str, folder: Path) -> Child:
        return self.warm.start(*COMMANDS[name], cwd=folder, env={"HF_TOKEN": WRITE_TOKEN})

    def quantize(self, *arguments: str, folder: Path, token: str = WRITE_TOKEN) -> Ended:
        return self.warm.run(*arguments, cwd=folder, env={"HF_TOKEN": token})

    def require_whole(self, revision: str = "main") -> None:
        """The target's head holds exactly one package, byte for byte as its provenance says."""
        there = self.hub.files(TARGET, revision)
        listed = {file["path"]: file["sha256"] for file in json.loads(there["provenance.json"])["files"]}
        held = {path: hashlib.sha256(data).hexdigest() for path, data in there.items()}
        assert {path for path in held if path not in ("NOTES.md", ".gitattributes", "provenance.json")} == set(listed)
        assert {path: held[path] for path in listed} == listed


@contextmanager
def prepared(root: Path, source: Path) -> Iterator[Place]:
    """A place in the empty folder `root`."""
    with LoopbackHub() as hub, warm_process(hub.env(home=root / "home"), root) as warm:
        seed_distilgpt2(hub, source)
        hub.add_user("tester", EXPIRED_TOKEN, role="expired")
        assert warm.run("--version", cwd=root).code == 0
        started = time.monotonic()
        made = warm.run(*COMMANDS["run --push-to"], cwd=root, env={"HF_TOKEN": WRITE_TOKEN})
        assert made.code == 0, made.err
        (root / NAME / "receipt.json").unlink()
        for name in ("run --push-to", "push"):
            warm.rehearse(*COMMANDS[name], "--dry-run", cwd=root, env={"HF_TOKEN": WRITE_TOKEN})
        yield Place(hub, warm, root / "home" / "hub", root / NAME, time.monotonic() - started, source)
