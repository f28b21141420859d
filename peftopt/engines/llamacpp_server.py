"""llama.cpp's own server, started and stopped here: GGUF weights, LoRA unmerged, many requests at once."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from peftopt import machine, plugins, redaction
from peftopt.engines import endpoint
from peftopt.engines._prefix import Reuse
from peftopt.engines._server import Option, Started, free_port
from peftopt.engines._speculation import Speculation
from peftopt.environments.llamacpp import LIBRARY, SERVER, has_amx
from peftopt.errors import BadInput
from peftopt.models.gguf import WEIGHTS, library, lora_file, lora_scale
from peftopt.records import Json, Model

NAME = "model"
"""What it is served as."""


@dataclass(frozen=True)
class Params:
    """`slots`: requests that it works on at once; others wait. `context`: tokens that each has room for.
    `cache_prompt`: off, since a benchmark that asks a prompt twice would find its answer half made; `cache_ram`:
    MiB in which prompts of other requests are kept too. `gpu_layers`: layers on a GPU, where the environment was built
    for one; -1 = all. `start_s`: seconds until it must be ready.
    `args`: more of `llama-server`'s own, as on its command line."""

    slots: int = 8
    context: int = 4096
    cache_prompt: bool = False
    cache_ram: int = 0
    gpu_layers: int = 0
    start_s: float = 600.0
    args: str = ""


PLUGIN = plugins.engine(
    Params, environment="llamacpp", format="gguf", serves=True, speculates=("prompts", "batches", "draft"), reuses=True
)


prepare = endpoint.prepare


def open(
    model: Model, params: Params, speculation: Speculation | None = None, reuse: Reuse | None = None
) -> LlamaCppServer:
    """Start a server and wait until it answers. Raises BadInput for a folder without a GGUF, WorkerFailed with its last
    lines when it does not start."""
    params = reusing(params, reuse) if reuse else params
    engine = LlamaCppServer(model, speculating(params, speculation) if speculation else params)
    engine.speculates = speculation is not None
    engine.reuses = reuse is not None
    return engine


def speculating(params: Params, speculation: Speculation) -> Params:
    """The parameters of a server that looks up n-grams, of exactly `ngram` tokens, in each request's own tokens, or has
    a draft model, whose folder holds a GGUF too."""
    options = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", str(speculation.ngram)]
    options += ["--spec-ngram-simple-size-m", str(speculation.tokens)]
    if speculation.draft:
        options = ["--spec-type", "draft-simple", "--spec-draft-model", str(Path(speculation.draft) / WEIGHTS)]
        options += ["--spec-draft-n-max", str(speculation.tokens), "--spec-draft-ngl", str(params.gpu_layers)]
    return replace(params, args=f"{params.args} {shlex.join(options)}".strip())


def reusing(params: Params, reuse: Reuse) -> Params:
    """The parameters of a server that keeps the last prompt of each slot, and so much of others in memory."""
    return replace(params, cache_prompt=True, cache_ram=max(1, reuse.memory_bytes >> 20))


class LlamaCppServer(Started):
    """It only generates: it tells no likelihoods of a given answer. The engine `llamacpp` gives those, of the same
    weights."""

    def __init__(self, model: Model, params: Params) -> None:
        if not (Path(model.path) / WEIGHTS).is_file():
            hint = f"make one: peftopt quantize --method gguf --model {model.path} --out …"
            raise BadInput(f"{model.path} holds no {WEIGHTS}", hint)
        self._params, self.slots = params, params.slots
        port, binary = free_port(), Path(library().__file__).parent / SERVER
        serving = command(model, params, port, str(binary), machine.threads(), has_amx(library()))
        super().__init__(model, serving, variables(), port, NAME, params.start_s, "llamacpp")
        self.threads = machine.threads()
        self.device = "cuda" if params.gpu_layers and library().llama_supports_gpu_offload() else "cpu"

    def facts(self) -> dict[str, Json]:
        """For the log: the server's version, its slots, the seconds until it was ready, and where it keeps prefixes."""
        ready = f"ready after {self._seconds:.1f} s"
        log = [f"llama.cpp's server ({LIBRARY} {version(LIBRARY)}), {self.slots} slots: {ready}"]
        if self._params.cache_prompt:
            log.append(f"it keeps the last prompt of each slot, and up to {self._params.cache_ram} MiB of others")
        return {"log": log}


def command(
    model: Model, params: Params, port: int, binary: str, threads: int, amx: bool, name: str = NAME
) -> list[str]:
    """`llama-server` for a model, which is served as `name`, and its adapters, each with its own scale. Raises BadInput
    for `args` that hold a secret."""
    folder = Path(model.path)
    args = ["--model", str(folder / WEIGHTS), "--alias", name, "--host", "127.0.0.1", "--port", str(port)]
    options = [*measured(params), *computing(params.gpu_layers, threads, amx), ("--metrics",), ("--no-ui",)]
    options += [("--lora-scaled", scaled(model))] if model.adapters else []
    args += [word for option in options for word in option]
    redaction.check(params.args, "the args of llama.cpp's server")
    return [binary, *args, *shlex.split(params.args)]


def variables() -> dict[str, str]:
    """The environment variables that the server takes: its API key."""
    return {"LLAMA_API_KEY": redaction.engine_key()}


def measured(params: Params) -> list[Option]:
    """The options of a server by which a run measures, without the recipe's own `args`."""
    return [
        ("--parallel", str(params.slots)),
        ("--ctx-size", str(params.slots * params.context)),
        ("--fit", "off"),
        ("--cache-prompt" if params.cache_prompt else "--no-cache-prompt",),
        ("--cache-ram", str(params.cache_ram)),
    ]


def computing(gpu_layers: int, threads: int, amx: bool) -> list[Option]:
    """The options that say what computes; `threads` 0 = llama.cpp's own number. `amx`: the processor has AMX, whose
    kernels are kept out: see `environments.llamacpp.has_amx`."""
    options: list[Option] = [("--n-gpu-layers", str(gpu_layers))]
    options += [("--threads", str(threads)), ("--threads-batch", str(threads))] if threads else []
    return [*options, ("--no-repack",)] if amx else options


def scaled(model: Model) -> str:
    """The GGUF forms of a model's adapters, each with its scale. Raises BadInput for what llama.cpp cannot apply."""
    folder = Path(model.path)
    return ",".join(f"{lora_file(folder, Path(a))}:{lora_scale(Path(a))}" for a in model.adapters)
