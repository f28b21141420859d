"""A metric of a whole variant as a ratio to the baseline's, paired where it can be. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from peftopt import stats
from peftopt.decision.evidence import Evidence, Rows, exp
from peftopt.decision.figures import figure, timed
from peftopt.metrics import TASK
from peftopt.records import Interval, Metric

TAILS = ("p95", "p99")


def timed_ratio(evidence: Evidence, variant: str, metric: Metric, level: float, blocks: int) -> Interval | None:
    """A timed metric as a ratio to the baseline's, over the first `blocks`: paired by block where it can be."""
    if variant == evidence.baseline:
        return Interval(1.0, 1.0, 1.0, blocks)
    if metric.name.endswith(TAILS):
        return _tail_ratio(evidence, variant, metric, level, blocks)
    field = evidence.wall_field(metric)
    series = dict(list(evidence.series(variant, evidence.baseline, metric.workload, field).items())[:blocks])
    if not series:
        return None
    launches = evidence.launches_of(variant, evidence.baseline, metric.workload, series)
    sign = -1 if metric.name == "throughput" else 1
    return exp(stats.paired([sign * x for x in series.values()], level, launches))


def _tail_ratio(evidence: Evidence, variant: str, metric: Metric, level: float, blocks: int) -> Interval | None:
    """A block holds too few requests for its tail to be paired: the bounds are those of two intervals that share the
    error."""
    both = (1 + level) / 2
    own, base = (timed(evidence, v, metric, both, blocks) for v in (variant, evidence.baseline))
    if own is None or base is None:
        return None
    low = own.low / base.high if own.low > 0 else 0.0
    high = own.high / base.low if base.low > 0 else math.inf
    return Interval(own.estimate / base.estimate, low, high, min(own.n, base.n), level)


def relative(evidence: Evidence, variant: str, metric: Metric, level: float = 0.95) -> Interval | None:
    """A metric of a whole variant as a ratio to the baseline's: paired by prompt where it can be."""
    if metric.name in ("perplexity", "length"):  # ratios by nature
        return figure(evidence, variant, metric, level)
    quality = evidence.plan.recipe.quality
    if metric.name == "validity" and not (quality and quality.tells_valid):
        return None
    if metric.name in ("accuracy", "validity"):
        ours, theirs = (_kept_as(metric.name, evidence.rows(name)) for name in (variant, evidence.baseline))
        return score_ratio(ours, theirs, level)
    if metric.name.startswith(TASK):
        mine, reference = (evidence.tasks[v].get(metric.name, {}) for v in (variant, evidence.baseline))
        return score_ratio(mine, reference, level)
    both = (1 + level) / 2
    own, base = (figure(evidence, v, metric, both) for v in (variant, evidence.baseline))
    if own is None or base is None or not base.estimate:
        return None
    low, high = max(own.low, 0.0) / base.high, own.high / base.low if base.low > 0 else math.inf
    return Interval(own.estimate / base.estimate, low, high, min(own.n, base.n), level)


def score_ratio(ours: Mapping[str, float], theirs: Mapping[str, float], level: float) -> Interval | None:
    """Mean score over the baseline's on the same rows: exact for rows that are right or wrong, and for rows that all
    kept their score; else by the delta method."""
    shared = sorted(ours.keys() & theirs.keys())
    if not any(theirs[row] for row in shared):
        return None
    mine, reference = [ours[row] for row in shared], [theirs[row] for row in shared]
    if mine != reference and not {*mine, *reference} <= {0.0, 1.0}:
        return stats.ratio_of_means(mine, reference, level)
    pairs = Counter((bool(a), bool(b)) for a, b in zip(mine, reference, strict=True))
    lost, won = pairs[False, True], pairs[True, False]
    return stats.kept(lost, lost + pairs[True, True], won, won + pairs[False, False], level)


def _kept_as(metric: str, answers: Rows) -> dict[str, float]:
    """1 for each answer that is right, or of the "validity" valid; 0 for the others."""
    return {row: float(a.valid if metric == "validity" else a.correct) for row, a in answers.items()}
