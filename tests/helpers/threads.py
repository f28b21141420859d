"""A small server in a thread of its own, for as long as a test needs it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

BEGINS_S = 60.0
ENDS_S = 10.0


@contextmanager
def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> Iterator[str]:
    """The URL at which `handle` has every connection, on a port of its own."""
    started, found = threading.Event(), dict[str, str]()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        found["url"] = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        started.set()
        await over.wait()
        listener.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(BEGINS_S)
    try:
        yield found["url"]
    finally:
        stop[0]()
        thread.join(ENDS_S)
