"""What the gateway costs: the same requests to an engine directly and through `peftopt serve`, in pairs.

    python benchmarks/gateway.py                    # the paced engine of the tests: no model is computed
    python benchmarks/gateway.py --requests 2000    # more pairs
    python benchmarks/gateway.py --litellm          # LiteLLM's proxy as a third way (pip install 'litellm[proxy]')
    python benchmarks/gateway.py --engine URL --model NAME --streams 8 --rounds 20     # streams of a real engine

Added time to first token is the difference within a pair, one user at a time, the order drawn for each pair. Streams
at once are compared by their tokens per second. Clients that leave are counted by the engine's own side.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from helpers.paced import Paced, paced  # type: ignore[import-not-found]  # noqa: E402

from peftopt.engines._server import free_port  # noqa: E402

LEFT_WITHIN_S = 1.0


@contextlib.contextmanager
def gateway(url: str, where: Path, *more: str) -> Iterator[str]:
    """`peftopt serve` before the engine, with more options; its URL."""
    port = free_port()
    command = [sys.executable, "-m", "peftopt.cli", "serve", "--upstream", url, "--port", str(port), *more]
    process = subprocess.Popen([*command, "--state", str(where / "state"), "--log", str(where / "log.jsonl")], cwd=ROOT)
    try:
        yield ready(f"http://127.0.0.1:{port}", "/health/ready", process)
    finally:
        end(process)


@contextlib.contextmanager
def litellm(url: str, where: Path) -> Iterator[str]:
    """LiteLLM's proxy before the engine; its URL."""
    port, config = free_port(), where / "litellm.yaml"
    params = {"model": "openai/base", "api_base": f"{url}/v1", "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "base", "litellm_params": params}]}))
    program = shutil.which("litellm") or str(Path(sys.executable).with_name("litellm"))
    process = subprocess.Popen(
        [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"},
    )
    try:
        yield ready(f"http://127.0.0.1:{port}", "/health/liveliness", process)
    finally:
        end(process)


def ready(url: str, path: str, process: subprocess.Popen[bytes]) -> str:
    import httpx2

    for _ in range(600):
        assert process.poll() is None, "it has ended"
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(url + path).status_code == 200:
                return url
        time.sleep(0.1)
    raise SystemExit(f"{url} is not ready after a minute")


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.kill()
    process.wait()


async def stream(
    session: aiohttp.ClientSession, url: str, tokens: int, model: str = "base", **more: object
) -> tuple[float, float]:
    """Seconds until the first text of an answer, and until its end."""
    messages = [{"role": "user", "content": "x"}]
    body = {"model": model, "stream": True, "max_tokens": tokens, "messages": messages, **more}
    began, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for piece in answer.content.iter_any():
            if not first and b'"y"' in piece:
                first = time.perf_counter() - began
    return first, time.perf_counter() - began


async def added(ways: dict[str, str], n: int) -> dict[str, np.ndarray]:
    """Milliseconds that each way adds to a first token, pair by pair."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    dice = random.Random(0)
    async with aiohttp.ClientSession() as session:
        for name in [*ways] * 20:
            await stream(session, ways[name], 2)
        for _ in range(n):
            for name in dice.sample([*ways], len(ways)):
                times[name].append((await stream(session, ways[name], 2))[0])
    direct = np.array(times.pop("direct"))
    return {name: 1e3 * (np.array(found) - direct) for name, found in times.items()}


async def at_once(url: str, streams: int, tokens: int, model: str = "base", **more: object) -> float:
    """Tokens per second of so many streams."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(stream(session, url, tokens, model, **more) for _ in range(streams)))
        return streams * tokens / (time.perf_counter() - began)


def real(url: str, model: str, streams: int, tokens: int, rounds: int) -> None:
    """Streams of a real engine that runs already, asked directly and through the gateway, which goes first in turns.

    The ratio is of the medians of neighbouring turns: an engine's own turns differ, so the interval is shown too."""
    from peftopt import stats

    with tempfile.TemporaryDirectory() as where, gateway(url, Path(where)) as ours:
        ways = {"direct": url, "peftopt": ours}
        for each in ways.values():
            asyncio.run(at_once(each, streams, tokens, model, ignore_eos=True))
        logs = []
        for number in range(rounds):
            names = sorted(ways, reverse=bool(number % 2))
            speed = {name: asyncio.run(at_once(ways[name], streams, tokens, model, ignore_eos=True)) for name in names}
            logs.append(float(np.log(speed["peftopt"] / speed["direct"])))
            print(f"direct {speed['direct']:.1f} tokens/s, peftopt {speed['peftopt']:.1f}", flush=True)
    ratio = stats.hodges_lehmann(logs, 0.95)
    shown = f"{np.exp(ratio.estimate):.1%} of direct ({np.exp(ratio.low):.1%}-{np.exp(ratio.high):.1%})"
    print(f"{streams} streams of {tokens} tokens, {rounds} pairs: {shown}")


async def leave(url: str, engine: Paced, prompt: str, streams: bool, n: int) -> list[float]:
    """Seconds from a client's leaving to its request's end at the engine; inf for one that went on."""
    host, port = url.removeprefix("http://").split(":")
    body = {"model": "base", "stream": streams, "max_tokens": 100_000 if prompt == "slow" else 4}
    text = json.dumps({**body, "messages": [{"role": "user", "content": prompt}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    found = []
    for _ in range(n):
        left, running = engine.left, engine.running
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + text)
        while engine.running == running:
            await asyncio.sleep(0.001)
        if streams and prompt == "slow":
            await reader.read(64)
        writer.close()
        began = time.perf_counter()
        while engine.left == left and time.perf_counter() - began < 5:
            await asyncio.sleep(0.001)
        found.append(time.perf_counter() - began if engine.left > left else float("inf"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500, help="pairs for the added time to first token")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6, help="pairs of the streams at once")
    parser.add_argument("--leave", type=int, default=100, help="clients that leave, on each of three paths")
    parser.add_argument("--litellm", action="store_true")
    parser.add_argument("--engine", default="", help="URL of a real engine that runs already: only its streams")
    parser.add_argument("--model", default="base", help="what that engine calls its model")
    parser.add_argument("--tokens", type=int, default=64, help="of each of the streams at once")
    options = parser.parse_args()
    if options.engine:
        real(options.engine, options.model, options.streams, options.tokens, options.rounds)
        return
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(paced(gap=0.02, first=0.01))
        ways = {"direct": engine.url, "peftopt": stack.enter_context(gateway(engine.url, where))}
        if options.litellm:
            ways["litellm"] = stack.enter_context(litellm(engine.url, where))
        for name, ms in asyncio.run(added(ways, options.requests)).items():
            p50, p99 = np.percentile(ms, [50, 99])
            print(f"{name:8} adds to a first token: P50 {p50:.2f} ms, P99 {p99:.2f} ms, {len(ms)} pairs", flush=True)
        ratios: dict[str, list[float]] = {name: [] for name in ways if name != "direct"}
        for _ in range(options.rounds):
            direct = asyncio.run(at_once(ways["direct"], options.streams, options.tokens))
            for name, each in ratios.items():
                each.append(asyncio.run(at_once(ways[name], options.streams, options.tokens)) / direct)
        for name, each in ratios.items():
            print(
                f"{name:8} {options.streams} streams: {np.median(each):.1%} of direct ({min(each):.1%}-{max(each):.1%})"
            )
        for title, prompt, streams in (
            ("before the first byte", "hold", True),
            ("in a stream", "slow", True),
            ("a whole answer", "hold", False),
        ):
            for name in ratios:
                left = np.array(asyncio.run(leave(ways[name], engine, prompt, streams, options.leave)))
                within = int((left <= LEFT_WITHIN_S).sum())
                ended = f"{within} of {len(left)} ended within 1 s, at most {left.max():.3f} s"
                print(f"{name:8} client leaves, {title}: {ended}")


if __name__ == "__main__":
    main()
