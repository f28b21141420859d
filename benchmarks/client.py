"""What it costs to follow a stream: CPU time per token of three HTTP clients, on the paced engine of the tests.

    python benchmarks/client.py                 # needs httpx and httpx2 beside aiohttp
    python benchmarks/client.py --streams 256

The engine runs in a process of its own, and so does each client. The clients take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import Callable, Coroutine
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TOKENS = 64
BODY = {"model": "base", "stream": True, "max_tokens": TOKENS, "messages": [{"role": "user", "content": "x"}]}
PATH = "/v1/chat/completions"


def engine(urls: multiprocessing.Queue[str], ended: Event) -> None:
    """Serve until `ended`."""
    from helpers.paced import paced  # type: ignore[import-not-found]

    with paced(gap=0.01, first=0.01) as server:
        urls.put(server.url)
        ended.wait()


async def follow_httpx(library: Any, url: str, streams: int) -> None:
    """Follow so many streams at once with httpx or its fork."""
    limits = library.Limits(max_connections=None, max_keepalive_connections=None)
    async with library.AsyncClient(limits=limits, verify=False, trust_env=False, timeout=60) as client:

        async def one() -> None:
            async with client.stream("POST", url + PATH, json=BODY) as answer:
                async for _ in answer.aiter_bytes():
                    pass

        await asyncio.gather(*(one() for _ in range(streams)))


async def follow_aiohttp(url: str, streams: int) -> None:
    """Follow so many streams at once with aiohttp."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> None:
            async with session.post(url + PATH, json=BODY) as answer:
                async for _ in answer.content.iter_any():
                    pass

        await asyncio.gather(*(one() for _ in range(streams)))


def cost(name: str, url: str, streams: int, costs: multiprocessing.Queue[float]) -> None:
    """CPU microseconds per token of one client, its imports and its first connections left out."""
    import httpx
    import httpx2

    ways: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "httpx": lambda: follow_httpx(httpx, url, streams),
        "httpx2": lambda: follow_httpx(httpx2, url, streams),
        "aiohttp": lambda: follow_aiohttp(url, streams),
    }
    asyncio.run(ways[name]())
    began = time.process_time()
    asyncio.run(ways[name]())
    costs.put(1e6 * (time.process_time() - began) / (streams * TOKENS))


def main() -> None:
    """Print each client's cost, and its ratio to aiohttp's within a turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    urls: multiprocessing.Queue[str] = multiprocessing.Queue()
    costs: multiprocessing.Queue[float] = multiprocessing.Queue()
    ended = multiprocessing.Event()
    server = multiprocessing.Process(target=engine, args=(urls, ended), daemon=True)
    server.start()
    url = urls.get()
    seen: dict[str, list[float]] = {"aiohttp": [], "httpx": [], "httpx2": []}
    for _ in range(options.turns):
        for name, each in seen.items():
            client = multiprocessing.Process(target=cost, args=(name, url, options.streams, costs))
            client.start()
            each.append(costs.get())
            client.join()
    for name, each in seen.items():
        ratios = np.array(each) / np.array(seen["aiohttp"])
        print(
            f"{name:8} {options.streams} streams: {np.median(each):.0f} us of CPU a token, "
            f"{np.median(ratios):.1f}x aiohttp ({ratios.min():.1f}-{ratios.max():.1f})"
        )
    ended.set()


if __name__ == "__main__":
    main()
