"""What quality against latency is drawn of: each variant's two values, and who dominates whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftopt.decision.evidence import Evidence
from peftopt.metrics import TASK, described
from peftopt.records import TWIN, Decision, Interval, VariantDecision
from peftopt.report import words
from peftopt.report.plots import axes
from peftopt.report.plots.picture import kind_of

QUALITIES = ("accuracy", "score", "perplexity", "greedy_match")


@dataclass(frozen=True)
class Point:
    """A variant, its time and its quality, the bar of its time, and the variants that are shown to be better."""

    variant: VariantDecision
    kind: str
    x: Interval
    y: Interval
    bar: tuple[float, float]
    """The bounds of the time; those of its ratio to the baseline where launches are too few; the estimate twice where
    neither is known."""
    dominated_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limit:
    """What `require:` asks of one of the two metrics, in its unit."""

    metric: str
    value: float
    text: str


def quality_of(decision: Decision) -> str:
    """The metric of quality that at least two variants have: accuracy, else a task's score, else one that compares."""
    tasks = sorted({name for v in decision.variants for name in v.figures if name.startswith(TASK)})
    for name in (QUALITIES[0], *tasks, *QUALITIES[1:]):
        if sum(_known(v.figures.get(name)) for v in decision.variants) > 1:
            return name
    return ""


def points(decision: Decision, evidence: Evidence) -> list[Point]:
    """The variants that have both; () where fewer than two have."""
    quality = quality_of(decision)
    found = []
    for variant in decision.variants:
        x, y = variant.figures.get(decision.minimize), variant.figures.get(quality)
        if x and y and axes.drawable(x.estimate, log=True) and axes.drawable(y.estimate):
            kind = kind_of(variant.name, variant.outcome, decision.baseline)
            found.append(Point(variant, kind, x, y, _bar(evidence, variant.name, x)))
    if len(found) < 2:
        return []
    return [replace(point, dominated_by=_dominators(evidence, point, found, direction(quality))) for point in found]


def frontier(found: Sequence[Point], better: int) -> list[Point]:
    """The points that no other one beats in both estimates, the fastest first; those that were turned down are not
    asked. `better` is the direction of quality."""
    best: list[Point] = []
    eligible = [point for point in found if _may_dominate(point)]
    for point in sorted(eligible, key=lambda p: (p.x.estimate, better * p.y.estimate)):
        if not best or better * point.y.estimate < better * best[-1].y.estimate:
            best.append(point)
    return best


def limits(decision: Decision, evidence: Evidence) -> list[Limit]:
    """What the recipe requires of the two metrics, relative limits times the baseline's value."""
    baseline = next((v for v in decision.variants if v.name == decision.baseline), None)
    shown = {decision.minimize, quality_of(decision)}
    found = []
    for threshold in evidence.plan.recipe.require:
        name = str(threshold.metric)
        own = baseline.figures.get(name) if baseline else None
        if name not in shown or (threshold.relative and not own):
            continue
        value = threshold.limit * own.estimate if threshold.relative and own else threshold.limit
        if axes.drawable(value):
            found.append(Limit(name, value, threshold.text))
    return found


# ---- who dominates whom ------------------------------------------------------------------------


def direction(metric: str) -> int:
    """1 where lower is better, -1 where higher is."""
    spec = described(metric)
    return -1 if spec and spec.better == "higher" else 1


def _dominators(evidence: Evidence, point: Point, others: Sequence[Point], better: int) -> tuple[str, ...]:
    """The variants that are at least as good in both estimates and shown to be better in one."""
    return tuple(
        other.variant.name
        for other in others
        if other is not point
        and _may_dominate(other)
        and other.x.estimate <= point.x.estimate
        and better * other.y.estimate <= better * point.y.estimate
        and (_better(other.y, point.y, better) or _faster(evidence, other.variant.name, point.variant.name))
    )


def _may_dominate(point: Point) -> bool:
    """Nobody gives up a variant for one that was turned down."""
    return point.kind in ("baseline", "accepted", "inconclusive")


def _better(ours: Interval, theirs: Interval, better: int) -> bool:
    return ours.high < theirs.low if better > 0 else ours.low > theirs.high


def _faster(evidence: Evidence, one: str, other: str) -> bool:
    """Whether blocks, which pair them, show that one is faster, on the clock that judges."""
    metric = evidence.plan.recipe.minimize
    ratio = evidence.ratio(one, other, metric.workload, evidence.field(metric))
    return ratio is not None and ratio.high < 1


def _bar(evidence: Evidence, name: str, time: Interval) -> tuple[float, float]:
    if words.bounded(time):
        return time.low, time.high
    metric = evidence.plan.recipe.minimize
    source = name + TWIN if name == evidence.baseline else name
    ratio = evidence.ratio(source, evidence.baseline, metric.workload, evidence.wall_field(metric))
    if ratio is None or not (words.bounded(ratio) and axes.drawable(ratio.estimate, log=True)):
        return time.estimate, time.estimate
    return time.estimate * ratio.low / ratio.estimate, time.estimate * ratio.high / ratio.estimate


def _known(value: Interval | None) -> bool:
    return value is not None and axes.drawable(value.estimate)
