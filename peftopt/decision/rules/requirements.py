"""Requirements, the lines of `require:`: a whole variant against what it was promised to be. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from peftopt import stats
from peftopt.decision.evidence import Evidence
from peftopt.decision.figures import figure, figures, timed
from peftopt.decision.rules.answers import critical_errors_of
from peftopt.decision.rules.case import Case
from peftopt.decision.rules.limits import against_limit, blocks_for
from peftopt.decision.rules.parents import family
from peftopt.decision.rules.ratios import TAILS, relative, timed_ratio
from peftopt.metrics import QUANTILES, counted, format_value, known
from peftopt.records import Interval, Metric, Recipe, Threshold, Verdict

LIKELIHOODS = ("perplexity", "kl", "top1")
"""Figures of the weights, which an engine that only generates cannot give."""


def requirement(evidence: Evidence, variant: str, threshold: Threshold) -> Verdict:
    """Judge one line of `require:`. A variant passes when it meets all of them, so only the number of variants, and of
    looks at growing blocks, share the error: 2.5 % a side for a requirement."""
    rule, metric = f"require: {threshold.text}", threshold.metric
    recipe = evidence.plan.recipe
    if metric.name == "critical_errors" and variant != evidence.baseline:
        whole_variant = recipe.variants[variant].engine
        case = Case(evidence, variant, whole_variant, threshold.limit, evidence.baseline, family(recipe))
        return replace(critical_errors_of(case, variant, evidence.baseline), rule=rule)
    if metric.workload:
        return _timed_requirement(evidence, variant, threshold)
    measured, whose = variant, ""
    if metric.name in LIKELIHOODS and (twin := _scored_twin(evidence, variant)):
        measured, whose = twin, f" of {twin}, the same weights on an engine that scores,"
    level = 1 - stats.REQUIRE_ALPHA / family(recipe)
    value = (relative if threshold.relative else figure)(evidence, measured, metric, level)
    if value is None:
        return Verdict(rule, "inconclusive", f"{metric} was not measured")
    reason = f"{metric}{whose} is {_show(threshold, value)} (n={value.n})"
    if value.n == 1 and not math.isfinite(value.high):
        reason += ": one launch has no interval"
    against = evidence.baseline if threshold.relative else ""
    outcome = against_limit(value, threshold.op, threshold.limit)
    return Verdict(rule, outcome, reason, against, value, _unit(threshold), threshold.limit)


def _timed_requirement(evidence: Evidence, variant: str, threshold: Threshold) -> Verdict:
    """A requirement on times, judged at planned numbers of blocks."""
    rule, metric, recipe = f"require: {threshold.text}", threshold.metric, evidence.plan.recipe
    blocks, most = evidence.blocks(variant, metric.workload), recipe.measure.max_blocks
    against = evidence.baseline if threshold.relative else ""
    common = Verdict(
        rule, "inconclusive", "", against, None, _unit(threshold), threshold.limit, "wall", workload=metric.workload
    )
    if not blocks:
        return replace(common, reason=f"{metric} was not measured", workload="")
    for look, share in stats.planned_looks(blocks, most) or [(blocks, 0.0)]:
        level = required_level(recipe, share or 1.0)
        found = (timed_ratio if threshold.relative else timed)(evidence, variant, metric, level, look)
        if found is None:
            return replace(common, reason=f"{metric} was not measured", workload="")
        value = found
        n = counted(value.n, "block" if threshold.relative else "request")
        launches = evidence.launch_count(variant, metric.workload, look)
        reason = f"{metric} is {_show(threshold, value)} ({n} of {counted(launches, 'launch', 'launches')})"
        outcome = against_limit(value, threshold.op, threshold.limit) if share else "inconclusive"
        if outcome != "inconclusive":
            return replace(common, outcome=outcome, reason=reason, value=value)
    if not threshold.relative and value.n < (fewest := fewest_requests(metric, recipe)):
        tail = metric.name.rpartition(".")[2].upper()
        reason = f"too few requests for {tail}: {value.n} of {fewest}"
        if recipe.timed_requests(metric.workload) * evidence.budget < fewest:
            key = f"workloads.{metric.workload}" if recipe.workloads[metric.workload].loaded else "measure"
            reason += f"; {key}.requests: {-(-fewest // evidence.budget)} would give them in {evidence.budget} blocks"
        needed = max(-(-fewest // recipe.timed_requests(metric.workload)), most)
    elif launches < 2:
        reason += "; one launch has no interval: lower measure.relaunch"
        needed = 2 * recipe.measure.relaunch
    else:
        needed = blocks_for(value, threshold.limit, look)
    needed = min(max(needed, blocks + 1), stats.MOST_BLOCKS)
    minutes = evidence.minutes(metric.workload, needed - blocks)
    return replace(common, reason=reason, value=value, blocks_needed=needed, minutes_needed=minutes)


def required_level(recipe: Recipe, share: float = 1.0) -> float:
    """The level of a requirement's interval at a look that has this share of its error."""
    return 1 - stats.REQUIRE_ALPHA * share / family(recipe)


def fewest_requests(metric: Metric, recipe: Recipe) -> int:
    """Requests below which the metric has no two-sided interval at the recipe's last look: 72 for a P95 of independent
    requests at 95 %, more for several variants."""
    name = metric.name.rpartition(".")[2]
    if name not in TAILS:
        return 0
    most = recipe.measure.max_blocks
    _, share = stats.planned_looks(most, most)[-1]
    return stats.fewest_for(QUANTILES[name], required_level(recipe, share))


def _scored_twin(evidence: Evidence, variant: str) -> str | None:
    """Another variant with the same weights that has likelihoods, for one whose engine only generates."""
    if "perplexity" in figures(evidence, variant):
        return None
    models = evidence.plan.models
    twins = (name for name, model in models.items() if model == models[variant] and name != variant)
    return next((name for name in twins if "perplexity" in figures(evidence, name)), None)


def _unit(threshold: Threshold) -> str:
    return "x" if threshold.relative else known(threshold.metric).unit


def _show(threshold: Threshold, value: Interval) -> str:
    def one(x: float) -> str:
        if not math.isfinite(x):
            return "unknown"
        return f"{x:.3g}x" if threshold.relative else format_value(threshold.metric.name, x)

    return f"{one(value.estimate)} ({one(value.low)} to {one(value.high)})"
