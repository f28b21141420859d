"""Server-sent events: the bytes of an answer -> its messages, each with the time at which its bytes arrived. Pure.

Read as the standard says (html.spec.whatwg.org, section 9.2.6), and more freely where servers do not keep to it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Final

from peftopt.loadtest import protocols
from peftopt.records import Json

MOST_BYTES = 1 << 20
"""A message longer than this is an error."""

DONE: Final = object()
"""What stands for OpenAI's closing message, [DONE]."""

TRIED = 16
"""Lines of a message after each of which it is looked at for its end: one of more lines ends with a blank one, or else
a server could have the same text read for every line that it adds."""

_PART: Final = object()
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data", b"event", b"id", b"retry", b"error")
TELLING = len(_BOM) + max(map(len, _FIELDS)) + 1
"""So many bytes tell whether they begin a stream."""


def begin(start: bytes) -> bool:
    """Whether an answer that starts with these bytes is a stream of events."""
    line = start.removeprefix(_BOM).lstrip()
    return line.startswith((b":", *(field + b":" for field in _FIELDS)))


async def messages(  # noqa: C901 (a branch for each field of an event)
    pieces: AsyncIterator[tuple[int, bytes]],
) -> AsyncIterator[tuple[int, Json]]:
    """(time, parsed JSON or DONE) of each event that brings one; comments, pings and empty ones are skipped.

    Raises ValueError for what is not a stream of events.
    """
    data: list[bytes] = []
    name, size = b"", 0
    async for now, line in _lines(pieces):
        field, _, value = line.partition(b":")
        value = value.strip()
        if not line:
            if data:
                yield now, json.loads(_text(data))
            data, name, size = [], b"", 0
        elif field == b"event":
            name = value
        elif field == b"error":  # llama.cpp's, which is not in the standard
            yield now, {"error": _error(value)}
        elif field == b"data":
            if name == b"ping" or not value or value.startswith(b":"):
                continue
            data.append(value)
            size += len(value) + 1
            if size > MOST_BYTES:
                raise ValueError(f"a message longer than {MOST_BYTES} bytes")
            # looked at before the blank line that ends it, which some servers leave out
            if len(data) <= TRIED and (message := _message(_text(data))) is not _PART:
                data, size = [], 0
                if name == b"error" and not protocols.error_of(message):
                    yield now, {"error": message}
                elif not _is_ping(message):
                    yield now, message
        elif field not in (b"", b"id", b"retry"):
            yield now, _stray(line)
    if data:
        yield now, json.loads(_text(data))


async def _lines(pieces: AsyncIterator[tuple[int, bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    r"""Lines without their ends, which are \n, \r\n or \r, and without a byte order mark in front."""
    rest, halved, first, now = b"", False, True, 0
    async for now, piece in pieces:
        if halved:  # of \r\n, the \r came before
            piece = piece.removeprefix(b"\n")
        halved = piece.endswith(b"\r") or (halved and not piece)
        lines = (rest + piece).splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        for line in lines:
            yield now, (line.removeprefix(_BOM) if first else line).rstrip(b"\r\n")
            first = False
        if len(rest) > MOST_BYTES:
            raise ValueError(f"a message longer than {MOST_BYTES} bytes")
    if rest.strip():
        yield now, rest.removeprefix(_BOM) if first else rest


def _text(data: list[bytes]) -> str:
    return b"\n".join(data).decode(errors="replace")


def _message(text: str) -> Json:
    """Parsed; _PART for what is not whole yet, or never."""
    if text == "[DONE]":
        return DONE
    try:
        return json.loads(text)
    except ValueError:
        return _PART


def _is_ping(message: Json) -> bool:
    kind = message.get("type") if isinstance(message, Mapping) else ""
    return message is None or kind in ("ping", "keepalive", "heartbeat")


def _error(value: bytes) -> Json:
    text = value.decode(errors="replace").strip()
    try:
        return json.loads(text)
    except ValueError:
        return text or "an error without words"


def _stray(line: bytes) -> Json:
    """A server's error that it wrote into the stream as it is."""
    try:
        message = json.loads(line.decode(errors="replace"))
    except ValueError:
        message = None
    if protocols.error_of(message):
        return message
    raise ValueError(f"{line[:80]!r} is not a server-sent event")
