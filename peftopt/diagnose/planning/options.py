"""The ways to serve several adapters: their engines, devices and memory, and the engine of each request. Pure.

Merging and unmerging in one engine is not an option: no serving engine can do it, and each switch would stop all
others' requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from peftopt.diagnose.planning.simulation import Due, Engine, simulate
from peftopt.diagnose.planning.speeds import Drawn, Speeds
from peftopt.diagnose.planning.traffic import Traffic
from peftopt.loadtest.summary import Request
from peftopt.metrics import counted

Family = Literal["apart", "replicas", "hottest merged", "all merged"]

MOST_REPLICAS = 2
"""Engines alike on one device: more of them share the same compute."""


@dataclass(frozen=True)
class Option:
    """The `merged` most popular of the `adapters` have an engine each; `engines` on every device serve the others,
    unmerged."""

    adapters: int
    merged: int
    engines: int

    @property
    def family(self) -> Family:
        """The kind of option."""
        if self.merged == self.adapters:
            return "all merged"
        if self.merged:
            return "hottest merged"
        return "replicas" if self.engines > 1 else "apart"

    @property
    def name(self) -> str:
        """Its name for readers."""
        match self.family:
            case "apart":
                return "all apart"
            case "replicas":
                return f"all apart, on {self.engines} engines a device"
            case "hottest merged":
                return f"hottest {self.merged} merged, rest apart"
            case _:
                return "all merged"

    @property
    def apart(self) -> int:
        """The number of unmerged adapters."""
        return self.adapters - self.merged


@dataclass(frozen=True)
class Room:
    """Memory of one device, and an engine's memory under the plan's lengths."""

    memory_bytes: int
    devices: int
    merged_bytes: int
    apart_bytes: int
    adapter_bytes: int

    def needed(self, option: Option) -> int:
        """Bytes on the fullest device."""
        copies = -(-option.merged // self.devices)
        rest = option.engines * (self.apart_bytes + option.apart * self.adapter_bytes)
        return copies * self.merged_bytes + rest

    def fits(self, option: Option) -> bool:
        """Whether every device has the memory."""
        return self.needed(option) <= self.memory_bytes

    def spare(self, option: Option) -> bool:
        """Whether a new copy can start while the old one still answers."""
        return self.needed(option) + self.merged_bytes <= self.memory_bytes

    @property
    def copies(self) -> int:
        """The number of merged engines that fit, with nothing else."""
        return self.devices * (self.memory_bytes // self.merged_bytes)

    def copies_beside(self, adapters: int) -> int:
        """The number of merged engines that fit beside an engine on every device that serves the rest of the adapters
        apart; -1 if even that one does not fit."""
        for merged in range(min(adapters - 1, self.copies), -1, -1):
            if self.fits(Option(adapters, merged, 1)):
                return merged
        return -1


def room(speeds: Speeds, traffic: Traffic) -> Room:
    """The memory: of the measured engines, and the KV cache that the plan's longest requests take beyond that."""
    more = max(0, speeds.rows * traffic.longest - speeds.kv_tokens) * speeds.kv_bytes_per_token
    return Room(
        memory_bytes=traffic.memory_bytes,
        devices=traffic.gpus,
        merged_bytes=speeds.engine_bytes + more,
        apart_bytes=speeds.apart_bytes + more,
        adapter_bytes=speeds.adapter_bytes,
    )


def options(adapters: int, space: Room) -> list[Option]:
    """Every option, whether it fits or not. For "hottest merged": 1, 2, 4, … and as many as fit."""
    counts, most = [], space.copies_beside(adapters)
    merged = 1
    while merged < min(adapters, most + 1):
        counts.append(merged)
        merged *= 2
    if 0 < most < adapters:
        counts.append(most)
    hottest = [Option(adapters, merged, 1) for merged in sorted(set(counts))]
    return [
        Option(adapters, 0, 1),
        *(Option(adapters, 0, engines) for engines in range(2, MOST_REPLICAS + 1)),
        *hottest,
        Option(adapters, adapters, 0),
    ]


def serve(option: Option, drawn: Drawn, rows: int, devices: int, due: Sequence[Due], others: int = 0) -> list[Request]:
    """The simulated requests, in their order. Each device is simulated by itself: a merged adapter's requests go to its
    engine, others to the engines with adapters in turn. `others`: see simulation.simulate."""
    places = list(_places(option, devices, due))
    answered: dict[int, Request] = {}
    for device in range(devices):
        copies = len(range(device, option.merged, devices))
        engines = [Engine(drawn.merged, rows)] * copies + [Engine(drawn.apart, rows)] * option.engines
        numbers = [number for number, (where, _) in enumerate(places) if where == device]
        routes = [places[number][1] for number in numbers]
        requests = simulate([due[number] for number in numbers], routes, engines, drawn.sharing, others)
        answered.update(zip(numbers, requests, strict=True))
    return [answered[number] for number in range(len(due))]


def _places(option: Option, devices: int, due: Sequence[Due]) -> Iterator[tuple[int, int]]:
    """For each request the device, and which of its engines: first the merged ones, then those with adapters."""
    turn = 0
    for request in due:
        if request.adapter < option.merged:
            yield request.adapter % devices, request.adapter // devices
            continue
        device, engine = turn % devices, turn // devices % option.engines
        turn += 1
        yield device, len(range(device, option.merged, devices)) + engine


def described(option: Option, traffic: Traffic) -> str:
    """What to start, in words."""
    copies = ", ".join(traffic.name(place) for place in range(min(option.merged, 3)))
    copies += ", …" if option.merged > 3 else ""
    servers = counted(option.engines * traffic.gpus, "engine")
    match option.family:
        case "all merged":
            return f"merge every adapter, and start an engine for each ({copies})"
        case "hottest merged":
            return f"merge {copies}, start an engine for each, and {servers} with the other {option.apart} adapters"
        case _:
            return f"keep the adapters apart, on {servers}"
