"""HTTP to one server, over aiohttp: bytes out, bytes back, and two ways to fail.

aiohttp costs a quarter of the CPU that httpx takes to follow a stream (docs/decisions/load.md has the figures).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftopt.errors import BadInput
from peftopt.loadtest import proxies

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 10.0
"""The longest that a connection may take to be made, where the whole request may take longer."""
KEPT_S = 4.0
"""An idle connection is kept so long: less than servers keep theirs, of which uvicorn's 5 s are the least."""
LONGEST_HEADER_BYTES = 65_536
READ_BYTES = 65_536
MOST_BYTES = 64 * 2**20
"""The longest answer that is read: a server that never ends takes no more memory than that."""


class Unreachable(Exception):
    """No connection to the server was made."""


class Lost(Exception):
    """The server, or what lies before it, ended the exchange too soon, or did not speak HTTP."""


class TooLong(Lost):
    """The answer goes on for more than MOST_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"the answer is longer than {MOST_BYTES // 2**20} MiB")


@dataclass(frozen=True)
class Head:
    """The beginning of an answer: its status and headers."""

    status: int
    headers: Mapping[str, str]

    @property
    def redirects_to(self) -> str:
        """The address that a redirect names; "" = it is no redirect."""
        return self.headers.get("location", "nowhere") if self.status in (301, 302, 303, 307, 308) else ""


@dataclass(frozen=True)
class Whole(Head):
    """An answer with its whole body."""

    body: bytes

    @property
    def text(self) -> str:
        """The body as text; what is not UTF-8 is replaced."""
        return self.body.decode(errors="replace")


@dataclass(frozen=True)
class Streaming(Head):
    """An answer whose body comes in pieces."""

    _response: aiohttp.ClientResponse

    async def pieces(self) -> AsyncIterator[tuple[int, bytes]]:
        """The pieces as they arrive, and when (perf_counter_ns). Raises Lost."""
        size = 0
        with _named_faults():
            async for piece in self._response.content.iter_any():
                size += len(piece)
                if size > MOST_BYTES:
                    raise TooLong
                yield time.perf_counter_ns(), piece

    async def read(self) -> bytes:
        """The whole body. Raises Lost."""
        return b"".join([piece async for _, piece in self.pieces()])

    async def beginning(self, most: int) -> bytes:
        """The first `most` bytes of the body, or all of it. Raises Lost."""
        return await beginning(self.pieces(), most)


class Http:
    """Connections to the server at `url`, as many as are asked for. The connections belong to the event loop of the
    first request. Redirects are not followed."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float, environ: Mapping[str, str]) -> None:
        """Raises BadInput for a `url` with a password, and BadInput or MissingEnvironment for a proxy or certificates
        in `environ` that cannot be used."""
        check_no_password(url)
        self.url = url
        self.via = proxies.of(url, environ)
        """The proxy on the way; None = none."""
        self._way = proxies.way(url, self.via, environ)
        self._headers, self._timeout_s = dict(headers), timeout_s
        self._opened: aiohttp.ClientSession | None = None

    async def get(self, path: str, limit_s: float = 0.0) -> Whole:
        """A whole answer within `limit_s` seconds (0 = the timeout). Raises Unreachable, Lost, TimeoutError."""
        return await self._whole("GET", path, None, limit_s)

    async def post(self, path: str, body: bytes) -> Whole:
        """A whole answer within the timeout. Raises Unreachable, Lost, TimeoutError."""
        return await self._whole("POST", path, body, 0.0)

    @asynccontextmanager
    async def stream(self, path: str, body: bytes) -> AsyncIterator[Streaming]:
        """An answer from its head on. Its connection is closed unless the answer was read to its end. It has no
        timeout of its own but for the connection. Raises Unreachable, Lost, TimeoutError."""
        with _named_faults():
            response = await self._request("POST", path, body)
        try:
            yield Streaming(response.status, response.headers, response)
        finally:
            if response.content.is_eof():
                response.release()
            else:
                response.close()

    async def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        opened, self._opened = self._opened, None
        if opened:
            await opened.close()

    async def _whole(self, method: str, path: str, body: bytes | None, limit_s: float) -> Whole:
        async with asyncio.timeout(limit_s or self._timeout_s):
            with _named_faults():
                async with await self._request(method, path, body) as response:
                    streaming = Streaming(response.status, response.headers, response)
                    return Whole(response.status, response.headers, await streaming.read())

    async def _request(self, method: str, path: str, body: bytes | None) -> aiohttp.ClientResponse:
        return await self._session().request(
            method, self.url + path, data=body, proxy=self._way.proxy, allow_redirects=False
        )

    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._opened is None:
            connect_s = min(CONNECT_S, self._timeout_s)
            settings: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEPT_S, "ssl": self._way.ssl}
            self._opened = aiohttp.ClientSession(
                connector=self._way.connector(settings),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BYTES,
                max_line_size=LONGEST_HEADER_BYTES,
                max_field_size=LONGEST_HEADER_BYTES,
                trust_env=False,  # proxies.py reads the environment, so that a wrong variable is named
            )
        return self._opened


def check_no_password(url: str) -> None:
    """Raises BadInput, which does not show it, for a URL with a name or a password before its host."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        hint = "remove it, and name the environment variable of an API key: --api-key-env, or --key-env"
        raise BadInput("the URL holds a password", hint)


async def beginning(pieces: AsyncIterator[tuple[int, bytes]], most: int) -> bytes:
    """The first `most` bytes of pieces, or all of them; what comes after is not waited for."""
    start = b""
    async for _, piece in pieces:
        start += piece
        if len(start) >= most:
            break
    return start[:most]


@contextmanager
def _named_faults() -> Iterator[None]:
    """The many exceptions of aiohttp as the two of this module. A TimeoutError stays one."""
    import aiohttp

    try:
        yield
    except TimeoutError:
        raise
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL, aiohttp.ClientHttpProxyError) as error:
        raise Unreachable(named(error)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(named(error)) from error


def named(error: BaseException) -> str:
    """An exception's kind and words, in one line of at most 200 characters."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:200] if words else type(error).__name__
