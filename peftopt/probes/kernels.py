"""Which kernels a request runs on a CUDA GPU, and for how much of its time: what is used, not what was asked for."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from peftopt.corpus import Row
from peftopt.engines import Engine
from peftopt.measurements import NO_FACTS, EngineFacts, Kernel
from peftopt.metrics import percent
from peftopt.probes import cuda_of

SHOWN = 6
"""Kernels that are named: those with the most time."""


def used(engine: Engine, rows: Sequence[Row], new_tokens: int) -> EngineFacts:
    """Ask one batch three times: warm, timed, and under CUPTI through torch's profiler, which slows it down.

    `kernels` are the names with the most time and their share of all GPU time; `gpu_busy` is the GPU time over the time
    the request took unwatched; `log` says both in words. NO_FACTS for an engine that computes elsewhere.
    """
    if (torch := cuda_of(engine)) is None:
        return NO_FACTS
    prompts = [engine.encode(row.messages)[0] for row in rows]
    engine.generate(prompts, new_tokens, stop=False)
    started = time.perf_counter()
    engine.generate(prompts, new_tokens, stop=False)
    seconds = time.perf_counter() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        engine.generate(prompts, new_tokens, stop=False)
    return summary(((e.name, e.device_time_total * 1e-6) for e in seen.events() if _on_gpu(e)), seconds)


def summary(spans: Iterable[tuple[str, float]], seconds: float) -> EngineFacts:
    """From kernels' names and seconds, and the seconds of the request. Pure."""
    total: Counter[str] = Counter()
    for name, span in spans:
        total[plain(name)] += span  # type: ignore[assignment]
    whole = sum(total.values())
    if not whole:
        return NO_FACTS
    shares = [(name, span / whole) for name, span in total.most_common(SHOWN)]
    top = tuple(Kernel(name=name, share=share) for name, share in shares)
    busy = whole / seconds
    named = ", ".join(f"{name} {percent(share)}" for name, share in shares)
    log = (f"its GPU computes for {percent(busy)} of a request's time: {named}",)
    return EngineFacts(why="kernels", gpu_busy=busy, kernels=top, log=log)


def plain(name: str) -> str:
    """A kernel's name without its C++ types: "void at::native::elementwise_kernel<128, …>(…)" is elementwise_kernel."""
    bare = re.sub(r"<.*|\(.*", "", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    return (bare.rsplit("::", 1)[-1].strip() or name)[:60]


def _on_gpu(event: Any) -> bool:
    return "cuda" in str(event.device_type).lower()
