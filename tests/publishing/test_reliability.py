"""Every way the Hub fails, for every command that publishes: success or one clear line, and never a second commit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub
from tests.publishing.workspace import COMMANDS, EXPIRED_TOKEN, REPO, STEPS, TARGET, Place

PUBLISHING = tuple(COMMANDS)
MAKING = ("run --push-to", "sync")
DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"

ASKED_FOR = {
    ("--tag", "v1"): {"branches and tags": ("GET", rf"^{REPO}/refs"), "make the tag": ("POST", rf"^{REPO}/tag")},
    ("--branch", "next"): {"make the branch": ("POST", rf"^{REPO}/branch")},
    ("--pr",): {"open pull requests": ("GET", rf"^{REPO}/discussions"), "commit of a pull request": STEPS["commit"]},
}
"""What a push asks for only with these options."""


@dataclass(frozen=True)
class Case:
    """A fault, and what the first try ends in; without it, every second try has to publish.

    `commits` counts what the first try left in the repo; `line` has to be in its one error line. Without `fetched` the
    cache is empty, so the source is fetched once more; without `made` there is no package yet. `options` go to both
    tries; `limit` is the largest file in bytes.
    """

    name: str
    faults: tuple[Fault, ...] = ()
    code: int = 0
    commits: int = 1
    line: str = ""
    commands: tuple[str, ...] = PUBLISHING
    options: tuple[str, ...] = ()
    token: str = WRITE_TOKEN
    fetched: bool = True
    made: bool = True
    limit: int | None = None
    meanwhile: Callable[[LoopbackHub], object] | None = None


def cases() -> Iterator[Case]:
    commit, upload = STEPS["commit"], STEPS["send a large file"]
    unreachable = "cannot reach the Hub"
    yield Case("commit is never answered, and not made", (Fault(*commit, kind="hang"),))
    yield Case("commit is made and never answered", (Fault(*commit, kind="hang", applied=True),))
    yield Case("commit is made, its reply is lost", (Fault(*commit, kind="drop-reply"),))
    yield Case("commit is made, its reply is 502", (Fault(*commit, status=502, applied=True),))
    yield Case("connection is reset before the commit", (Fault(*commit, kind="reset"),))
    yield Case("commits are never answered", (Fault(*commit, kind="hang", times=None),), 1, 0, unreachable)
    yield Case("412: somebody else pushed", (), 1, 1, "somebody else committed", meanwhile=somebody_pushes)
    yield Case("repo is deleted between two calls", (), 1, 0, "no such repo", meanwhile=somebody_deletes)
    for name, step in STEPS.items():
        yield Case(f"429 once: {name}", (Fault(*step, status=429, retry_after=2),))
        yield Case(f"503 once: {name}", (Fault(*step, status=503),))
        for_good = (Fault(*step, status=503, times=None),)
        if name == "confirm a large file":  # a second try finds that the file arrived, and asks no more
            yield Case(f"503 for good: {name}", for_good)
        else:
            yield Case(f"503 for good: {name}", for_good, 1, 0, "the Hub answered 503")
    yield Case("429 with RateLimit once: commit", (Fault(*commit, status=429, rate_limit=20),))
    hour = Fault(*commit, status=429, retry_after=3600, times=None)
    yield Case("429 that asks for an hour: commit", (hour,), 1, 0, "more than --hub-wait 600 leaves")
    for status in (501, 507):
        final = Fault(*commit, status=status, times=None)
        yield Case(f"{status}: commit", (final,), 1, 0, "another attempt will not help")
    limit = "Private repository storage limit reached"
    no_room = Fault(*STEPS["announce large files"], status=403, times=None, message=limit)
    yield Case("403: storage is full", (no_room,), 1, 0, "free some of the account's storage")
    no_question = Fault(*STEPS["right to write"], status=404, times=None)
    yield Case("a Hub without auth-check: right to write", (no_question,))
    for options, steps in ASKED_FOR.items():
        to_main = "--tag" in options
        for name, step in steps.items():
            words = f"{name} ({' '.join(options)})"
            never, once = (Fault(*step, times=None),), (Fault(*step),)
            made = int(name == "make the tag")
            if name == "commit of a pull request":  # not tried twice, since nobody could tell two of them apart
                yield Case(f"503 once: {words}", once, 1, 0, "answered 503", ("push",), options)
            else:
                yield Case(f"503 once: {words}", once, commits=int(to_main), commands=("push",), options=options)
            yield Case(f"503 for good: {words}", never, 1, made, "answered 503", ("push",), options)
    lost = (Fault(*commit, kind="drop-reply"), Fault("GET", rf"^{REPO}/commits/"))
    yield Case("commit is made, its reply is lost, and 503 when looking for it", lost)
    asked = ("GET", r"^/api/models/distilbert")
    yield Case("429 once: what the source is", (Fault(*asked, status=429, retry_after=2),), commands=MAKING)
    yield Case("503 once: what the source is", (Fault(*asked),), commands=MAKING)
    lasting = (Fault(*asked, times=None),)
    yield Case("503 for good: what the source is", lasting, 1, 0, "the Hub answered 503", commands=MAKING)
    yield Case("reset in the middle of an upload", (Fault(*upload, kind="reset"),))
    yield Case("uploads are always reset", (Fault(*upload, kind="reset", times=None),), 1, 0, unreachable)
    yield Case("storage refuses an upload (403)", (Fault(*upload, status=403, times=None),), 1, 0, "403")
    yield Case("the token may only read", (), 1, 0, "may only read", token=READ_TOKEN)
    yield Case("the token is expired", (), 1, 0, "the token is missing, expired", token=EXPIRED_TOKEN)
    weights = ("GET", r"^/lfs/model/distilbert")
    head = ("HEAD", r"^/distilbert/.*/resolve/")
    yield Case("503 once: a file of the source", (Fault(*head),), commands=MAKING[:1], fetched=False)
    yield Case("429 once: a file of the source", (Fault(*head, status=429),), commands=MAKING[:1], fetched=False)
    reset = Fault(*weights, kind="reset-body")
    yield Case("reset in the middle of a download", (reset,), commands=MAKING, fetched=False, made=False)
    yield Case("download is cut short", (Fault(*weights, kind="cut"),), commands=MAKING, fetched=False)
    yield Case("download has corrupt bytes", (Fault(*weights, kind="corrupt"),), commands=MAKING, fetched=False)
    corrupt = Fault(*weights, kind="corrupt", times=None)
    yield Case("downloads are always corrupt", (corrupt,), 1, 0, "wrong hash", commands=MAKING, fetched=False)
    full = "no space left"
    yield Case("no disk space for the source", (), 1, 0, full, commands=MAKING, fetched=False, limit=1_000_000)
    yield Case("no disk space for the receipt", (), 1, 1, full, commands=("push", "run --push-to"), limit=2000)


def somebody_pushes(hub: LoopbackHub) -> None:
    hub.commit(TARGET, {"NOTES.md": b"mine"}, message="somebody else")


def somebody_deletes(hub: LoopbackHub) -> None:
    hub.delete_repo(TARGET)


def marks(case: Case, name: str) -> list[pytest.MarkDecorator]:
    """Publishing is the same code in every command, and so are answers to its steps: the inner loop takes each kind of
    fault once, with `push` and mostly in the commit."""
    lasting = any(fault.times is None and fault.kind != "status" for fault in case.faults)
    step = case.name.partition(": ")[2]
    quick = name == "push" and not lasting and not case.options and (step not in STEPS or step == "commit")
    return [] if quick else [pytest.mark.slow]


CELLS = [
    pytest.param(case, name, id=f"{name}: {case.name}", marks=marks(case, name))
    for case in cases()
    for name in case.commands
]


@pytest.mark.parametrize(("case", "name"), CELLS)
def test_fault(place: Place, tmp_path: Path, case: Case, name: str) -> None:
    folder, hub = place.fresh(tmp_path, fetched=case.fetched, made=case.made), place.hub
    if "right to write" in case.name or case.meanwhile or case.options:
        hub.create_repo(TARGET)
    for fault in case.faults:
        hub.inject(fault)
    if case.meanwhile is not None:
        event = case.meanwhile
        hub.inject(Fault(*STEPS["commit"], kind="none", meanwhile=lambda: event(hub)))

    first = place.run(name, folder, *case.options, token=case.token, limit=case.limit)

    assert (first.code, len(place.commits())) == (case.code, case.commits), first.err
    assert "Traceback" not in first.err
    if case.code and name != "sync":
        (line,) = (line for line in first.err.splitlines() if line.startswith("error: "))
        assert case.line in line
    assert " ".join(case.line.split()) in " ".join(first.err.split())

    hub.clear_faults()
    again = place.run(name, folder, *case.options)
    assert again.code == 0, again.err
    others = 1 if case.meanwhile is somebody_pushes else 0
    revision = {"--branch": "next", "--pr": "refs/pr/1"}.get(next(iter(case.options), ""), "main")
    assert len(hub.log(TARGET, revision)) == 2 + others and hub.pull_requests(TARGET) in ([], [1])
    place.require_whole(revision)


def table() -> str:
    """The matrix as docs/reliability.md has it."""
    lines = ["| fault | push | run --push-to | sync | commits after it |", "|---|---|---|---|---|"]
    for case in cases():
        ends = "published" if case.code == 0 else f"exit 1: {case.line}"
        cells = [ends if name in case.commands else "" for name in PUBLISHING]
        lines.append(f"| {case.name} | {' | '.join(cells)} | {case.commits} |")
    return "\n".join(lines) + "\n"


def test_the_matrix_is_in_the_docs() -> None:
    """UPDATE_GOLDEN=1 writes it anew."""
    begin, end = "<!-- matrix -->\n", "<!-- end of matrix -->"
    head, _, rest = DOCS.read_text("utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    text = f"{head}{begin}\n{table()}\n{end}{tail}"
    if os.environ.get("UPDATE_GOLDEN"):
        DOCS.write_text(text, "utf-8")
    assert DOCS.read_text("utf-8") == text
