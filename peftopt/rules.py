"""The named rules: one half-row of the trade-off table, or one requirement, asked of one variant. Pure.

Every rule has three outcomes; inconclusive never passes. A rule of a technique is judged on what isolates it: the
variant against the same variant without it, a merge against the unmerged adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peftopt import stats
from peftopt.evidence import FIELDS, Evidence, exp
from peftopt.records import Interval, Metric, Outcome, Recipe, Rule, Step, Threshold, Variant, Verdict
from peftopt.thresholds import METRICS, format_value

FEWEST_FOR_P95 = 72
"""Requests below which a two-sided 95 % interval of the 95th percentile does not exist."""

SKIPPED = ("missing library", "missing environment", "refused")
"""Failures that say nothing of the variant: it was not tried."""

LIKELIHOODS = ("perplexity", "kl", "top1")
"""Figures of the weights, which an engine that only generates cannot give."""


# ---- one rule, one variant ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One rule asked of one variant's technique. `parent` is what it is compared with for speed and size."""

    evidence: Evidence
    variant: str
    step: Step
    limit: float
    parent: str
    family: int

    @property
    def baseline(self) -> str:
        return self.evidence.baseline


def race(evidence: Evidence, variant: str, against: str, limit: float, family: int) -> tuple[stats.Race, Metric]:
    """The sequential test of variant/against on the recipe's `minimize` metric; `limit` is a ratio."""
    recipe = evidence.plan.recipe
    metric = recipe.minimize
    field = "cpu_ms" if recipe.measure.clock == "cpu" else FIELDS[metric.name.split(".")[0]]
    logs = evidence.paired(variant, against, metric.workload, field)
    return stats.race(logs, math.log(limit), family, recipe.measure.max_blocks), metric


def _speed(case: Case, against: str, limit: float, goal: str) -> Verdict:
    result, metric = race(case.evidence, case.variant, against, limit, case.family)
    n = result.interval.n
    if not n:
        return Verdict("", "inconclusive", f"{metric} was not measured against {against}", against)
    ratio = exp(result.interval)
    seen = f"{metric} is {ratio.estimate:.2f}x {against}'s ({ratio.low:.2f} to {ratio.high:.2f}, {n} blocks)"
    reasons = {
        "accepted": f"{seen}: {goal}",
        "rejected": f"{seen}: not {goal}",
        "inconclusive": f"{seen}: cannot tell yet whether {goal}",
    }
    return Verdict(
        rule="",
        outcome=result.outcome,
        reason=reasons[result.outcome],
        against=against,
        value=ratio,
        unit="x",
        limit=limit,
        clock=case.evidence.plan.recipe.measure.clock,
        blocks_needed=result.blocks_needed if result.outcome == "inconclusive" else None,
    )


def gain(case: Case) -> Verdict:
    """Latency drops by more than the limit. A merge is judged as a whole variant against the unmerged adapter,
    since that is what is given up for it; any other technique against the same variant without it."""
    against = case.baseline if case.step.technique == "merge" else case.parent
    goal = f"{case.limit:.0%} faster or better" if case.limit else "faster"
    return _speed(case, against, 1 - case.limit, goal)


def not_slower(case: Case) -> Verdict:
    """The slow-down against the variant without the technique is provably below the limit."""
    return _speed(case, case.parent, 1 + case.limit, f"less than {case.limit:.0%} slower")


def smaller(case: Case) -> Verdict:
    """On disk the model is smaller than its parent's by at least the limit."""
    ours, theirs = case.evidence.size(case.variant), case.evidence.size(case.parent)
    if not ours or not theirs:
        return Verdict("", "inconclusive", "its size was not measured", case.parent)
    ratio = ours / theirs
    text = f"{format_value('size', ours)} on disk against {format_value('size', theirs)}"
    outcome: Outcome = "accepted" if ratio <= 1 - case.limit else "rejected"
    return Verdict("", outcome, text, case.parent, Interval(ratio, ratio, ratio, 1), "x", 1 - case.limit)


def critical_errors(case: Case) -> Verdict:
    """None was seen, in enough prompts to bound their rate below the limit. One is enough to reject."""
    errors, n = case.evidence.critical_errors(case.variant)
    if not n:
        return Verdict("", "inconclusive", "no answers were checked", case.baseline)
    bound = stats.upper_bound(len(errors), n, 1 - 0.05 / case.family)
    value = Interval(len(errors) / n, 0.0, bound, n)
    needed = stats.needed_n(case.limit, case.family)
    if errors:
        row, flag = errors[0]
        outcome: Outcome = "rejected"
        reason = f"{len(errors)} critical errors in {n} prompts that the adapter does not make, first {row}: {flag}"
    elif n >= needed:
        outcome, reason = "accepted", f"0 critical errors in {n} prompts: below {bound:.2%} at 95 %"
    else:
        outcome = "inconclusive"
        reason = f"0 critical errors in {n} prompts; a claim of {case.limit:.1%} needs {needed}"
    return Verdict("", outcome, reason, case.baseline, value, "share", case.limit)


def parity(case: Case) -> Verdict:
    """It is still the same model: beyond the adapter's own null, few tokens change."""
    evidence = case.evidence
    variant, against = case.variant, case.parent
    if case.step.technique == "merge":  # the merge itself is judged, not what was done to it afterwards
        merged = _prefix(evidence.plan.recipe, variant, case.step)
        if merged is None:
            return Verdict("", "not judged", "no variant of the recipe is the merge alone", case.baseline)
        variant, against = merged, case.baseline
    interval = evidence.excess_divergence(variant, against)
    if interval is None:
        return Verdict("", "inconclusive", f"its answers were not compared with {against}'s", against)
    whose = "" if variant == case.variant else f"{variant}: "
    seen = f"{whose}{max(interval.estimate, 0):.2%} of tokens differ from {against}'s beyond its own null"
    outcome = against_limit(interval, "<=", case.limit)
    return Verdict("", outcome, f"{seen} ({interval.n} prompts)", against, interval, "share", case.limit)


RULES = {
    "gain": gain,
    "parity": parity,
    "critical_errors": critical_errors,
    "not_slower": not_slower,
    "smaller": smaller,
}


def rule_name(step: Step) -> str:
    """The word before the dot: the plug-in's name for quantizers ("int8"), else the technique ("merge")."""
    return step.plugin if step.technique == "quantize" else step.technique


def parent_of(recipe: Recipe, variant: Variant, step: Step) -> str:
    """The variant that is this one without the technique, as like it as the recipe has; else the baseline."""
    candidates = [v for v in recipe.variants.values() if v.name != variant.name]
    plain = recipe.variants[recipe.baseline].engine
    rest = tuple(s for s in variant.steps if s != step)
    engine = plain if step == variant.engine else variant.engine
    prefix = variant.steps if step == variant.engine else variant.steps[: variant.steps.index(step)]
    for steps, wanted_engine in ((rest, engine), (rest, plain), (prefix, plain)):
        for candidate in candidates:
            if candidate.steps == steps and candidate.engine == wanted_engine:
                return candidate.name
    return recipe.baseline


def _prefix(recipe: Recipe, variant: str, step: Step) -> str | None:
    """The variant that is this one's chain up to and including the step, on the baseline's engine."""
    chain = recipe.variants[variant].steps
    wanted = chain[: chain.index(step) + 1]
    plain = recipe.variants[recipe.baseline].engine
    return next((v.name for v in recipe.variants.values() if v.steps == wanted and v.engine == plain), None)


def table_verdicts(evidence: Evidence, variant: Variant) -> list[Verdict]:
    """Every rule of the trade-off table that applies to the variant, technique by technique."""
    recipe = evidence.plan.recipe
    verdicts = []
    for step in variant.techniques:
        for rule in (r for r in recipe.rules if r.technique == rule_name(step) and r.name in RULES):
            name = f"{rule.technique}.{rule.name}"
            if rule.limit is None:
                continue
            case = Case(
                evidence, variant.name, step, rule.limit, parent_of(recipe, variant, step), family(recipe, rule)
            )
            verdicts.append(replace(RULES[rule.name](case), rule=name))
    return verdicts


def family(recipe: Recipe, rule: Rule) -> int:
    """How many variants face this rule: the error rate holds over all of them together."""
    return sum(any(rule_name(s) == rule.technique for s in v.techniques) for v in recipe.variants.values())


# ---- requirements: a whole variant against the SLA ----------------------------------------------


def requirement(evidence: Evidence, variant: str, threshold: Threshold) -> Verdict:
    """Judge one line of `require:`."""
    rule = f"require: {threshold.text}"
    measured, whose = variant, ""
    if threshold.metric.name in LIKELIHOODS and (twin := _scored_twin(evidence, variant)):
        measured, whose = twin, f" of {twin}, the same weights on an engine that scores,"
    figure = relative if threshold.relative else Evidence.figure
    value = figure(evidence, measured, threshold.metric)
    if value is None:
        return Verdict(rule, "inconclusive", f"{threshold.metric} was not measured")
    clock = evidence.plan.recipe.measure.clock if threshold.metric.workload else ""
    outcome = against_limit(value, threshold.op, threshold.limit)
    if threshold.metric.name.endswith("p95") and not threshold.relative and value.n < FEWEST_FOR_P95:
        reason = f"too few requests for P95: {value.n} of {FEWEST_FOR_P95}"
        return Verdict(rule, "inconclusive", reason, value=value, limit=threshold.limit, clock=clock)
    reason = f"{threshold.metric}{whose} is {_show(threshold, value)} (n={value.n})"
    against = evidence.baseline if threshold.relative else ""
    unit = "x" if threshold.relative else METRICS[threshold.metric.name].unit
    return Verdict(rule, outcome, reason, against, value, unit, threshold.limit, clock)


def _scored_twin(evidence: Evidence, variant: str) -> str | None:
    """Another variant with the same weights that has likelihoods, for one whose engine only generates."""
    if "perplexity" in evidence.figures(variant):
        return None
    models = evidence.plan.models
    twins = (name for name, model in models.items() if model == models[variant] and name != variant)
    return next((name for name in twins if "perplexity" in evidence.figures(name)), None)


def relative(evidence: Evidence, variant: str, metric: Metric) -> Interval | None:
    """A figure as a ratio to the baseline's: paired by block or by prompt where it can be."""
    family = metric.name.split(".")[0]
    if metric.workload:
        if variant == evidence.baseline:
            return Interval(1.0, 1.0, 1.0, evidence.blocks(variant, metric.workload))
        logs = evidence.paired(variant, evidence.baseline, metric.workload, FIELDS[family])
        if not logs:
            return None
        if metric.name == "throughput":
            logs = [-x for x in logs]
        return exp(stats.hodges_lehmann(logs, 0.95))
    if metric.name in ("perplexity", "length"):  # ratios by nature
        return evidence.figure(variant, metric)
    if metric.name in ("accuracy", "validity"):
        key = {"accuracy": "correct", "validity": "valid"}[metric.name]
        ours, theirs = evidence.rows(variant), evidence.rows(evidence.baseline)
        shared = sorted(ours.keys() & theirs.keys())
        if not any(theirs[r][key] for r in shared):
            return None
        return stats.ratio_of_means([ours[r][key] for r in shared], [theirs[r][key] for r in shared])
    own, base = evidence.figure(variant, metric), evidence.figure(evidence.baseline, metric)
    if own is None or base is None or not base.estimate:
        return None
    return Interval(own.estimate / base.estimate, own.low / base.estimate, own.high / base.estimate, own.n)


def against_limit(value: Interval, op: str, limit: float) -> Outcome:
    """Accept when the whole interval meets the limit, reject when the whole interval misses it."""
    passes = {
        "<=": lambda x: x <= limit,
        "<": lambda x: x < limit,
        ">=": lambda x: x >= limit,
        ">": lambda x: x > limit,
    }[op]
    low, high = passes(value.low), passes(value.high)
    return "accepted" if low and high else "inconclusive" if low or high else "rejected"


def _show(threshold: Threshold, value: Interval) -> str:
    def one(x: float) -> str:
        if not math.isfinite(x):
            return "unknown"
        return f"{x:.3g}x" if threshold.relative else format_value(threshold.metric.name, x)

    return f"{one(value.estimate)} ({one(value.low)} to {one(value.high)})"


# ---- all of a variant ----------------------------------------------------------------------------


def verdicts(evidence: Evidence, variant: Variant) -> tuple[Verdict, ...]:
    """All that is said of one variant: that it runs and is whole, the table's rules, the requirements."""
    if failure := evidence.failures.get(variant.name):
        skipped = failure["reason"] in SKIPPED
        outcome: Outcome = "not judged" if skipped else "rejected"
        reason = f"{failure['stage']} failed, {failure['reason']}: {failure['detail']}"
        return (Verdict("artifact.runs", outcome, reason),)
    require = evidence.plan.recipe.require
    if variant.name == evidence.baseline:  # which is not measured against itself
        return tuple(requirement(evidence, variant.name, t) for t in require if not t.relative)
    found = [_intact(evidence, variant), *table_verdicts(evidence, variant)]
    return (*found, *(requirement(evidence, variant.name, t) for t in require))


def _intact(evidence: Evidence, variant: Variant) -> Verdict:
    """Tier 0: nothing wrong with the files of any artifact in the chain."""
    builds = {b.id: b for b in evidence.plan.builds}
    wrong, at = [], evidence.plan.models[variant.name]
    checked = 0
    while at:
        if at in evidence.builds:
            checked += 1
            wrong += evidence.builds[at]["tier0"]
        at = builds[at].parent
    if wrong:
        return Verdict("artifact.intact", "rejected", "; ".join(wrong[:3]))
    if not checked and variant.steps:
        return Verdict("artifact.intact", "inconclusive", "its artifact was not built")
    return Verdict("artifact.intact", "accepted", "all weights are finite and the files match their hash")
