"""Engines for single versions: a merged model has its own process beside the gateway's engine.

A process ends with its version and with the gateway, and the kernel ends it if the gateway is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from peftopt import machine
from peftopt.engines._server import Server
from peftopt.errors import BadInput, MissingEnvironment, PeftoptError
from peftopt.gateway import backends, copies
from peftopt.gateway.backends import Start
from peftopt.gateway.registry import Stored
from peftopt.gateway.routes import Version
from peftopt.gateway.sampling import Engine, Known
from peftopt.gateway.upstream import Upstream

Starter = Callable[[str, Path, str], Start]
"""How an engine is started for a model: by the engine's name, "" for the gateway's own, the model's folder, and the
name that it is served as."""

MORE, LEAST_BYTES = 1.1, 512 * 2**20
"""An engine takes this times its weights, and so much for its process and its cache of keys and values."""


@dataclass
class Running:
    """An engine's process, its URL for requests, the known sizes of its memory, and the seconds of its start."""

    server: Server
    version: Version
    known: Known
    seconds: float = 0.0


class Engines:
    """The processes, by the names of their versions. `starter` None: none can be started."""

    def __init__(self, starter: Starter | None = None, logs: Path = Path()) -> None:
        self.starter, self._logs = starter, logs
        self._running: dict[str, Running] = {}

    def named(self, engine: str, folder: Path, name: str) -> str:
        """The engine for a merged model with this `name`. Raises BadInput for an unknown one, and if none can be
        started, MissingEnvironment if it is not installed."""
        if self.starter is None:
            raise BadInput(f"{folder} is a whole model, and this gateway starts no engines", "put an adapter")
        return self.starter(engine, folder, name).engine

    def where(self, name: str) -> Version | None:
        """A version with the engine that runs for it; None for one on the gateway's engine."""
        return self._running[name].version if name in self._running else None

    def loading_s(self, name: str) -> float | None:
        """Seconds that the start of a version's engine took; None for one on the gateway's engine."""
        return self._running[name].seconds if name in self._running else None

    def sampled(self, upstream: Upstream) -> list[Engine]:
        """The running engines, for the sampler, with connections like these."""
        return [
            Engine(name, upstream.at(running.version.url).get, running.known, running.server.processes)
            for name, running in self._running.items()
            if running.server.alive()
        ]

    async def start(self, stored: Stored) -> Version:
        """Start an engine for a version, unless it runs. Raises MissingEnvironment if the memory is too small,
        WorkerFailed with the engine's last lines if it does not start."""
        assert self.starter
        version = stored.version
        running = self._running.get(version.served)
        if running and running.server.alive():
            return running.version
        await self.stop(version.served)
        folder = Path(stored.folder)
        await asyncio.to_thread(check_room, folder)
        how = self.starter(stored.engine, folder, version.served)
        # By this thread: the kernel ends the process with the thread that started it.
        server = backends.launch(how, self._logs / f"engine-{version.id}.log")
        running = Running(server, replace(version, url=how.url), Known(how.weights_bytes, how.kv_bytes))
        self._running[version.served] = running
        try:
            running.seconds = await asyncio.to_thread(server.ready, how.ready_s)
        except BaseException:
            await self.stop(version.served)
            raise
        return running.version

    async def stop(self, name: str) -> None:
        """End a version's engine, if it has one."""
        if running := self._running.pop(name, None):
            await asyncio.to_thread(running.server.stop)

    async def stop_all(self) -> None:
        """End all of them."""
        await asyncio.gather(*(self.stop(name) for name in list(self._running)))

    def dead(self) -> dict[str, str]:
        """The versions with a dead engine, and its last lines."""
        return {name: each.server.why() for name, each in self._running.items() if not each.server.alive()}


def check_room(folder: Path) -> None:
    """Raises MissingEnvironment if another engine with this model does not fit in this machine's memory."""
    weights = sum(file.stat().st_size for file in copies.of_model(folder) if file.suffix in (".safetensors", ".gguf"))
    needed, free = round(MORE * weights) + LEAST_BYTES, machine.free_memory()
    if needed > free:
        what = f"a second engine for {folder.name} takes about {_gib(needed)}: its weights are {_gib(weights)}"
        where = "in the fullest GPU" if machine.gpus() else "in memory"
        hint = "remove a version, put the adapter in place of the merged model, or let the first engine take less"
        raise MissingEnvironment(f"{what}, and {_gib(free)} are free {where}", hint)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def as_text(error: PeftoptError) -> str:
    """An error and its hint, in a line."""
    return f"{error.message}; {error.hint}" if error.hint else error.message
