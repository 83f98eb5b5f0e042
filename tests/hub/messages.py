"""What passes between the HTTP layer and the endpoints: requests, replies, refusals, records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, unquote


@dataclass(frozen=True)
class Request:
    method: str
    raw_path: str  # still percent-encoded: a revision may hold a slash
    query: str
    headers: Message
    body: bytes

    @property
    def path(self) -> str:
        return unquote(self.raw_path)

    @property
    def token(self) -> str | None:
        scheme, _, token = str(self.headers.get("Authorization", "")).partition(" ")
        return token if scheme.lower() == "bearer" else None

    @property
    def authorized(self) -> bool:
        return "Authorization" in self.headers

    def parameter(self, name: str) -> str | None:
        return parse_qs(self.query).get(name, [None])[0]

    def flag(self, name: str) -> bool:
        return (self.parameter(name) or "").lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refusal(400, f"The request's body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise Refusal(400, "The request's body is not a JSON object")
        return value


@dataclass(frozen=True)
class Served:
    """The repository file whose bytes a reply carries."""

    kind: str
    repo_id: str
    path: str


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    served: Served | None = None


@dataclass(frozen=True)
class Record:
    """One request as the Hub saw it; status is 0 where no answer was sent."""

    method: str
    path: str
    query: str
    status: int
    authorized: bool
    fault: str | None = None


class Refusal(Exception):
    """An answer that refuses; an endpoint raises it from any depth."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})

    def reply(self) -> Reply:
        header = {"X-Error-Message": self.message.encode("ascii", "replace").decode().replace("\n", " ")}
        if self.code is not None:
            header["X-Error-Code"] = self.code
        return json_reply({"error": self.message}, self.status, {**header, **self.headers})


def json_reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    body = json.dumps(value, default=str).encode()
    return Reply(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
