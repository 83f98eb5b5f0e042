"""Faults: which requests go wrong, how many times, and in what way."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["none", "status", "hang", "reset", "reset-body", "drop-reply", "corrupt", "cut"]


@dataclass(frozen=True)
class Fault:
    """What happens to a request whose method is `method` and whose path matches `path`.

    The path is the decoded one, with `?query` where there is one, and `path` is searched in it.
    The first `skip` matching requests pass; the next `times` (None: all) meet the fault.

    none        nothing by itself; for what happens `meanwhile`
    status      an error status, with Retry-After, RateLimit and X-Error-Code where given
    hang        no answer, until the faults are cleared or the Hub stops
    reset       the connection is reset before the request's body is read
    reset-body  the connection is reset after `after` bytes of the reply's body (None: half of it)
    drop-reply  the request takes effect, then the connection is reset without an answer
    corrupt     one byte of the reply's body is another one (at `after`; None: in the middle)
    cut         the connection is closed in good order after `after` bytes of the body (None: half)

    With `applied`, a status or a hang comes after the request has taken effect. `meanwhile` is called before the
    request is looked at: what somebody else does just then.
    """

    method: str
    path: str
    kind: Kind = "status"
    times: int | None = 1
    skip: int = 0
    status: int = 503
    retry_after: int | str | None = None
    rate_limit: int | None = None
    error_code: str | None = None
    message: str = "injected fault"
    after: int | None = None
    applied: bool = False
    meanwhile: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no such kind of fault: {self.kind!r}")
        if self.applied and self.kind not in ("status", "hang"):
            raise ValueError(f"applied says nothing for a fault of kind {self.kind!r}")
        re.compile(self.path)

    def meets(self, method: str, path: str) -> bool:
        return self.method in ("*", method) and re.search(self.path, path) is not None

    def headers(self) -> dict[str, str]:
        headers = {"X-Error-Message": self.message}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.rate_limit is not None:
            headers["RateLimit"] = f'"api";r=0;t={self.rate_limit}'
        if self.error_code is not None:
            headers["X-Error-Code"] = self.error_code
        return headers

    def position(self, body: bytes) -> int:
        """Where in the body the fault strikes."""
        return min(len(body) // 2 if self.after is None else self.after, len(body))


class Faults:
    """The faults in wait; the first one injected that meets a request strikes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Fault, list[str]]] = []
        self._released = threading.Event()

    def inject(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append((fault, []))

    def clear(self) -> None:
        """Forgets every fault and lets the hanging requests go, unanswered."""
        with self._lock:
            self._waiting.clear()
            self._released.set()
            self._released = threading.Event()

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault, met in self._waiting:
                if not fault.meets(method, path):
                    continue
                if fault.times is not None and len(met) >= fault.skip + fault.times:
                    continue
                met.append(path)
                if len(met) > fault.skip:
                    return fault
        return None

    def hang(self) -> None:
        with self._lock:
            released = self._released
        released.wait()
