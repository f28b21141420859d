"""Runs side by side: what differs between them, their values relative to their own baselines, their verdicts. Pure.

Each run was judged by itself. Here the same value of two runs is compared by a two-sample test on what their intervals
show; times of two machines meet only as ratios to the baseline that was measured beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from peftopt import stats
from peftopt.decision.evidence import exp
from peftopt.errors import BadInput
from peftopt.metrics import described
from peftopt.records import Decision, Interval, Outcome, VariantDecision

ERROR = 0.05
"""Two-sided error of all statements of a comparison together."""

ALIKE = 1e-3
"""How far apart exact values may lie, as a share, and still count as the same: a certificate beside the weights."""

TOLD = 100.0
"""The ratio of an interval's bounds beyond which it tells nothing: ten times more, or ten times less."""

COMPARED = ("latency.ratio", "memory", "gpu_memory", "size", "accuracy", "perplexity", "critical_errors")
"""The metrics that are compared where none are named."""

BY_NATURE = ("latency.ratio", "cpu.ratio", "length.ratio", "perplexity", "length")
"""Metrics that are ratios to the baseline already."""

Facts = Mapping[str, Mapping[str, str]]
"""What a run was made of and measured on: topic -> name -> text. A topic that is not known is not there."""

Statement = Literal["differs", "none shown", "cannot be told", "same", ""]
"""What is said of a value of two runs: "same" and "differs" also of exact values; "" where one run lacks it."""


@dataclass(frozen=True)
class ComparedRun:
    """A run as it is compared. `launches`: of each "variant@workload", how many launches its blocks come from, where
    that is known; `lacks`: what its folder lacks, in words."""

    name: str
    decision: Decision
    facts: Facts = field(default_factory=dict)
    launches: Mapping[str, int] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Differing:
    """A fact that is not the same in all runs; a text for each run, "" where it is not known."""

    topic: str
    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Contrast:
    """A run's value against the first run's: as a ratio of the two, or where `Compared.scale` is "difference" as their
    difference, with bounds that hold for all statements together. None where one of the runs lacks the value."""

    statement: Statement
    value: Interval | None = None


@dataclass(frozen=True)
class Compared:
    """A metric of a variant: its value in each run, relative to that run's own baseline, and each further run's against
    the first run's."""

    variant: str
    metric: str
    scale: Literal["ratio", "difference"]
    values: tuple[Interval | None, ...]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Judged:
    """What each run says of a variant, or of one `rule` of it ("" = the variant): None where a run has no such rule."""

    variant: str
    rule: str
    outcomes: tuple[Outcome | None, ...]
    decided_by: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether two runs judge it differently; a rule that only some runs have is no change of a verdict."""
        return len({outcome for outcome in self.outcomes if outcome}) > 1


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, in the order in which they were given; the first is what the others are compared with.

    `differing` comes before any value. `same` names the facts that are known of all runs and equal. `only` holds the
    variants that not all runs have, with the runs (by index) that do. `family` counts the tests that share ERROR, and
    `level` is that of each one's interval.
    """

    runs: tuple[ComparedRun, ...]
    differing: tuple[Differing, ...]
    same: Mapping[str, tuple[str, ...]]
    only: Mapping[str, tuple[int, ...]]
    values: tuple[Compared, ...]
    verdicts: tuple[Judged, ...]
    family: int
    level: float


def compare(runs: Sequence[ComparedRun], metrics: Sequence[str] = COMPARED) -> Comparison:
    """The runs side by side. Raises BadInput for fewer than two, and where no two share a variant with the first."""
    if len(runs) < 2:
        raise BadInput("a comparison takes two runs or more", "name another run; `peftopt runs` lists them")
    first, *others = runs
    shared = [v for v in _candidates(first) if any(v in _candidates(other) for other in others)]
    if not shared:
        raise BadInput("the runs have no variant in common", "; ".join(_has(run) for run in runs))
    rows = [row for name in shared for row in _rows(runs, name, metrics)]
    family = sum(_tested(each, row[0]) for _, _, _, row in rows for each in row[1:])
    level = 1 - ERROR / max(family, 1)
    values = tuple(
        Compared(variant, metric, scale, row, tuple(_contrast(each, row[0], scale, level) for each in row[1:]))
        for variant, metric, scale, row in rows
    )
    differing, same = _facts(runs)
    names = list(dict.fromkeys(name for run in runs for name in _candidates(run)))
    having = {name: tuple(n for n, run in enumerate(runs) if name in _candidates(run)) for name in names}
    only = {name: found for name, found in having.items() if len(found) < len(runs)}
    verdicts = tuple(judged for name in shared for judged in _judged(runs, name))
    return Comparison(tuple(runs), differing, same, only, values, verdicts, family, level)


def _candidates(run: ComparedRun) -> dict[str, VariantDecision]:
    """The variants of a run but its baseline, by name."""
    return {v.name: v for v in run.decision.variants if v.name != run.decision.baseline}


def _has(run: ComparedRun) -> str:
    return f"{run.name} has {', '.join(_candidates(run)) or 'its baseline alone'}"


# ---- facts -----------------------------------------------------------------------------------------


def _facts(runs: Sequence[ComparedRun]) -> tuple[tuple[Differing, ...], dict[str, tuple[str, ...]]]:
    """What differs, and by topic the names of what does not. A topic that a run does not know differs from nothing."""
    differing: list[Differing] = []
    same: dict[str, tuple[str, ...]] = {}
    for topic in dict.fromkeys(topic for run in runs for topic in run.facts):
        known = [run.facts[topic] for run in runs if topic in run.facts]
        names = list(dict.fromkeys(name for facts in known for name in facts))
        unlike = [name for name in names if len({facts.get(name, "") for facts in known}) > 1]
        for name in unlike:
            texts = tuple(run.facts[topic].get(name, "none") if topic in run.facts else "" for run in runs)
            differing.append(Differing(topic, name, texts))
        if len(known) == len(runs):
            same[topic] = tuple(name for name in names if name not in unlike)
    return tuple(differing), same


# ---- values ----------------------------------------------------------------------------------------

Row = tuple[Interval | None, ...]
Scale = Literal["ratio", "difference"]


def _rows(runs: Sequence[ComparedRun], variant: str, metrics: Sequence[str]) -> Iterator[tuple[str, str, Scale, Row]]:
    """The values of a variant, metric by metric; those that fewer than two runs have are left out."""
    for metric in metrics:
        scale: Scale = "difference" if _is_difference(metric) else "ratio"
        for name in _names(runs, variant, metric):
            row = tuple(relative(run, variant, name) for run in runs)
            if sum(value is not None for value in row) > 1:
                yield variant, name, scale, row


def _names(runs: Sequence[ComparedRun], variant: str, metric: str) -> list[str]:
    """The metric under its full names, one for each workload that a run measured it on."""
    variants = [_candidates(run)[variant] for run in runs if variant in _candidates(run)]
    found = (name for each in variants for name in each.figures if metric in (name, name.partition("@")[0]))
    return list(dict.fromkeys(found))


def _is_difference(metric: str) -> bool:
    """Whether a metric compares with the baseline already, but not as a ratio: a share of prompts, a divergence."""
    spec = described(metric)
    return spec is not None and spec.compared


def relative(run: ComparedRun, variant: str, metric: str) -> Interval | None:
    """A metric of a variant as a ratio to the run's own baseline, or as it is where it compares with the baseline
    already; None where it was not measured. `n` counts what is independent: launches, prompts."""
    decision, name = run.decision, metric.partition("@")[0]
    ours = _candidates(run).get(variant)
    value = ours.figures.get(metric) if ours else None
    if ours is None or value is None:
        return None
    if name in BY_NATURE or _is_difference(metric):
        return _by_launch(run, ours, metric, value)
    base = next((v for v in decision.variants if v.name == decision.baseline), None)
    reference = base.figures.get(metric) if base else None
    if base is None or reference is None:
        return None
    if name == "accuracy" and (kept := _kept(ours, value, reference)):
        return kept
    if not (value.estimate > 0 and reference.estimate > 0):
        return None
    own = _log(_by_launch(run, ours, metric, value))
    theirs = _log(_by_launch(run, base, metric, reference))
    return exp(stats.welch(own, theirs))


def _kept(ours: VariantDecision, value: Interval, reference: Interval) -> Interval | None:
    """Accuracy as a ratio to the baseline's, paired by prompt: exact, from how many answers flipped."""
    worse, better = ours.figures.get("flips_worse"), ours.figures.get("flips_better")
    if worse is None or better is None or worse.n != value.n:
        return None
    lost, won = round(worse.estimate), round(better.estimate)
    right = round(value.estimate * value.n) - won + lost
    return stats.kept(lost, right, won, value.n - right) if right else None


def _by_launch(run: ComparedRun, variant: VariantDecision, metric: str, value: Interval) -> Interval:
    """A value on a workload, with the number of launches as its n: blocks of a launch share its fate."""
    workload = metric.partition("@")[2]
    if not workload:
        return value
    known = run.launches.get(f"{variant.name}@{workload}") or _launches(variant, workload, value.n)
    return replace(value, n=min(known, value.n))


def _launches(variant: VariantDecision, workload: str, n: int) -> int:
    """About how many launches measured a workload: its share of all blocks, of the launches whose time to load is
    known."""
    loaded = variant.figures.get("load_time")
    blocks = {
        name.partition("@")[2]: value.n for name, value in variant.figures.items() if name.startswith("latency.ratio@")
    }
    if loaded is None or workload not in blocks:
        return n
    return max(1, loaded.n * blocks[workload] // sum(blocks.values()))


def _tested(ours: Interval | None, theirs: Interval | None) -> bool:
    """Whether two values take a test: both are known, and not both are exact."""
    return ours is not None and theirs is not None and not (_exact(ours) and _exact(theirs))


def _exact(value: Interval) -> bool:
    return value.n == 1 and value.low == value.high


def _contrast(ours: Interval | None, theirs: Interval | None, scale: Scale, level: float) -> Contrast:
    if ours is None or theirs is None:
        return Contrast("")
    if scale == "ratio":
        value = exp(stats.welch(_log(ours), _log(theirs), level))
        nothing = 1.0
    else:
        value = stats.welch(ours, theirs, level)
        nothing = 0.0
    if _exact(ours) and _exact(theirs):
        return Contrast("same" if abs(value.estimate - nothing) <= ALIKE else "differs", value)
    if value.low > nothing or value.high < nothing:
        return Contrast("differs", value)
    told = math.isfinite(value.high) and (scale == "difference" or 0 < value.high <= TOLD * value.low)
    return Contrast("none shown" if told else "cannot be told", value)


def _log(value: Interval) -> Interval:
    return replace(value, estimate=_ln(value.estimate), low=_ln(value.low), high=_ln(value.high))


def _ln(x: float) -> float:
    if math.isnan(x) or x == math.inf:
        return x
    return math.log(x) if x > 0 else -math.inf


# ---- verdicts --------------------------------------------------------------------------------------


def _judged(runs: Sequence[ComparedRun], name: str) -> Iterator[Judged]:
    """The variant's outcome in each run, and each of its rules that not all runs judge alike."""
    variants = [_candidates(run).get(name) for run in runs]
    outcomes = tuple(v.outcome if v else None for v in variants)
    yield Judged(name, "", outcomes, tuple(v.decided_by if v else "" for v in variants))
    verdicts = [{verdict.rule: verdict.outcome for verdict in v.verdicts} if v else {} for v in variants]
    for rule in dict.fromkeys(rule for found in verdicts for rule in found):
        said = tuple(found.get(rule) for found in verdicts)
        if len({said[n] for n, v in enumerate(variants) if v}) > 1:
            yield Judged(name, rule, said)
