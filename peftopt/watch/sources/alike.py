"""Which times of a span may be compared with a run's, where nothing is known of single requests. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftopt.watch.promise import Promise
from peftopt.watch.spans import Buckets, Time


def alike(
    times: Mapping[Time, Buckets], running: Sequence[float | None], prompt_tokens: float | None, promise: Promise
) -> Mapping[Time, Buckets]:
    """The span's times, or none of them. `running`: requests at the engine at its beginning and end, and on average;
    `prompt_tokens`: the mean length of its prompts. All of the span's requests count or none; none where the run does
    not know its prompts' lengths."""
    usual = promise.prompt_tokens
    if usual is None or prompt_tokens is None or not usual.low <= prompt_tokens <= usual.high:
        return {}
    return {} if any(n is None or n > promise.beside for n in running) else times
