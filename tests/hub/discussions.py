"""Endpoints of the community tab: discussions and pull requests."""

from __future__ import annotations

from .call import Call
from .messages import Refusal, Reply, json_reply
from .repository import Discussion, Repository, now


def index(call: Call) -> Reply:
    repository = call.visible()
    kind = call.request.parameter("type") or "all"
    status = call.request.parameter("status") or "all"
    author = call.request.parameter("author")
    found = [
        summary(repository, discussion)
        for discussion in reversed(repository.discussions)
        if kind in ("all", "pull_request" if discussion.is_pull_request else "discussion")
        and status in ("all", "open" if discussion.status in ("open", "draft") else "closed")
        and author in (None, discussion.author)
    ]
    # All of them are on the first page.
    first = call.request.parameter("p") in (None, "0")
    page = found if first else []
    return json_reply({"discussions": page, "count": len(found), "start": 0 if first else len(found)})


def create(call: Call) -> Reply:
    repository = call.proposable()
    wanted = call.request.json()
    pull_request = bool(wanted.get("pullRequest"))
    discussion = repository.discuss(
        str(wanted["title"]),
        call.author,
        "draft" if pull_request else "open",
        pull_request=repository.resolve("main").sha if pull_request else None,
    )
    _add_comment(discussion, call.author, str(wanted.get("description", "")))
    return json_reply({"num": discussion.number, "pullRequest": pull_request})


def details(call: Call) -> Reply:
    repository = call.visible()
    discussion = _find(repository, call)
    commits = _own_commits(repository, discussion)
    answer = {**summary(repository, discussion), "events": [*discussion.events, *commits]}
    if discussion.is_pull_request:
        answer |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
    return json_reply(answer)


def comment(call: Call) -> Reply:
    discussion = _find(call.proposable(), call)
    text = str(call.request.json()["comment"])
    return json_reply({"newMessage": _add_comment(discussion, call.author, text)})


def change_status(call: Call) -> Reply:
    discussion = _find(call.writable(), call)
    wanted = call.request.json()
    if wanted.get("status") not in ("open", "closed"):
        raise Refusal(400, "status is open or closed")
    discussion.status = wanted["status"]
    event = _event("status-change", len(discussion.events), call.author, {"status": discussion.status})
    discussion.events.append(event)
    return json_reply({"newStatus": event})


def summary(repository: Repository, discussion: Discussion) -> dict[str, object]:
    return {
        "num": discussion.number,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": discussion.created,
        "status": discussion.status,
        "isPullRequest": discussion.is_pull_request,
        "repo": {"name": repository.repo_id, "type": repository.kind},
    }


def _find(repository: Repository, call: Call) -> Discussion:
    number = int(call.arguments["number"])
    for discussion in repository.discussions:
        if discussion.number == number:
            return discussion
    raise Refusal(404, f"No discussion {number}")


def _own_commits(repository: Repository, discussion: Discussion) -> list[dict[str, object]]:
    if not discussion.is_pull_request:
        return []
    main = {commit.sha for commit in repository.history("main")}
    own = [c for c in repository.history(f"refs/pr/{discussion.number}") if c.sha not in main]
    return [
        _event("commit", commit.sha, commit.author, {"subject": commit.title, "oid": commit.sha})
        for commit in reversed(own)
    ]


def _add_comment(discussion: Discussion, author: str, text: str) -> dict[str, object]:
    data = {"edited": False, "hidden": False, "latest": {"raw": text}}
    discussion.events.append(_event("comment", len(discussion.events), author, data))
    return discussion.events[-1]


def _event(kind: str, name: object, author: str, data: dict[str, object]) -> dict[str, object]:
    event = {"id": f"{kind}-{name}", "type": kind, "createdAt": now()}
    return {**event, "author": {"name": author}, "data": data}
