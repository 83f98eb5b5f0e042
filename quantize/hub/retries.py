"""How long the Hub may take, how often it is asked again, and what the client's many errors mean."""

from __future__ import annotations

import datetime
import email.utils
import functools
import json
import logging
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
from quantize.options import HUB_WAIT

ENDPOINT = "HF_ENDPOINT"
TIMEOUT = "QUANTIZE_HUB_TIMEOUT"
DEFAULT_TIMEOUT = 120.0
"""Seconds without a single byte from the Hub after which a request is given up; the client itself waits for ever."""
ATTEMPTS = 4
WORTH_SAYING = 5.0
"""Seconds of waiting about which nobody has to be told."""
WAIT = "QUANTIZE_HUB_WAIT"
BUSY, FINAL = (429, 503), (501, 505, 507)
"""Statuses that may name a time to wait, and those that another attempt cannot change."""
TOKEN_WORDS = ("token", "permission", "rights", "credential", "authoriz", "authentic", "log in", "forbidden")
"""In reasons for a refusal that a better token would undo."""

log = logging.getLogger(__name__)
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def timeout() -> float:
    """The deadline for an answer, in seconds; raises ConfigError."""
    return _seconds(TIMEOUT, DEFAULT_TIMEOUT)


def _seconds(variable: str, default: float) -> float:
    given = os.environ.get(variable)
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{variable}={given}: give a number of seconds")
    return seconds


def wait_at_most(seconds: float) -> None:
    """Let this process, and those that it starts, wait no longer than that in all for one answer."""
    os.environ[WAIT] = repr(seconds)


def patience() -> float:
    """Seconds that one question may wait in all where the Hub asks to wait; raises ConfigError."""
    return _seconds(WAIT, HUB_WAIT)


@functools.cache
def set_deadlines() -> None:
    """Give every request of the client a deadline, and let none wait by itself where the Hub names a time."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    seconds = timeout()

    def client() -> Any:
        http_client = default_client_factory()
        http_client.timeout = seconds
        hooks = http_client.event_hooks
        http_client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _raise_busy]}
        return http_client

    set_client_factory(client)


def retried(question: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Ask again while the Hub is only unreachable, with longer and longer waits or those that it names.

    For what may be done twice.
    """
    return tenacity.retry(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, HubUnreachable) and error.passing),
        wait=_wait,
        stop=_stop,
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


def _named_wait(state: tenacity.RetryCallState) -> float | None:
    """Seconds that the Hub asked to wait."""
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, HubUnreachable) else None


def _wait(state: tenacity.RetryCallState) -> float:
    return max(_backoff(state), _named_wait(state) or 0.0)


def _stop(state: tenacity.RetryCallState) -> bool:
    """After a few attempts, or where the waits that the Hub names are longer than they may be in all."""
    named = _named_wait(state)
    if named is None:
        return state.attempt_number >= ATTEMPTS
    if state.idle_for + _wait(state) <= patience():
        if named >= WORTH_SAYING:
            log.warning("the Hub asks to wait %.0f s", named)
        return False
    raise HubUnreachable(
        f"{state.outcome.exception() if state.outcome else ''} (it asks to wait {named:.0f} s, which is more than "
        f"--hub-wait {patience():g} leaves)"
    )


def _raise_busy(response: Any) -> None:
    """Raise HubUnreachable for a response that names a time to wait.

    The client would wait by itself, however long that is; threads of it hand this on as it is.
    """
    asked = _retry_after(response) if response.status_code in BUSY else None
    if asked is not None:
        raise HubUnreachable(
            f"the Hub answered {response.status_code} for {response.request.url.path}: try again later",
            retry_after=asked,
        )


def _meaning(error: BaseException, repo_id: str, revision: str | None) -> QuantizeError | None:
    """The known error behind what the client raised, None for anything else, which is a bug."""
    from huggingface_hub import errors

    here = address()
    match error:
        case RuntimeError() if isinstance(error.__cause__, Exception):
            # The client's threads wrap what went wrong while they sent a file.
            return _meaning(error.__cause__, repo_id, revision)
        case QuantizeError():
            return error
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
    if status == 403 and reason and not any(word in reason.lower() for word in TOKEN_WORDS):
        return PublishError(f"the Hub refuses {repo_id} ({status}{because}){_advice(reason)}")
    if status in (401, 403):
        return AccessDenied(
            f"the Hub refused {repo_id} ({status}{because}): the token is missing, expired or lacks the right; "
            f"log in with `hf auth login`"
        )
    if status == 404:
        return SourceNotFound(f"the Hub answered 404 for {repo_id}{because}")
    if status == 412:
        return Conflict(f"somebody else committed to {repo_id} meanwhile: look at it and push again")
    said = f"the Hub answered {status} for {repo_id}{because}"
    if status in FINAL:
        return HubUnreachable(f"{said}: another attempt will not help", passing=False)
    if status == 429 or status >= 500 or status == 0:
        return HubUnreachable(f"{said}: try again later", retry_after=_retry_after(error.response))
    return PublishError(said)


def _advice(reason: str) -> str:
    """What to do about a refusal that has nothing to do with the token."""
    lowered = reason.lower()
    if "storage" in lowered or "quota" in lowered:
        return ": free some of the account's storage, or publish under another account"
    if "discussion" in lowered or "pull request" in lowered:
        return ": turn on discussions in the repo's settings, or push without --pr"
    if "disabled" in lowered:
        return ": ask the Hub's staff why"
    return ""


def _retry_after(response: Any) -> float | None:
    """Seconds that a response asks to wait, in Retry-After (a number or a date) or in RateLimit."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds + 1)  # it is rounded down
    given = response.headers.get("Retry-After", "").strip()
    if given.isdigit():
        return float(given)
    try:
        until = email.utils.parsedate_to_datetime(given)
    except ValueError:
        return None
    until = until.replace(tzinfo=until.tzinfo or datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())


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
