"""Two small proxies: SOCKS5 (RFC 1928, without a password) and HTTP. Both lead every request to one server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from helpers.threads import listening

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Led:
    """What a proxy was asked for: hosts and ports, in order."""

    def __init__(self, server: str) -> None:
        address = urlsplit(server)
        self.host, self.port = address.hostname, address.port
        self.asked: list[tuple[str, int]] = []

    async def lead(self, reader: Reader, writer: Writer, first: bytes = b"") -> None:
        """Pass bytes on in both directions until one side ends."""
        theirs, ours = await asyncio.open_connection(self.host, self.port)
        ours.write(first)

        async def copy(source: Reader, sink: Writer) -> None:
            while piece := await source.read(65_536):
                sink.write(piece)
                await sink.drain()

        ways = [asyncio.ensure_future(copy(reader, ours)), asyncio.ensure_future(copy(theirs, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        ours.close()


@contextmanager
def socks5(led: Led) -> Iterator[str]:
    """The URL of a SOCKS5 proxy."""

    async def handle(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(OSError, EOFError):
            _, methods = await reader.readexactly(2)
            await reader.readexactly(methods)
            writer.write(b"\x05\x00")
            *_, kind = await reader.readexactly(4)
            if kind == 3:
                host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
            else:
                host = ".".join(map(str, await reader.readexactly(4)))
            led.asked.append((host, int.from_bytes(await reader.readexactly(2))))
            writer.write(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            await led.lead(reader, writer)
        writer.close()

    with listening(handle) as url:
        yield url.replace("http:", "socks5:")


@contextmanager
def http(led: Led) -> Iterator[str]:
    """The URL of an HTTP proxy. Requests come with the whole address in their first line."""

    async def handle(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(OSError, EOFError):
            method, address, version = (await reader.readline()).decode().split(" ")
            target = urlsplit(address)
            led.asked.append((target.hostname or "", target.port or 80))
            await led.lead(reader, writer, f"{method} {target.path} {version}".encode())
        writer.close()

    with listening(handle) as url:
        yield url
