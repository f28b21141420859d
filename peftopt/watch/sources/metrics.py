"""Two looks at metrics -> the span between them, whoever's metrics they are. Pure."""

from __future__ import annotations

from peftopt.watch.promise import Promise
from peftopt.watch.sources import gateway, vllm
from peftopt.watch.sources.scrape import Scrape, growth
from peftopt.watch.spans import Span

KNOWN = (gateway, vllm)
"""Whose metrics are known. A gateway's come first: they are what users saw, and have adapters."""

NAMES = frozenset((*gateway.NAMES, *vllm.NAMES))
"""The samples that are read."""

LENGTHS = "a gateway's metrics tell no lengths of single requests: give its log (--logs) to see other lengths"
WHOLE_SPANS = (
    "metrics tell whole windows: times are compared with the run's in windows whose requests at the engine and mean "
    "prompt are like the run's"
)
"""What is not seen in metrics."""


def known(look: Scrape) -> bool:
    """Whether somebody's metrics are there that can be watched."""
    return any(each.is_there(look) for each in KNOWN)


def span(before: Scrape, after: Scrape, promise: Promise) -> Span:
    """What users saw between two looks; nothing where nobody's metrics are known."""
    empty = Span(before.at, after.at - before.at)
    for each in KNOWN:
        if each.is_there(after):
            adapters = each.traffic(growth(before, after), before, after, promise)
            return Span(empty.began, empty.seconds, adapters, each.engine(after))
    return empty


def blind(look: Scrape) -> tuple[str, ...]:
    """What these metrics do not tell."""
    return (WHOLE_SPANS, LENGTHS) if gateway.is_there(look) else (WHOLE_SPANS,)
