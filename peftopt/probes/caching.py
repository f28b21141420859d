"""What a KV cache saves and holds, and what of a token's time an adapter's own matrices take."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from peftopt.engines import eager
from peftopt.measurements import Caching

MATRICES = ("lora_A", "lora_B")
"""PEFT's names of a LoRA's matrices."""

WATCHED = 4
"""Tokens that are computed under the profiler."""


def look(model: Any, tokens: int, rounds: int) -> Caching:
    """Compute one token after `tokens` others with the cache and without, in turns of random order."""
    import torch

    with torch.inference_mode(), eager.contiguous_inputs(model.get_output_embeddings()):  # or only `anew` copies it
        ids = torch.randint(0, int(model.config.get_text_config().vocab_size), (1, tokens + 1), device=model.device)
        cache = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        columns = cache.get_seq_length()

        def kept() -> None:
            cache.crop(columns)
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def anew() -> None:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

        kept()
        anew()
        times: dict[Callable[[], None], list[float]] = {kept: [], anew: []}
        for _ in range(rounds):
            for ways in random.sample(list(times), len(times)):
                started = time.perf_counter_ns()
                ways()
                times[ways].append((time.perf_counter_ns() - started) / 1e6)
        share = adapter_share(model, kept)
    return Caching(
        kept_ms=tuple(times[kept]), anew_ms=tuple(times[anew]), kv_bytes=held // columns, adapter_share=share
    )


def adapter_share(model: Any, step: Callable[[], None]) -> float | None:
    """The share of a step's time that passes in the adapter's matrices, by torch's profiler; None without any."""
    import torch

    matrices = [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith(MATRICES)]
    if not matrices:
        return None
    own: list[Any] = []

    def enter(module: Any, inputs: Any) -> None:
        own.append(torch.profiler.record_function("adapter"))
        own[-1].__enter__()

    def leave(module: Any, inputs: Any, output: Any) -> None:
        own.pop().__exit__(None, None, None)

    hooks = [
        hook for each in matrices for hook in (each.register_forward_pre_hook(enter), each.register_forward_hook(leave))
    ]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(WATCHED):
                with torch.profiler.record_function("token"):
                    step()
    finally:
        for hook in hooks:
            hook.remove()
    spans = {event.key: event.cpu_time_total for event in profile.key_averages() if event.key in ("adapter", "token")}
    return spans.get("adapter", 0) / spans["token"] if spans.get("token") else None
