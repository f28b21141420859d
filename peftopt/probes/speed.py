"""One variant's turn in a block: warm-up requests, then timed ones, every one kept."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence

from peftopt import machine
from peftopt.corpus import Row
from peftopt.engines import Engine
from peftopt.measurements import Request
from peftopt.policies import uncut
from peftopt.probes import cuda_of

WARMUP_TOKENS = 4
"""What a warm-up request generates in a worker that has answered before."""


def turn(
    engine: Engine,
    batches: Sequence[Sequence[Row]],
    new_tokens: int,
    warmup: int,
    fresh: bool = True,
    stop: bool = False,
) -> list[Request]:
    """Time each batch as one request, one after the other (a closed loop); the first `warmup` are marked so. Only in a
    `fresh` worker are they as long as the others, so that whatever is compiled for that length is compiled there.

    All durations in milliseconds, wall clock, measured from the submission; `cpu_ms` is the CPU time of the process,
    and of those that serve the model for it. On CUDA `gpu_ms` is the time between two events around the
    generation, by the GPU's own clock.
    TTFT ends with the first token of the batch, TPOT is the mean gap after it (Vocabulary: MLPerf, vLLM).
    Every request generates exactly `new_tokens` tokens per prompt, so no variant wins by being terse; with `stop`
    answers end by themselves, as a user meets them, and the record's `new_tokens` tell how long they were.
    """
    gc.collect()
    gc.disable()  # a collection inside a request would be charged to whichever variant it happened to hit
    try:
        first = new_tokens if fresh else min(WARMUP_TOKENS, new_tokens)
        lengths = [first if n < warmup else new_tokens for n in range(len(batches))]
        return [_request(engine, *each, n < warmup, stop) for n, each in enumerate(zip(batches, lengths, strict=True))]
    finally:
        gc.enable()


def _request(engine: Engine, batch: Sequence[Row], new_tokens: int, warmup: bool, stop: bool) -> Request:
    serving = engine.processes()
    served = machine.cpu_s(serving)
    submitted, cpu = time.perf_counter_ns(), time.process_time_ns()
    prompts = [engine.encode(row.messages)[0] for row in batch]
    started = time.perf_counter_ns()
    with _gpu_clock(engine) as gpu:
        generations = engine.generate(prompts, new_tokens, stop=stop)
    cpu = time.process_time_ns() - cpu + round((machine.cpu_s(serving) - served) * 1e9)
    # A batch begins with its first token and is done with its longest answer; a server ends rows at times of their own.
    first, last = min(g.times[0] for g in generations), max(g.times[-1] for g in generations)
    gaps = max(len(g.times) for g in generations) - 1
    steps = sum(g.steps for g in generations)
    reused = [g.reused for g in generations if g.reused is not None]
    return Request(
        request_duration_ms=(last - submitted) / 1e6,
        queue_time_ms=(started - submitted) / 1e6,
        generation_latency_ms=(last - started) / 1e6,
        ttft_ms=(first - submitted) / 1e6,
        tpot_ms=(last - first) / 1e6 / gaps if gaps else None,
        cpu_ms=cpu / 1e6,
        gpu_ms=gpu(),
        batch=len(batch),
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(len(g.tokens) for g in generations),
        touched=sum(uncut(engine, row.messages) is not None for row in batch),
        warmup=warmup,
        reused=sum(reused) if reused else None,
        steps=steps or None,
        proposed=sum(g.proposed for g in generations) if steps else None,
        accepted=sum(g.accepted for g in generations) if steps else None,
    )


@contextlib.contextmanager
def _gpu_clock(engine: Engine) -> Iterator[Callable[[], float | None]]:
    """Tells the milliseconds afterwards; None where the engine does not compute on CUDA in this process."""
    if (torch := cuda_of(engine)) is None:
        yield lambda: None
        return
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    yield lambda: float(first.elapsed_time(last))
    last.record()
    last.synchronize()
