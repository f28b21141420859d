"""The servers of a diagnosis: started for its cells, up together, asked in turns, ended with it."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from peftopt import corpus
from peftopt.diagnose.measuring.asking import Asker
from peftopt.diagnose.measuring.cells import BASE, Launch
from peftopt.diagnose.setting import LLAMACPP, OURS, VLLM, Setting
from peftopt.engines._server import Server, free_port
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.forking import ForkServer
from peftopt.gateway import backends
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target
from peftopt.records import Model
from peftopt.redaction import ENGINE_KEY

REQUEST_S = 120.0
"""So long a request may take."""


class Servers:
    """Servers by their launches. Use as an async context manager: all are ended with it.

    `folders`: every adapter that a launch may name, by its served name, in a folder that the server can read; `merged`:
    the folder of the merged model. Both grow while a diagnosis makes them. `forks`: what our own servers are copies of.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        folders: Mapping[str, str],
        tell: Callable[[str], None],
        forks: ForkServer | None = None,
    ) -> None:
        self.setting, self.folder, self.tell, self.forks = setting, folder, tell, forks
        self.folders = dict(folders)
        self.merged = ""
        self._rows = corpus.read(setting.prompts) if setting.prompts else []
        self._stack = AsyncExitStack()
        self._ports: set[int] = set()
        self._askers: dict[Launch, Asker] = {}
        self._clients: dict[Launch, Client] = {}
        self.servers: dict[Launch, Server] = {}
        """Those that were started here, whose processes are ours to look at."""

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def up(self, launches: Sequence[Launch]) -> None:
        """Start those that are not up, at the same time, and ask every name that they serve once.

        Raises BadInput for a model that the engine cannot serve, MissingEnvironment if it is not installed,
        WorkerFailed with a server's last lines if it does not start.
        """
        missing = [launch for launch in dict.fromkeys(launches) if launch not in self._askers]
        started = {launch: self._start(launch) for launch in missing}
        await asyncio.gather(*(self._ready(launch, how) for launch, how in started.items()))

    async def close(self, launch: Launch) -> None:
        """End a server that was started here, before the others."""
        self._askers.pop(launch, None)
        client = self._clients.pop(launch, None)
        if client:
            await client.__aexit__()
        server = self.servers.pop(launch, None)
        if server:
            await asyncio.to_thread(server.stop)

    def asker(self, launch: Launch) -> Asker:
        """The client that asks this server, which must be up."""
        return self._askers[launch]

    def client(self, launch: Launch) -> Client:
        """The connections to this server, which must be up."""
        return self._clients[launch]

    def messages(self, count: int) -> list[Sequence[Mapping[str, str]]]:
        """The first of the user's prompts; [] without any."""
        return [row.messages for row in self._rows[:count]]

    def called(self, name: str) -> str:
        """A server's name for a name of a load."""
        return self.setting.base_name if name == BASE else name

    def _start(self, launch: Launch) -> str:
        """Start a server, or name the one that runs; its URL."""
        setting = self.setting
        if setting.runs_elsewhere:
            return setting.engine.rstrip("/")
        if setting.base_name != BASE:
            raise BadInput("--base-name is for a server that runs already", "leave it out: the base is served as base")
        how = backends.start(wanted(setting, launch, self.folders, self.merged), self._port())
        log = self.folder / "logs" / f"server-{len(self.servers)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        server = backends.launch(how, log, self.forks)
        self.servers[launch] = server
        self._stack.push_async_callback(self._stopped, server)
        return how.url

    def _port(self) -> int:
        """A free port that no server which is just starting will take."""
        port = free_port()
        while port in self._ports:
            port = free_port()
        self._ports.add(port)
        return port

    async def _stopped(self, server: Server) -> None:
        await asyncio.to_thread(server.stop)

    async def _ready(self, launch: Launch, url: str) -> None:
        """Wait until it answers, load its adapters, and ask each name once: the first request pays for what is set up
        at a first request, and shows which fields the server takes."""
        server = self.servers.get(launch)
        if server:
            seconds = await asyncio.to_thread(server.ready, 600.0)
            self.tell(f"{described(launch)}: ready after {seconds:.1f} s")
        protocol = "chat" if self._rows else "completions"
        key_env = ENGINE_KEY if server else ""
        target = Target(url, protocol, key_env=key_env, timeout_s=REQUEST_S)
        client = await self._stack.enter_async_context(Client(target))
        self._clients[launch] = client
        names = {name: self.called(name) for name in (BASE, *launch.adapters)}
        await self._load(launch, client)
        self._askers[launch] = Asker(client, names, self._rows)
        for name in names:
            await self._askers[launch].warm(name)

    async def _load(self, launch: Launch, client: Client) -> None:
        """Load the adapters that the server does not serve yet. Raises BadInput for one that it refuses."""
        if not launch.adapters:
            return
        known = {str(model["id"]) for model in await client.models()}
        for name in launch.adapters:
            if name not in known and (error := await client.lora("load", name, self.folders[name])):
                hint = "give an adapter of this base that the engine can serve, or merge it: peftopt merge"
                raise BadInput(f"the server does not load {name}: {error}", hint)


def wanted(setting: Setting, launch: Launch, folders: Mapping[str, str], merged: str) -> backends.Wanted:
    """What to start for a launch. Raises BadInput for a merged model that was not made, or an engine that cannot serve
    it."""
    if launch.model == "merged" and not merged:
        raise BadInput("there is no merged model to serve", "merge the adapter first: peftopt merge")
    model = Model(str(Path(merged if launch.model == "merged" else setting.base).resolve()))
    plain = backends.Wanted(engine=setting.engine, model=model, threads=setting.threads, drain_s=5.0)
    if setting.engine == OURS:
        return _ours(plain, launch, folders)
    if setting.engine == VLLM:
        return _vllm(plain, launch, folders)
    if setting.engine == LLAMACPP:
        return _llamacpp(plain, launch)
    raise BadInput(f"no engine named {setting.engine!r}", "known: eager, vllm, llamacpp_server, or a server's URL")


def _ours(plain: backends.Wanted, launch: Launch, folders: Mapping[str, str]) -> backends.Wanted:
    loaded = [f"--adapter {shlex.quote(f'{name}={folders[name]}')}" for name in launch.adapters]
    most = len(launch.adapters) or 1
    return replace(plain, running=launch.rows, waiting=64 * most, args=" ".join(loaded))


def _vllm(plain: backends.Wanted, launch: Launch, folders: Mapping[str, str]) -> backends.Wanted:
    asked = replace(plain, running=launch.rows, prefix_caching=launch.prefix_caching)
    if not launch.lora:
        return asked
    return replace(asked, adapters=1, rank=launch.rank, slots=launch.slots)


def _llamacpp(plain: backends.Wanted, launch: Launch) -> backends.Wanted:
    if launch.adapters:
        raise MissingEnvironment("llama.cpp's server tells no adapters apart by name", "ask eager or vllm")
    return replace(plain, running=launch.rows)


def described(launch: Launch) -> str:
    """A launch in a few words."""
    what = "merged model" if launch.model == "merged" else "base"
    return f"{what} with {', '.join(launch.adapters)}" if launch.adapters else what
