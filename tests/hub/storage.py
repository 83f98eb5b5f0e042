"""The LFS protocol: its endpoints on the main port, and the storage on a port of its own."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass
from typing import Any

from .call import Call
from .catalog import Catalog, PartedUpload
from .downloads import ranged
from .messages import Refusal, Reply, Request, Served, json_reply
from .repository import Repository

OBJECT = re.compile(r"/lfs/(?P<kind>\w+)/(?P<repo>[^/]+/[^/]+)/(?P<sha256>[0-9a-f]{64})(?:/(?P<path>.+))?")
PART = re.compile(r"/parts/(?P<upload>\w+)/(?P<number>\d+)")


def batch(call: Call) -> Reply:
    # The client names no revision when it opens a pull request: for that, no right to write is needed.
    reference = call.request.json().get("ref", {}).get("name")
    repository = call.proposable() if reference is None else call.changeable(str(reference))
    objects = call.request.json().get("objects", [])
    parted = any(_parts(call.catalog, wanted["size"]) for wanted in objects)
    return json_reply(
        {
            "transfer": "multipart" if parted else "basic",
            "objects": [_instructions(call, repository, wanted) for wanted in objects],
        }
    )


def verify(call: Call) -> Reply:
    repository = call.proposable()
    wanted = call.request.json()
    data = repository.objects.get(wanted["oid"])
    if data is None or len(data) != wanted["size"]:
        raise Refusal(404, f"Object {wanted['oid']} is not in the storage")
    return json_reply({})


def complete(call: Call) -> Reply:
    """Puts the parts together; asks for no token, since the upload's id is a secret."""
    upload = call.catalog.uploads.get(call.arguments["upload"])
    if upload is None:
        raise Refusal(404, "No such upload")
    announced = call.request.json()
    parts = [_part(upload, part) for part in announced.get("parts", [])]
    if announced.get("oid") != upload.sha256 or len(parts) != len(upload.parts):
        raise Refusal(400, "These are not the parts that were uploaded")
    repository = call.catalog.known(upload.kind, upload.repo_id)
    repository.store(b"".join(parts), expected_sha256=upload.sha256)
    return json_reply({})


@dataclass(frozen=True)
class StorageEndpoint:
    """The storage port; as a presigned address does, it refuses any further authorization."""

    catalog: Catalog

    def answer(self, request: Request) -> Reply:
        if request.authorized:
            raise Refusal(400, "Only one auth mechanism allowed")
        if part := PART.fullmatch(request.path):
            return self._store_part(request, part["upload"], int(part["number"]))
        named = OBJECT.fullmatch(request.path)
        if named is None:
            raise Refusal(404, f"The storage has no {request.path}")
        repository = self._repository(named["kind"], named["repo"])
        if request.method == "PUT":
            repository.store(request.body, expected_sha256=named["sha256"])
            return Reply(200, headers={"ETag": f'"{named["sha256"]}"'})
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, "Method not allowed")
        data = repository.objects.get(named["sha256"])
        if data is None:
            raise Refusal(404, "No such object")
        served = Served(repository.kind, repository.repo_id, named["path"] or named["sha256"])
        return ranged(request, data, {"ETag": f'"{named["sha256"]}"'}, served)

    def _repository(self, kind: str, repo_id: str) -> Repository:
        try:
            return self.catalog.known(kind, repo_id)
        except LookupError as error:
            raise Refusal(404, str(error)) from error

    def _store_part(self, request: Request, name: str, number: int) -> Reply:
        upload = self.catalog.uploads.get(name)
        if upload is None or request.method != "PUT":
            raise Refusal(404, "No such upload")
        upload.parts[number] = request.body
        return Reply(200, headers={"ETag": _etag(request.body)})


def _instructions(call: Call, repository: Repository, wanted: dict[str, Any]) -> dict[str, object]:
    sha256, size = str(wanted["oid"]), int(wanted["size"])
    answer: dict[str, object] = {"oid": sha256, "size": size, "authenticated": True}
    if sha256 in repository.objects:
        return answer
    catalog = call.catalog
    place = f"{repository.kind}/{repository.repo_id}/{sha256}"
    upload: dict[str, object] = {"href": f"{catalog.storage}/lfs/{place}"}
    if count := _parts(catalog, size):
        name = uuid.uuid4().hex
        catalog.uploads[name] = PartedUpload(repository.kind, repository.repo_id, sha256)
        links = {str(number): f"{catalog.storage}/parts/{name}/{number}" for number in range(1, count + 1)}
        upload = {
            "href": f"{catalog.endpoint}/api/complete-multipart/{name}",
            "header": {"chunk_size": str(catalog.multipart_over), **links},
        }
    verify_link = f"{catalog.page(repository)}.git/info/lfs/objects/verify"
    answer["actions"] = {"upload": upload, "verify": {"href": verify_link}}
    return answer


def _parts(catalog: Catalog, size: int) -> int:
    """How many parts an object of this size is uploaded in; 0 means in one piece."""
    over = catalog.multipart_over
    return -(-size // over) if over is not None and size > over else 0


def _part(upload: PartedUpload, announced: dict[str, Any]) -> bytes:
    data = upload.parts.get(int(announced["partNumber"]))
    if data is None or announced["etag"] != _etag(data):
        raise Refusal(400, f"Part {announced['partNumber']} is not the one that was uploaded")
    return data


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
