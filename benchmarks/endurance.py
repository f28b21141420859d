"""Does the gateway stay right over a long time? Reloads under load, kills at any moment, memory over many requests.

    python benchmarks/endurance.py --reloads 200                    # a real engine: eager on a tiny model
    python benchmarks/endurance.py --reloads 200 --engine vllm --base DIR --adapter DIR
    python benchmarks/endurance.py --kills 60                       # gateway, engine, gateway in the midst of put
    python benchmarks/endurance.py --requests 100000                # the paced engine of the tests, with reloads

Every answer is compared, by its log-probabilities, with what each version answers alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.tiny_models import make_base, make_lora  # type: ignore[import-not-found]  # noqa: E402

from peftopt import stats  # noqa: E402
from peftopt.canary.fingerprint import Known, Print, distance, judge  # noqa: E402
from peftopt.engines._server import free_port  # noqa: E402

PROMPTS = ("count the stars over the lazy dog", "the fox number 7 jumps", "how many squares are there?")
TOKENS = 6
READY_S = 600.0
USERS = 2


@dataclass
class Gateway:
    """`peftopt serve` in a process of its own, which is started again after a kill."""

    where: Path
    arguments: list[str]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where users ask."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; `ready` waits for it."""
        state = ["--port", str(self.port), "--state", str(self.where / "state"), "--log", str(self.where / "log.jsonl")]
        command = [sys.executable, "-m", "peftopt.cli", "serve", *state, *self.arguments]
        said = (self.where / "said.txt").open("ab")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Wait until it says so itself."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(f"{self.url}/health/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
        raise SystemExit(f"not ready after {READY_S:g} s:\n{(self.where / 'said.txt').read_text()[-2000:]}")

    def kill(self) -> None:
        """As if by kill -9 of an operator's, or of the kernel's."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """As an operator ends it."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait()

    @contextlib.asynccontextmanager
    async def operators(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A session with the operators' socket."""
        connector = aiohttp.UnixConnector(path=str(self.where / "state" / "admin.sock"))
        timeout = aiohttp.ClientTimeout(total=READY_S)
        async with aiohttp.ClientSession("http://gateway", connector=connector, timeout=timeout) as session:
            yield session

    async def put(self, name: str, folder: Path) -> dict[str, Any]:
        """What the gateway said of it."""
        async with (
            self.operators() as session,
            session.put(f"/adapters/{name}", json={"folder": str(folder)}) as answer,
        ):
            told: dict[str, Any] = await answer.json()
            return told

    async def listed(self) -> list[dict[str, Any]]:
        """Routes and versions."""
        async with self.operators() as session, session.get("/adapters") as answer:
            rows: list[dict[str, Any]] = await answer.json()
            return rows


@dataclass
class Seen:
    """Answers of users, by what they were."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, what: str, example: str = "") -> None:
        """Count one more, and keep the first few examples of what went wrong."""
        self.counts[what] += 1
        if what != "own" and len(self.examples) < 5:
            self.examples.append(f"{what}: {example}"[:300])


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: str) -> Print:
    """The log-probabilities of an answer. Raises ClientError or OSError for one that did not come whole."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise aiohttp.ClientPayloadError(f"HTTP {answer.status}: {text[:200]}")
        content = json.loads(text)["choices"][0]["logprobs"]["content"]
        return [(t["token"], {o["token"]: o["logprob"] for o in t["top_logprobs"]}) for t in content]


async def fingerprints(session: aiohttp.ClientSession, gateway: Gateway, folders: dict[str, Path]) -> Known:
    """What each version answers alone, and its noise: how far answers that are given together lie from that."""
    prints: dict[str, dict[str, Print]] = {}
    noise: dict[str, float] = {}
    for name, folder in folders.items():
        await gateway.put("support", folder)
        prints[name] = {prompt: await ask(session, gateway.url, "support", prompt) for prompt in PROMPTS}
        again = [p for _ in range(2) for p in zip(PROMPTS, await _together(session, gateway.url), strict=True)]
        noise[name] = max(distance(prints[name][prompt], other) for prompt, other in again)
    return Known(prints, noise)


async def _together(session: aiohttp.ClientSession, url: str) -> list[Print]:
    return await asyncio.gather(*(ask(session, url, "support", prompt) for prompt in PROMPTS))


async def users(
    session: aiohttp.ClientSession, gateway: Gateway, known: Known, live: list[str], seen: Seen, over: asyncio.Event
) -> None:
    """One user asks until `over`. `live` holds the version that was routed last, and the one before while `put` runs:
    an answer must be of one that was live between the request's beginning and its end."""
    dice = random.Random(len(seen.counts))
    while not over.is_set():
        prompt = dice.choice(PROMPTS)
        may = set(live)
        try:
            print_ = await ask(session, gateway.url, "support", prompt)
        except (aiohttp.ClientError, OSError) as error:
            seen.add("dropped", str(error))
            continue
        may |= set(live)
        if any(judge(known, version, prompt, print_) is None for version in may):
            seen.add("own")
        elif any(judge(known, version, prompt, print_) is None for version in known.prints):
            seen.add("stale", f"{prompt!r} was not answered by {may}")
        else:
            seen.add("wrong", f"{prompt!r} was answered by none")


async def reload(gateway: Gateway, folders: dict[str, Path], n: int) -> None:
    """Switch between two adapters under one name, `n` times, while users ask."""
    timeout = aiohttp.ClientTimeout(total=READY_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await gateway.ready(session)
        known = await fingerprints(session, gateway, folders)
        if known.alike():
            raise SystemExit("the prompts do not tell the two adapters apart")
        seen, over, names, times = Seen(), asyncio.Event(), list(folders), []
        live = [names[-1]]
        asking = [asyncio.ensure_future(users(session, gateway, known, live, seen, over)) for _ in range(USERS)]
        for number in range(n):
            name = names[number % len(names)]
            live.insert(0, name)
            began = time.perf_counter()
            told = await gateway.put("support", folders[name])
            times.append(time.perf_counter() - began)
            if told["exit_code"]:
                raise SystemExit(f"put {number}: {told['said']}")
            del live[1:]
            await asyncio.sleep(0.2)
        over.set()
        await asyncio.gather(*asking)
    wrong = {what: seen.counts[what] for what in ("stale", "wrong", "dropped")}
    p50, p95 = np.percentile(times, [50, 95])
    print(f"{n} reloads under {USERS} users: {seen.counts['own']} answers of their own version, {wrong}")
    print(f"a put takes {p50:.2f} s (P50), {p95:.2f} s (P95), at most {max(times):.2f} s")
    for example in seen.examples:
        print("  ", example)


async def kills(gateway: Gateway, folders: dict[str, Path], n: int) -> None:
    """Kill, wait until it is ready by itself (a killed gateway is started as a supervisor would), and look."""
    timeout, dice = aiohttp.ClientTimeout(total=READY_S), random.Random(1)
    result: dict[str, Counter[str]] = {}
    times: dict[str, list[float]] = {}
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await gateway.ready(session)
        known = await fingerprints(session, gateway, folders)
        names = list(folders)
        live = names[-1]
        for number in range(n):
            what = ("gateway", "engine", "put")[number % 3]
            may = {live}
            if what == "put":
                other = names[(names.index(live) + 1) % len(names)]
                may.add(other)
                putting = asyncio.ensure_future(gateway.put("support", folders[other]))
                await asyncio.sleep(dice.uniform(0.0, 1.5))
            began = time.perf_counter()
            if what == "engine":
                for child in psutil.Process(gateway.process.pid).children():  # type: ignore[union-attr]
                    child.kill()
                await asyncio.sleep(1.0)  # the gateway looks twice a second
            else:
                gateway.kill()
                gateway.start()
            await gateway.ready(session)
            times.setdefault(what, []).append(time.perf_counter() - began)
            if what == "put":
                await asyncio.gather(putting, return_exceptions=True)
            outcome, live = await _look(session, gateway, known, may)
            result.setdefault(what, Counter())[outcome] += 1
    for what, counts in result.items():
        print(f"kill -9 ({what}): {dict(counts)}; ready again after {np.median(times[what]):.1f} s (P50)")


async def _look(session: aiohttp.ClientSession, gateway: Gateway, known: Known, may: set[str]) -> tuple[str, str]:
    """What is wrong after a kill, and which version answers."""
    rows = [row for row in await gateway.listed() if row["name"] == "support" and row["arm"] == "live"]
    if len(rows) != 1:
        return "registry not whole", next(iter(may))
    answers = await _together(session, gateway.url)
    for version in may:
        if all(judge(known, version, p, a) is None for p, a in zip(PROMPTS, answers, strict=True)):
            return "whole, own answers", version
    return "wrong answer", next(iter(may))


async def remember(gateway: Gateway, folders: dict[str, Path], n: int) -> None:
    """The gateway's resident memory over many requests, an adapter put again after each hundredth of them."""
    parts, sizes = 100, []
    connector = aiohttp.TCPConnector(limit=64)
    body = {"model": "support", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
    async with aiohttp.ClientSession(connector=connector) as session:
        await gateway.ready(session)
        memory = psutil.Process(gateway.process.pid)  # type: ignore[union-attr]

        async def one() -> None:
            async with session.post(f"{gateway.url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()

        for part in range(parts):
            told = await gateway.put("support", folders[("one", "two")[part % 2]])
            assert not told["exit_code"], told
            for _ in range(n // parts // 50):
                await asyncio.gather(*(one() for _ in range(50)))
            sizes.append(memory.memory_info().rss / 2**20)
    warm = np.array(sizes[parts // 4 :])  # what is cached fills first
    steps = np.diff(warm)
    interval = stats.hodges_lehmann(steps, 0.95)
    print(
        f"{n} requests, {parts} puts: {sizes[0]:.1f} MiB at first, {warm[0]:.1f} after a quarter, "
        f"{warm[-1]:.1f} at the end; "
        f"per {n // parts} requests and a put {interval.estimate * 1024:.1f} KiB "
        f"({interval.low * 1024:.1f} to {interval.high * 1024:.1f})"
    )


def paced_engine(urls: multiprocessing.Queue[str], ended: Event) -> None:
    """The paced engine in a process of its own."""
    from helpers.paced import paced  # type: ignore[import-not-found]

    with paced(gap=0.0, first=0.0) as server:
        urls.put(server.url)
        ended.wait()


@contextlib.contextmanager
def running(gateway: Gateway) -> Iterator[None]:
    """Start and end it."""
    gateway.start()
    try:
        yield
    finally:
        gateway.end()


def made(where: Path, base: Path | None, adapter: Path | None) -> tuple[Path, dict[str, Path], list[str]]:
    """A base, tiny where none is given, adapters of it by name, the first as it is given, and where a gateway may take
    adapters from."""
    if base is None:
        base = where / "base"
        make_base(base, "bfloat16")
    folders = {"one": adapter or where / "one", "two": where / "two", "three": where / "three"}
    for name, std in {"one": 0.3, "two": 0.1, "three": 0.2}.items():
        if name != "one" or adapter is None:
            make_lora(base, folders[name], std=std if adapter is None else std / 2)
    roots = ["--adapters-from", str(where), "--adapters-from", str(folders["one"].resolve().parent)]
    return base, folders, roots


def main() -> None:
    """Do what the options ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reloads", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--base", type=Path, help="a real model; by default a tiny one is made")
    parser.add_argument("--adapter", type=Path, help="a LoRA for --base; a second one is made beside it")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        base, folders, roots = made(where, options.base, options.adapter)
        del folders["three"]
        served = ["--base", str(base), "--adapter", f"support={folders['one']}", "--engine", options.engine, *roots]
        for work, n in ((reload, options.reloads), (kills, options.kills)):
            if n:
                gateway = Gateway(where, [*served, "--keep", "2"])
                with running(gateway):
                    asyncio.run(work(gateway, folders, n))
        if options.requests:
            urls: multiprocessing.Queue[str] = multiprocessing.Queue()
            ended = multiprocessing.Event()
            multiprocessing.Process(target=paced_engine, args=(urls, ended), daemon=True).start()
            (where / "paced").mkdir()
            gateway = Gateway(where / "paced", ["--upstream", urls.get(), *roots, "--keep", "1"])
            with running(gateway):
                asyncio.run(remember(gateway, folders, options.requests))
            ended.set()


if __name__ == "__main__":
    main()
