"""The engine behind the gateway: a server that is started here, or one that runs already.

Each gives a URL, the names that it serves from its start, and whether adapters can be loaded while it runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from peftopt import environments, machine, redaction
from peftopt.engines import _rows
from peftopt.engines._prefix import Reuse
from peftopt.engines._server import Server, check_port, free_port
from peftopt.errors import BadInput
from peftopt.forking import ForkServer
from peftopt.gateway.sampling import weights_bytes
from peftopt.records import Json, Model

BASE = "base"
"""The route of the base, or of a merged model, where it is asked without an adapter."""

OURS = ("eager", "compiled")
"""Engines of this environment, which peftopt.server puts behind OpenAI's API."""

MAX_BATCH = 8
"""Requests that an engine of ours computes at once, where no limit says how many."""

CHECKED, CHECKED_TOKENS = 8, 128
"""Prompts that each served name is asked at once to see whether it answers as itself, and about as many tokens as one
has: the engine's own limits leave room for them."""

SPARE_SLOTS = 2
"""Adapters that the engine holds beside those it starts with: the version that is put, and the one kept for a
rollback."""


@dataclass(frozen=True)
class Start:
    """How to start an engine's server. `brings`: the names it serves from its start, by route; `loads`: whether it
    loads adapters while it runs, of a rank up to `max_rank` (0 = any); `ready_s`: seconds until it must answer; the
    `engine`'s name, "" for a server that runs already; `most_running` requests at once. That, and the bytes of its
    weights and its KV cache, are 0 if not known."""

    command: Sequence[str]
    variables: Mapping[str, str]
    url: str
    brings: Mapping[str, str] = field(default_factory=dict)
    loads: bool = False
    max_rank: int = 0
    ready_s: float = 600.0
    engine: str = ""
    weights_bytes: int = 0
    kv_bytes: int = 0
    most_running: int = 0

    @property
    def key_env(self) -> str:
        """The environment variable that holds the server's API key; "" for a server that runs already."""
        return redaction.ENGINE_KEY if self.command else ""


@dataclass(frozen=True)
class Wanted:
    """What to start: `engine`, the plug-in's name; the `model`; the `name` of the model for users; the `params` from
    the recipe; the number of `adapters` it must hold at once and their highest `rank`; limits on running and waiting
    requests and on queued prompt tokens (0 = its own default); `args` of its command line."""

    engine: str
    model: Model
    name: str = BASE
    params: Mapping[str, Json] = field(default_factory=dict)
    adapters: int = 0
    rank: int = 0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    compile: bool = False
    prefix_caching: bool = False
    slots: int = 0
    threads: int = 0
    drain_s: float = 30.0
    args: str = ""


def start(wanted: Wanted, port: int = 0) -> Start:
    """The command line of an engine's server on a port of this machine. Raises BadInput for a model that it cannot
    serve, MissingEnvironment if it is not installed."""
    check(wanted.engine, wanted.adapters)
    if port:
        check_port(port)
    starters = {"vllm": _vllm, "llamacpp_server": _llamacpp}
    how = starters.get(wanted.engine, _ours)(wanted, port or free_port())
    return replace(how, engine=wanted.engine)


def check(engine: str, adapters: int) -> None:
    """Raises BadInput for an engine without a server, and for one that cannot serve unmerged adapters."""
    if engine not in ("vllm", "llamacpp_server", *OURS):
        hint = f"choose one with --engine: vllm, llamacpp_server, {', '.join(OURS)}"
        raise BadInput(f"nothing serves the engine {engine!r} over HTTP", hint)
    if adapters and engine == "llamacpp_server":
        raise BadInput(
            "llama.cpp's server applies its adapters to every request: it cannot tell them apart by name",
            "serve the merged model there (peftopt merge, peftopt quantize --method gguf), or several on vllm or eager",
        )
    if adapters and engine not in ("vllm", "eager"):
        raise BadInput(_rows.ALONE, _rows.BESIDE)


def _vllm(wanted: Wanted, port: int) -> Start:
    from peftopt.engines import vllm

    slots = wanted.slots or wanted.adapters + SPARE_SLOTS
    told = vllm.Params(**wanted.params)
    params = replace(
        told,
        compile=wanted.compile or told.compile,
        prefix_caching=wanted.prefix_caching or told.prefix_caching,
        max_num_seqs=wanted.running or told.max_num_seqs,
        args=f"{told.args} {wanted.args}".strip(),
    )
    python = environments.python(vllm.PLUGIN.environment)
    command, variables = vllm.command(Model(wanted.model.path), params, port, (), python, wanted.name)
    variables |= vllm.own(loads=bool(wanted.adapters))
    command += ["--enable-per-request-metrics", "--shutdown-timeout", str(round(wanted.drain_s))]
    checked = CHECKED * (slots + 1)  # a backstop: the gateway refuses before
    requests = wanted.running + wanted.waiting + checked if wanted.running else 0
    tokens = wanted.queued_tokens + CHECKED_TOKENS * checked if wanted.queued_tokens else 0
    options = vllm.queued(requests, tokens)
    if wanted.adapters:
        options += [*vllm.lora(wanted.rank, slots), ("--max-cpu-loras", str(slots))]
    command += [word for option in options for word in option]
    return Start(
        command,
        variables,
        f"http://127.0.0.1:{port}",
        {wanted.name: wanted.name},
        loads=bool(wanted.adapters),
        max_rank=vllm.padded(wanted.rank) if wanted.adapters else 0,
        weights_bytes=weights_bytes(Path(wanted.model.path)),
        kv_bytes=0 if params.gpu_memory else params.kv_cache_gb * 2**30,
        most_running=params.max_num_seqs,
    )


def _llamacpp(wanted: Wanted, port: int) -> Start:
    from peftopt.engines import llamacpp_server
    from peftopt.environments.llamacpp import SERVER

    home = Path(environments.python(llamacpp_server.PLUGIN.environment)).parent.parent
    binary = next(home.glob(f"lib/python*/site-packages/llama_cpp/{SERVER}"))
    names = [each.name for each in fields(llamacpp_server.Params)]  # a run on the library has others
    told = llamacpp_server.Params(**{name: wanted.params[name] for name in names if name in wanted.params})
    params = replace(told, slots=wanted.running or told.slots, args=f"{told.args} {wanted.args}".strip())
    if wanted.prefix_caching and not params.cache_prompt:
        params = llamacpp_server.reusing(params, Reuse())
    amx = "amx_int8" in machine.processor()
    command = llamacpp_server.command(wanted.model, params, port, str(binary), _threads(wanted), amx, wanted.name)
    url = f"http://127.0.0.1:{port}"
    variables = llamacpp_server.variables()
    return Start(command, variables, url, {wanted.name: wanted.name}, most_running=params.slots)


def _ours(wanted: Wanted, port: int) -> Start:
    command = [*environments.module("peftopt.server"), "--base", wanted.model.path, "--name", wanted.name]
    command += ["--port", str(port), "--engine", wanted.engine]
    command += ["--threads", str(_threads(wanted)), "--drain", str(wanted.drain_s)]
    running = wanted.running or MAX_BATCH
    command += ["--max-batch", str(running)]
    if wanted.running:
        queued = wanted.waiting + CHECKED * ((wanted.slots or wanted.adapters + SPARE_SLOTS) + 1)
        command += ["--max-queued", str(queued)]
    command += ["--device", str(wanted.params["device"])] if "device" in wanted.params else []
    redaction.check(wanted.args, "the args of the engine's server")
    command += shlex.split(wanted.args)
    variables = {"OMP_NUM_THREADS": str(_threads(wanted)), **machine.waiting()}
    variables["PYTHONPATH"] = environments.variables()["PYTHONPATH"]
    variables[redaction.SERVER_KEY] = redaction.engine_key()
    url, loads = f"http://127.0.0.1:{port}", wanted.engine == "eager"
    return Start(command, variables, url, {wanted.name: wanted.name}, loads=loads, most_running=running)


def _threads(wanted: Wanted) -> int:
    return wanted.threads or machine.cores()


def launch(how: Start, log: Path, forks: ForkServer | None = None) -> Server:
    """Start it, as a copy of `forks` where that is possible; `Server.ready` waits until it answers."""
    return Server(how.command, how.variables, how.url, log, forks)
