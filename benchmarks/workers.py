"""What one gateway process carries, and what several do: CPU time per streamed token and per short request.

    python benchmarks/workers.py

The engine is the paced one of the tests: it computes nothing. It and the clients need cores too, so the rates here are
theirs as much as the gateway's. The CPU time is the gateway's alone: one process carries at most the inverse of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil
from gateway import at_once, gateway
from helpers.paced import paced  # type: ignore[import-not-found]

TOKENS = 64


def cpu_s() -> dict[str, float]:
    """CPU seconds of the gateway's processes so far: those that answer, and a supervisor."""
    found = {"answering": 0.0, "supervisor": 0.0}
    several = False
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times, worker = process.cpu_times(), "peftopt.gateway.workers" in process.cmdline()
            several |= worker
            found["answering" if worker else "supervisor"] += times.user + times.system
    return found if several else {"answering": found["supervisor"], "supervisor": 0.0}


async def short(url: str, n: int, at_once: int) -> float:
    """Requests per second of whole answers of one token, each on a connection that is kept."""
    left = iter(range(n))

    async def user(session: aiohttp.ClientSession) -> None:
        body = {"model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        for _ in left:
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200
                await answer.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(user(session) for _ in range(at_once)))
        return n / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, paced(gap=0.02, first=0.002) as engine:
        for workers in options.workers:
            where = Path(folder, str(workers))
            where.mkdir()
            with gateway(engine.url, where, "--workers", str(workers)) as url:
                asyncio.run(at_once(url, options.streams, 4))
                asyncio.run(short(url, 200, 16))
                for _ in range(options.rounds):
                    before = cpu_s()
                    rate = asyncio.run(at_once(url, options.streams, TOKENS))
                    spent = {name: each - before[name] for name, each in cpu_s().items()}
                    tokens = options.streams * TOKENS
                    us = {name: 1e6 * each / tokens for name, each in spent.items()}
                    print(f"{workers} workers: {rate:6.0f} tokens/s, {shown(us)} us of CPU a token", flush=True)
                    before = cpu_s()
                    rate = asyncio.run(short(url, options.requests, 16))
                    ms = {name: 1e3 * (each - before[name]) / options.requests for name, each in cpu_s().items()}
                    print(f"{workers} workers: {rate:6.0f} requests/s, {shown(ms)} ms of CPU a request", flush=True)


def shown(costs: dict[str, float]) -> str:
    return f"{costs['answering']:.2f} (and the supervisor {costs['supervisor']:.2f})"


if __name__ == "__main__":
    main()
