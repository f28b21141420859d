"""The limits for other programs: OpenSLO, an analysis of Argo Rollouts, and how Prometheus reads the rules. Pure."""

from __future__ import annotations

import re

from peftopt.deploy.monitoring.burn import fewest
from peftopt.deploy.monitoring.limits import shares, watched
from peftopt.deploy.monitoring.sources import WORDS, Source, le, one_of, quoted
from peftopt.deploy.monitoring.texts import as_yaml
from peftopt.records import JsonValue
from peftopt.watch.promise import Bound, Promise

WINDOW = "10m"
"""Of one measurement of a canary."""
MISSES, ERRORS = (1.5, 2.0), (2.0, 6.0)
"""Times the allowed share up to which a measurement is good, and above which it is bad."""
BY_CHANCE = 1e-3
"""At the allowed share, one measurement fails by chance no more often; an analysis fails at the second."""


def open_slo(promise: Promise, source: Source, head: str) -> str:
    """A service, and an SLO for each limit. Source: OpenSLO v1."""
    name = _name(promise.variant)
    service: JsonValue = {
        "apiVersion": "openslo/v1",
        "kind": "Service",
        "metadata": {"name": name, "displayName": promise.variant},
        "spec": {"description": f"{promise.variant}, as the run {promise.run} decided."},
    }
    return as_yaml((head,), service, *(_objective(promise, source, bound, name) for bound in watched(promise, source)))


def _objective(promise: Promise, source: Source, bound: Bound, service: str) -> JsonValue:
    histogram, end = source.times[bound.time], source.end(bound)
    assert end is not None
    good = f"sum({histogram}_bucket{{le={quoted(le(end))}}})"
    return {
        "apiVersion": "openslo/v1",
        "kind": "SLO",
        "metadata": {"name": _name(bound.name), "displayName": bound.name},
        "spec": {
            "description": f"{WORDS[bound.time]}; {promise.variant} was decided on under it, by the run {promise.run}",
            "service": service,
            "indicator": {
                "metadata": {"name": f"{_name(bound.name)}-within"},
                "spec": {
                    "ratioMetric": {
                        "counter": True,
                        "good": _metric(good),
                        "total": _metric(f"sum({histogram}_count)"),
                    }
                },
            },
            "timeWindow": [{"duration": "30d", "isRolling": True}],
            "budgetingMethod": "Occurrences",
            "objectives": [{"displayName": f"within {end:g} s", "target": round(1.0 - bound.share, 9)}],
        },
    }


def _metric(query: str) -> JsonValue:
    return {"metricSource": {"type": "Prometheus", "spec": {"query": query}}}


def _name(text: str) -> str:
    """A name by RFC 1123: lower-case letters, digits and dashes, 63 at most."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-") or "peftopt"


# ---- Argo Rollouts -----------------------------------------------------------------------------


def analysis_template(promise: Promise, source: Source, head: str) -> str:
    """Three outcomes of a measurement: good, bad, and too little or too near to say."""
    which = 'version="…"' if source.name == "gateway" else 'rollouts_pod_template_hash="…"'
    heads = (
        head,
        "Name it in a Rollout (strategy.canary.analysis) with two args: prometheus, its address, and canary, labels of",
        f"the canary's series, as {which}.",
        f"A measurement is good up to {MISSES[0]:g} times what is allowed ({ERRORS[0]:g} of errors), bad above",
        f"{MISSES[1]:g} times ({ERRORS[1]:g} of errors), inconclusive between, and where there are too few requests.",
        "Two bad ones end the rollout; four inconclusive ones pause it for a person.",
    )
    metrics: list[JsonValue] = [_measured(source, bound) for bound in watched(promise, source)]
    metrics.append(_failing(promise, source))
    if source.name == "gateway":
        metrics.append(_wrong())
    template: JsonValue = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "AnalysisTemplate",
        "metadata": {"name": _name(f"peftopt-{promise.variant}")},
        "spec": {"args": [{"name": "prometheus"}, {"name": "canary"}], "metrics": metrics},
    }
    return as_yaml(heads, template)


CANARY = " {{args.canary}}"
"""Labels that Argo puts in; without the space it would read the brace before as a part of the name."""


def _measured(source: Source, bound: Bound) -> JsonValue:
    counter = f"{source.times[bound.time]}_count{{{CANARY}}}"
    expr = source.over(bound, WINDOW, CANARY, by="none")
    return _metric_of(_name(bound.name), expr, counter, bound.share, MISSES)


def _failing(promise: Promise, source: Source) -> JsonValue:
    by_share = shares(promise, source)
    kinds = [kind for each in by_share.values() for kind in each]
    allowed = max(by_share, default=0.01)
    counter = f"{source.requests}{{{CANARY}}}"
    failing = f"{source.errors}{{{CANARY},{source.kind}=~{one_of(kinds)}}}"
    expr = f"(sum (rate({failing}[{WINDOW}])) or vector(0))\n  / sum (rate({counter}[{WINDOW}]))"
    return _metric_of("errors", expr, counter, allowed, ERRORS)


def _metric_of(name: str, expr: str, counter: str, allowed: float, times: tuple[float, float]) -> JsonValue:
    good, bad = (min(each * allowed, (1 + allowed) / 2) for each in times)
    least = fewest(allowed, bad, BY_CHANCE)
    return {
        "name": name,
        "initialDelay": WINDOW,
        "interval": WINDOW,
        "count": 6,
        "failureLimit": 1,
        "inconclusiveLimit": 3,
        "consecutiveErrorLimit": 4,
        "successCondition": f"len(result) > 0 && result[0] <= {good:.6g}",
        "failureCondition": f"len(result) > 0 && result[0] > {bad:.6g}",
        "provider": {
            "prometheus": {
                "address": "{{args.prometheus}}",
                "query": f"({expr})\n  and sum (increase({counter}[{WINDOW}])) >= {least}",
            }
        },
    }


def _wrong() -> JsonValue:
    query = f'sum (peftopt_canary_answers_total{{{CANARY},verdict=~"stale|wrong"}}) or vector(0)'
    return {
        "name": "answers-of-other-weights",
        "interval": "1m",
        "count": 60,
        "failureLimit": 0,
        "consecutiveErrorLimit": 4,
        "successCondition": "result[0] == 0",
        "provider": {"prometheus": {"address": "{{args.prometheus}}", "query": query}},
    }


# ---- Prometheus --------------------------------------------------------------------------------


def prometheus(source: Source, head: str) -> str:
    """An example of its configuration."""
    keys = ["With --keys the gateway tells its metrics to users only with --metrics users."]
    heads = (head, "Check: promtool check config prometheus.yml", *(keys if source.name == "gateway" else ()))
    target = "127.0.0.1:8000"
    config: JsonValue = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "1m"},
        "rule_files": ["recording.yaml", "alerts.yaml"],
        "scrape_configs": [{"job_name": source.name, "static_configs": [{"targets": [target]}]}],
    }
    return as_yaml(heads, config)
