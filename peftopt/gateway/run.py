"""A gateway from its start to its end: the engine, the two applications, what runs beside them, and the end in order.

engine starts -> adapters load and answer as themselves -> ready -> SIGTERM -> no new requests -> drain -> the end
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftopt.engines._server import Server
from peftopt.errors import BadInput, PeftoptError
from peftopt.gateway import admin, backends, keys, sampling
from peftopt.gateway.admission import Admission
from peftopt.gateway.app import App
from peftopt.gateway.asking import Asker, vocabulary_of
from peftopt.gateway.backends import Start
from peftopt.gateway.engines import Engines, Starter
from peftopt.gateway.heads import READ_S
from peftopt.gateway.keys import Keys
from peftopt.gateway.limits import Limits
from peftopt.gateway.lines import Log, Origin
from peftopt.gateway.listening import address, listening, operated, socket_of
from peftopt.gateway.lives import Lives
from peftopt.gateway.lives import Settings as LifeSettings
from peftopt.gateway.metrics import Metrics
from peftopt.gateway.rechecks import Rechecks
from peftopt.gateway.registry import Registry, is_served_name, open_registry
from peftopt.gateway.routes import Route
from peftopt.gateway.sampling import Engine, Known, Sampler
from peftopt.gateway.shared import Settings, Shared
from peftopt.gateway.tracing import Traces
from peftopt.gateway.upstream import Timeouts, Upstream, unless
from peftopt.gateway.workers import messages, shares
from peftopt.gateway.workers.supervisor import Plan, Supervisor
from peftopt.loadtest import client as clients
from peftopt.loadtest.client import Client
from peftopt.loadtest.protocols import Target
from peftopt.redaction import engine_key

LOOK_EVERY_S, RECONCILE_EVERY_S, SAMPLE_EVERY_S, JUDGE_EVERY_S = 0.5, 10.0, 2.0, 1.0
LINES_S = 5.0
"""The longest that the end waits for the last lines of the log."""
AGAIN_S, AGAIN_AT_MOST_S = 1.0, 60.0
"""A dead engine is started again after so long, each time after twice that."""


@dataclass(frozen=True)
class Config:
    """What to run. `upstream`: the URL of a server that runs already, else `start` makes the engine's command line for
    a highest rank; `second`: starts an engine for a merged model; `adapters` by name; `admin`: "unix:PATH" or
    "HOST:PORT"; `allowed`: folders that adapters may come from; `slos_s`: limits of the decision in seconds, each the
    bound of a bucket; `workers` processes answer users; with `join`, another program starts them, and they join at that
    socket. `keys_file`: read again on SIGHUP; `read_s`: seconds for a request to arrive; `metrics`: users may read
    them; `log_text`: prompts and answers are logged; `log_keep`: number of rotated log files to keep, 0 = all; `trace`:
    a collector's URL; `origins`: the run of each name that a run chose. `check_every_s`: seconds between checks whether
    each version answers as itself, 0 = never; `refuse`: one that does not answers no users. `ready`: called with data
    whenever the gateway is ready."""

    state: Path
    host: str = "127.0.0.1"
    port: int = 8000
    admin: str = ""
    admin_key: str = ""
    upstream: str = ""
    start: Callable[[Registry], Start] | None = None
    second: Starter | None = None
    base: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    allowed: Sequence[Path] = ()
    limits: Limits = field(default_factory=Limits)
    per_adapter: int = 0
    per_key: int = 0
    keys: Keys = field(default_factory=Keys)
    timeouts: Timeouts = field(default_factory=Timeouts)
    lives: LifeSettings = field(default_factory=LifeSettings)
    log: str = ""
    drain_s: float = 30.0
    slos_s: Sequence[float] = ()
    most_body_bytes: int = Settings.most_body_bytes
    workers: int = 1
    join: str = ""
    keys_file: Path | None = None
    read_s: float = READ_S
    metrics: bool = True
    log_text: bool = False
    log_keep: int = 0
    trace: str = ""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    check_every_s: float = 0.0
    refuse: bool = False
    ready: Callable[[Mapping[str, object]], None] = lambda _: None


def run(config: Config, tell: Callable[[str], None]) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code. Raises BadInput and MissingEnvironment for errors at the
    start, WorkerFailed with the engine's last lines if it does not start or answers wrongly."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Gateway(config, tell).whole())


class Gateway:
    """One gateway before one engine."""

    def __init__(self, config: Config, tell: Callable[[str], None]) -> None:
        self.config, self.tell = config, tell
        self.registry = open_registry(config.state)
        self.metrics = Metrics(config.slos_s)
        several = config.workers > 1 or bool(config.join)
        self.log = Log(config.log, shared=several, keep=config.log_keep)
        self.traces = Traces(config.trace, config.host, config.port) if config.trace else None
        self.engine: Server | None = None
        self.supervisor: Supervisor | None = None
        """Of the workers, where there are several."""
        self.ended = asyncio.Event()
        self.at_once = asyncio.Event()
        """Nothing is waited for: the end was asked for twice."""
        self.starting = False
        """Whether a dead engine is being started again."""
        self.in_terminal = os.isatty(0)
        self._show_limits()

    async def whole(self) -> int:
        """Start, serve, drain, end."""
        config = self.config
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end)
        brought = self._bring()  # first: the engine is started for their number and their ranks
        how = await self._how()
        settings = replace(
            config.lives, base=config.base, max_rank=how.max_rank, drain_s=config.drain_s, key_env=how.key_env
        )
        engines = Engines(config.second, config.state.resolve())
        lives = Lives(how.url, self.registry, settings, self.metrics, how.brings, how.loads, self.tell, engines)
        key = engine_key() if how.key_env else ""
        async with Upstream(how.url, config.timeouts, key) as upstream:
            admission = Admission(config.limits, config.per_adapter, config.per_key)
            own = Settings(
                config.most_body_bytes,
                read_s=config.read_s,
                metrics=config.metrics,
                log_text=config.log_text,
                most_running=how.most_running,
                origins=self._origins(how),
            )
            self.shared = Shared(
                upstream, lives, admission, config.keys, self.metrics, self.log, own, traces=self.traces
            )
            asker = Asker(self.shared, vocabulary_of(config.base), self._busy, self._waiting)
            lives.trials.asker = asker
            lives.loader.write = self.shared.write
            self.rechecks = Rechecks(lives, asker, config.refuse)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up)
            async with self._listening(lives):
                try:
                    await unless(self.ended.wait(), self._start(how, lives))
                    for line in brought:
                        self.tell(line)
                    if not self.ended.is_set():
                        await self._serve(how, lives)
                finally:
                    await self._drain()
                    await engines.stop_all()
                    if self.engine:
                        await self._stop(self.engine)
            await self._lines()
        self.log.close()
        if self.traces:
            await asyncio.to_thread(self.traces.close)
        return 0

    def _end(self) -> None:
        """The end is asked for; the second time, nothing is waited for."""
        if self.ended.is_set():
            self.at_once.set()
        self.ended.set()

    def _hung_up(self) -> None:
        """The terminal is gone, which ends what runs in it; where it is there, somebody asks for the files again."""
        if self.in_terminal and not os.isatty(0):
            self._end()
        else:
            self.again()

    def again(self) -> None:
        """Read the keys again, and open the log again: it may have been moved."""
        self.log.reopen()
        if self.config.keys_file:
            self._read_keys(self.config.keys_file)
        if self.supervisor:
            self.supervisor.again(shares.keys_of(self.shared.keys, self.config.workers))

    def _read_keys(self, file: Path) -> None:
        """The keys as the file has them now; as they were where it has none."""
        try:
            renewed = keys.parse(file.read_text(encoding="utf-8"), str(file))
        except (BadInput, OSError, UnicodeDecodeError) as error:
            self.tell(f"the keys stay as they were: {error}")
            return
        self.shared.keys = keys.renewed(self.shared.keys, renewed)
        self.tell(f"{file} holds {len(renewed.known)} keys")

    # ---- the start

    async def _how(self) -> Start:
        config = self.config
        if config.start:
            return config.start(self.registry)
        async with Client(Target(config.upstream)) as client:
            models = await client.models()
        names = [str(model["id"]) for model in models]
        ours = set(self.registry.versions)
        brings = {name: name for name in names if name not in ours and not is_served_name(name)}
        return Start((), {}, config.upstream.rstrip("/"), brings, loads=clients.labels(models) in ("vllm", "peftopt"))

    def _origins(self, how: Start) -> dict[str, Origin]:
        """The run that decided to serve a version, by the version's name at the engine."""
        names = dict(how.brings)
        for name, folder in self.config.adapters.items():
            names[name] = self.registry.copy(name, folder).version.served
        return {names[name]: origin for name, origin in self.config.origins.items() if name in names}

    def _bring(self) -> list[str]:
        """Put the adapters of the command line on record; what a reader should know of it. An adapter that was put
        later stays: a restart takes nothing back."""
        said = []
        for name, folder in self.config.adapters.items():
            stored = self.registry.copy(name, folder)
            route = self.registry.table.routes.get(name)
            if route and route.live.id not in ("", stored.version.id):  # "": another engine brought it
                said.append(
                    f"{name} is served as {route.live.served}, put later than --adapter {folder}; to go back: "
                    f"peftopt adapters put {name}={folder}"
                )
                continue
            self.registry.keep(stored, state="live")
            if route is None or not route.live.id:
                self.registry.route(name, Route(stored.version))
        return said

    async def _start(self, how: Start, lives: Lives) -> None:
        """The engine, where it is ours, and the adapters on it."""
        started = time.perf_counter()
        if how.command:
            self.tell(f"starting the engine: its log is {self._engine_log}")
            self.engine = backends.launch(how, self._engine_log)
            await asyncio.to_thread(self.engine.ready, how.ready_s)
            seconds = time.perf_counter() - started
            self.metrics.loading.set(seconds)
            self.shared.settings.model_loading_time = seconds
        for note in await lives.upkeep.begin():
            self.tell(note)
        self.metrics.ready.set(1)
        url, names = f"http://{self.config.host}:{self.config.port}", [*self.registry.table.routes]
        seconds = time.perf_counter() - started
        self.tell(
            f"{url} serves {', '.join(names)}, ready after {seconds:.1f} s; adapters: {self.config.admin}; "
            "Ctrl-C ends it"
        )
        self.config.ready({"url": url, "serves": names, "admin": self.config.admin, "seconds": seconds})

    @property
    def _engine_log(self) -> Path:
        return self.config.state.resolve() / "engine.log"

    def _show_limits(self) -> None:
        limits = self.config.limits
        for what, value in (("running", limits.running), ("waiting", limits.waiting), ("wait_s", limits.wait_ms / 1e3)):
            self.metrics.limit.labels(what).set(value)

    # ---- while it runs

    async def _serve(self, how: Start, lives: Lives) -> None:
        """Until the end is asked for, with what runs beside: the engine is watched and sampled, routes are kept."""
        beside = [
            asyncio.ensure_future(self._keep_alive(how, lives)),
            asyncio.ensure_future(self._reconcile(lives)),
            asyncio.ensure_future(self._sample(how, lives)),
            asyncio.ensure_future(self._judge(lives)),
            asyncio.ensure_future(self._mend(lives)),
        ]
        if self.config.check_every_s:
            beside.append(asyncio.ensure_future(self._recheck()))
        try:
            await self.ended.wait()
        finally:
            lives.trials.close()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _keep_alive(self, how: Start, lives: Lives) -> None:
        """Start a dead engine again: it is ready when its adapters have answered."""
        pause = AGAIN_S
        while self.engine:
            await asyncio.sleep(LOOK_EVERY_S)
            if self.engine.alive():
                continue
            self.starting, lives.ready = True, False
            self.metrics.ready.set(0)
            self.metrics.restarts.inc()
            self.tell(f"the engine has died: {self.engine.why()}; it is started again in {pause:g} s")
            self.registry.tell("engine died", why=self.engine.why())
            await asyncio.sleep(pause)
            await asyncio.to_thread(self.engine.stop)
            pause = min(2 * pause, AGAIN_AT_MOST_S)
            with self._told():
                await self._start(how, lives)
                pause = AGAIN_S
            self.starting = False

    async def _reconcile(self, lives: Lives) -> None:
        """What the engine lost is loaded again, what nobody needs is unloaded."""
        while True:
            await asyncio.sleep(RECONCILE_EVERY_S)
            if self.starting or (self.engine and not self.engine.alive()):
                continue
            answers = False
            with self._told():
                if lives.ready:
                    for name in await lives.upkeep.reconcile():
                        self.tell(f"the engine had lost {name}: it is loaded again")
                else:  # a server of somebody else's that was away, or one of ours that did not answer as it should
                    for note in await lives.upkeep.begin():
                        self.tell(note)
                answers = True
            lives.ready = lives.ready and answers
            self.metrics.ready.set(lives.ready)
            if answers:
                with self._told():  # what cannot be cleared away, as on a full disk, keeps nobody from being answered
                    for why in await lives.retire():
                        self.tell(why)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell of what fails: what runs beside the gateway goes on, or nobody would start a dead engine again."""
        try:
            yield
        except PeftoptError as error:
            self.tell(error.message)
        except Exception as error:  # noqa: BLE001 (whatever it is, the engine has to be watched)
            self.tell(f"{type(error).__name__}: {error}")

    async def _judge(self, lives: Lives) -> None:
        """Look at the canaries on trial."""
        while True:
            await asyncio.sleep(JUDGE_EVERY_S)
            with self._told():
                await lives.trials.judge()

    async def _mend(self, lives: Lives) -> None:
        """Start engines of versions that have died, and try again what has failed, each after a while."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if lives.ready:
                with self._told():
                    for name in await lives.upkeep.mend():
                        self.tell(f"{name} answers again")

    async def _recheck(self) -> None:
        """Ask those that answer users, now and then, whether they still answer as themselves."""
        while True:
            await asyncio.sleep(self.config.check_every_s)
            with self._told():
                await self.rechecks.round()

    async def _sample(self, how: Start, lives: Lives) -> None:
        """What is known of the engines' memory and load, every few seconds."""
        upstream, sampler = self.shared.upstream, Sampler(self.metrics, sampling.gpus(), self.tell)
        own = Engine("", upstream.get, Known(how.weights_bytes, how.kv_bytes), self._processes)
        while True:
            with self._told():
                self.shared.samples = await sampler.sample([own, *lives.engines.sampled(upstream)])
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _processes(self) -> Sequence[int]:
        """The engine's processes; none of a server of somebody else's, which may have GPUs of its own."""
        return self.engine.processes() if self.engine else ()

    # ---- the end

    async def _drain(self) -> None:
        """No new requests; wait for those that run, as long as they may take."""
        self.shared.open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                await unless(self.at_once.wait(), self._idle())

    async def _idle(self) -> None:
        """Wait until no request runs or waits."""
        if self.supervisor:
            await self.supervisor.published()
        while self._busy():
            await asyncio.sleep(0.05)

    def _busy(self) -> int:
        """Requests that run or wait, here or in the workers."""
        admission = self.shared.admission
        return admission.running + admission.waiting + (self.supervisor.busy if self.supervisor else 0)

    def _waiting(self) -> int:
        """Requests that wait, here or in the workers."""
        return self.shared.admission.waiting + (self.supervisor.waiting if self.supervisor else 0)

    async def _stop(self, engine: Server) -> None:
        """End the engine, which gives what it still has under way up when nobody waits any more."""
        stopping = asyncio.ensure_future(asyncio.to_thread(engine.stop))
        if await unless(self.at_once.wait(), asyncio.shield(stopping)):
            return
        await asyncio.to_thread(engine.kill)
        await stopping

    async def _lines(self) -> None:
        """Wait for the lines of those that the end has cut off."""
        until = time.monotonic() + LINES_S
        while self.shared.here and time.monotonic() < until:
            await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def _listening(self, lives: Lives) -> AsyncIterator[None]:
        """Users and operators are listened to."""
        config = self.config
        operators = admin.application(lives, self._exposition, config.allowed, config.admin_key)
        where = address(config.admin)
        async with self._users(lives), operated(operators, where, config.read_s):
            yield

    @contextlib.asynccontextmanager
    async def _users(self, lives: Lives) -> AsyncIterator[None]:
        """Users are answered, by this process or by its workers."""
        config = self.config
        if config.workers == 1 and not config.join:
            async with listening(App(self.shared), (config.host, config.port), config.read_s):
                yield
            return
        own = socket_of(config.state, "workers").removeprefix("unix:")
        users = None if config.join else (config.host, config.port)
        plan = Plan(config.workers, self._part, Path(config.join or own), users)
        self.supervisor = Supervisor(plan, self.shared, lives, self.tell)
        async with self.supervisor.running():
            lives.published = self.supervisor.published
            yield

    async def _exposition(self) -> bytes:
        """The metrics of the whole gateway."""
        return await self.supervisor.scrape() if self.supervisor else self.metrics.text()

    def _part(self, index: int) -> messages.Part:
        """What a worker works with."""
        config, workers = self.config, self.config.workers
        return messages.Part(
            index=index,
            url=self.shared.upstream.url,
            limits=shares.limits_of(config.limits, workers, index),
            per_adapter=shares.part(config.per_adapter, workers, index),
            per_key=shares.part(config.per_key, workers, index),
            keys=messages.keys(shares.keys_of(self.shared.keys, workers)),
            timeouts=config.timeouts,
            log=config.log,
            slos_s=tuple(config.slos_s),
            settings=replace(
                self.shared.settings, most_running=shares.part(self.shared.settings.most_running, workers, index)
            ),
            log_keep=config.log_keep,
            trace=config.trace,
            host=config.host,
            port=config.port,
            engine_key=engine_key(),
            started=self.config.start is not None,
        )
