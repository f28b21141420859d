"""A worker's part of every limit. Pure.

The parts add up to the limit, so no more than the limit ever runs. Connections are spread over the workers by chance:
one may refuse while another has room.
"""

from __future__ import annotations

from dataclasses import replace

from peftopt.errors import BadInput
from peftopt.gateway.keys import Key, Keys
from peftopt.gateway.limits import Limits


def part(number: int, workers: int, index: int) -> int:
    """The part of a whole number that worker `index` of 1 to `workers` has."""
    return number // workers + (index <= number % workers)


def limits_of(whole: Limits, workers: int, index: int) -> Limits:
    """A worker's part of the limits; the longest wait is the same for all."""
    return replace(
        whole,
        running=part(whole.running, workers, index),
        waiting=part(whole.waiting, workers, index),
        rate=whole.rate / workers,
    )


def keys_of(whole: Keys, workers: int) -> Keys:
    """The keys with a worker's part of their rates."""
    return Keys({digest: Key(key.name, key.adapters, key.rate / workers) for digest, key in whole.known.items()})


def check(workers: int, limits: Limits, per_adapter: int, per_key: int) -> None:
    """Raises BadInput for limits that cannot be divided: a part of 0 would be no limit at all."""
    if workers < 1:
        raise BadInput(f"--workers {workers} is not a number of processes", "write --workers 2")
    for name, number in (
        ("--limits running", limits.running),
        ("--per-adapter", per_adapter),
        ("--per-key", per_key),
    ):
        if 0 < number < workers:
            raise BadInput(
                f"{name}={number} cannot be divided among {workers} workers",
                f"take at most {number} workers, or a limit of {workers} or more",
            )
