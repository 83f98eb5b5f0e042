"""Endpoints that change repositories: create, delete, preupload, commit, branches and tags."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from . import cards
from .call import Call
from .catalog import signed_in
from .messages import Refusal, Reply, json_reply
from .repository import Edit, is_lfs

PLAIN_LIMIT = 10_485_760


def create_repo(call: Call) -> Reply:
    kind, repo_id = _named(call)
    wanted = call.request.json()
    user = signed_in(call.user)
    namespace = repo_id.split("/")[0]
    if not user.may_write(namespace):
        raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    private = private and not call.catalog.ignores_private
    try:
        repository = call.catalog.create(kind, repo_id, private=private, author=user.name)
    except Refusal as refusal:
        known = call.catalog.known(kind, repo_id)
        return json_reply({"error": refusal.message, "url": call.catalog.page(known)}, refusal.status)
    return json_reply({"url": call.catalog.page(repository), "name": repo_id, "id": repo_id})


def delete_repo(call: Call) -> Reply:
    address = _named(call)
    call.catalog.writable(*address, call.user)
    call.catalog.remove(*address)
    return Reply(200)


def validate_yaml(call: Call) -> Reply:
    errors, warnings = cards.problems(str(call.request.json().get("content", "")))
    answer = {"errors": _messages(errors), "warnings": _messages(warnings)}
    return json_reply(answer, 400 if errors else 200)


def preupload(call: Call) -> Reply:
    pull_request = call.request.flag("create_pr")
    repository = call.proposable() if pull_request else call.changeable(call.revision)
    tree = repository.resolve(call.revision).tree
    answers = []
    for wanted in call.request.json().get("files", []):
        path = str(wanted["path"])
        mode = "lfs" if is_lfs(path, int(wanted["size"])) else "regular"
        answer: dict[str, object] = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in tree:
            answer["oid"] = tree[path].etag
        answers.append(answer)
    return json_reply({"files": answers})


def commit(call: Call) -> Reply:
    pull_request = call.request.flag("create_pr")
    repository = call.proposable() if pull_request else call.changeable(call.revision)
    header, edits = _commit_of(call.request.body)
    title, description = str(header.get("summary", "")), str(header.get("description", ""))
    parent = header.get("parentCommit")
    author = call.author
    page = call.catalog.page(repository)
    answer: dict[str, object] = {"success": True, "hookOutput": ""}
    if pull_request:
        base = parent or call.revision
        opened = repository.propose(base, edits, title, description, author)
        sha = repository.resolve(f"refs/pr/{opened.number}").sha
        answer["pullRequestUrl"] = f"{page}/discussions/{opened.number}"
    else:
        made = repository.commit(
            call.revision, edits, title=title, description=description, author=author, parent=parent
        )
        sha = made.sha
    return json_reply({**answer, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"})


def create_branch(call: Call) -> Reply:
    start = str(call.request.json().get("startingPoint") or "main")
    call.writable().add_ref(f"refs/heads/{call.arguments['name']}", start)
    return Reply(200)


def delete_branch(call: Call) -> Reply:
    call.writable().remove_ref(f"refs/heads/{call.arguments['name']}")
    return Reply(200)


def create_tag(call: Call) -> Reply:
    call.writable().add_ref(f"refs/tags/{call.request.json()['tag']}", call.revision)
    return Reply(200)


def delete_tag(call: Call) -> Reply:
    call.writable().remove_ref(f"refs/tags/{call.arguments['name']}")
    return Reply(200)


def _named(call: Call) -> tuple[str, str]:
    wanted = call.request.json()
    namespace = wanted.get("organization") or signed_in(call.user).name
    return str(wanted.get("type") or "model"), f"{namespace}/{wanted['name']}"


def _messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"message": text} for text in texts]


def _commit_of(body: bytes) -> tuple[dict[str, Any], list[Edit]]:
    try:
        first, *rest = [json.loads(line) for line in body.splitlines() if line.strip()]
        if first["key"] != "header" or not first["value"].get("summary"):
            raise Refusal(400, "A commit starts with a header that has a summary")
        return first["value"], [_edit(line["key"], line["value"]) for line in rest]
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(400, f"Not a commit: {error!r}") from error


def _edit(key: str, value: dict[str, Any]) -> Edit:
    path = str(value["path"])
    match key:
        case "file":
            return Edit("file", path, _content(path, value))
        case "lfsFile" if value.get("algo") == "sha256":
            return Edit("large-file", path, sha256=str(value["oid"]))
        case "deletedFile":
            return Edit("delete", path)
        case "deletedFolder":
            return Edit("delete-folder", path)
    raise Refusal(400, f"No such operation: {key}")


def _content(path: str, value: dict[str, Any]) -> bytes:
    if value.get("encoding") != "base64":
        raise Refusal(400, f"{path}: only base64 is understood")
    try:
        data = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise Refusal(400, f"{path}: {error}") from error
    if len(data) > PLAIN_LIMIT:
        raise Refusal(400, f"{path}: a file over 10 MiB has to go to LFS")
    errors = cards.problems(data.decode("utf-8", "replace"))[0] if path == "README.md" else []
    if errors:
        raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    return data
