"""How long the Hub may take, how often it is asked again, and what the client's many errors mean."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import tenacity

from quantize.errors import (
    AccessDenied,
    ConfigError,
    Conflict,
    HubUnreachable,
    PublishError,
    QuantizeError,
    SourceNotFound,
)

ENDPOINT = "HF_ENDPOINT"
TIMEOUT = "QUANTIZE_HUB_TIMEOUT"
DEFAULT_TIMEOUT = 120.0
"""Seconds without a single byte from the Hub after which a request is given up; the client itself waits for ever."""
ATTEMPTS = 4
LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most; also where the Hub asks for more."""

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def timeout() -> float:
    """The deadline for an answer, in seconds; raises ConfigError."""
    given = os.environ.get(TIMEOUT)
    try:
        seconds = float(given) if given else DEFAULT_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT}={given}: give a number of seconds")
    return seconds


@functools.cache
def set_deadlines() -> None:
    """Give every request of the client a deadline."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    seconds = timeout()

    def client() -> Any:
        http_client = default_client_factory()
        http_client.timeout = seconds
        return http_client

    set_client_factory(client)


def retried(question: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Ask again, with longer and longer waits, while the Hub is only unreachable; for what may be done twice."""
    return tenacity.retry(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, HubUnreachable) and error.passing),
        wait=_wait,
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        reraise=True,
    )(question)


@contextmanager
def translated(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one readable line each."""
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        known = _meaning(error, repo_id, revision)
        if known is None:
            raise
        raise known from error


_backoff = tenacity.wait_exponential_jitter(initial=1, max=8, jitter=0.5)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, HubUnreachable) else None
    return _backoff(state) if asked is None else min(asked, LONGEST_WAIT)


def _meaning(error: BaseException, repo_id: str, revision: str | None) -> QuantizeError | None:
    """The known error behind what the client raised, None for anything else, which is a bug."""
    from huggingface_hub import errors

    here = address()
    match error:
        case RuntimeError() if isinstance(error.__cause__, Exception):
            # The client's threads wrap what went wrong while they sent a file.
            return _meaning(error.__cause__, repo_id, revision)
        case errors.GatedRepoError():
            return AccessDenied(
                f"{repo_id} is gated: accept its terms at {here}/{repo_id} and log in with `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return SourceNotFound(f"{repo_id} has no revision {revision!r}")
        case errors.RepositoryNotFoundError():
            return SourceNotFound(
                f"no such repo: {repo_id} (if it is private, log in with `hf auth login`; a local folder is "
                f"written with ./)"
            )
        case errors.HFValidationError():
            return SourceNotFound(f"{repo_id!r} is neither a folder nor a Hub id such as distilbert/distilgpt2")
        case errors.HfHubHTTPError():
            return _from_status(repo_id, error)
        case json.JSONDecodeError():
            return HubUnreachable(f"the Hub at {here} answers for {repo_id} with something else than JSON: try again")
        case errors.OfflineModeIsEnabled():
            return HubUnreachable(f"HF_HUB_OFFLINE forbids asking the Hub for {repo_id}: unset it", passing=False)
        case _ if type(error) is ConnectionError:  # raised by nothing but the client's Xet code
            return HubUnreachable(
                f"the Xet storage of the Hub at {here} cannot be reached for {repo_id}: try again, or do without it by "
                f"setting HF_HUB_DISABLE_XET=1"
            )
        case errors.LocalEntryNotFoundError() | errors.HTTPError() | ConnectionError() | TimeoutError():  # type: ignore[attr-defined]
            return HubUnreachable(
                f"cannot reach the Hub at {here} for {repo_id} ({type(error).__name__}): check the network and "
                f"run the same command again"
            )
    return None


def _from_status(repo_id: str, error: Any) -> QuantizeError:
    status = error.response.status_code if error.response is not None else 0
    reason = ((error.server_message or "").strip().splitlines() or [""])[0]
    because = f": {reason}" if reason else ""
    if status in (401, 403):
        return AccessDenied(
            f"the Hub refused {repo_id} ({status}{because}): the token is missing, expired or lacks the right; "
            f"log in with `hf auth login`"
        )
    if status == 412:
        return Conflict(f"somebody else committed to {repo_id} meanwhile: look at it and push again")
    said = f"the Hub answered {status} for {repo_id}{because}"
    if status == 429 or status >= 500 or status == 0:
        return HubUnreachable(f"{said}: try again later", retry_after=_retry_after(error.response))
    return PublishError(said)


def _retry_after(response: Any) -> float | None:
    given = response.headers.get("Retry-After", "") if response is not None else ""
    return float(given) if given.isdigit() else None


def address() -> str:
    """Where the Hub is, without the credentials that HF_ENDPOINT may hold; raises ConfigError."""
    from huggingface_hub import constants

    try:
        parts = urlsplit(os.environ.get(ENDPOINT) or constants.ENDPOINT)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("it is no plain address")
    except ValueError as error:
        raise ConfigError(f"{ENDPOINT} is no address of a Hub: it begins with https:// or http://") from error
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
