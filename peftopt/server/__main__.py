"""Serve one of our own engines: `python -m peftopt.server --base DIR --adapter NAME=DIR …`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftopt import machine, redaction
from peftopt.errors import BadInput, MissingEnvironment, PeftoptError

if TYPE_CHECKING:
    from peftopt.server.scheduler import Model

ENGINES = ("eager", "compiled", "continuous")
COMPILED_CONTEXT = 2048
"""Tokens of a prompt and its answer where --engine compiled is not told: each step looks at a cache of so many."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code."""
    options = _options().parse_args(arguments)
    os.environ.update(machine.waiting())
    os.environ["OMP_NUM_THREADS"] = str(options.threads or machine.threads())  # before torch reads it
    try:
        adapters = _named(options.adapter)
        model = _opened(options, adapters)
        _check_port(options.host, options.port)
        if not asyncio.run(_serve(model, adapters, options)):
            sys.stderr.flush()
            os._exit(0)  # a thread that still computes cannot be asked to end, and may crash the interpreter's end
    except PeftoptError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    return 0


async def _serve(model: Model, adapters: dict[str, str], options: argparse.Namespace) -> bool:
    """Serve until told to end; whether the model's thread has ended too."""
    from peftopt.server import app
    from peftopt.server.asked import Problem
    from peftopt.server.scheduler import Scheduler

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scheduler = Scheduler(model, options.base, options.max_batch, options.context, options.max_queued, options.name)
    try:
        for name, folder in adapters.items():
            await scheduler.load(name, folder)
    except Problem as problem:
        await scheduler.end("it cannot start")
        raise BadInput(str(problem), "give an adapter of this base, or leave it out") from problem

    _freeze()

    def ready() -> None:
        names = ", ".join([options.name, *adapters])
        sys.stderr.write(f"http://{options.host}:{options.port} serves {names} with {options.engine}\n")
        sys.stderr.flush()

    key = redaction.api_key(redaction.SERVER_KEY) if os.environ.get(redaction.SERVER_KEY) else ""
    await app.serve(scheduler, options.host, options.port, stop, options.drain, ready, key)
    return not scheduler.alive


def _freeze() -> None:
    """Leave what is there at the start out of every later search for objects in cycles: it takes a second, in which no
    token is computed. PEFT is a large part of it, and is there already for who may load an adapter."""
    gc.collect()
    gc.freeze()


def _opened(options: argparse.Namespace, adapters: dict[str, str]) -> Model:
    """The engine, with its model. Raises BadInput for what an engine cannot serve."""
    if options.engine == "continuous":
        what = "transformers' continuous batching gives a server neither log-probabilities nor the choice of a token"
        raise BadInput(what, "use --engine eager: there too requests join and leave a running batch")
    from peftopt.engines import _rows
    from peftopt.models import importing

    if options.engine == "compiled" and adapters:
        raise BadInput(_rows.ALONE, _rows.BESIDE)
    importing.torch_side(options.base, adapters=options.engine == "eager")
    if options.engine == "eager":
        return _rows.Served(options.base, options.device)
    return _rows.CompiledServed(options.base, options.device, options.max_batch, options.context or COMPILED_CONTEXT)


def _named(texts: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER, or a folder that is called by its own name. Raises BadInput for a name that is given twice."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.rpartition("=")
        path = Path(folder if equals else text).resolve()
        name = name or path.name
        if name in named:
            raise BadInput(f"two adapters are called {name}", "name each: --adapter NAME=FOLDER")
        named[name] = str(path)
    return named


def _check_port(host: str, port: int) -> None:
    """Raises MissingEnvironment for an address that cannot be listened on."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise MissingEnvironment(f"cannot listen on {host}:{port}: {error.strerror}", "choose --port") from error


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peftopt.server", description=__doc__)
    parser.add_argument("--base", required=True, help="Folder of the base, or of a merged model.")
    parser.add_argument("--name", default="base", help="What it is served as.")
    parser.add_argument("--adapter", action="append", default=[], help="NAME=FOLDER; repeat for several.")
    parser.add_argument("--engine", choices=ENGINES, default="eager")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores.")
    parser.add_argument("--max-batch", type=int, default=8, help="Requests that are computed at once.")
    parser.add_argument("--max-queued", type=int, default=0, help="Requests that may wait for it; 0 = any number.")
    parser.add_argument(
        "--context", type=int, default=0, help="Tokens of a prompt and its answer; 0 = the model's (compiled: 2048)."
    )
    parser.add_argument("--drain", type=float, default=30.0, help="Seconds that requests may take after SIGTERM.")
    parser.add_argument("--device", default="auto", help='"auto", "cpu" or "cuda".')
    return parser


if __name__ == "__main__":
    sys.exit(main())
