"""vLLM's own OpenAI server, started and stopped here: a merged model, or LoRA unmerged on its base."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from peftopt import environments, machine, plugins, redaction
from peftopt.corpus import Row
from peftopt.engines import TOP_K, Scores, endpoint
from peftopt.engines._prefix import Reuse
from peftopt.engines._server import Option, Started, free_port
from peftopt.engines._speculation import Speculation
from peftopt.errors import BadInput, WorkerFailed
from peftopt.models.adapter import CONFIG, highest_rank
from peftopt.models.prompts import check_engine
from peftopt.records import Json, Model, Step

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (vllm/config/lora.py)."""
BASE = "base"
"""The name under which the base, or a merged model, is served; adapters have their folders' names."""


@dataclass(frozen=True)
class Params:
    """`compile`: let vLLM compile the model (it starts some minutes later; with LoRA on a CPU it never does, so compare
    like with like). `prefix_caching`: off, since a benchmark that asks a prompt twice would find its answer half made.
    `max_model_len` tokens, 0 the model's own; `max_num_seqs` requests in one batch, 0 vLLM's own; `max_loras` adapters
    in one batch, 0 all of them.
    `kv_cache_gb`: memory for keys and values, GiB: variants stay loaded side by side, so each takes so much and no
    share of the machine. `gpu_memory`: the share of a GPU that a server takes instead, for a variant alone on one.
    `start_s`: seconds until it must be ready. `args`: more of `vllm serve`'s own, as on its command line.
    """

    compile: bool = False
    prefix_caching: bool = False
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_loras: int = 0
    kv_cache_gb: int = 1
    gpu_memory: float = 0.0
    start_s: float = 600.0
    args: str = ""


PLUGIN = plugins.engine(
    Params,
    environment="vllm",
    serves=True,
    needs=("vllm", "aiohttp", "transformers"),
    speculates=("prompts", "batches", "shortest", "draft"),
    reuses=True,
)


prepare = endpoint.prepare

KERNELS_ON_GPUS = {"bnb8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "FP8"}
"""Quantizers whose output vLLM runs on GPUs only, and what it is called: see `without_kernels`."""


def check(base: Path, params: Params, before: Sequence[Step], rows: Sequence[Row]) -> None:
    """Raises BadInput for a format that vLLM has no kernels for on a CPU: the last quantizer's, or the base's."""
    formats = [KERNELS_ON_GPUS.get(step.plugin, "") for step in before if step.technique == "quantize"]
    if not machine.gpus() and (format_ := formats[-1] if formats else without_kernels(str(base))):
        raise no_kernels(format_)


def check_draft(base: Path, draft: Path) -> None:
    """Raises BadInput for a draft model that vLLM refuses: its logits must have as many tokens as the model's. Raises
    it too for a format that vLLM has no kernels for on a CPU."""
    if not machine.gpus() and (format_ := without_kernels(str(draft))):
        raise no_kernels(format_)
    ours, theirs = (_words(folder) for folder in (draft, base))
    if ours != theirs:
        what = f"vLLM needs a draft with as many tokens as the model: {draft} has {ours} (vocab_size), {base} {theirs}"
        raise BadInput(what, "name a draft of the same vocab_size, or use eager or llamacpp_server, which take it")


def _words(folder: Path) -> int:
    """The tokens of a model's logits, by its config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0))


def no_kernels(format_: str) -> BadInput:
    """The error for weights that vLLM runs on GPUs only."""
    return BadInput(f"vLLM has no kernels for {format_} on a CPU", "int8, w8a8, gptq and awq run there")


def open(model: Model, params: Params, speculation: Speculation | None = None, reuse: Reuse | None = None) -> Vllm:
    """Start a server and wait until it answers. Raises BadInput for adapters that it cannot serve, WorkerFailed
    with its last lines when it does not start."""
    params = reusing(params, reuse) if reuse else params
    engine = Vllm(model, speculating(params, speculation) if speculation else params)
    engine.speculates = speculation is not None
    engine.reuses = reuse is not None
    return engine


def speculating(params: Params, speculation: Speculation) -> Params:
    """The parameters of a server that looks up n-grams in each request's own tokens, or has a draft model."""
    how = {"method": "ngram", "prompt_lookup_max": speculation.ngram, "prompt_lookup_min": speculation.shortest}
    if speculation.draft:
        how = {"method": "draft_model", "model": speculation.draft}
    config = {**how, "num_speculative_tokens": speculation.tokens}
    option = shlex.join(["--speculative-config", json.dumps(config)])
    return replace(params, args=f"{params.args} {option}".strip())


def reusing(params: Params, reuse: Reuse) -> Params:
    """The parameters of a server with its own prefix cache, whose page size and bound are the server's."""
    return replace(params, prefix_caching=True)


class Vllm(Started):
    """A vLLM server. It also scores, by its prompt log-probabilities."""

    scores = True

    def __init__(self, model: Model, params: Params) -> None:
        if len(model.adapters) > 1:
            raise BadInput("vLLM applies one adapter to a request", "merge several into one first: merge")
        device = "cuda" if _has_cuda() else "cpu"
        if device == "cpu" and (format_ := without_kernels(model.path)):
            raise no_kernels(format_)
        self._home, self._params, self.slots = model, params, params.max_num_seqs
        port, names = free_port(), tuple(name_of(a) for a in model.adapters)
        serving, variables = command(model, params, port, names)
        variables |= own(loads=bool(model.adapters))
        super().__init__(model, serving, variables, port, names[0] if names else BASE, params.start_s)
        self.device = device
        if model.adapters:
            _, self.adapter_switch_time = self._exchange(model.adapters[0])

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Score by the server's prompt log-probabilities, one at a time: with LoRA, vLLM 0.32 cannot batch them."""
        return [self._score(list(p), list(a)) for p, a in zip(prompts, answers, strict=True)]

    def _score(self, prompt: list[int], answer: list[int]) -> Scores:
        body = {
            "model": self._model,
            "prompt": prompt + answer,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": TOP_K,
        }
        reply = self._loop.run(self._client.post("/v1/completions", json.dumps(body).encode()))
        if isinstance(reply, str):
            raise WorkerFailed("request failed", reply, f"its log: {self._server.log}")
        positions = reply["choices"][0]["prompt_logprobs"][len(prompt) :]
        return scores(positions, answer)

    def switch(self, adapter: str) -> float:
        """Load another LoRA and unload the previous one, through vLLM's runtime API. Returns the seconds for both.

        Raises BadInput for a model without an adapter, WorkerFailed when the server refuses.
        """
        if not self._home.adapters:
            raise BadInput("only a model with an adapter can switch it", "open the base with one --adapter on top")
        self._model, seconds = self._exchange(adapter, self._model)
        return seconds

    def _exchange(self, adapter: str, leaving: str = "") -> tuple[str, float]:
        """Load a LoRA on the running server and unload `leaving`, which may be the same LoRA. Returns its name, and the
        seconds for both."""
        started = time.perf_counter()
        # A name of its own: under an old one vLLM would serve what it has cached of the old adapter's answers.
        name = f"{name_of(adapter)}-{time.time_ns()}"
        self._lora("load", name, str(Path(adapter).resolve()))
        self._lora("unload", leaving or name)
        return name, time.perf_counter() - started

    def facts(self) -> dict[str, Json]:
        """For the log: vLLM's version, whether it compiles, the seconds until it was ready, and where it keeps
        prefixes."""
        compiled = "compiled" if self._params.compile else "eager"
        log = [f"vLLM {version('vllm')}, {compiled}: ready after {self._seconds:.0f} s"]
        if self._params.prefix_caching:
            room = "" if self._params.gpu_memory else f" of {self._params.kv_cache_gb} GiB"
            log.append(f"it keeps prefixes in its KV cache{room}, which is as large without them")
        return {"log": log}

    def _lora(self, verb: str, name: str, folder: str = "") -> None:
        if error := self._loop.run(self._client.lora(verb, name, folder)):
            raise WorkerFailed("request failed", f"{verb} {name}: {error}", f"its log: {self._server.log}")


def command(
    model: Model, params: Params, port: int, names: Sequence[str], python: str = sys.executable, base: str = BASE
) -> tuple[list[str], dict[str, str]]:
    """`vllm serve` for a model, which is served as `base`, and its adapters; the environment variables it takes.
    Raises BadInput for `args` that hold a secret."""
    args = ["serve", model.path, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", base]
    args += ["--max-logprobs", str(TOP_K), "--disable-uvicorn-access-log"]
    args += ["--enable-prompt-tokens-details"] if params.prefix_caching else []  # it then tells what it reused
    options = measured(params)
    if model.adapters:
        options += lora(max(map(lora_rank, model.adapters)), params.max_loras or len(model.adapters))
        loaded = (f"{n}={Path(a).resolve()}" for n, a in zip(names, model.adapters, strict=True))
        options += [("--lora-modules", *loaded)]
    args += [word for option in options for word in option]
    redaction.check(params.args, "vLLM's args")
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    return [*environments.module("vllm.entrypoints.cli.main", python), *args, *shlex.split(params.args)], variables


def own(loads: bool) -> dict[str, str]:
    """The environment variables of a server that only peftopt uses: its API key and, with `loads`, the permission to
    load adapters while it runs. With this permission, a client can make it read folders of this machine."""
    variables = {"VLLM_API_KEY": redaction.engine_key()}
    return {**variables, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if loads else variables


def measured(params: Params) -> list[Option]:
    """The options for a run, without the recipe's own `args`."""
    options: list[Option] = [] if params.compile else [("--enforce-eager",)]
    options += [("--enable-prefix-caching",) if params.prefix_caching else ("--no-enable-prefix-caching",)]
    options += [("--max-model-len", str(params.max_model_len))] if params.max_model_len else []
    options += [("--max-num-seqs", str(params.max_num_seqs))] if params.max_num_seqs else []
    if params.gpu_memory:
        return [*options, ("--gpu-memory-utilization", str(params.gpu_memory))]
    # then the share is only asked about at the start, when another variant may hold most of the machine
    kv_cache = ("--kv-cache-memory-bytes", str(params.kv_cache_gb * 2**30))
    return [*options, kv_cache, ("--gpu-memory-utilization", "0.01")]


def lora(rank: int, slots: int) -> list[Option]:
    """The options for adapters up to that rank, so many in one batch. Raises BadInput for a rank that is too high."""
    return [("--enable-lora",), ("--max-lora-rank", str(padded(rank))), ("--max-loras", str(slots))]


def queued(requests: int, tokens: int) -> list[Option]:
    """The options that bound the queue: requests that run or wait, and tokens of prompts; 0 = without a bound."""
    options: list[Option] = [("--max-num-queued-reqs", str(requests))] if requests else []
    return [*options, ("--max-num-queued-tokens", str(tokens))] if tokens else options


def padded(rank: int) -> int:
    """The least rank of vLLM that is not below this one. Raises BadInput if there is none."""
    ranks = [known for known in RANKS if known >= rank]
    if not ranks:
        raise BadInput(f"vLLM serves LoRA up to rank {RANKS[-1]}, not {rank}", "merge it")
    return ranks[0]


def without_kernels(model: str) -> str:
    """The format of a checkpoint that vLLM cannot run on a CPU, "" for others: 0.32 refuses bitsandbytes there after
    half a minute, and loads FP8 to answer nothing within its five minutes for a step."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    quantized = config.get("quantization_config") or {}
    if quantized.get("quant_method") == "bitsandbytes":
        return "bitsandbytes"
    weights = [group.get("weights") or {} for group in (quantized.get("config_groups") or {}).values()]
    return next((f"FP{w['num_bits']}" for w in weights if w.get("type") == "float"), "")


def lora_rank(adapter: str) -> int:
    """The highest rank of an adapter. Raises BadInput for one that vLLM cannot serve."""
    check_engine("vllm", Path(adapter), baked=False)
    config = json.loads((Path(adapter) / CONFIG).read_text(encoding="utf-8"))
    if odd := not_plain(config):
        raise BadInput(f"vLLM cannot serve {odd} ({adapter})", "merge it, or use the eager engine")
    rank = highest_rank(config)
    padded(rank)
    return rank


def not_plain(config: Mapping[str, Json]) -> str:
    """The features of an adapter beyond plain LoRA on single layers, by its config; "" for plain LoRA."""
    odd = [name for name in ("use_dora", "modules_to_save", "layer_replication") if config.get(name)]
    if config.get("peft_type") != "LORA":
        return f"{config.get('peft_type')} adapters"
    return f"LoRA with {', '.join(odd)}" if odd else ""


def name_of(adapter: str) -> str:
    """The name an adapter is served under."""
    return Path(adapter).resolve().name


def scores(positions: Sequence[Mapping[str, Mapping[str, Json]]], answer: Sequence[int]) -> Scores:
    """Scores of an answer from vLLM's prompt log-probabilities of its tokens: by token id, {logprob, rank}; the given
    token is among them whatever its rank."""
    given = [float(at[str(token)]["logprob"]) for at, token in zip(positions, answer, strict=True)]
    top = [sorted((float(-v["logprob"]), int(t)) for t, v in at.items() if v["rank"] <= TOP_K) for at in positions]
    width = min(map(len, top))
    ids = [[token for _, token in at[:width]] for at in top]
    logprobs = [[-nats for nats, _ in at[:width]] for at in top]
    return Scores(given, [at[0] for at in ids], ids, logprobs, finite=all(map(math.isfinite, given)))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
