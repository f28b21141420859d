"""The chosen variant against the baseline, figure by figure. Pure: from the decision record to words."""

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
"""What a change is for who pays or waits; "same" where no difference is shown, "" where nothing can be told."""

MILLION = 1e6
HOUR_S = 3600


@dataclass(frozen=True)
class Price:
    """What the machine costs an hour, in a currency."""

    per_hour: float
    currency: str = "USD"


@dataclass(frozen=True)
class Score:
    """A figure of the variant beside the baseline's; `difference` says what changed, `change` whether for better."""

    title: str
    before: str
    after: str
    difference: str
    change: Change
    about: str = ""


@dataclass(frozen=True)
class Scorecard:
    """What is compared with the baseline, and each figure of it."""

    variant: str
    baseline: str
    scores: tuple[Score, ...]


def price(text: str) -> Price:
    """A price per hour as it is typed: "2.10" or "2.10 EUR". Raises BadInput for anything else."""
    read = price_of(text)
    if read is None:
        raise BadInput(f"{text!r} is not a price per hour", "write a number above 0 and a currency: 2.10 USD")
    amount, currency = read
    return Price(amount, currency or Price.currency)


def scorecard(decision: Decision, machine: Price | None = None) -> Scorecard | None:
    """The chosen variant's, or the only candidate's; None where there is not one to compare with a baseline."""
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
    """The median, with the ratio that is paired by block."""
    name = f"latency.p50@{workload}"
    score = _figure(before, after, name, "half of the requests are faster")
    ratio = speed_of(decision, after, workload)
    if score is None or ratio is None or not _positive(ratio.estimate):
        return score
    change: Change = "better" if ratio.high < 1 else "worse" if ratio.low > 1 else "same"
    difference = "no difference shown" if change == "same" else _change(ratio.estimate)
    return _score(name, before, after, difference, change, score.about)


def _figure(before: VariantDecision, after: VariantDecision, name: str, about: str) -> Score | None:
    """A metric that both have, and both with an interval where it is a quantile that needs many requests."""
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
    told = [words.estimate(name, variant.figures.get(name)) for variant in (before, after)]
    return Score(clean(title), clean(told[0]), clean(told[1]), difference, change, about)


_TITLES = {"latency.p50": "latency P50", "latency.p95": "latency P95"}
"""Where a metric's title needs its table to be understood."""


def _compared(name: str, ours: Interval, theirs: Interval) -> Change:
    """Better or worse where the intervals lie apart; an estimate without an interval, such as a size, is exact."""
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
    """Right answers, compared prompt by prompt where both were asked the same."""
    ours = after.figures.get("accuracy")
    theirs = before.figures.get("accuracy")
    if ours is None or theirs is None or not math.isfinite(ours.estimate + theirs.estimate):
        return None
    told = worse_and_better(after)
    change = "" if told else _compared("accuracy", ours, theirs)
    worse, better, p = (after.figures.get(name) for name in ("flips_worse", "flips_better", "flips_p"))
    if worse and better and p:
        shown = p.estimate <= CHANCE and worse.estimate > better.estimate
        change = "worse" if shown else "same"
    about = f"of {ours.n} prompts" if ours.n == theirs.n else f"of {ours.n} prompts, {after.name} was asked no more"
    return _score("accuracy", before, after, told or "not compared by prompt", change, clean(about))


CHANCE = 0.05
"""The chance of as uneven a count of flips between equals, at or below which the variant is worse."""


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
    """The throughput; where its own interval is open and it moves as the paired time does, the pairs tell."""
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
"""How far throughput times time may lie from 1 where one request waits for the other."""


def _cost(
    decision: Decision, before: VariantDecision, after: VariantDecision, workload: str, machine: Price
) -> Score | None:
    """What a million output tokens cost on a machine that is never idle."""
    name = f"throughput@{workload}"
    throughput = _throughput(decision, before, after, workload)
    ours = after.figures.get(name)
    theirs = before.figures.get(name)
    if throughput is None or ours is None or theirs is None:
        return None
    costs = [machine.per_hour * MILLION / (HOUR_S * each.estimate) for each in (theirs, ours)]
    shown = [f"{_money(cost)} {machine.currency}" for cost in costs]
    ratio = theirs.estimate / ours.estimate
    difference = "no difference shown" if throughput.change == "same" else _change(ratio)
    about = f"{_money(machine.per_hour)} {machine.currency} an hour, never idle, {name}"
    return Score("cost of a million output tokens", shown[0], shown[1], difference, throughput.change, clean(about))


def _money(amount: float) -> str:
    """Two decimals, three digits where it is less than one."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
