"""The main endpoint: which action answers which request."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from . import changes, discussions, downloads, listings, storage
from .accounts import BAD_TOKEN
from .call import Call
from .catalog import Catalog
from .messages import Refusal, Reply, Request

Action = Callable[[Call], Reply]

REPO = r"/api/(?P<kinds>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kinds>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+?)"
REV = r"(?P<revision>[^/]+)"

ROUTES: list[tuple[str, str, Action]] = [
    ("GET", r"/api/whoami-v2", listings.whoami),
    ("POST", r"/api/repos/create", changes.create_repo),
    ("DELETE", r"/api/repos/delete", changes.delete_repo),
    ("POST", r"/api/validate-yaml", changes.validate_yaml),
    ("GET", REPO, listings.info),
    ("GET", rf"{REPO}/revision/{REV}", listings.info),
    ("GET", rf"{REPO}/auth-check", listings.auth_check),
    ("GET", rf"{REPO}/auth-check/(?P<right>write)", listings.auth_check),
    ("GET", rf"{REPO}/commits/{REV}", listings.commits),
    ("GET", rf"{REPO}/refs", listings.refs),
    ("GET", rf"{REPO}/tree/{REV}(?:/(?P<path>.+))?", listings.tree),
    ("POST", rf"{REPO}/paths-info/{REV}", listings.paths_info),
    ("POST", rf"{REPO}/preupload/{REV}", changes.preupload),
    ("POST", rf"{REPO}/commit/{REV}", changes.commit),
    ("POST", rf"{REPO}/branch/(?P<name>[^/]+)", changes.create_branch),
    ("DELETE", rf"{REPO}/branch/(?P<name>[^/]+)", changes.delete_branch),
    ("POST", rf"{REPO}/tag/{REV}", changes.create_tag),
    ("DELETE", rf"{REPO}/tag/(?P<name>[^/]+)", changes.delete_tag),
    ("GET", rf"{REPO}/discussions", discussions.index),
    ("POST", rf"{REPO}/discussions", discussions.create),
    ("GET", rf"{REPO}/discussions/(?P<number>\d+)", discussions.details),
    ("POST", rf"{REPO}/discussions/(?P<number>\d+)/comment", discussions.comment),
    ("POST", rf"{REPO}/discussions/(?P<number>\d+)/status", discussions.change_status),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", storage.batch),
    ("POST", rf"{FILES}\.git/info/lfs/objects/verify", storage.verify),
    ("POST", r"/api/complete-multipart/(?P<upload>\w+)", storage.complete),
    ("GET", rf"{FILES}/resolve/{REV}/(?P<path>.+)", downloads.resolve),
    ("HEAD", rf"{FILES}/resolve/{REV}/(?P<path>.+)", downloads.resolve),
]


@dataclass(frozen=True)
class MainEndpoint:
    catalog: Catalog

    def answer(self, request: Request) -> Reply:
        for former, present in self.catalog.former_names.items():
            if re.match(rf"/(?:api/models/)?{former}(?:/|$)", request.raw_path):
                where = request.raw_path.replace(former, present, 1)
                return Reply(307, headers={"Location": f"{where}?{request.query}" if request.query else where})
        try:
            user = self.catalog.accounts.of(request.token)
            action, arguments = _route(request)
            return action(Call(self.catalog, request, user, arguments))
        except Refusal as refusal:
            # Over https the client reads RepoNotFound out of the address; over http only out of the code.
            about_repo = re.match(r"/api/(models|datasets|spaces)/.|/.+/resolve/.", request.raw_path)
            if refusal.status == 401 and refusal.message != BAD_TOKEN and about_repo:
                refusal.code = refusal.code or "RepoNotFound"
            raise


def _route(request: Request) -> tuple[Action, Mapping[str, str]]:
    for method, pattern, action in ROUTES:
        found = re.fullmatch(pattern, request.raw_path) if method == request.method else None
        if found is not None:
            given = {name: text for name, text in found.groupdict().items() if text is not None}
            return action, {name: unquote(text) for name, text in given.items()}
    raise Refusal(404, f"This Hub has no {request.method} {request.path}")
