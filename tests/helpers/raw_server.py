"""A server over a real socket that writes the bytes that a test says: at once, drop by drop, without an end, half."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from helpers.scripted import LISTED
from helpers.threads import listening

Write = Callable[[asyncio.StreamWriter], Awaitable[None]]
CHUNK = 1 << 16
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CHUNKED = SSE.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")


def http(content: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode() + content


def at_once(answer: bytes) -> Write:
    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return write


def dripping(answer: bytes, seconds: float = 30.0) -> Write:
    """The head, and then the rest drop by drop, for so many seconds."""

    async def write(writer: asyncio.StreamWriter) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        for n in range(len(body)):
            writer.write(body[n : n + 1])
            await writer.drain()
            await asyncio.sleep(seconds / len(body))

    return write


def endless(head: bytes, piece: bytes, most: int = 400 * 2**20) -> Write:
    """The head, and then the same again and again, for as long as somebody reads: 400 MiB at most."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        pieces = piece * (CHUNK // len(piece) + 1)
        for _ in range(most // len(pieces)):
            writer.write(pieces)
            await writer.drain()

    return write


def broken_off(answer: bytes) -> Write:
    """The bytes, and a reset, which may throw some of them away before they are read."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.transport.abort()

    return write


MODELS = at_once(http(json.dumps(LISTED).encode()))
NOTHING = at_once(http(b"{}", "404 Not Found"))


@contextmanager
def answering(
    post: Callable[[int], Write] = lambda number: NOTHING, models: Write = MODELS, metrics: Write = NOTHING
) -> Iterator[str]:
    """The URL of a server: `post` says what the n-th request (from 0) is answered."""
    asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split("\r\n")[0].split(" ")
            length = next((int(x[15:]) for x in head.lower().split("\r\n") if x.startswith("content-length:")), 0)
            await reader.readexactly(length)
            if method == "POST":
                asked += 1
                await post(asked - 1)(writer)
            else:
                await {"/v1/models": models, "/metrics": metrics}.get(path.partition("?")[0], NOTHING)(writer)
        writer.close()

    with listening(handle) as url:
        yield url
