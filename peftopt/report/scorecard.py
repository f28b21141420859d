"""The chosen variant against the baseline, value by value. Pure: from the decision record to words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from peftopt.errors import BadInput
from peftopt.metrics import HIGHER, described, format_value, percent
from peftopt.recipe.values import price_of
from peftopt.records import Decision, Interval, VariantDecision
from peftopt.report import words
from peftopt.report.headline import named, quotient, worse_and_better
from peftopt.report.table import busiest, speed_of
from peftopt.report.words import MISSING, Table, clean

Change = Literal["better", "worse", "same", ""]
"""Whether a change is better or worse for users; "same" if no difference is shown, "" if it is not known."""

MILLION = 1e6
HOUR_S = 3600


@dataclass(frozen=True)
class Price:
    """The machine's price per hour, in a currency."""

    per_hour: float
    currency: str = "USD"


@dataclass(frozen=True)
class Score:
    """A value of the variant beside the baseline's. `difference` is the change in words, `change` its direction."""

    title: str
    before: str
    after: str
    difference: str
    change: Change
    about: str = ""


@dataclass(frozen=True)
class Scorecard:
    """The variant that is compared with the baseline, and its values."""

    variant: str
    baseline: str
    scores: tuple[Score, ...]


def price(text: str) -> Price:
    """The price per hour in "2.10" or "2.10 EUR". Raises BadInput for anything else."""
    parts = price_of(text)
    if parts is None:
        raise BadInput(f"{text!r} is not a price per hour", "write a number above 0 and a currency: 2.10 USD")
    amount, currency = parts
    return Price(amount, currency or Price.currency)


def scorecard(decision: Decision, machine: Price | None = None) -> Scorecard | None:
    """The scorecard of the chosen variant, or of the only candidate; None without one or without a baseline."""
    candidates = [variant for variant in decision.variants if variant.name != decision.baseline]
    shown = named(decision, decision.chosen) or (candidates[0] if len(candidates) == 1 else None)
    before = named(decision, decision.baseline)
    if shown is None or before is None or shown is before:
        return None
    workload = decision.minimize.partition("@")[2]
    busy = busiest(decision)
    scores = [
        _latency(decision, before, shown, workload),
        _figure(before, shown, f"latency.p95@{workload}", "95 of 100 requests are faster"),
        _throughput(decision, before, shown, busy),
        _figure(before, shown, "memory", "peak of the process"),
        _figure(before, shown, "gpu_memory_allocated", "peak on the accelerator"),
        _figure(before, shown, "size", "files on disk"),
        _accuracy(before, shown),
        _same(shown),
        _critical(shown),
        _cost(decision, before, shown, busy, machine) if machine else None,
    ]
    return Scorecard(clean(shown.name), clean(decision.baseline), tuple(score for score in scores if score))


def rows(card: Scorecard) -> Table:
    """The scorecard as a table."""
    header = ["metric", card.baseline, card.variant, "difference"]
    return header, [[score.title, score.before, score.after, score.difference] for score in card.scores]


def _latency(decision: Decision, before: VariantDecision, after: VariantDecision, workload: str) -> Score | None:
    """The median latency, with the ratio paired by block."""
    name = f"latency.p50@{workload}"
    score = _figure(before, after, name, "half of the requests are faster")
    ratio = speed_of(decision, after, workload)
    if score is None or ratio is None or not _positive(ratio.estimate):
        return score
    change: Change = "better" if ratio.high < 1 else "worse" if ratio.low > 1 else "same"
    difference = "no difference shown" if change == "same" else _change(ratio.estimate)
    return _score(name, before, after, difference, change, score.about)


def _figure(before: VariantDecision, after: VariantDecision, name: str, about: str) -> Score | None:
    """A metric that both variants have. A P95 needs an interval in both."""
    ours = after.figures.get(name)
    theirs = before.figures.get(name)
    ratio = quotient(ours, theirs)
    if ours is None or theirs is None or ratio is None:
        return None
    if ".p95@" in name and not (words.bounded(ours) and words.bounded(theirs)):
        return None
    change = _compared(name, ours, theirs)
    difference = "no difference shown" if change == "same" else _change(ratio)
    return _score(name, before, after, difference, change, about)


def _score(
    name: str, before: VariantDecision, after: VariantDecision, difference: str, change: Change, about: str
) -> Score:
    spec = described(name)
    _, at, workload = name.partition("@")
    title = f"{_TITLES.get(name.partition('@')[0]) or (spec.title if spec else name)}{at}{workload}"
    ours, theirs = (clean(words.estimate(name, variant.figures.get(name))) for variant in (after, before))
    return Score(clean(title), theirs, ours, difference, change, about)


_TITLES = {"latency.p50": "latency P50", "latency.p95": "latency P95"}
"""Titles of metrics whose own titles are unclear outside a table."""


def _compared(name: str, ours: Interval, theirs: Interval) -> Change:
    """Better or worse if the intervals do not overlap. An estimate without an interval, such as a size, is exact."""
    spec = described(name)
    if spec is None:
        return ""
    if ours.low <= theirs.high and theirs.low <= ours.high:
        return "same"
    grew = ours.estimate > theirs.estimate
    return "better" if grew == (spec.better == HIGHER) else "worse"


def _change(ratio: float) -> str:
    """ "74 % less (0.26x)"."""
    distance = abs(1 - ratio)
    change = percent(distance, 1 if distance < 0.05 else 0)
    shown = format_value("ratio", ratio)
    return f"{shown}" if ratio >= 2 else f"{change} {'less' if ratio < 1 else 'more'} ({shown})"


def _accuracy(before: VariantDecision, after: VariantDecision) -> Score | None:
    """Right answers, compared prompt by prompt if both variants answered the same prompts."""
    ours = after.figures.get("accuracy")
    theirs = before.figures.get("accuracy")
    if ours is None or theirs is None or not math.isfinite(ours.estimate + theirs.estimate):
        return None
    flips = worse_and_better(after)
    change = "" if flips else _compared("accuracy", ours, theirs)
    worse, better, p = (after.figures.get(name) for name in ("flips_worse", "flips_better", "flips_p"))
    if worse and better and p:
        shown = p.estimate <= CHANCE and worse.estimate > better.estimate
        change = "worse" if shown else "same"
    about = f"of {ours.n} prompts" if ours.n == theirs.n else f"of {ours.n} prompts, {after.name} was asked no more"
    return _score("accuracy", before, after, flips or "not compared by prompt", change, clean(about))


CHANCE = 0.05
"""The greatest p-value of the flips at which the variant counts as worse."""


def _same(after: VariantDecision) -> Score | None:
    same = after.figures.get("greedy_match")
    if same is None or not math.isfinite(same.estimate):
        return None
    shown = format_value("greedy_match", same.estimate)
    return Score("same answer", MISSING, shown, "word for word", "same" if same.estimate >= 1 else "", "")


def _critical(after: VariantDecision) -> Score | None:
    errors = after.figures.get("critical_errors")
    if errors is None or not math.isfinite(errors.estimate):
        return None
    change: Change = "worse" if errors.estimate > 0 else "same"
    bound = f"a rate below {format_value('share', errors.high)}" if math.isfinite(errors.high) else ""
    return Score("critical errors", MISSING, words.count(errors), bound, change, "beyond the baseline's own")


def _throughput(decision: Decision, before: VariantDecision, after: VariantDecision, workload: str) -> Score | None:
    """The throughput. If its interval shows no difference and it follows the paired time, the paired time decides."""
    score = _figure(before, after, f"throughput@{workload}", "output tokens of all requests at once")
    paired = speed_of(decision, after, workload)
    ratio = quotient(after.figures.get(f"throughput@{workload}"), before.figures.get(f"throughput@{workload}"))
    if score is None or score.change != "same" or paired is None or ratio is None:
        return score
    follows = abs(ratio * paired.estimate - 1) <= FOLLOWS
    if not follows or paired.low <= 1 <= paired.high:
        return score
    return replace(score, difference=_change(ratio), change="better" if paired.high < 1 else "worse")


FOLLOWS = 0.15
"""Greatest distance from 1 of the throughput's ratio times the paired time's ratio, for requests one by one."""


def _cost(
    decision: Decision, before: VariantDecision, after: VariantDecision, workload: str, machine: Price
) -> Score | None:
    """The price of a million output tokens on a machine that is never idle."""
    throughput = _throughput(decision, before, after, workload)
    costs = [million(each, workload, machine) for each in (before, after)]
    if throughput is None or costs[0] is None or costs[1] is None:
        return None
    shown = [money(cost, machine.currency) for cost in costs if cost is not None]
    ratio = costs[1] / costs[0]
    difference = "no difference shown" if throughput.change == "same" else _change(ratio)
    about = f"{money(machine.per_hour, machine.currency)} an hour, never idle, throughput@{workload}"
    return Score("cost of a million output tokens", shown[0], shown[1], difference, throughput.change, clean(about))


def million(variant: VariantDecision, workload: str, machine: Price) -> float | None:
    """The price of a million output tokens of a workload on a machine that is never idle; None if it is not known."""
    throughput = variant.figures.get(f"throughput@{workload}")
    if throughput is None or not _positive(throughput.estimate):
        return None
    return machine.per_hour * MILLION / (HOUR_S * throughput.estimate)


def money(amount: float, currency: str) -> str:
    """An amount with its currency: two decimals, or three significant digits below 1."""
    return f"{amount:,.2f} {currency}" if amount >= 1 else f"{amount:.3g} {currency}"


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
