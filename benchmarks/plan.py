"""Does the plan agree with what is measured? Each option is served for real, and gets the plan's own load.

    python benchmarks/plan.py
    python benchmarks/plan.py --engine vllm --memory 16GB --rounds 1

For each number of adapters: all apart on one engine, and all merged on an engine each, or as many as fit beside the
others. Both get the same requests at the same times (Poisson, Zipf), and the rule of docs/planning.md picks the winner
from what was measured, as the plan picked it from times of single batches. All adapters are one and the same, under
several names: what an adapter says makes no difference to the time it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftopt.diagnose.measuring import company
from peftopt.diagnose.measuring.cells import Launch
from peftopt.diagnose.measuring.serving import wanted
from peftopt.diagnose.planning import options as ways
from peftopt.diagnose.planning import plan, planning, speed_asking
from peftopt.diagnose.planning.options import Option, Room
from peftopt.diagnose.planning.plan import Outcome
from peftopt.diagnose.planning.simulation import Due
from peftopt.diagnose.planning.speeds import Speeds
from peftopt.diagnose.planning.traffic import Traffic
from peftopt.diagnose.setting import Setting
from peftopt.engines._server import Server
from peftopt.gateway import backends
from peftopt.loadtest import arrivals, sender
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.loadtest.sender import Planned
from peftopt.loadtest.summary import Request
from peftopt.redaction import ENGINE_KEY

TIMEOUT_S = 600.0

HEADER = (
    *("adapters", "rps", "option", "goodput/s predicted", "measured", "P50 ms predicted", "measured"),
    *("memory predicted", "measured", "the plan picks", "measured winner"),
)


@dataclass(frozen=True)
class Place:
    """Where an adapter answers: the server's URL, and its name there."""

    url: str
    name: str


@dataclass(frozen=True)
class Bench:
    """What is compared: times that were measured, merged copies on disk, how many made-up words a prompt has, and how
    long each load is."""

    speeds: Speeds
    setting: Setting
    rank: int
    copies: Sequence[Path]
    work: Path
    words: int
    seconds: float
    rounds: int

    @property
    def adapter(self) -> str:
        return str(Path(self.setting.adapters[self.setting.first]).resolve())


def tell(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- for real ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(option: Option, bench: Bench) -> AsyncIterator[tuple[list[Place], list[Server]]]:
    """The servers of an option, and where each adapter answers."""
    rest = [f"adapter-{place}" for place in range(option.merged, option.adapters)]
    folders = {name: bench.adapter for name in rest}
    launches = [(Launch(model="merged"), str(bench.copies[place])) for place in range(option.merged)]
    if rest:
        launches.append((Launch(adapters=tuple(rest), lora=True, slots=len(rest), rank=bench.rank), ""))
    servers: list[Server] = []
    try:
        for number, (launch, merged) in enumerate(launches):  # in turn: a port is free until its server has taken it
            how = backends.start(wanted(bench.setting, launch, folders, merged))
            servers.append(backends.launch(how, bench.work / f"server-{number}.log"))
            await asyncio.to_thread(servers[-1].ready, TIMEOUT_S)
        places = [Place(server.url, "base") for server in servers[: option.merged]]
        places += [Place(servers[-1].url, name) for name in rest]
        for place in places:
            await warm(place, bench.adapter)
        yield places, servers
    finally:
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))


async def warm(place: Place, adapter: str) -> None:
    """Load an adapter that the server lacks, and ask it once."""
    async with Client(Target(place.url, "completions", key_env=ENGINE_KEY, timeout_s=TIMEOUT_S)) as client:
        known = {str(model["id"]) for model in await client.models()}
        if place.name not in known and (error := await client.lora("load", place.name, adapter)):
            raise SystemExit(f"{place.name} is not loaded: {error}")
        reply = await client.ask(prompt(16, 0), place.name, 2, stop=False)
        if reply.error:
            raise SystemExit(f"{place.name}: {reply.error}")


async def loaded(places: Sequence[Place], due: Sequence[Due], words: int, seed: int) -> list[Request]:
    """The plan's requests, sent when they are due; in their order, named by their adapter's place."""
    async with contextlib.AsyncExitStack() as stack:
        clients: dict[str, Client] = {}
        planned: dict[str, list[Planned]] = {}
        for number, each in enumerate(due):
            place = places[each.adapter]
            if place.url not in clients:
                target = Target(place.url, "completions", key_env=ENGINE_KEY, timeout_s=TIMEOUT_S)
                clients[place.url] = await stack.enter_async_context(Client(target))
            text = prompt(words, seed * 100_000 + number)
            request = Planned(each.at, str(each.adapter), place.name, text, each.new_tokens)
            planned.setdefault(place.url, []).append(request)
        sends = [sender.whole(clients[url], rows, fixed=True) for url, rows in planned.items()]
        played = await asyncio.gather(*sends)
    requests = [replace(request, model=request.id) for one in played for request in one.requests]
    return sorted(requests, key=lambda request: request.scheduled)


def prompt(words: int, seed: int) -> Prompt:
    """A made-up prompt that no other request has."""
    text = arrivals.made_up(words, seed)
    return Prompt(({"role": "user", "content": text},), text)


# ---- one plan ----------------------------------------------------------------------------------


def compared(planned: Traffic, space: Room) -> list[Option]:
    """All apart, and all merged or as many as fit."""
    apart = Option(planned.adapters, 0, 1)
    everything = Option(planned.adapters, planned.adapters, 0)
    if space.fits(everything):
        return [apart, everything]
    beside = space.copies_beside(planned.adapters)
    tell(f"{space.copies} of {planned.adapters} merged copies fit, {beside} beside an engine with the others")
    return [apart, Option(planned.adapters, beside, 1)] if beside > 0 else [apart]


async def agreement(planned: Traffic, bench: Bench) -> list[list[str]]:
    """Rows of the table: one plan, predicted and measured for each option."""
    space = ways.room(bench.speeds, planned)
    options = compared(planned, space)
    n = max(40, round(planned.rps * bench.seconds))
    dues = [plan.requests(planned, n, 100 + number) for number in range(bench.rounds)]
    predicted = [
        {
            option: plan.outcome(option, times, bench.speeds.rows, planned, space, dues[number % len(dues)])
            for option in options
        }
        for number, times in enumerate(plan.draws_of(bench.speeds, plan.DRAWS, 0))
    ]
    choices = [plan.choose(each, space) for each in predicted]
    measured: list[dict[Option, Outcome]] = []
    held: dict[Option, int] = {}
    for number, due in enumerate(dues):
        outcomes = {}
        for option in options if number % 2 else reversed(options):
            async with served(option, bench) as (places, servers):
                requests = await loaded(places, due, bench.words, number)
                held[option] = sum(speed_asking.memory(server) for server in servers)
            outcomes[option] = plan.measured(requests, planned)
            failed = sum(bool(request.error) for request in requests)
            goodput = f"{outcomes[option].goodput:.2f} of {planned.rps:g} requests/s"
            p50 = f"P50 {outcomes[option].latency_ms:.0f} ms"
            tell(f"{planned.adapters} adapters, {option.name}: {goodput}, {p50}, {failed} failed")
        measured.append(outcomes)
    winner = plan.choose({option: middle([each[option] for each in measured]) for option in options}, space)
    picked = max([*options, None], key=choices.count)
    share = choices.count(picked) / len(choices)
    return [
        [
            str(planned.adapters),
            f"{planned.rps:g}",
            option.name,
            *figures([each[option].goodput for each in predicted], [each[option].goodput for each in measured], 2),
            *figures(
                [each[option].latency_ms for each in predicted], [each[option].latency_ms for each in measured], 0
            ),
            f"{space.needed(option) / 1e9:.2f} GB",
            f"{held[option] / 1e9:.2f} GB",
            f"yes, in {share:.0%} of draws" if option == picked else "",
            "yes" if option == winner else "",
        ]
        for option in options
    ]


def middle(values: Sequence[Outcome]) -> Outcome:
    """The median of several loads, each figure by itself."""
    rows = [(each.goodput, each.latency_ms, each.ttft_ms) for each in values]
    goodput, latency, ttft = (statistics.median(column) for column in zip(*rows, strict=True))
    return Outcome(goodput, latency, ttft, values[0].counts)


def figures(predicted: Sequence[float], measured: Sequence[float], places: int) -> list[str]:
    """The median of what was predicted, with its interval, and of what was measured, with all loads."""
    draws = plan.spread(predicted)
    each = ", ".join(f"{value:.{places}f}" for value in measured)
    middle = statistics.median(measured)
    return [
        f"{draws.estimate:.{places}f} ({draws.low:.{places}f}–{draws.high:.{places}f})",
        f"{middle:.{places}f}" + (f" ({each})" if len(measured) > 1 else ""),
    ]


# ---- all of it ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="models/smollm2-135m-instruct")
    parser.add_argument("--adapter", default="demo/adapter")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 3, 8])
    parser.add_argument("--rps", type=float, nargs="*", default=[1.0])
    parser.add_argument("--slo", action="append", help="default: ttft <= 500 ms")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=48, help="made-up words of a prompt")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--memory", default="", help="of the plan, such as 16GB; what is free by default")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of each server; 0 = all cores")
    parser.add_argument("--times", default="", help="a folder with the engine's times, or to keep them in")
    arguments = parser.parse_args()
    adapters = {"adapter": arguments.adapter}
    setting = Setting(arguments.base, adapters, arguments.engine, threads=arguments.threads)
    levels = " ".join(f"slo='{level}'" for level in arguments.slo or ["ttft <= 500 ms"])
    memory = f"memory={arguments.memory}" if arguments.memory else ""
    common = f"{levels} zipf={arguments.zipf} new={arguments.new} {memory}"
    with tempfile.TemporaryDirectory(prefix="peftopt-") as folder:
        work = Path(folder)
        first = planning.read(f"adapters=1 rps=1 prompt={arguments.prompt} {common}", None)
        started = time.monotonic()
        speeds = speed_asking.speeds(setting, first, Path(arguments.times or work / "times"), tell)
        print(f"times of the engine: {time.monotonic() - started:.0f} s\n{speeds}\n", flush=True)
        names = company.gathered(setting, work / "company", tell)
        merged = Path(company.merged(setting, names, work, tell))
        copies = [merged, *(work / f"copy-{number}" for number in range(1, max(arguments.adapters)))]
        for copy in copies[1:]:
            shutil.copytree(merged, copy)
        bench = Bench(speeds, setting, names.rank, copies, work, arguments.prompt, arguments.seconds, arguments.rounds)
        common += f" prompt={max(speeds.merged.prefill)}"  # as many as the server counted
        lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
        for count in arguments.adapters:
            for rps in arguments.rps:
                planned = planning.read(f"adapters={count} rps={rps} {common}", None)
                planned = replace(planned, memory_bytes=first.memory_bytes)
                lines += [f"| {' | '.join(row)} |" for row in asyncio.run(agreement(planned, bench))]
                print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
