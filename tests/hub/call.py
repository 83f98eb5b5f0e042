"""One request to the main endpoint, with who asks and what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .accounts import User
from .catalog import KINDS, Catalog, signed_in
from .messages import Request
from .repository import Repository


@dataclass(frozen=True)
class Call:
    catalog: Catalog
    request: Request
    user: User | None
    arguments: Mapping[str, str]

    @property
    def author(self) -> str:
        return signed_in(self.user).name

    @property
    def revision(self) -> str:
        return self.arguments.get("revision", "main")

    @property
    def address(self) -> tuple[str, str]:
        return KINDS[self.arguments.get("kinds", "models")], self.arguments["repo"]

    def visible(self) -> Repository:
        return self.catalog.visible(*self.address, self.user)

    def readable(self) -> Repository:
        return self.catalog.readable(*self.address, self.user)

    def writable(self) -> Repository:
        return self.catalog.writable(*self.address, self.user)

    def proposable(self) -> Repository:
        return self.catalog.proposable(*self.address, self.user)

    def changeable(self, revision: str) -> Repository:
        """The repository, if the user may commit to the revision: to an own pull request, anybody may."""
        number = revision.removeprefix("refs/pr/")
        if number != revision and number.isdigit():
            repository = self.proposable()
            own = [d for d in repository.discussions if d.number == int(number) and d.author == self.author]
            if own:
                return repository
        return self.writable()
