"""The HTTP layer: two listening ports, their records, and the faults on the wire."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import unquote

from .faults import Fault, Faults
from .messages import Record, Refusal, Reply, Request, Served


class Endpoint(Protocol):
    def answer(self, request: Request) -> Reply: ...


@dataclass
class Log:
    """What both ports saw."""

    records: list[Record] = field(default_factory=list)
    served: set[Served] = field(default_factory=set)
    crashes: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Port(ThreadingHTTPServer):
    """A port of 127.0.0.1 that serves one endpoint from a daemonic thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, endpoint: Endpoint, faults: Faults, log: Log) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint, self.faults, self.log = endpoint, faults, log
        self._connections: set[socket.socket] = set()
        self._stopped = False
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def number(self) -> int:
        return int(self.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        # A client may keep its connection open for ever, and with it the thread that serves it.
        with self.log.lock:
            self._stopped = True
            for connection in self._connections:
                _shut(connection)
        self._thread.join()

    def server_bind(self) -> None:
        # HTTPServer would look up the host's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        problem = sys.exception()
        # That a client leaves early is its right.
        if problem is not None and not isinstance(problem, ConnectionError):
            with self.log.lock:
                self.log.crashes.append(problem)

    @contextlib.contextmanager
    def holding(self, connection: socket.socket) -> Iterator[None]:
        with self.log.lock:
            self._connections.add(connection)
            if self._stopped:
                _shut(connection)
        try:
            yield
        finally:
            with self.log.lock:
                self._connections.discard(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Port

    def handle(self) -> None:
        with self.server.holding(self.connection):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def respond(self) -> None:
        raw_path, _, query = self.path.partition("?")
        path = unquote(raw_path)
        fault = self.server.faults.take(self.command, f"{path}?{query}" if query else path)
        if fault is not None and fault.meanwhile is not None:
            fault.meanwhile()
        if fault is not None and fault.kind == "reset":
            self._drop(fault)
            return
        request = Request(self.command, raw_path, query, self.headers, self._body())
        if fault is not None and fault.kind in ("status", "hang", "drop-reply"):
            self._fail(request, fault)
        else:
            self._send(self._answer(request), fault)

    def _fail(self, request: Request, fault: Fault) -> None:
        """The reply that the request would have got never leaves."""
        if fault.applied or fault.kind == "drop-reply":
            self._answer(request)
        if fault.kind == "status":
            self._send(Reply(fault.status, fault.message.encode(), fault.headers()), fault)
            return
        self._record(0, fault)
        if fault.kind == "hang":
            self.server.faults.hang()
        self._reset()

    def _answer(self, request: Request) -> Reply:
        if "Transfer-Encoding" in self.headers:
            return Refusal(501, "A header you provided implies functionality that is not implemented").reply()
        try:
            return self.server.endpoint.answer(request)
        except Refusal as refusal:
            return refusal.reply()

    def _body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the body stays unread
            return b""
        announced = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(announced)
        if len(body) < announced:
            raise ConnectionAbortedError("the client left in the middle of a request")
        return body

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        body = b"" if self.command == "HEAD" else reply.body
        stop = len(body)
        if fault is not None and body and fault.kind in ("corrupt", "cut", "reset-body"):
            stop = fault.position(body) if fault.kind != "corrupt" else stop
            body = _corrupted(body, fault.position(body)) if fault.kind == "corrupt" else body
        self._record(reply.status, fault)
        if body and reply.served is not None and reply.status in (200, 206):
            with self.server.log.lock:
                self.server.log.served.add(reply.served)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(body[:stop])
        if stop < len(body):
            self._cut(fault)

    def _cut(self, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "reset-body":
            self._reset()
        else:
            self.close_connection = True

    def _drop(self, fault: Fault) -> None:
        self._record(0, fault)
        self._reset()

    def _reset(self) -> None:
        """Ends the connection with RST, as a crashed peer or a middlebox does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The socket closes only once its last file has.
        self.rfile.close()
        self.connection.close()

    def _record(self, status: int, fault: Fault | None) -> None:
        raw_path, _, query = self.path.partition("?")
        kind = fault.kind if fault is not None else None
        authorized = "Authorization" in self.headers
        with self.server.log.lock:
            record = Record(self.command, unquote(raw_path), query, status, authorized, kind)
            self.server.log.records.append(record)


# http.server finds the method to call by its name.
for _method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler.respond)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _corrupted(body: bytes, position: int) -> bytes:
    position = min(position, len(body) - 1)
    return body[:position] + bytes([body[position] ^ 0xFF]) + body[position + 1 :]
