"""Rules on what the run allows: shares over its limits on times, and shares of errors by kind. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from peftopt.deploy.monitoring.alerts import ALL, Alert, literal
from peftopt.deploy.monitoring.burn import WINDOWS, Burn, burns
from peftopt.deploy.monitoring.sources import WORDS, Source, joined, le, one_of, percent, quoted
from peftopt.records import JsonValue
from peftopt.watch.promise import Bound, Promise

IN_WORDS = {"1h": "hour", "6h": "6 hours", "1d": "day", "5m": "5 minutes", "30m": "30 minutes", "2h": "2 hours"}
OWN = {"cancelled", "request", "refused"}
"""Kinds of errors that are the client's own, or have an alert of their own."""


def watched(promise: Promise, source: Source) -> tuple[Bound, ...]:
    """The limits that the rules hear, each name once: those that the buckets can tell of."""
    by_name = {bound.name: bound for bound in promise.sla if source.end(bound) is not None and bound.share < 1.0}
    return tuple(by_name.values())


def shares(promise: Promise, source: Source) -> Mapping[float, tuple[str, ...]]:
    """Kinds of errors by the share of requests that may fail so, the strictest first."""
    told = {kind: share for kind, share in promise.errors.items() if kind not in OWN}
    kinds = {**source.kinds, **told} if source.name == "gateway" else source.kinds
    by_share = defaultdict(list)
    for kind, share in kinds.items():
        by_share[share].append(kind)
    return {share: tuple(by_share[share]) for share in sorted(by_share) if share < 1.0}


def over_limit(source: Source, window: str) -> str:
    """The name of the recorded share of requests over a limit."""
    return f"{source.by}:peftopt_over_limit:ratio_rate{window}"


def failed(source: Source, window: str) -> str:
    """The name of the recorded share of requests that failed, by kind."""
    return f"{source.by}:peftopt_errors:ratio_rate{window}"


def recording(promise: Promise, source: Source) -> list[JsonValue]:
    """Rules that record the shares, over every window that an alert looks at."""
    rules: list[JsonValue] = []
    for bound in watched(promise, source):
        for window in _windows(burns(bound.share)):
            expr = source.over(bound, window)
            rules.append({"record": over_limit(source, window), "expr": expr, "labels": {"limit": bound.name}})
    kinds = [kind for each in shares(promise, source).values() for kind in each]
    for window in _windows(tuple(burn for share in shares(promise, source) for burn in burns(share))):
        rules.append({"record": failed(source, window), "expr": error_share(source, kinds, window)})
    return rules


def _windows(of: tuple[Burn, ...]) -> list[str]:
    used = {window for burn in of for window in (burn.pace.short, burn.pace.long)}
    return [window for window in WINDOWS if window in used]


def error_share(source: Source, kinds: list[str], window: str, chosen: str = "") -> str:
    """PromQL: of all requests with the labels `chosen`, the share that failed, by kind."""
    by, kind = source.by, source.kind
    failing = f"{source.errors}{{{joined(chosen, f'{kind}=~{one_of(kinds)}')}}}"
    every = f"{source.requests}{{{chosen}}}" if chosen else source.requests
    return (
        f"sum by ({by}, {kind}) (rate({failing}[{window}]))\n"
        f"  / on ({by}) group_left () sum by ({by}) (rate({every}[{window}]))"
    )


def alerts(promise: Promise, source: Source) -> list[Alert]:
    """All alerts on limits, on errors, and on a rate that nobody has measured."""
    found = []
    for bound in watched(promise, source):
        found += [_over_limit(source, bound, burn) for burn in burns(bound.share)]
        found.append(_blind(source, bound))
    for share, kinds in shares(promise, source).items():
        found += [_errors(source, kinds, burn) for burn in burns(share)]
    return found + ([_demand(source, promise.rate)] if promise.rate else [])


def _above(recorded: str, matcher: str, burn: Burn, short: str, source: Source, counter: str) -> str:
    """The share is above the threshold in both windows, and there are enough requests to say so."""
    by, pace, least = source.by, burn.pace, f"{burn.threshold:.6g}"
    return (
        f"{recorded}{{{matcher}}} > {least}\n"
        f"  and {short}{{{matcher}}} > {least}\n"
        f"  and on ({by}) sum by ({by}) (increase({counter}[{pace.long}])) >= {burn.requests}"
    )


def _over_limit(source: Source, bound: Bound, burn: Burn) -> Alert:
    pace, name = burn.pace, literal(bound.name)
    counter = f"{source.times[bound.time]}_count"
    matcher = f"limit={quoted(bound.name)}"
    end = source.end(bound)
    counted = "" if end == bound.bound_s else f" (counted at {end:g} s, the next bound of a bucket)"
    return Alert(
        name="PeftoptOverLimit",
        severity="page",
        expr=_above(over_limit(source, pace.long), matcher, burn, over_limit(source, pace.short), source, counter),
        summary=f"{{{{ $labels.{source.by} }}}}: {{{{ $value | humanizePercentage }}}} of its requests miss {name}",
        description=(
            f"{name} allows {percent(burn.allowed)} of requests to take longer than {bound.bound_s:g} s{counted}, "
            f"{WORDS[bound.time]}. Over the last {IN_WORDS[pace.long]} {{{{ $value | humanizePercentage }}}} did, and "
            f"over the last {IN_WORDS[pace.short]} more than {percent(burn.threshold)} too: look at queue time, batch "
            "fill and demand, and whether a version or the engine has changed."
        ),
        labels={"limit": bound.name, "pace": pace.name},
    )


def _blind(source: Source, bound: Bound) -> Alert:
    """No bucket ends at the limit: the alert on it would stay silent for ever."""
    by, name, end = source.by, source.times[bound.time], source.end(bound)
    assert end is not None
    bucket = f"{name}_bucket{{le={quoted(le(end))}}}"
    labels = f'{by}="support"'
    return Alert(
        name="PeftoptLimitUnwatched",
        severity="ticket",
        expr=f"sum by ({by}) (rate({name}_count[1h])) > 0\n  unless on ({by}) sum by ({by}) ({bucket})",
        hold="15m",
        summary=f"{{{{ $labels.{by} }}}}: nobody counts the requests over {literal(bound.name)}",
        description=(
            f"No bucket of {name} ends at {end:g} s, so that the alert on {literal(bound.name)} cannot fire. "
            + ("Serve the run itself: peftopt serve RUN." if source.name == "gateway" else "Were the buckets changed?")
        ),
        labels={"limit": bound.name},
        fires={f"{name}_count{{{labels}}}": "0+60x2880"},
        silent={
            f"{name}_count{{{labels}}}": "0+60x2880",
            f"{name}_bucket{{{labels},le={quoted(le(end))}}}": "0+60x2880",
        },
    )


def _errors(source: Source, kinds: tuple[str, ...], burn: Burn) -> Alert:
    pace, by, kind = burn.pace, source.by, source.kind
    matcher = f"{kind}=~{one_of(kinds)}"
    labels = f'{by}="support",{kind}="{kinds[0]}"'
    often = min(1.0, 1.5 * burn.threshold) if burn.threshold else 0.01
    return Alert(
        name="PeftoptErrors",
        severity="page",
        expr=_above(failed(source, pace.long), matcher, burn, failed(source, pace.short), source, source.requests),
        summary=f"{{{{ $labels.{by} }}}}: {{{{ $value | humanizePercentage }}}} of requests fail, "
        f"{{{{ $labels.{kind} }}}}",
        description=(
            f"{percent(burn.allowed)} of requests may fail so. Over the last {IN_WORDS[pace.long]} "
            f"{{{{ $value | humanizePercentage }}}} did, and over the last {IN_WORDS[pace.short]} more than "
            f"{percent(burn.threshold)} too: the engine's log says why."
        ),
        labels={"allowed": percent(burn.allowed), "pace": pace.name},
        fires={
            f"{source.errors}{{{labels}}}": f"0+{ALL * often:g}x2880",
            _all(source): f"0+{ALL * (1 - often):g}x2880",
        },
        silent={f"{source.errors}{{{labels}}}": f"0+{ALL * burn.allowed:g}x2880", _all(source): f"0+{ALL}x2880"},
    )


def _demand(source: Source, rate: float) -> Alert:
    below, above = 60 * rate * 0.9, 60 * rate * 1.1
    return Alert(
        name="PeftoptDemand",
        severity="ticket",
        expr=f"sum by (instance) (rate({source.requests}[30m])) > {rate:.6g}",
        hold="30m",
        summary="{{ $labels.instance }} has {{ $value | humanize }} requests a second",
        description=(
            f"The run held its limits up to {rate:.3g} requests a second of one server, and nobody knows what holds "
            "above that. Add a replica, or measure a higher rate: peftopt load --find-rate."
        ),
        fires={_all(source): f"0+{above:g}x300"},
        silent={_all(source): f"0+{below:g}x300"},
    )


def _all(source: Source) -> str:
    """A series of a healthy service: requests that were answered."""
    return {
        "gateway": 'peftopt_requests_total{adapter="support",version="v1",arm="live",code="200"}',
        "vllm": 'vllm:request_success_total{model_name="support",engine="0",finished_reason="stop"}',
    }[source.name]
