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

MEASURING = ("--max-windows", "24", "--new-tokens", "8", "--require", "degraded")
QUICK_OPTIONS = ("--recipe", "rtn", *MEASURING)
EXPIRED_TOKEN = "hf_loopback_expired"
MODEL, TARGET = "distilbert/distilgpt2", "tester/distilgpt2-bnb-4bit"
NAME = "distilgpt2-bnb-4bit"
CATALOGUE = f"""
[defaults]
recipe = "rtn"
max_windows = 24
new_tokens = 8
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


@dataclass(frozen=True)
class Place:
    """What a test of publishing works with: `cache` is the Hub's cache, `package` is sealed and passed; `seconds`
    is what making and publishing it took.
    """

    hub: LoopbackHub
    warm: Warm
    cache: Path
    package: Path
    seconds: float

    def fresh(self, folder: Path, *, afresh: bool = False) -> Path:
        """A folder to work in as a command leaves it before it publishes, or an empty one with an empty cache."""
        self.hub.clear_faults()
        self.hub.delete_repo(TARGET)
        (folder / "catalogue.toml").write_text(CATALOGUE)
        if afresh:
            shutil.rmtree(self.cache, ignore_errors=True)
        else:
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
def prepared(root: Path, pocket: Path) -> Iterator[Place]:
    """A place in the empty folder `root`."""
    with LoopbackHub() as hub, warm_process(hub.env(home=root / "home"), root) as warm:
        seed_distilgpt2(hub, pocket)
        hub.add_user("tester", EXPIRED_TOKEN, role="expired")
        assert warm.run("--version", cwd=root).code == 0
        started = time.monotonic()
        made = warm.run(*COMMANDS["run --push-to"], cwd=root, env={"HF_TOKEN": WRITE_TOKEN})
        assert made.code == 0, made.err
        (root / NAME / "receipt.json").unlink()
        yield Place(hub, warm, root / "home" / "hub", root / NAME, time.monotonic() - started)
