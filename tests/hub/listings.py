"""Endpoints that tell what there is: users, repositories, commits, refs and trees."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from urllib.parse import parse_qs

from .call import Call
from .cards import front_matter
from .catalog import signed_in
from .messages import Refusal, Reply, json_reply
from .repository import Commit, File, Repository, git_oid


def whoami(call: Call) -> Reply:
    return json_reply(signed_in(call.user).who())


def auth_check(call: Call) -> Reply:
    _ = call.writable() if "right" in call.arguments else call.readable()
    return json_reply({})


def info(call: Call) -> Reply:
    repository = call.visible()
    commit = repository.resolve(call.revision)
    card = front_matter(commit.tree["README.md"].data) if "README.md" in commit.tree else None
    blobs = call.request.flag("blobs") and call.catalog.tells_content
    answer = {
        "_id": git_oid("repo", repository.repo_id.encode())[:24],
        "id": repository.repo_id,
        "author": repository.namespace,
        "sha": commit.sha,
        "createdAt": repository.created,
        "lastModified": commit.date,
        "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []) if card else [],
        "cardData": card,
        "usedStorage": sum(len(data) for data in repository.objects.values()),
        "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.tree.items())],
    }
    if repository.kind == "model":
        answer["modelId"] = repository.repo_id
    if call.request.flag("securityStatus"):
        answer["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    return json_reply(answer)


def commits(call: Call) -> Reply:
    return json_reply(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in call.visible().history(call.revision)
        ]
    )


def refs(call: Call) -> Reply:
    found = sorted(call.visible().refs.items())

    def under(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in found
            if ref.startswith(prefix)
        ]

    answer = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    if call.request.flag("include_prs"):
        answer["pullRequests"] = under("refs/pr/")
    return json_reply(answer)


def tree(call: Call) -> Reply:
    repository = call.visible()
    commit = repository.resolve(call.revision)
    folder = call.arguments.get("path", "")
    prefix = f"{folder}/" if folder else ""
    if prefix and not any(path.startswith(prefix) for path in commit.tree):
        raise Refusal(404, f"{folder} does not exist on {call.revision}", "EntryNotFound")
    recursive = call.request.flag("recursive")

    def asked_for(path: str) -> bool:
        return path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))

    entries = _entries(repository, commit, call.request.flag("expand"))
    return json_reply([entry for entry in entries if asked_for(str(entry["path"]))])


def paths_info(call: Call) -> Reply:
    repository = call.visible()
    commit = repository.resolve(call.revision)
    form = parse_qs(call.request.body.decode())
    wanted = {path.strip("/") for path in form.get("paths", [])}
    expand = form.get("expand", ["false"])[0].lower() in ("1", "true")
    return json_reply([e for e in _entries(repository, commit, expand) if e["path"] in wanted])


def _sibling(path: str, file: File, blobs: bool) -> dict[str, object]:
    if not blobs:
        return {"rfilename": path}
    found: dict[str, object] = {"rfilename": path, "blobId": file.blob_id, "size": len(file.data)}
    if file.sha256 is not None:
        found["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": file.pointer_size}
    return found


def _entries(repository: Repository, commit: Commit, expand: bool) -> Iterable[dict[str, object]]:
    """The tree's folders and files, as the tree and paths-info endpoints list them."""
    parents = {path.rsplit("/", depth)[0] for path in commit.tree for depth in range(1, path.count("/") + 1)}
    for folder in sorted(parents):
        inside = sorted((p, f.blob_id) for p, f in commit.tree.items() if p.startswith(f"{folder}/"))
        yield {"type": "directory", "oid": git_oid("tree", repr(inside).encode()), "size": 0, "path": folder}
    for path, file in sorted(commit.tree.items()):
        entry: dict[str, object] = {
            "type": "file",
            "oid": file.blob_id,
            "size": len(file.data),
            "path": path,
        }
        if file.sha256 is not None:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": file.pointer_size}
        if expand:
            last = _last_change(repository, commit, path)
            entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        yield entry


def _last_change(repository: Repository, commit: Commit, path: str) -> Commit:
    history = repository.history(commit.sha)
    for newer, older in pairwise(history):
        before = older.tree.get(path)
        if before is None or before.blob_id != newer.tree[path].blob_id:
            return newer
    return history[-1]
