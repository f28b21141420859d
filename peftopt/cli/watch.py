"""watch: check whether production still matches a run's decision."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftopt.cli.shared import AsJson, app, options_from, seconds
from peftopt.errors import BadInput
from peftopt.redaction import api_key

if TYPE_CHECKING:
    from peftopt.records import Json
    from peftopt.watch.promise import Promise
    from peftopt.watch.running import Saved, Source

EVERY, ARL, SINCE = "60s", "30d", "1h"
STATE = "watch.json"
SHORTEST_S = 1.0
"""The shortest window."""


@dataclass(frozen=True)
class Options:
    """The options of `watch`."""

    run: Annotated[Path, typer.Argument(help="A finished run below results/runs, with the decision to check.")]
    variant: Annotated[str, typer.Option(help="Watch this variant of the run, not the chosen one.")] = ""
    logs: Annotated[list[Path], typer.Option(help="A log of `peftopt serve`; repeat for several.")] = field(
        default_factory=list
    )
    server: Annotated[str, typer.Option(help="URL of a gateway or of vLLM, to read its /metrics.")] = ""
    prometheus: Annotated[str, typer.Option(help="URL of a Prometheus that scrapes a gateway or vLLM.")] = ""
    select: Annotated[str, typer.Option(help="With --prometheus, only series with these labels: 'job=\"chat\"'.")] = ""
    key_env: Annotated[
        str, typer.Option("--key-env", help="Environment variable with a bearer token for --server or --prometheus.")
    ] = ""
    every: Annotated[
        str, typer.Option(help="Length of a window; each window is judged at its end.", show_default=EVERY)
    ] = ""
    once: Annotated[bool, typer.Option("--once", help="Judge the data since the last call, and end: for cron.")] = False
    arl: Annotated[
        str, typer.Option(help="Average time between two false alarms, over all detectors.", show_default=ARL)
    ] = ""
    state: Annotated[
        Path | None,
        typer.Option(help="File of the state that the next call continues from.", show_default="RUN/watch.json"),
    ] = None
    since: Annotated[
        str,
        typer.Option(
            help="Without a state, begin this long ago, with --prometheus and --logs.",
            show_default=f"{SINCE} of --prometheus, the whole log",
        ),
    ] = ""
    propose: Annotated[
        Path | None,
        typer.Option(help="If the traffic differs from the run's, write the recipe to run next to this file."),
    ] = None
    as_json: AsJson = False


@app.command()
@options_from(Options)
def watch(options: Options) -> None:
    """Check whether production still matches a run's decision: its limits, its times, its errors, its traffic.

    Exit codes: 0 nothing shown, 1 alarm, 3 other traffic than the run's or too little of it, 4 nothing to read.
    """
    from peftopt.cli.session import Session
    from peftopt.watch import promised, running
    from peftopt.watch.running import Kept

    source = _named_source(options)
    every_s, arl_s = _lengths(options)
    promise = promised.load(options.run, options.variant)
    path = options.state or options.run / STATE
    with running.alone(path):
        saved = running.read(path)
        if saved:
            _check(saved, options, source, path)
            every_s, arl_s = saved.every_s, saved.arl_s
        watch = saved.watch(promise, path) if saved else running.begun(promise, arl_s, every_s)
        reading = _reading(options, promise, every_s, saved.position if saved else None)
        begin = time.time() - seconds(options.since) if options.since and not saved else 0.0
        session = Session(options, watch, reading, Kept(path, source, every_s, arl_s), begin)
        raise typer.Exit(session.once() if options.once else session.until_interrupted())


def _lengths(options: Options) -> tuple[float, float]:
    """Seconds of a window, and between two false alarms. Raises BadInput for a window that is too short or too long."""
    every_s, arl_s = seconds(options.every or EVERY), seconds(options.arl or ARL)
    if every_s < SHORTEST_S:
        raise BadInput(f"--every {options.every} is too short for a window", "give a second or more: --every 60s")
    if arl_s < every_s:
        what = f"--arl {options.arl or ARL} is shorter than a window of --every {options.every or EVERY}"
        raise BadInput(what, "give a shorter window, or a longer time without a false alarm: --every 60s --arl 30d")
    return every_s, arl_s


def _named_source(options: Options) -> str:
    """The source as the options name it. Raises BadInput unless they name one."""
    named = [f"--server {options.server}"] if options.server else []
    named += [f"--prometheus {options.prometheus} {options.select}".rstrip()] if options.prometheus else []
    named += [f"--logs {' '.join(str(path.resolve()) for path in options.logs)}"] if options.logs else []
    if len(named) != 1:
        raise BadInput(
            "watch takes one of --logs FILE, --server URL and --prometheus URL",
            "name the log of peftopt serve, the address of a server, or that of a Prometheus",
        )
    if options.select and not options.prometheus:
        raise BadInput("--select chooses series of a Prometheus", "leave it out, or name one: --prometheus URL")
    if options.key_env and options.logs:
        raise BadInput("--key-env is for --server and --prometheus", "leave it out: a log needs no key")
    return named[0]


def _check(saved: Saved, options: Options, source: str, path: Path) -> None:
    """Raises BadInput where a state belongs to a watch with another source or other lengths of time."""
    hint = "name another file: --state FILE"
    if saved.source != source:
        raise BadInput(f"the state {path} is of {saved.source}", hint)
    for option, given, known in (("--every", options.every, saved.every_s), ("--arl", options.arl, saved.arl_s)):
        if given and seconds(given) != known:
            raise BadInput(f"the state {path} was begun with {option} {known:g}s", f"leave {option} out, or {hint}")


def _reading(options: Options, promise: Promise, every_s: float, position: Json) -> Source:
    """The source, opened at the position where the last call stopped. Raises MissingEnvironment without a source."""
    from peftopt.watch.sources.log import Log
    from peftopt.watch.sources.prometheus import Prometheus
    from peftopt.watch.sources.server import Server

    key = api_key(options.key_env) if options.key_env else ""
    if options.server:
        return Server(options.server, promise, position, key)
    if options.prometheus:
        since_s = seconds(options.since or SINCE)
        return Prometheus(options.prometheus, promise, every_s, since_s, position, options.select, key)
    return Log(options.logs, promise, every_s, position or None)
