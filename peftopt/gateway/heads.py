"""The most that a request's head may hold: httptools, which reads it, takes one without an end."""

from __future__ import annotations

from typing import Any

MOST_HEAD_BYTES = 65_536


def bounded() -> Any:
    """Uvicorn's HTTP protocol, which refuses a longer head; "auto" without httptools, since h11 has a limit itself."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "auto"

    class Bounded(HttpToolsProtocol):
        """Counts the bytes between a request's start and the end of its head."""

        in_head = False
        heads = head_bytes = 0

        def on_message_begin(self) -> None:
            self.in_head = True
            self.heads, self.head_bytes = self.heads + 1, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            heads = self.heads
            super().data_received(data)
            if not self.in_head or self.heads != heads:  # what this one has of its head is the end of other bytes
                return
            self.head_bytes += len(data)
            if self.head_bytes > MOST_HEAD_BYTES:
                self.send_400_response(f"a request's head has at most {MOST_HEAD_BYTES} bytes")

    return Bounded
