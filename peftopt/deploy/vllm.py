"""vllm: a script that starts vLLM's server on what a run chose. Pure."""

from __future__ import annotations

import shlex
from dataclasses import replace

from peftopt.deploy import chosen as common
from peftopt.deploy.chosen import Chosen
from peftopt.deploy.deployed import Exported
from peftopt.deploy.flags import Flag
from peftopt.deploy.scripts import LISTEN, Script, address
from peftopt.engines import vllm
from peftopt.records import SAFETENSORS

NAME = "vLLM"
VERSION = "0.32.0"
"""The version whose options these are."""
SLOTS = 2
"""Adapters that one batch may hold: the one that is served, and one place that stays free."""

REASONS = {
    "--enforce-eager": "the run measured without vLLM's compilation (compile: false in its recipe)",
    "--enable-prefix-caching": "the run measured with it",
    "--no-enable-prefix-caching": "the run measured without it, since it asks a prompt more than once",
    "--max-model-len": "tokens of a prompt and its answer, as the run measured",
    "--max-num-seqs": "requests in one batch, as the run measured",
    "--kv-cache-memory-bytes": "memory for keys and values, as the run measured",
    "--gpu-memory-utilization": "the share of a GPU, as the run measured; with --kv-cache-memory-bytes it is only "
    "asked about at the start",
}


def check(chosen: Chosen) -> None:
    """Raises BadInput for what vLLM cannot serve."""
    common.check(chosen, "vLLM", SAFETENSORS, _own(chosen))
    if chosen.adapter and chosen.odd:
        raise common.unserved(chosen, "vLLM")
    if chosen.adapter:
        vllm.padded(chosen.rank)
    if chosen.gpu_only and chosen.device == "cpu":
        raise vllm.no_kernels(chosen.gpu_only)


def exported(chosen: Chosen) -> Exported:
    """The script. Raises BadInput for what vLLM cannot serve."""
    check(chosen)
    own = _own(chosen)
    given, args = common.given(chosen) if own else ([], [])
    dtype, no_dtype = common.dtype(chosen, own, args)
    format_, no_format = common.quantization(chosen)
    measured, unmeasured = _measured(chosen) if own else ([], [Flag(tuple(REASONS), "not measured on vLLM")])
    queue, no_queue = _queue(chosen, own)
    flags = [*_served(chosen), LISTEN, *_lora(chosen), *dtype, *format_, *measured, *queue, *given]
    script = Script(
        "vllm.sh",
        (*common.head(chosen, NAME, "vllm", own), f"Its options are those of vLLM {VERSION}."),
        '"${VLLM:-vllm}" serve "$MODEL"',
        tuple(flags),
        variables=(*common.paths(chosen), *(common.draft(chosen) if own else ()), *address()),
        left=(*no_dtype, *no_format, *unmeasured, *no_queue),
    )
    use = f"bash vllm.sh; then ask http://127.0.0.1:8000/v1 for {chosen.name}"
    return Exported((script.file,), use, () if own else common.unmeasured(chosen, NAME))


def _own(chosen: Chosen) -> bool:
    return chosen.engine == "vllm"


def _served(chosen: Chosen) -> list[Flag]:
    """The names that users ask for."""
    if not chosen.adapter:
        return [Flag(("--served-model-name", chosen.name), "the run's adapter, which the model holds")]
    adapter = f"--lora-modules {shlex.quote(chosen.name)}="
    return [
        Flag(("--served-model-name", vllm.BASE), "the base without the adapter"),
        Flag(
            ("--lora-modules", f"{chosen.name}={chosen.adapter}"),
            "the adapter, which the run chose to keep apart",
            bash=f'{adapter}"$ADAPTER"',
        ),
    ]


def _lora(chosen: Chosen) -> list[Flag]:
    if not chosen.adapter:
        return []
    padded = vllm.padded(chosen.rank)
    rank = "the adapter's rank" if padded == chosen.rank else f"the adapter's rank is {chosen.rank}, and this is next"
    reasons = {
        "--enable-lora": "the adapter stays apart",
        "--max-lora-rank": rank,
        "--max-loras": "one live adapter and one spare slot: where all slots are taken, vLLM 0.32 computes the base's "
        "requests with an adapter's weights (peftopt canary)",
    }
    return common.as_measured(vllm.lora(chosen.rank, SLOTS), reasons)


def _measured(chosen: Chosen) -> tuple[list[Flag], list[Flag]]:
    """The options by which the run measured, and those that it left too."""
    params = vllm.Params(**chosen.decided.params)
    limits = chosen.decided.limits
    reasons = dict(REASONS)
    if limits:
        params = replace(params, max_num_seqs=limits.running)
        reasons["--max-num-seqs"] = common.little(chosen)
    left = [Flag(("--max-model-len",), "the run measured with the model's own")] if not params.max_model_len else []
    return common.as_measured(vllm.measured(params), reasons), left


def _queue(chosen: Chosen, own: bool) -> tuple[list[Flag], list[Flag]]:
    """The options that bound the queue, or why they are left."""
    held, limits = chosen.decided.held, chosen.decided.limits
    options = ("--max-num-queued-reqs", "--max-num-queued-tokens")
    if not (held and limits and own):
        return [], [Flag(options, common.no_limits(chosen, own))]
    reasons = {
        options[0]: f"{limits.running} that run and {limits.waiting} that can wait {limits.wait_ms:.0f} ms, which "
        f"{held.level} leaves; more get HTTP 503",
        options[1]: f"{held.limit_s:g} s of the limit x {held.prefill:.0f} tokens of prompts per second, of requests "
        "that were alone; more get HTTP 503",
    }
    bounds = vllm.queued(limits.running + limits.waiting, limits.queued_tokens)
    left = [] if limits.queued_tokens else [Flag(options[1:], "the run has no speed of prompts that were alone")]
    return common.as_measured(bounds, reasons), left
