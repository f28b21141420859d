"""Reads a plan's fields from a gateway's log: adapters, skew, rate and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from peftopt.diagnose.planning.traffic import fitted_zipf
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.metrics import counted
from peftopt.records import Json
from peftopt.watch.sources.following import Files

PEAK_S = 3600.0
"""A plan is for the busiest hour of a log."""

MOST_LENGTHS = 1000
"""So many pairs of lengths stand for those of all requests."""

FEWEST = 20
"""With fewer requests a log says nothing about traffic."""


class Asked(NamedTuple):
    """A request of a log: its arrival, in seconds; lengths are None and 0 if no answer gives them."""

    at: float
    adapter: str
    prompt_tokens: int | None
    new_tokens: int


def read(path: Path) -> dict[str, Json]:
    """The fields of a plan in the log of `peftopt serve --log`. Raises MissingEnvironment if it cannot be read,
    BadInput if it has too little."""
    try:
        from peftopt.watch.sources import lines
    except ImportError as error:
        raise MissingEnvironment("reading a log needs msgspec", "pip install 'peftopt[serve]'") from error
    asked, left_out = [], 0
    for line in Files([path]).lines(over=True):
        try:
            row = lines.decode(line)
        except lines.UNREADABLE:
            left_out += 1
            continue
        if isinstance(row, lines.Request) and row.adapter and row.error_kind != "request":  # that was the user's fault
            asked.append(Asked(row.timestamp / 1e3, row.adapter, row.prompt_tokens, row.new_tokens))
    if len(asked) < FEWEST:
        what = f"{path} holds {counted(len(asked), 'request')}, too few to say what traffic is like"
        raise BadInput(what, f"give a log of at least {FEWEST} requests, as peftopt serve --log writes it")
    fields = of_requests(asked)
    if left_out:
        fields["notes"] = (*fields["notes"], f"{counted(left_out, 'line')} of the log could not be read")
    return fields


def of_requests(asked: Sequence[Asked]) -> dict[str, Json]:
    """Fields of a plan. `asked` are two requests or more, in any order."""
    popular = Counter(request.adapter for request in asked).most_common()
    rate, note = _rate(sorted(request.at for request in asked))
    lengths = [
        (request.prompt_tokens, request.new_tokens) for request in asked if request.prompt_tokens and request.new_tokens
    ]
    fields: dict[str, Json] = {
        "adapters": len(popular),
        "names": tuple(name for name, _ in popular),
        "zipf": fitted_zipf([count for _, count in popular]),
        "rps": rate,
        "notes": (f"of {counted(len(asked), 'request')} in the log, {note}",),
    }
    if lengths:
        step = -(-len(lengths) // MOST_LENGTHS)
        fields["lengths"] = tuple(lengths[::step])
    return fields


def _rate(times: Sequence[float]) -> tuple[float, str]:
    """Requests a second in the busiest hour, or over all of a shorter log; and in words which it is."""
    span = times[-1] - times[0]
    if span <= PEAK_S:
        return (len(times) - 1) / max(span, 1e-3), f"which is {span / 60:.3g} min long: the mean rate of all of it"
    most = max(_counts(times))
    return most / PEAK_S, "the rate of the busiest hour"


def _counts(times: Sequence[float]) -> Iterable[int]:
    """For each request, how many came in the hour that it ends."""
    oldest = 0
    for number, at in enumerate(times):
        while times[oldest] <= at - PEAK_S:
            oldest += 1
        yield number - oldest + 1
