"""Who may do what: users, their tokens, and the rights to a namespace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .messages import Refusal

BAD_TOKEN = "Invalid credentials in Authorization header"

Role = Literal["write", "read", "expired"]


@dataclass(frozen=True)
class User:
    name: str
    role: Role
    organizations: tuple[str, ...] = ()

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and self.belongs_to(namespace)

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
                {"type": "org", "id": f"id-{name}", "name": name, "fullname": name, "roleInOrg": "write"}
                for name in self.organizations
            ],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": f"{self.name}-{self.role}", "role": self.role},
            },
        }


class Accounts:
    def __init__(self) -> None:
        self._by_token: dict[str, User] = {}

    def add(self, name: str, token: str, role: Role, organizations: Iterable[str] = ()) -> None:
        self._by_token[token] = User(name, role, tuple(organizations))

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
