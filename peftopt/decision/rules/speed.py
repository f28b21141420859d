"""Rules on times: a technique gains speed, or costs little of it. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from peftopt import stats
from peftopt.decision.evidence import FIELDS, Evidence, acceptance_length, exp
from peftopt.decision.figures import RATIOS
from peftopt.decision.index import Field
from peftopt.decision.rules.case import Case
from peftopt.decision.rules.parents import SAME_MODEL, by_itself, family, parent_of, rule_name
from peftopt.metrics import counted, percent
from peftopt.records import TWIN, Interval, Metric, Recipe, Step, Variant, Verdict

TOUCHED = 0.5
"""The share of a workload's requests that a policy must change for its latency to be judged there."""

_NOWHERE = {
    "shorten": "no workload lets answers stop by themselves: add one with lengths: natural",
    "truncate": "no workload has mostly prompts that are long enough to be cut: add one with a slice of long prompts",
    "pack": "no workload has a batch: add one",
}


def gain(case: Case) -> Verdict:
    """Latency drops by more than the limit. A merge, or a baked prompt, is judged as a whole variant against the
    unmerged adapter, since that is what is given up for it, but by itself where a quantizer in the variant may cost
    speed, being a memory win; any other technique against the same variant without it. What proposes tokens also says
    how many a step gave, what reuses prefixes how much of the prompts, and these and packing on which other workloads
    they cost time."""
    goal = f"{percent(case.limit)} faster or better" if case.limit else "faster"
    judged, against = _gains_as(case.evidence.plan.recipe, case.variant, case.step)
    found = _speed(replace(case, variant=judged), against, 1 - case.limit, goal)
    if case.step.technique in ("speculate", "prefix", "pack"):
        says = {"speculate": _proposing, "prefix": _reusing}.get(case.step.technique)
        how = says(case, found.workload) if says else ""
        found = replace(found, reason=f"{found.reason}{how}{_losing(case, found.workload)}")
    return found if judged == case.variant else replace(found, reason=f"{judged}: {found.reason}")


def not_slower(case: Case) -> Verdict:
    """The slow-down against the variant without the technique is provably below the limit."""
    return _speed(case, case.parent, 1 + case.limit, f"less than {percent(case.limit)} slower")


def judged_speed(evidence: Evidence, variant: Variant) -> Interval | None:
    """The ratio to the baseline's time on what the recipe minimizes, as it is judged: by the variant's own rule that
    compares the two, else as a race against 1x would be; of the baseline its second copy's, at the level of the A/A
    arm. None where no times of whole requests are minimized, or none were measured."""
    recipe, metric = evidence.plan.recipe, evidence.plan.recipe.minimize
    if metric.name.partition(".")[0] not in FIELDS or evidence.field(metric) not in RATIOS.values():
        return None
    if variant.name == recipe.baseline:
        twin, level = recipe.baseline + TWIN, 1 - stats.ALPHA / len(stats.LOOKS)
        return evidence.ratio(twin, recipe.baseline, metric.workload, evidence.field(metric), level)
    result = race(evidence, variant.name, recipe.baseline, metric, next(_own_limits(evidence, variant), 1.0))
    return exp(result.interval) if result.interval.n else None


def a_a(evidence: Evidence) -> Interval | None:
    """The A/A arm's interval when it excludes zero: the baseline differs from itself, so nothing can be accepted."""
    recipe = evidence.plan.recipe
    for workload in recipe.workloads:
        field = evidence.field(Metric(recipe.minimize.name, workload))
        twin, level = recipe.baseline + TWIN, 1 - stats.ALPHA / len(stats.LOOKS)
        ratio = evidence.ratio(twin, recipe.baseline, workload, field, level)
        if ratio and (ratio.low > 1 or ratio.high < 1):
            return ratio
    return None


def raced_on(evidence: Evidence, variant: str, step: Step) -> str | None:
    """The workload on which a technique's latency is judged: the recipe's `minimize`, but a policy where it matters."""
    recipe = evidence.plan.recipe
    if step.technique == "shorten":
        return next((w.name for w in recipe.workloads.values() if w.lengths == "natural"), None)
    if step.technique == "truncate":
        shares = {w: evidence.touched_share(variant, w) for w in recipe.workloads}
        most = max(shares, key=lambda w: shares[w])
        return most if shares[most] >= TOUCHED else None
    if step.technique == "pack" and recipe.workloads[recipe.minimize.workload].batch < 2:
        largest = max(recipe.workloads.values(), key=lambda workload: workload.batch)
        return largest.name if largest.batch > 1 else None
    return recipe.minimize.workload


def _speed(case: Case, against: str, limit: float, goal: str) -> Verdict:
    """The sequential test of variant/against on the recipe's `minimize` metric; `limit` is a ratio."""
    evidence, recipe = case.evidence, case.evidence.plan.recipe
    workload = raced_on(evidence, case.variant, case.step)
    if workload is None:
        return Verdict("", "inconclusive", _NOWHERE[case.step.technique], against)
    metric = Metric(recipe.minimize.name, workload)
    field = evidence.field(metric)
    logs = list(evidence.series(case.variant, against, workload, field).values())
    result = race(evidence, case.variant, against, metric, limit)
    n = result.interval.n
    if not n:
        return Verdict("", "inconclusive", f"{metric} was not measured against {against}", against, workload=workload)
    ratio = exp(result.interval)
    blocks = counted(n, "block")
    if result.launches < n:
        blocks += f" of {counted(result.launches, 'launch', 'launches')}"
    if result.test == "bets":
        blocks += ", by bets"
    bounded = math.isfinite(ratio.low) and math.isfinite(ratio.high) and ratio.low > 0
    span = f"{ratio.low:.2f} to {ratio.high:.2f}" if bounded else "no interval yet"
    seen = f"{metric} is {ratio.estimate:.2f}x {against}'s ({span}, {blocks})"
    open_ = result.outcome == "inconclusive"
    hopeless = open_ and len(logs) < evidence.budget
    hopeless = hopeless and stats.out_of_reach(logs, math.log(limit), evidence.budget, case.family)
    reasons = {
        "accepted": f"{seen}: {goal}",
        "rejected": f"{seen}: not {goal}",
        "inconclusive": f"{seen}: cannot tell yet whether {goal}"
        + f"{_unseen(case, against, workload, field, result)}{_troubles(evidence, workload)}"
        + f"; the {evidence.budget} blocks it may have can hardly suffice" * hopeless,
    }
    # between two looks bets alone judge, and they decide later
    needed = stats.next_look(result.blocks_needed) if open_ and result.blocks_needed else None
    return Verdict(
        rule="",
        outcome=result.outcome,
        reason=reasons[result.outcome],
        against=against,
        value=ratio,
        unit="x",
        limit=limit,
        clock=evidence.clock[0],
        blocks_needed=needed,
        workload=workload,
        minutes_needed=evidence.minutes(workload, needed - len(logs)) if needed else None,
        hopeless=hopeless,
    )


def race(evidence: Evidence, variant: str, against: str, metric: Metric, limit: float) -> stats.Race:
    """The sequential test of variant/against on a metric; `limit` is a ratio."""
    recipe, workload, field = evidence.plan.recipe, metric.workload, evidence.field(metric)
    series = evidence.series(variant, against, workload, field)
    return stats.race(
        series.values(),
        math.log(limit),
        family(recipe),
        recipe.measure.max_blocks > stats.LOOKS[-1],
        evidence.launches_of(variant, against, workload, series),
        evidence.resolution((variant, against), workload, field),
    )


def _own_limits(evidence: Evidence, variant: Variant) -> Iterator[float]:
    """The limits, as ratios, by which the variant itself is raced against the baseline on the minimized workload."""
    recipe = evidence.plan.recipe
    for step in variant.techniques:
        if raced_on(evidence, variant.name, step) != recipe.minimize.workload:
            continue
        limits = [(r.name, r.limit) for r in recipe.rules if r.technique == rule_name(step) and r.limit is not None]
        for name, limit in limits:
            if name == "gain" and _gains_as(recipe, variant.name, step) == (variant.name, recipe.baseline):
                yield 1 - limit
            elif name == "not_slower" and parent_of(recipe, variant, step) == recipe.baseline:
                yield 1 + limit


def _gains_as(recipe: Recipe, variant: str, step: Step) -> tuple[str, str]:
    """(the variant whose gain is a technique's, the one it is compared with)."""
    if step.technique not in SAME_MODEL:
        return variant, parent_of(recipe, recipe.variants[variant], step)
    slower = any(_may_be_slower(recipe, each) for each in recipe.variants[variant].techniques)
    alone = by_itself(recipe, variant, step) if slower else None
    return alone or variant, recipe.baseline


def _may_be_slower(recipe: Recipe, step: Step) -> bool:
    """Whether the recipe takes the step as a memory win: it asks that it be smaller, not that it be as fast."""
    limits = {rule.name: rule.limit for rule in recipe.rules if rule.technique == rule_name(step)}
    return limits.get("smaller") is not None and limits.get("not_slower") is None


def _unseen(case: Case, against: str, workload: str, field: Field, result: stats.Race) -> str:
    """What keeps these blocks from deciding although they are clear, and what to do about it."""
    evidence = case.evidence
    reasons = ""
    if needed := result.launches_needed:
        reasons += (
            f"; {counted(result.launches, 'launch', 'launches')} cannot show what differs between launches, "
            f"about {needed} would: lower measure.relaunch"
        )
    resolution = evidence.resolution((case.variant, against), workload, field)
    if resolution > math.log1p(0.01):
        reasons += f"; the clock's steps are {percent(math.expm1(resolution))} of what it times: use longer requests"
    loads = [evidence.loads(v, workload) for v in (case.variant, against)]
    if max(loads) > result.interval.n and min(loads):
        reasons += f"; of {max(loads)} loads {result.interval.n} are pairs: let the loads of both alternate"
    return reasons


def _troubles(evidence: Evidence, workload: str) -> str:
    """What disturbed the blocks of an undecided race, where it was more than a few of them."""
    disturbed, blocks = evidence.disturbed(workload), evidence.blocks(evidence.baseline, workload)
    if 4 * len(disturbed) < blocks or not disturbed:
        return ""
    reasons = Counter(reason for found in disturbed.values() for reason in found)
    return f"; {len(disturbed)} of {blocks} blocks were disturbed ({reasons.most_common(1)[0][0]})"


def _proposing(case: Case, raced: str) -> str:
    """How many tokens a step gave on the workload of the race."""
    steps = [request for request in case.evidence.requests(case.variant, raced) if request.steps]
    return f"; {acceptance_length(steps).estimate:.2f} tokens a step" if steps else ""


def _reusing(case: Case, raced: str) -> str:
    """How much of the prompts on the workload of the race was there already."""
    share = case.evidence.reused(case.variant, raced)
    return f"; {percent(share.estimate)} of prompt tokens were reused" if share else ""


def _losing(case: Case, raced: str) -> str:
    """The other workloads on which it is slower for sure."""
    evidence, metric = case.evidence, case.evidence.plan.recipe.minimize
    said = ""
    for workload in evidence.plan.recipe.workloads:
        field = evidence.field(Metric(metric.name, workload))
        ratio = evidence.ratio(case.variant, case.parent, workload, field) if workload != raced else None
        if ratio and ratio.low > 1:
            said += f"; it loses on {workload}: {ratio.estimate:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    return said
