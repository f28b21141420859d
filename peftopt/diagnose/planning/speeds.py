"""How fast an engine is, merged and with adapters apart: the input of a plan. Pure.

Samples are stored as they were measured. `typical` takes their medians; `resampled` draws from them, so that results
over many draws have the spread of the measurements.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from peftopt import stats

if TYPE_CHECKING:
    import numpy as np

Samples = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of one way of serving, in seconds. `prefill`: tokens of a prompt -> from the request to the first token,
    alone. `step`: rows in the batch -> one decode step of all of them."""

    prefill: Mapping[int, Samples]
    step: Mapping[int, Samples]


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """An engine's times and memory on one machine.

    `merged`: a merged model. `apart`: the engine with adapters, all rows of one adapter. `mixed`: rows -> a step with
    as many adapters as rows. An engine runs `rows` requests at once. `sharing`: how many times slower an engine is
    while one other computes too (2 = each gets half). `engine_bytes`: memory of a merged engine at work, in which there
    is room for the KV cache of `kv_tokens`; `apart_bytes` the same of one with adapters, `adapter_bytes` each adapter.
    Seconds that it takes to load an adapter, to merge one, and to start an engine.
    """

    engine: str
    merged: Times
    apart: Times
    mixed: Mapping[int, Samples]
    rows: int
    sharing: Samples
    engine_bytes: int
    apart_bytes: int
    adapter_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    load_s: Samples
    merge_s: Samples
    start_s: Samples
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs:
    """The costs of one way of serving, in seconds. A prefill takes `request_s` for each group of requests of one
    adapter and `token_s` for each token. `same[n]` is a decode step of n rows of one adapter, `mixed[n]` of n
    adapters."""

    request_s: float
    token_s: float
    same: tuple[float, ...]
    mixed: tuple[float, ...]

    def prefill(self, groups: int, tokens: int) -> float:
        """Seconds until requests of so many adapters have their first tokens."""
        return groups * self.request_s + tokens * self.token_s

    def step(self, rows: int, adapters: int) -> float:
        """Seconds of a decode step: interpolated between a batch of one adapter and one of as many adapters as rows.
        That is exact if an engine steps adapter by adapter, each in a time of c + d x rows."""
        if adapters <= 1 or rows <= 1:
            return self.same[rows]
        return self.same[rows] + (self.mixed[rows] - self.same[rows]) * (adapters - 1) / (rows - 1)


@dataclass(frozen=True)
class Drawn:
    """One draw of all measurements, or the medians."""

    merged: Costs
    apart: Costs
    sharing: float
    load_s: float
    merge_s: float
    start_s: float


def typical(speeds: Speeds) -> Drawn:
    """With the medians."""
    return _drawn(speeds, stats.median)


def resampled(speeds: Speeds, rng: np.random.Generator) -> Drawn:
    """With the medians of as many samples, drawn with replacement: one bootstrap replicate."""

    def draw(samples: Samples) -> float:
        return stats.median([samples[place] for place in rng.integers(0, len(samples), len(samples))])

    return _drawn(speeds, draw)


def _drawn(speeds: Speeds, centre: Callable[[Samples], float]) -> Drawn:
    merged, apart = _times(speeds.merged, centre), _times(speeds.apart, centre)
    rows = speeds.rows
    same = _by_rows(apart[1], rows)
    mixed = _by_rows({1: same[1], **{n: centre(samples) for n, samples in speeds.mixed.items() if n > 1}}, rows)
    alone = _by_rows(merged[1], rows)
    return Drawn(
        merged=Costs(*_line(merged[0]), alone, alone),
        apart=Costs(*_line(apart[0]), same, tuple(map(max, mixed, same))),
        sharing=max(1.0, centre(speeds.sharing)),
        load_s=centre(speeds.load_s),
        merge_s=centre(speeds.merge_s),
        start_s=centre(speeds.start_s),
    )


def _times(times: Times, centre: Callable[[Samples], float]) -> tuple[dict[int, float], dict[int, float]]:
    prefill = {tokens: centre(samples) for tokens, samples in times.prefill.items()}
    return prefill, {rows: centre(samples) for rows, samples in times.step.items()}


def _line(prefill: Mapping[int, float]) -> tuple[float, float]:
    """Seconds for a request and for each token of it, from the prefills of the shortest and the longest prompt."""
    short, long = min(prefill), max(prefill)
    if short == long:
        return 0.0, prefill[long] / long
    per_token = max(0.0, (prefill[long] - prefill[short]) / (long - short))
    return max(0.0, prefill[long] - per_token * long), per_token


def _by_rows(measured: Mapping[int, float], rows: int) -> tuple[float, ...]:
    """The time of a step for 0, 1, … rows: straight lines between the measured ones and beyond the last, and never less
    than with fewer rows, since a shorter time could only be noise."""
    known = sorted(measured)
    rising = list(accumulate((measured[n] for n in known), max))
    return tuple(accumulate((_between(known, rising, n) for n in range(rows + 1)), max))


def _between(known: Sequence[int], values: Sequence[float], n: int) -> float:
    if n <= known[0] or len(known) == 1:
        return values[0]
    place = min(bisect_left(known, n), len(known) - 1)
    (left, right), (low, high) = list(pairwise(known))[place - 1], list(pairwise(values))[place - 1]
    return low + (high - low) * (n - left) / (right - left)
