"""Advice against a cost, in words for the engine. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from peftopt.diagnose.setting import LLAMACPP, OURS, VLLM

ANY = ""
"""Stands for an engine that has no words of its own."""

MERGE = "merge the adapter: peftopt merge --base {base} --adapter {adapter} --out merged"

ADVICE: Mapping[str, Mapping[str, str]] = {
    "capability": {
        OURS: "serve the base on a server of its own, without adapters",
        VLLM: "serve the base on a server of its own, without --enable-lora",
        ANY: "serve the base on a server of its own, without adapters",
    },
    "the adapter": {ANY: MERGE},
    "slots": {
        VLLM: "--max-loras {live}: no more slots than adapters that are live at once",
        ANY: "load fewer adapters, on more servers",
    },
    "rank padding": {
        VLLM: "--max-lora-rank {rank}: the adapters' own",
        ANY: "cut the rank to what the adapter uses; serve adapters of other ranks apart",
    },
    "mixed ranks": {ANY: "serve adapters of one rank together, others on another server"},
    "switching": {ANY: "send requests of one adapter together, or merge the hottest"},
    "live adapters": {
        OURS: "merge the hottest; serve the rest with an engine that batches adapters (vLLM)",
        ANY: "merge the hottest adapter, and serve the rest apart",
    },
    "the cliff": {
        VLLM: "--max-loras {live}: as many slots as adapters are live at once",
        ANY: "no more than {cliff} live adapters a server, or more slots",
    },
    "service level": {
        ANY: "fewer adapters a server, or the hottest merged; peftopt load --find-rate says what it holds"
    },
    "skew": {ANY: "merge the hottest adapter: it has most of the traffic"},
    "first request": {ANY: "ask an adapter once after its load, before users do: peftopt adapters put"},
    "virtual tokens": {ANY: "compute them once: peftopt bake --base {base} --adapter {adapter} --out baked"},
    "KV cache": {ANY: "fewer virtual tokens; an engine that shares a prefix between requests keeps them once"},
    "batching": {
        OURS: "--max-batch {rows}: requests that come together are computed together",
        VLLM: "--max-num-seqs {rows}",
        LLAMACPP: "--parallel {rows}",
        ANY: "let the engine compute requests together",
    },
    "static batches": {ANY: "an engine whose rows join and leave (continuous batching)"},
    "shared prompt": {
        VLLM: "--enable-prefix-caching",
        LLAMACPP: "--cache-prompt",
        ANY: "an engine that keeps a shared prefix: vLLM with --enable-prefix-caching",
    },
    "no KV cache": {ANY: "use_cache=True: the engines of peftopt always do"},
}


def advice(part: str, engine: str, **words: object) -> str:
    """The advice for a part, with `words` put in."""
    known = ADVICE.get(part, {})
    text = known.get(engine, known.get(ANY, ""))
    return text.format_map(words)
