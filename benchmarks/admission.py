"""What limits do under too much load: 1.5 times the rate that holds, and one adapter that sends ten times its share.

    python benchmarks/admission.py                          # both cells: about a quarter of an hour
    python benchmarks/admission.py --cell admission --repeats 3 --seconds 10

The engine is paced: SLOTS requests at once, each of TOKENS tokens on average, GAP seconds apart after FIRST seconds;
others wait in its own queue. The engine, the gateways and each load generator are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gateway import ROOT, gateway

SLOTS, TOKENS, GAP, FIRST = 16, 10, 0.1, 0.1
LIMIT_MS = 1000.0
SLO = f"ttft <= {LIMIT_MS:.0f} ms"
TOO_MUCH, LOUD, SHARES = 1.5, 10, 4
"""Times the rate that holds; times its share; adapters that share that rate."""
QUIET, LOUD_ONE = ("base", "sales"), "support"
ENGINE, LOAD = "engine", "load"
"""Arguments that start the engine's process, and a load generator's."""


@dataclass(frozen=True)
class Answers:
    """What came back of a load: of the answered, whether each met the limit and its whole time in ms; how many were
    refused and how many failed otherwise."""

    first_ms: np.ndarray
    whole_ms: np.ndarray
    refused: int
    failed: int
    seconds: float

    @property
    def sent(self) -> int:
        return len(self.first_ms) + self.refused + self.failed

    @property
    def met(self) -> int:
        """Answered within the limit."""
        return int((self.first_ms <= LIMIT_MS).sum())


@contextlib.contextmanager
def engine() -> Iterator[str]:
    """The paced engine in a process of its own; its URL."""
    process = subprocess.Popen(
        [sys.executable, __file__, ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def _serve_engine() -> None:
    """Be the engine, until the pipe is closed. It tells the time in its queue as vLLM does."""
    from helpers.servers import METRICS, Server  # type: ignore[import-not-found]
    from helpers.threads import listening  # type: ignore[import-not-found]

    class Slots(asyncio.Semaphore):
        """Places, and how long requests waited for them."""

        taken, waited_s = 0, 0.0

        async def acquire(self) -> Literal[True]:
            began = time.perf_counter()
            await super().acquire()
            self.waited_s += time.perf_counter() - began
            self.taken += 1
            return True

    class Paced(Server):  # type: ignore[misc]
        async def answer(self, method: str, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
            if path == "/metrics":
                text = METRICS.format(running=self.running, queued=self.slots.waited_s, count=self.slots.taken)
                return bool(self.whole(writer, 200, text, "text/plain"))
            return bool(await super().answer(method, path, body, writer))

    server = Paced(gap=GAP, first=FIRST, models=(*QUIET, LOUD_ONE))
    server.slots = Slots(SLOTS)
    with listening(server.handle) as url:
        print(url, flush=True)
        sys.stdin.read()


def _load(url: str, rate: float, seconds: float, seed: int, *models: str) -> subprocess.Popen[str]:
    """A load generator that has started."""
    command = [sys.executable, __file__, LOAD, url, str(rate), str(seconds), str(seed), *models]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _answers(process: subprocess.Popen[str]) -> Answers:
    out, _ = process.communicate()
    found = json.loads(out)
    answered = [each for each in found if each["status"] == 200]
    refused = sum(each["status"] == 429 for each in found)
    return Answers(
        np.array([each["first_ms"] for each in answered]),
        np.array([each["whole_ms"] for each in answered]),
        refused,
        len(found) - len(answered) - refused,
        max(each["done"] for each in found),
    )


async def _send(url: str, rate: float, seconds: float, seed: int, models: Sequence[str]) -> list[dict[str, float]]:
    """Requests as they come (Poisson), the models in turn. Times count from when a request was due."""
    import aiohttp

    from peftopt.loadtest import arrivals

    n, dice = max(2, round(rate * seconds)), random.Random(seed)
    lengths = [dice.randint(1, 2 * TOKENS - 1) for _ in range(n)]
    """Of the answers: were they all alike, those that begin together would end together."""
    began = time.perf_counter() + 0.5

    async def ask(session: aiohttp.ClientSession, at: float, model: str, tokens: int) -> dict[str, float]:
        body = {"model": model, "stream": True, "max_tokens": tokens, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": "x"}]
        due = began + at
        await asyncio.sleep(due - time.perf_counter())
        first = math.inf
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            async for piece in answer.content.iter_any():
                if b'"content"' in piece:
                    first = min(first, time.perf_counter())
        done = time.perf_counter()
        told = {"status": answer.status, "whole_ms": 1e3 * (done - due), "done": done - began}
        return told if answer.status != 200 else {**told, "first_ms": 1e3 * (first - due)}

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        due = enumerate(arrivals.arrivals("poisson", rate, n, seed))
        return list(await asyncio.gather(*(ask(session, at, models[i % len(models)], lengths[i]) for i, at in due)))


def highest_rate(url: str, where: Path, seconds: float) -> tuple[float, Path]:
    """The rate at which the service level holds at the engine itself, and the file that says so."""
    prompts, out = where / "prompts.jsonl", where / "found.jsonl"
    prompts.write_text('{"id": "1", "messages": [{"role": "user", "content": "x"}]}\n')
    command = [
        sys.executable,
        "-m",
        "peftopt.cli",
        "load",
        url,
        "--prompts",
        prompts,
        "--new-tokens",
        TOKENS,
        "--quiet",
    ]
    command += ["--find-rate", "--slo", SLO, "--rate", SLOTS / 2, "--duration", seconds, "--model", "base"]
    subprocess.run(list(map(str, [*command, "--out", out])), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return float(json.loads(out.read_text().splitlines()[-1])["values"]["highest_rate"]), out


def admission(with_limits: str, without: str, rate: float, repeats: int, seconds: float) -> None:
    """Too much load, with limits and without."""
    dice, urls = random.Random(0), {"limits": with_limits, "no limits": without}
    found: dict[str, list[Answers]] = {name: [] for name in urls}
    for number in range(repeats):
        for name in dice.sample([*urls], len(urls)):
            found[name].append(_answers(_load(urls[name], TOO_MUCH * rate, seconds, number, "base")))
            _rest(urls[name])
    for name, each in found.items():
        print(
            f"{TOO_MUCH:g} x the rate that holds, {name}: of the answered "
            f"{_shown([a.met / max(1, len(a.first_ms)) for a in each], '.1%')} meet {SLO}; "
            f"refused {_shown([a.refused / a.sent for a in each], '.1%')}; failed {sum(a.failed for a in each)}; "
            f"met {_shown([a.met / a.seconds for a in each], '.2f')} a second, {sum(a.sent for a in each)} requests",
            flush=True,
        )


def fairness(with_limits: str, without: str, rate: float, repeats: int, seconds: float) -> None:
    """Quiet adapters beside one that sends ten times its share. One queue for all is what they have where all ask for
    the same name."""
    share, dice = rate / SHARES, random.Random(0)
    arms = {
        "alone": (with_limits, QUIET, ""),
        "a queue each": (with_limits, QUIET, LOUD_ONE),
        "one queue": (with_limits, ("base",), "base"),
        "no limits": (without, QUIET, LOUD_ONE),
    }
    found: dict[str, list[Answers]] = {name: [] for name in arms}
    for number in range(repeats):
        for name in dice.sample([*arms], len(arms)):
            url, whose, loud = arms[name]
            beside = _load(url, LOUD * share, seconds, 99 + number, loud) if loud else None
            found[name].append(_answers(_load(url, len(QUIET) * share, seconds, number, *whose)))
            if beside:
                _answers(beside)
            _rest(url)
    alone = [_p95(a.whole_ms) for a in found["alone"]]
    for name, each in found.items():
        ratios = [_p95(a.whole_ms) / reference for a, reference in zip(each, alone, strict=True)]
        print(
            f"{len(QUIET)} quiet adapters, {name}: P95 {_shown([_p95(a.whole_ms) for a in each], '.0f')} ms, "
            f"{_shown(ratios, '.2f')} x alone; refused {_shown([a.refused / a.sent for a in each], '.1%')}; "
            f"{sum(a.sent for a in each)} requests",
            flush=True,
        )


def _p95(values: np.ndarray) -> float:
    return float(np.percentile(values, 95)) if len(values) else float("inf")


def _shown(values: Sequence[float], how: str) -> str:
    """The median, and the range over the repeats: of six it is an exact 97 % interval of the median."""
    return f"{np.median(values):{how}} ({min(values):{how}}–{max(values):{how}})"


def _rest(url: str) -> None:
    """Wait until nothing runs or waits any more, a minute at most."""
    import httpx2

    for _ in range(240):
        text = httpx2.get(f"{url}/metrics").text
        if "\npeftopt_running 0.0" in text and "\npeftopt_waiting 0.0" in text:
            return
        time.sleep(0.25)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def busy() -> str:
    """How busy the machine is."""
    return f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, niceness {os.nice(0)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cells = {"admission": admission, "fairness": fairness}
    parser.add_argument("--cell", choices=[*cells], help="one of them alone")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(engine())
        rate, found = highest_rate(url, where, options.seconds)
        print(f"{SLO} holds at {rate:.2f} requests/s at the engine itself; {busy()}", flush=True)
        limited, unlimited = (
            stack.enter_context(gateway(url, _folder(where / name), "--limits", limits))
            for name, limits in (("limited", str(found)), ("unlimited", "off"))
        )
        for name, cell in cells.items():
            if options.cell in (None, name):
                cell(limited, unlimited, rate, options.repeats, options.seconds)
        print(busy(), flush=True)


if __name__ == "__main__":
    what, given = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if what == ENGINE:
        _serve_engine()
    elif what == LOAD:
        sent = _send(given[0], float(given[1]), float(given[2]), int(given[3]), given[4:])
        print(json.dumps(asyncio.run(sent)))
    else:
        main()
