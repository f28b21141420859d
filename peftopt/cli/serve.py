"""serve: the gateway before an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import app, named, options_from, seconds
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.records import SAFETENSORS, Json
from peftopt.redaction import api_key

if TYPE_CHECKING:
    from peftopt.gateway.backends import Start
    from peftopt.gateway.engines import Starter
    from peftopt.gateway.limits import Limits
    from peftopt.gateway.lines import Origin
    from peftopt.gateway.registry import Registry
    from peftopt.gateway.run import Config

STATE = "serve-state"
"""Where a gateway keeps its adapters, unless told otherwise."""


@dataclass(frozen=True)
class Options:
    """The options of `serve`."""

    run: Annotated[
        Path | None, typer.Argument(help="A finished run, in place of --base: serve the variant it chose.")
    ] = None
    variant: Annotated[str, typer.Option(help="Serve this variant of the run, not the chosen one.")] = ""
    base: Annotated[Path | None, typer.Option(help="Folder of the base, or of a merged model.")] = None
    adapter: Annotated[list[str], typer.Option(help="Adapter folder, or NAME=FOLDER; repeat for several.")] = field(
        default_factory=list
    )
    upstream: Annotated[str, typer.Option(help="URL of a server that runs already, in place of --base.")] = ""
    engine: Annotated[
        str,
        typer.Option(help="vllm, llamacpp_server, eager or compiled; by default vllm, or eager where it is missing."),
    ] = ""
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port for users.")] = 8000
    admin: Annotated[
        str, typer.Option(help="Where to listen to operators: unix:PATH or HOST:PORT; by default in --state.")
    ] = ""
    workers: Annotated[int, typer.Option(help="Processes that answer users; they share the limits.")] = 1
    join: Annotated[
        str, typer.Option(help="Socket for workers that another program starts; `export gunicorn` uses it.")
    ] = ""
    admin_key_env: Annotated[str, typer.Option(help="Environment variable with the operators' key.")] = ""
    adapters_from: Annotated[
        list[Path], typer.Option(help="Folder below which `adapters put` may take adapters; repeat for several.")
    ] = field(default_factory=list)
    state: Annotated[Path, typer.Option(help="Folder of the adapters and routes; it survives restarts.")] = Path(STATE)
    limits: Annotated[
        str,
        typer.Option(
            help="running=32,waiting=64,wait=400ms; decision, what the run measured; a FILE of `peftopt load "
            "--find-rate --out FILE`; or off. By default decision, where a run has measured limits."
        ),
    ] = ""
    per_adapter: Annotated[int, typer.Option(help="Most requests of one adapter at once; 0 = no limit.")] = 0
    per_key: Annotated[int, typer.Option(help="Most requests of one API key at once; 0 = no limit.")] = 0
    keys: Annotated[Path | None, typer.Option(help="File with hashes of API keys; without it, no key is needed.")] = (
        None
    )
    log: Annotated[str, typer.Option(help="File for one JSON line per request; - is standard output.")] = ""
    log_text: Annotated[
        bool, typer.Option("--log-text", help="Log prompts and answers too; text that looks like a key is removed.")
    ] = False
    log_keep: Annotated[int, typer.Option(help="Rotated log files to keep; 0 = all.")] = 0
    metrics: Annotated[
        str, typer.Option(help="Who reads /metrics: users or operators; by default users, unless --keys is given.")
    ] = ""
    trace: Annotated[str, typer.Option(help="URL of an OpenTelemetry collector (OTLP over HTTP) for spans.")] = ""
    read: Annotated[float, typer.Option(help="Most seconds until a request has arrived; 0 = no limit.")] = 30.0
    canary: Annotated[
        Path | None, typer.Option(help="Prompts on which adapters should differ; by default, six built-in ones.")
    ] = None
    check_every: Annotated[
        str,
        typer.Option(help="How often to check that each version answers as itself, such as 10m; 0 = never."),
    ] = "10m"
    check_then: Annotated[
        str,
        typer.Option(help="After two failed checks in a row: report the version, or refuse its users until it passes."),
    ] = "report"
    first: Annotated[float, typer.Option(help="Most seconds until the engine's first byte; 0 = no limit.")] = 120.0
    gap: Annotated[float, typer.Option(help="Most seconds between two pieces of an answer; 0 = no limit.")] = 60.0
    whole: Annotated[float, typer.Option(help="Most seconds for a whole answer; 0 = no limit.")] = 600.0
    drain: Annotated[float, typer.Option(help="Most seconds to wait for running requests when the gateway ends.")] = (
        30.0
    )
    keep: Annotated[float, typer.Option(help="Seconds that a replaced version stays loaded for a rollback.")] = 600.0
    max_rank: Annotated[
        int, typer.Option(help="Highest rank of adapters that are put later; 0 = that of the given ones.")
    ] = 0
    slots: Annotated[int, typer.Option(help="Adapters in one batch (vLLM: max-loras); 0 = all, plus two.")] = 0
    compile_: Annotated[bool, typer.Option("--compile", help="Let vLLM compile the model: a slower start.")] = False
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching", help="Reuse keys and values of prompts with the same beginning.")
    ] = False
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 = one per core.")] = 0
    args: Annotated[str, typer.Option(help="Further options of the engine, as on its command line.")] = ""
    engine_only: Annotated[
        bool, typer.Option("--engine-only", help="Become vLLM's own server, without the gateway.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON line on stdout when the gateway is ready: its addresses.")
    ] = False


@dataclass(frozen=True)
class What:
    """What is served, from the options or from a finished run."""

    base: Path | None
    adapters: dict[str, Path]
    engine: str
    name: str = "base"
    params: Mapping[str, Json] = field(default_factory=dict)
    slos_s: tuple[float, ...] = ()
    limits: Limits | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)


@app.command()
@options_from(Options)
def serve(options: Options) -> None:
    """Serve a base and its adapters until Ctrl-C, through the gateway. It stands before vLLM, llama.cpp's server or one
    of peftopt's engines."""
    from peftopt.cli.console import Console

    what = _what(options)
    if options.engine_only:
        _engine_only(options)
    if options.as_json and options.log == "-":
        raise BadInput("--json and --log - both write to standard output", "give --log a file")
    from peftopt.gateway import backends, run

    if what.base and what.engine:  # before --state keeps anything of it
        backends.check(what.engine, len(what.adapters))
    carried, console = _limits(options, what), Console()
    for line in _notices(options, what, carried):
        console.tell(line)
    raise typer.Exit(run.run(_config(options, what, carried), console.tell))


def _what(options: Options) -> What:
    """Raises BadInput for options that conflict, and for models that cannot be served."""
    from peftopt import plugins
    from peftopt.gateway import decided
    from peftopt.runner import preflight

    check_source(options)
    given = [named(text) for text in options.adapter]
    if len(dict(given)) < len(given) or "base" in dict(given):
        what = "two adapters, or an adapter and the base, have the same name"
        raise BadInput(what, "name each: --adapter NAME=FOLDER")
    if options.run:
        variant = decided.of_run(options.run, options.variant)
        adapter = {variant.name: Path(variant.model.adapters[0])} if variant.model.adapters else {}
        engine = options.engine or variant.engine
        return What(
            base=Path(variant.model.path),
            adapters=adapter | dict(given),
            engine=engine,
            name="base" if adapter else variant.name,
            params=variant.params if engine == variant.engine else {},
            slos_s=variant.slos_s,
            limits=variant.limits if engine == variant.engine else None,
            origins={variant.name: variant.origin},
        )
    if options.base:
        known = plugins.catalogue()
        weights = known[options.engine].format if options.engine in known else SAFETENSORS
        preflight.check_base(options.base, quantized=True, weights=weights, ours=False)
        for _, folder in given:
            preflight.check_adapter(folder, options.base, [])
    return What(options.base, dict(given), options.engine)


def check_source(options: Options) -> None:
    """Raises BadInput unless one thing to serve is named."""
    if sum(map(bool, (options.run, options.base, options.upstream))) != 1:
        hint = "name a finished run, the folder of a model, or a server's address"
        raise BadInput("serve takes one of RUN, --base DIR and --upstream URL", hint)


def _notices(options: Options, what: What, carried: Limits) -> Iterator[str]:
    """Lines for the user before the start: what the run chose, and its limits."""
    from peftopt.gateway import decided
    from peftopt.server.__main__ import COMPILED_CONTEXT

    for name, origin in what.origins.items():
        yield f"{name} is {origin}, on {what.engine}"
    if what.engine == "compiled" and options.run and "--context" not in options.args:
        measured = f"{tokens} tokens" if (tokens := what.params.get("cache_len")) else "the length of its requests"
        yield (
            f"the run measured it with a cache of {measured}. "
            f"It is served with room for {COMPILED_CONTEXT}, and may be up to twice as slow: each token looks at the "
            "whole cache. Where prompts and answers are shorter, --args '--context TOKENS' serves it as measured"
        )
    if carried.running:
        yield f"limits: {carried}"
    elif options.run and not options.limits:
        yield f"no limits: the run has no load that met its limits on times. To find some, {decided.NO_LIMITS}"


def _limits(options: Options, what: What) -> Limits:
    """The limits of --limits. Raises BadInput where the run or the file has none."""
    from peftopt.gateway import decided, limits

    if options.limits in ("", limits.DECISION):
        if what.limits:
            return what.limits
        if options.limits:
            why = "the run has no load that met its limits on times" if options.run else "there is no run"
            raise BadInput(f"--limits decision: {why}", decided.NO_LIMITS)
        return limits.Limits()
    if options.limits == limits.OFF or "=" in options.limits:
        return limits.parse(options.limits)
    return decided.limits_of_file(Path(options.limits))


def _config(options: Options, what: What, carried: Limits) -> Config:
    from peftopt import corpus, store
    from peftopt.cli.console import print_json
    from peftopt.engines._server import check_port
    from peftopt.gateway import keys, lives
    from peftopt.gateway.listening import socket_of
    from peftopt.gateway.run import Config
    from peftopt.gateway.upstream import Timeouts
    from peftopt.gateway.workers import shares

    _check_extra()
    if not options.join:
        check_port(options.port)
    shares.check(options.workers, carried, options.per_adapter, options.per_key)
    life = lives.Settings(keep_s=options.keep)
    if options.canary:
        life.prompts = {row.id: row.messages for row in corpus.read(str(options.canary))[:8]}
    if options.check_then not in ("report", "refuse"):
        raise BadInput(f"--check-then {options.check_then!r} is not known", "write --check-then report, or refuse")
    return Config(
        state=options.state,
        host=options.host,
        port=options.port,
        admin=options.admin or socket_of(options.state),
        admin_key=api_key(options.admin_key_env) if options.admin_key_env else "",
        upstream=options.upstream,
        start=_starter(options, what, carried) if what.base else None,
        second=_second(options, what),
        base=what.base,
        adapters=what.adapters,
        allowed=[*options.adapters_from, *(folder.resolve().parent for folder in what.adapters.values())],
        limits=carried,
        per_adapter=options.per_adapter,
        per_key=options.per_key,
        keys=keys.parse(store.read_text(options.keys), str(options.keys)) if options.keys else keys.Keys(),
        timeouts=Timeouts(first=options.first, gap=options.gap, whole=options.whole),
        lives=life,
        log=options.log,
        keys_file=options.keys,
        read_s=options.read,
        metrics=_users_read_metrics(options),
        log_text=options.log_text,
        log_keep=options.log_keep,
        trace=options.trace,
        drain_s=options.drain,
        slos_s=what.slos_s,
        workers=options.workers,
        join=options.join,
        origins=what.origins,
        check_every_s=seconds(options.check_every),
        refuse=options.check_then == "refuse",
        ready=print_json if options.as_json else lambda _: None,
    )


def _users_read_metrics(options: Options) -> bool:
    """Whether users may read /metrics. Raises BadInput for another word than users or operators."""
    if options.metrics not in ("", "users", "operators"):
        raise BadInput(f"--metrics {options.metrics!r} is not known", "write --metrics users or --metrics operators")
    return options.metrics == "users" or (not options.metrics and options.keys is None)


def _starter(options: Options, what: What, carried: Limits) -> Callable[[Registry], Start]:
    """The function that starts the engine, once the registry knows the adapters."""
    from peftopt.gateway import backends
    from peftopt.records import Model

    def start(registry: Registry) -> Start:
        assert what.base
        wanted = backends.Wanted(
            engine=what.engine or _installed(),
            model=Model(str(what.base.resolve())),
            name=what.name,
            params=what.params,
            adapters=len({stored.name for stored in registry.versions.values() if not stored.engine}),
            rank=max([options.max_rank, *(stored.rank for stored in registry.versions.values())]),
            running=carried.running,
            waiting=carried.waiting,
            queued_tokens=carried.queued_tokens,
            compile=options.compile_,
            prefix_caching=options.prefix_caching,
            slots=options.slots,
            threads=options.threads,
            drain_s=options.drain,
            args=options.args,
        )
        return backends.start(wanted)

    return start


def _second(options: Options, what: What) -> Starter:
    """The function that starts an engine for a merged model that is put while the first engine runs."""
    from peftopt.gateway import backends, limits
    from peftopt.records import Model

    def start(engine: str, folder: Path, name: str) -> Start:
        carried = limits.parse(options.limits)
        wanted = backends.Wanted(
            engine=engine or what.engine or _installed(),
            model=Model(str(folder.resolve())),
            name=name,
            running=carried.running,
            waiting=carried.waiting,
            compile=options.compile_,
            prefix_caching=options.prefix_caching,
            threads=options.threads,
            drain_s=options.drain,
            args=options.args if engine in ("", what.engine) else "",
        )
        return backends.start(wanted)

    return start


def _installed() -> str:
    """The default engine: vLLM where it is installed, else eager."""
    from peftopt import environments

    try:
        environments.python("vllm")
    except MissingEnvironment:
        return "eager"
    return "vllm"


def _check_extra() -> None:
    import importlib.util

    lacking = [
        name
        for name in ("uvicorn", "uvloop", "starlette", "fastapi", "orjson", "prometheus_client")
        if importlib.util.find_spec(name) is None
    ]
    if lacking:
        raise MissingEnvironment(f"serve needs {', '.join(lacking)}", "pip install 'peftopt[serve]'")


def _engine_only(options: Options) -> None:
    """Become vLLM's own server, without the gateway."""
    from peftopt import environments
    from peftopt.cli.console import Console, print_json
    from peftopt.engines import vllm
    from peftopt.engines._server import check_port
    from peftopt.records import Model

    if options.base is None or options.engine not in ("", "vllm"):
        raise BadInput("--engine-only starts vLLM on a --base", "leave it out for other engines")
    given = dict(map(named, options.adapter))
    model = Model(str(options.base.resolve()), tuple(map(str, given.values())))
    params = vllm.Params(
        compile=options.compile_, prefix_caching=options.prefix_caching, max_loras=options.slots, args=options.args
    )
    python = environments.python(vllm.PLUGIN.environment)
    check_port(options.port)
    command, variables = vllm.command(model, params, options.port, tuple(given), python)
    url, names = f"http://127.0.0.1:{options.port}", [vllm.BASE, *given]
    if options.as_json:
        print_json({"url": url, "serves": names})
    else:
        Console().say(f"{url} will serve {', '.join(names)}; Ctrl-C ends it")
    os.execve(command[0], command, {**os.environ, **variables})  # nosec B606 # peftopt's own command: vLLM and its options
