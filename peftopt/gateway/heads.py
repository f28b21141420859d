"""The largest head of a request, and the longest time for a request to arrive.

httptools, the parser of heads, accepts one without an end, and uvicorn waits for one without a limit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peftopt.loadtest import protocols

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 65_536
READ_S = 30.0
"""Seconds that a request may take to come in."""

TOO_LATE = json.dumps(protocols.error(408, "the request did not come in in time", "request_timeout")).encode()
LATE_ANSWER = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(TOO_LATE), TOO_LATE)
)


class Intake:
    """A connection's requests as they arrive: the bytes of a head, and the time from a request's first byte (for the
    first request: from the connection) to its last."""

    def __init__(self, connection: HttpToolsProtocol, read_s: float) -> None:
        self._connection, self._read_s = connection, read_s
        self._in_head = False
        self._heads = self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None

    def wait(self) -> None:
        """The time of a request begins, unless it has begun."""
        if self._read_s and self._late is None:
            self._late = self._connection.loop.call_later(self._read_s, self._too_late)

    def stop(self) -> None:
        """A request is whole, or nobody sends it any more."""
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def head_begins(self) -> None:
        """The first byte of a request has come."""
        self._in_head = True
        self._heads, self._head_bytes = self._heads + 1, 0
        self.wait()

    def head_ends(self) -> None:
        """The head is whole."""
        self._in_head = False

    def take(self, data: bytes, feed: Callable[[bytes], None]) -> None:
        """Let bytes be parsed, and count those of a head."""
        connection = self._connection
        if connection.transport.is_closing():
            return
        heads = self._heads
        self.wait()
        feed(data)
        if not self._in_head or self._heads != heads:  # what this one has of its head is the end of other bytes
            return
        self._head_bytes += len(data)
        if self._head_bytes > MOST_HEAD_BYTES:
            connection.send_400_response(f"a request's head has at most {MOST_HEAD_BYTES} bytes")

    def _too_late(self) -> None:
        """Say so and close; where a request is being answered, later: its application has a limit for its body."""
        self._late = None
        connection = self._connection
        if connection.transport.is_closing():
            return
        if connection.cycle is not None and not connection.cycle.response_complete:
            self.wait()
            return
        if self._in_head or connection.cycle is None:
            connection.transport.write(LATE_ANSWER)
        connection.transport.close()


def bounded(read_s: float = READ_S) -> Any:
    """Uvicorn's HTTP protocol with limits: it refuses a longer head, and closes a connection if a request takes more
    than `read_s` seconds to arrive (0 = without limit). "auto" without httptools: h11 limits a head's length itself,
    and has no time limit."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "auto"

    class Bounded(HttpToolsProtocol):
        """Tells its intake what comes."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.intake = Intake(self, read_s)
            self.intake.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self.intake.stop()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self.intake.head_begins()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.intake.head_ends()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self.intake.stop()
            super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            self.intake.take(data, super().data_received)

    return Bounded
