"""What a run decided, as far as production can be held against it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftopt.watch.spans import Time


@dataclass(frozen=True)
class Bound:
    """Of the requests, a share of at most `share` takes longer than `bound_s` seconds. `name` is how a person calls it:
    "ttft.p95@chat <= 500 ms"."""

    name: str
    time: Time
    bound_s: float
    share: float


@dataclass(frozen=True)
class Lengths:
    """The run's own lengths in tokens: at most a share `below` of its requests was shorter than `low`, at most a share
    `above` longer than `high`. The shares are upper bounds, since a run has few requests."""

    low: float
    high: float
    below: float
    above: float


@dataclass(frozen=True)
class Promise:
    """`sla`: the recipe's own limits on times. `drift`: quantiles of the run's times with the upper bounds of its
    intervals. `beside`: the most requests that the run had at the engine at once. `tokens_per_s`: the lower bound of
    new tokens per second of the engine's time, over requests; None where it is not known. `errors`: by kind, the share
    that the run does not exclude. `rate`: the highest, in requests/s, at which the run held its limits; None where no
    load was measured. `unwatched`: what cannot be watched, and why.
    """

    run: str
    variant: str
    sla: tuple[Bound, ...] = ()
    drift: tuple[Bound, ...] = ()
    beside: int = 1
    tokens_per_s: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: Lengths | None = None
    new_tokens: Lengths | None = None
    rate: float | None = None
    adapters: int = 1
    unwatched: tuple[str, ...] = ()
