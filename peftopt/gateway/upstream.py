"""The gateway's client of the engine's server: bytes out, bytes back, each wait with its own limit.

A request ends with its connection, for whatever reason: then the engine stops computing an answer that nobody waits
for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftopt import redaction

if TYPE_CHECKING:
    import aiohttp

CONNECT_TRIES = 3
CONNECT_AGAIN_S = 0.1
AT_ONCE_S = 0.1
"""A kept connection that the server had let go of already fails sooner than this: the request was never read."""
KEPT_S = 4.0
"""Connections are kept so long: less than the servers do, uvicorn's 5 s the least."""
READ_BYTES = 65_536
REDIRECTS = (301, 302, 303, 307, 308)
"""Statuses that are not followed: a user's prompt goes to the engine and nowhere else."""
MOST_ANSWER_BYTES = 64 * 2**20
"""The longest answer that does not stream."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect, until the first byte, between two pieces, for the whole; 0 = without limit."""

    connect: float = 5.0
    first: float = 120.0
    gap: float = 60.0
    whole: float = 600.0


class Fault(Exception):
    """An error on the way to the engine: `kind` is a word of lines.Line.kind; `detail`, such as an address, is for the
    log alone."""

    def __init__(self, kind: str, said: str, detail: str = "") -> None:
        super().__init__(said)
        self.kind, self.detail = kind, detail


class Answer:
    """An answer that has begun: its status, headers, and pieces."""

    def __init__(self, response: aiohttp.ClientResponse, timeouts: Timeouts) -> None:
        self.status = response.status
        self.content_type = response.headers.get("content-type", "application/json")
        self._response, self._timeouts = response, timeouts

    @property
    def streams(self) -> bool:
        """Whether it comes as server-sent events."""
        return "event-stream" in self.content_type

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes as they come. Raises Fault for a stall or a lost connection."""
        import aiohttp

        content, first = self._response.content, True
        while True:
            limit, kind = (self._timeouts.first, "timeout_first") if first else (self._timeouts.gap, "timeout_gap")
            try:
                async with asyncio.timeout(limit or None):
                    piece = await content.readany()
            except TimeoutError:
                raise Fault(kind, f"the engine sent nothing for {limit:g} s") from None
            except aiohttp.ClientError as error:
                raise Fault("upstream", "the engine's answer broke off", _named(error)) from error
            if not piece:
                return
            first = False
            yield piece

    async def whole(self, most_bytes: int = MOST_ANSWER_BYTES) -> bytes:
        """All of it. Raises Fault for one that is too long: it is held in memory."""
        pieces, size = [], 0
        async for piece in self.pieces():
            pieces.append(piece)
            size += len(piece)
            if size > most_bytes:
                raise Fault("upstream", f"the engine's answer has more than {most_bytes} bytes: ask for a stream")
        return b"".join(pieces)


class Upstream:
    """Connections to the engine at `url`, with its `key`, "" for none. Use as an async context manager."""

    def __init__(self, url: str, timeouts: Timeouts, key: str = "") -> None:
        self.url, self.timeouts = url, timeouts
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect or None),
            auto_decompress=False,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            read_bufsize=READ_BYTES,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._session is not None
        await self._session.close()

    def at(self, url: str) -> Upstream:
        """The same connections, to an engine that was started beside; closed with these."""
        other = Upstream(url, self.timeouts, redaction.engine_key())
        other._session = self._session
        return other

    @asynccontextmanager
    async def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """The answer to a request, from its first byte on; closed at the end of the context. Only a connection that was
        never made is tried again. Raises Fault."""
        response = await self._opened(path, body, headers)
        try:
            yield Answer(response, self.timeouts)
        finally:
            if response.content.is_eof():
                response.release()
            else:
                response.close()

    async def get(self, path: str, limit_s: float = 5.0) -> tuple[int, bytes]:
        """(status, body) of a short answer; (0, reason) without one."""
        import aiohttp

        assert self._session is not None
        try:
            async with (
                asyncio.timeout(limit_s),
                self._session.get(self.url + path, headers=self._headers, allow_redirects=False) as response,
            ):
                return await _short(response)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return 0, _named(error).encode()

    async def post(self, path: str, body: bytes, limit_s: float) -> tuple[int, bytes]:
        """(status, body) of an operator's request; (0, reason) without an answer."""
        import aiohttp

        assert self._session is not None
        try:
            async with (
                asyncio.timeout(limit_s),
                self._session.post(
                    self.url + path, data=body, headers=self._headers, allow_redirects=False
                ) as response,
            ):
                return await _short(response)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return 0, _named(error).encode()

    async def _opened(self, path: str, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        import aiohttp

        assert self._session is not None
        limit = self.timeouts.first or None
        clock = asyncio.get_running_loop().time
        for again in reversed(range(CONNECT_TRIES)):
            started = clock()
            try:
                async with asyncio.timeout(limit):
                    answer = await self._session.post(
                        self.url + path, data=body, headers={**headers, **self._headers}, allow_redirects=False
                    )
                if answer.status in REDIRECTS:
                    answer.close()
                    to = answer.headers.get("location", "nowhere")[:200]
                    raise Fault("upstream", "the engine redirects, which is not followed", to)
                return answer
            except aiohttp.ClientConnectorError as error:
                if not again:
                    raise Fault("engine_dead", "no engine answers", _named(error)) from error
                await asyncio.sleep(CONNECT_AGAIN_S)
            except aiohttp.ServerTimeoutError as error:  # to connect
                raise Fault("timeout_connect", f"no connection to the engine in {self.timeouts.connect:g} s") from error
            except TimeoutError:
                raise Fault("timeout_first", f"the engine sent nothing for {limit:g} s") from None
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if not again or clock() - started > AT_ONCE_S:
                    raise Fault("upstream", "the engine did not answer", _named(error)) from error
            except aiohttp.ClientError as error:
                raise Fault("upstream", "the engine did not answer", _named(error)) from error
        raise AssertionError("the last try returns or raises")


async def unless(ended: Awaitable[object], doing: Awaitable[None]) -> bool:
    """Run it, or cancel it when something else has ended before; returns whether it ran. Raises what it raises."""
    work, other = asyncio.ensure_future(doing), asyncio.ensure_future(ended)
    try:
        await asyncio.wait((work, other), return_when=asyncio.FIRST_COMPLETED)
        done = work.done()
        if done:
            work.result()
        return done
    finally:
        for task in (work, other):
            task.cancel()
        await asyncio.gather(work, other, return_exceptions=True)


async def _short(response: aiohttp.ClientResponse) -> tuple[int, bytes]:
    """(status, body); (0, reason) for one that is longer than MOST_ANSWER_BYTES: it is held in memory."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MOST_ANSWER_BYTES:
            return 0, f"the engine's answer has more than {MOST_ANSWER_BYTES} bytes".encode()
    return response.status, bytes(body)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
