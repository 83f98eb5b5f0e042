"""Who may read what is published: never more people than were meant to, and than may read the original."""

from __future__ import annotations

from quantize import hub
from quantize.errors import AccessDenied, PublishError, SourceNotFound
from quantize.publishing.records import Destination
from quantize.publishing.remote_state import RemoteState


def require_wished(destination: Destination, state: RemoteState, source_repo: str | None) -> None:
    """Raise PublishError where a public repo was to be private, or where a restricted source would become public."""
    repo_id = destination.repo_id
    if destination.private and state.access not in (None, hub.PRIVATE):
        raise PublishError(
            f"{repo_id} is {state.access}, and --private makes only a new repo private: change it in the repo's "
            f"settings, or push to another repo"
        )
    stays_private = destination.private or state.access == hub.PRIVATE
    if source_repo is None or stays_private or destination.public:
        return
    restriction = _restriction(source_repo)
    if restriction:
        tense = "is" if state.exists else "would be"
        raise PublishError(
            f"the original {source_repo} is {restriction}, and {repo_id} {tense} public: publish to a private repo "
            f"with --private, or say --public where you have the right to"
        )


def require_created(destination: Destination) -> str:
    """Who may read the repo that was just created; raises PublishError where it is not private as it was to be."""
    access = hub.access(destination.repo_id)
    if destination.private and access != hub.PRIVATE:
        raise PublishError(
            f"the Hub created {destination.repo_id} as a public repo although a private one was asked for: nothing was "
            f"published there; delete it, or change it in its settings"
        )
    return access


def _restriction(source_repo: str) -> str | None:
    """What keeps others from reading the source; None for a public one."""
    try:
        access = hub.access(source_repo)
    except (SourceNotFound, AccessDenied):
        return "not visible to this token (private, or no longer there)"
    return None if access == hub.PUBLIC else access
