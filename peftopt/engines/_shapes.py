"""Which shapes the `compiled` engine has to compile for the prompts of a workload, told from their lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftopt.engines.compiled import SHORTEST, Params, buckets


@dataclass(frozen=True)
class Wanted:
    """Shares of requests that are answered `uncompiled`, and of those that are not whose prompt is `eager`; `graphs`,
    of steps and prompts together; `padding`: tokens that prompts are padded to, over their own; `longest` tokens of a
    request."""

    uncompiled: float
    eager: float
    graphs: int
    padding: float
    longest: int


def wanted(lengths: Sequence[int], rows: int, new_tokens: int, params: Params, ahead: int = 0) -> Wanted:
    """What an engine that was warm for these prompts (token counts), in batches of `rows`, does with them. A batch is
    as long as its longest row, and any row may be. `lengths` must not be empty. `ahead`: tokens that are proposed at a
    time, which take room in the cache and a graph of their own."""
    new_tokens += ahead
    room = params.cache_len or max(SHORTEST, 2 ** (max(lengths) + new_tokens - 1).bit_length())
    fitting = [length for length in lengths if length + new_tokens <= room]
    offered = buckets(params.prompt_buckets, room)
    bucketed = [length for length in fitting if offered and length <= offered[-1]]
    own = {min(bucket for bucket in offered if bucket >= length) for length in bucketed}
    kept = sorted(own, reverse=True)[: params.prompt_graphs]
    padded = sum(min(bucket for bucket in kept if bucket >= length) for length in bucketed)
    in_graphs = len(bucketed) / len(fitting) if offered and fitting else 1.0
    return Wanted(
        uncompiled=1 - _of_batches(len(fitting) / len(lengths), rows),
        eager=1 - _of_batches(in_graphs, rows),
        graphs=(1 + bool(ahead) if fitting else 0) + len(kept),
        padding=padded / sum(bucketed) if bucketed else 1.0,
        longest=max(lengths) + new_tokens,
    )


def _of_batches(share: float, rows: int) -> float:
    """The share of batches all of whose rows are of such a share of prompts."""
    return share**rows
