"""Who may do what: users, their tokens, and the rights to a namespace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .messages import Refusal

BAD_TOKEN = "Invalid credentials in Authorization header"

Role = Literal["write", "read", "expired"]


@dataclass(frozen=True)
class User:
    """A user as one token shows it: of `reads`, organizations too, it may change nothing.

    A fine-grained token may write the repos of the namespaces in `scope` only.
    """

    name: str
    role: Role
    organizations: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    scope: tuple[str, ...] | None = None

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organizations, *self.reads)

    def may_write(self, namespace: str) -> bool:
        within = self.scope is None or namespace in self.scope
        return self.role == "write" and within and namespace in (self.name, *self.organizations)

    def who(self) -> dict[str, object]:
        """The answer to whoami-v2."""
        return {
            "type": "user",
            "id": f"id-{self.name}",
            "name": self.name,
            "fullname": self.name.title(),
            "email": f"{self.name}@loopback.invalid",
            "emailVerified": True,
            "isPro": False,
            "orgs": [
                {"type": "org", "id": f"id-{name}", "name": name, "fullname": name, "roleInOrg": role}
                for role, names in (("write", self.organizations), ("read", self.reads))
                for name in names
            ],
            "auth": {"type": "access_token", "accessToken": self._token()},
        }

    def _token(self) -> dict[str, object]:
        token: dict[str, object] = {"displayName": f"{self.name}-{self.role}", "role": self.role}
        if self.scope is None:
            return token
        permissions = ["repo.content.read", "repo.write"]
        scoped = [{"entity": {"type": "user", "name": name}, "permissions": permissions} for name in self.scope]
        return token | {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}


class Accounts:
    def __init__(self) -> None:
        self._by_token: dict[str, User] = {}

    def add(self, token: str, user: User) -> None:
        self._by_token[token] = user

    def of(self, token: str | None) -> User | None:
        """The token's user, None without a token; the Hub refuses a bad token even for public repos."""
        if token is None:
            return None
        user = self._by_token.get(token)
        if user is None:
            raise Refusal(401, BAD_TOKEN)
        if user.role == "expired":
            raise Refusal(401, f'User Access Token "{user.name}-expired" is expired')
        return user
