"""transformers `generate` with the decode step compiled by torch.compile, over a static key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftopt.engines import Generation, eager
from peftopt.errors import BadInput
from peftopt.records import Model

TECHNIQUE = "compile"
NEEDS = eager.NEEDS
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ATTENTIONS = ("auto", "sdpa", "eager")
ROUND_TO = 128
"""Tokens; the cache grows in steps of this."""


@dataclass(frozen=True)
class Params:
    """`mode` of torch.compile ("reduce-overhead" records CUDA graphs); `cache_len`: the least length of the cache in
    tokens (a longer request makes it grow, and compile again); `attention`: "sdpa", "eager" or "auto", which is
    "eager" on a CPU and the model's own elsewhere; `device` as in `eager`."""

    mode: str = "default"
    cache_len: int = 0
    attention: str = "auto"
    device: str = "auto"


prepare = eager.prepare


def open(model: Model, params: Params) -> Compiled:
    """Load the model; the first `generate` of each batch size compiles, or loads what an earlier process compiled."""
    if params.mode not in MODES:
        raise BadInput(f"mode: {params.mode!r} is no mode of torch.compile", f"use one of {', '.join(MODES)}")
    if params.attention not in ATTENTIONS:
        raise BadInput(f"attention: {params.attention!r} is unknown", f"use one of {', '.join(ATTENTIONS)}")
    return Compiled(model, params)


class Compiled(eager.Transformers):
    """The eager engine with another cache and a compiled decode step; the prompt itself still runs eagerly, and so does
    scoring, over the same weights.

    What Inductor compiles is kept in TORCHINDUCTOR_CACHE_DIR, so a second process starts warm.
    """

    own_decoder = True

    def __init__(self, model: Model, params: Params) -> None:
        from transformers import CompileConfig

        super().__init__(model, params.device)
        self._cache_len = params.cache_len
        attention = params.attention
        if attention == "auto" and self._device.type == "cpu":
            # Inductor fuses plain attention, but can only call the SDPA kernel, which on a CPU takes its time over a
            # padded cache: 39 against 81 ms a token, where uncompiled `generate` takes 52 (SmolLM2-135M, batch 8).
            attention = "eager"
        if attention != "auto":
            self._owners[-1].set_attn_implementation(attention)
        # Static shapes: a graph of its own for each batch size, instead of one slower graph for all of them.
        self._compile = CompileConfig(mode=params.mode, dynamic=False)
        self._compile._compile_all_devices = True  # transformers compiles by itself only on accelerators

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        # Each batch size is a graph of its own: rows of padding up to a power of two keep them few.
        padding = 2 ** (len(prompts) - 1).bit_length() - len(prompts)
        return super().generate([*prompts, *[prompts[-1]] * padding], new_tokens, stop)[: len(prompts)]

    def _cache(self, length: int) -> dict[str, Any]:
        # The cache's length is part of the compiled shape. Rounded up, and never smaller than before (transformers
        # keeps the longest), it stays the same over the prompt lengths of a workload: one graph, no recompiling.
        # Not rounded further than that: attention on a CPU takes its time over the whole cache, filled or not.
        rounded = max(-(-length // ROUND_TO) * ROUND_TO, self._cache_len)
        return {"cache_implementation": "static", "max_cache_len": rounded, "compile_config": self._compile}
