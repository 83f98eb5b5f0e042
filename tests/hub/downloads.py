"""Endpoints that hand out file contents: resolve, with redirects to the LFS storage, and byte ranges."""

from __future__ import annotations

import re
from urllib.parse import quote

from .call import Call
from .messages import Refusal, Reply, Request, Served

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def resolve(call: Call) -> Reply:
    repository = call.readable()
    commit = repository.resolve(call.revision)
    path = call.arguments["path"]
    headers = {"X-Repo-Commit": commit.sha}
    file = commit.tree.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{file.etag}"'
    if file.sha256 is None:
        served = Served(repository.kind, repository.repo_id, path)
        return ranged(call.request, file.data, headers, served)
    headers["X-Linked-Etag"] = f'"{file.sha256}"'
    headers["X-Linked-Size"] = str(len(file.data))
    where = f"{repository.kind}/{repository.repo_id}/{file.sha256}/{quote(path)}"
    headers["Location"] = f"{call.catalog.storage}/lfs/{where}"
    return Reply(302, headers=headers)


def ranged(request: Request, data: bytes, headers: dict[str, str], served: Served) -> Reply:
    """The whole of the data or the range that the request asks for."""
    name = served.path.rsplit("/", 1)[-1]
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";",
        "Accept-Ranges": "bytes",
        **headers,
    }
    wanted = RANGE.fullmatch(str(request.headers.get("Range", "")).replace(" ", ""))
    if wanted is None or wanted[0] == "bytes=-":
        return Reply(200, data, headers, served)
    first, last = wanted.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise Refusal(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Reply(206, data[start:stop], headers, served)
