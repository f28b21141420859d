"""The named rules: one half-row of the trade-off table, or one requirement, asked of one variant. Pure.

Every rule has three outcomes; inconclusive never passes. A rule of a technique is judged on what isolates it: the
variant against the same variant without it, a merge against the unmerged adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from peftopt import stats
from peftopt.evidence import FIELDS, Evidence, exp
from peftopt.figures import figure, figures
from peftopt.goodput import QUANTILES
from peftopt.records import Interval, Metric, Outcome, Recipe, Rule, Step, Threshold, Variant, Verdict
from peftopt.thresholds import TASK, counted, format_value, known

SKIPPED = ("missing library", "missing environment", "refused")
"""Failures that say nothing of the variant: it was not tried."""

LIKELIHOODS = ("perplexity", "kl", "top1")
"""Figures of the weights, which an engine that only generates cannot give."""

LOST = 0.1
"""What must be left of the adapter's shift from the base for it to count as applied at all."""

TAILS = ("p95", "p99")

TOUCHED = 0.5
"""The share of a workload's requests that a policy must change for its latency to be judged there."""


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


def _speed(case: Case, against: str, limit: float, goal: str) -> Verdict:
    """The sequential test of variant/against on the recipe's `minimize` metric; `limit` is a ratio."""
    evidence, recipe = case.evidence, case.evidence.plan.recipe
    workload = raced_on(evidence, case.variant, case.step)
    if workload is None:
        return Verdict("", "inconclusive", _NOWHERE[case.step.technique], against)
    metric = Metric(recipe.minimize.name, workload)
    logs = evidence.paired(case.variant, against, workload, evidence.field(metric))
    result = stats.race(logs, math.log(limit), case.family, recipe.measure.max_blocks > stats.LOOKS[-1])
    n = result.interval.n
    if not n:
        return Verdict("", "inconclusive", f"{metric} was not measured against {against}", against, workload=workload)
    ratio = exp(result.interval)
    blocks = f"{n} blocks, by bets" if result.test == "bets" else f"{n} blocks"
    bounded = math.isfinite(ratio.low) and math.isfinite(ratio.high) and ratio.low > 0
    span = f"{ratio.low:.2f} to {ratio.high:.2f}" if bounded else "no interval yet"
    seen = f"{metric} is {ratio.estimate:.2f}x {against}'s ({span}, {blocks})"
    open_ = result.outcome == "inconclusive"
    hopeless = open_ and len(logs) < evidence.budget
    hopeless = hopeless and stats.out_of_reach(logs, math.log(limit), evidence.budget, case.family)
    reasons = {
        "accepted": f"{seen}: {goal}",
        "rejected": f"{seen}: not {goal}",
        "inconclusive": f"{seen}: cannot tell yet whether {goal}{_troubles(evidence, workload)}"
        + f"; the {evidence.budget} blocks it may have can hardly suffice" * hopeless,
    }
    needed, each = result.blocks_needed, evidence.minutes_per_block(workload)
    return Verdict(
        rule="",
        outcome=result.outcome,
        reason=reasons[result.outcome],
        against=against,
        value=ratio,
        unit="x",
        limit=limit,
        clock=evidence.clock[0],
        blocks_needed=needed if open_ else None,
        workload=workload,
        minutes_needed=(needed - len(logs)) * each if open_ and needed and each else None,
        hopeless=hopeless,
    )


def raced_on(evidence: Evidence, variant: str, step: Step) -> str | None:
    """The workload on which a technique's latency is judged: the recipe's `minimize`, but a policy where it matters."""
    recipe = evidence.plan.recipe
    if step.technique == "shorten":
        return next((w.name for w in recipe.workloads.values() if w.lengths == "natural"), None)
    if step.technique == "truncate":
        shares = {w: evidence.touched_share(variant, w) for w in recipe.workloads}
        most = max(shares, key=lambda w: shares[w])
        return most if shares[most] >= TOUCHED else None
    return recipe.minimize.workload


_NOWHERE = {
    "shorten": "no workload lets answers stop by themselves: add one with lengths: natural",
    "truncate": "no workload has mostly prompts that are long enough to be cut: add one with a slice of long prompts",
}


def _troubles(evidence: Evidence, workload: str) -> str:
    """What disturbed the blocks of an undecided race, where it was more than a few of them."""
    disturbed, blocks = evidence.disturbed(workload), evidence.blocks(evidence.baseline, workload)
    if 4 * len(disturbed) < blocks or not disturbed:
        return ""
    reasons = Counter(reason for found in disturbed.values() for reason in found)
    return f"; {len(disturbed)} of {blocks} blocks were disturbed ({reasons.most_common(1)[0][0]})"


def gain(case: Case) -> Verdict:
    """Latency drops by more than the limit. A merge is judged as a whole variant against the unmerged adapter,
    since that is what is given up for it, but by itself where a quantizer after it may cost speed, being a memory win;
    any other technique against the same variant without it."""
    goal = f"{case.limit:.0%} faster or better" if case.limit else "faster"
    if case.step.technique != "merge":
        return _speed(case, case.parent, 1 - case.limit, goal)
    recipe = case.evidence.plan.recipe
    slower = any(_may_be_slower(recipe, step) for step in recipe.variants[case.variant].techniques)
    alone = _prefix(recipe, case.variant, case.step) if slower else None
    if alone is None or alone == case.variant:
        return _speed(case, case.baseline, 1 - case.limit, goal)
    found = _speed(replace(case, variant=alone), case.baseline, 1 - case.limit, goal)
    return replace(found, reason=f"{alone}: {found.reason}")


def _may_be_slower(recipe: Recipe, step: Step) -> bool:
    """Whether the recipe takes the step as a memory win: it asks that it be smaller, not that it be as fast."""
    limits = {rule.name: rule.limit for rule in recipe.rules if rule.technique == rule_name(step)}
    return limits.get("smaller") is not None and limits.get("not_slower") is None


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
        count = counted(len(errors), "critical error")
        reason = f"{count} in {n} prompts that the adapter does not make, first {row}: {flag}"
        theirs = {row for row, _ in case.evidence.critical_errors(case.parent)[0]} if case.parent else set()
        if shared := sum(row in theirs for row, _ in errors):
            reason += f"; {case.parent}, without this step, makes {shared} of them too"
    elif n >= needed:
        outcome, reason = "accepted", f"0 critical errors in {n} prompts: below {bound:.2%} at 95 %"
    else:
        outcome = "inconclusive"
        reason = f"0 critical errors in {n} prompts; a claim of {case.limit:.1%} needs {needed}"
    return Verdict("", outcome, reason, case.baseline, value, "share", case.limit)


def over(case: Case) -> Verdict:
    """Only inputs longer than the limit are ever cut: so says the policy, and so it was seen to do."""
    asked = case.step.params["over"]
    cut = [case.evidence.rows(case.variant)[row]["uncut_tokens"] for row in case.evidence.touched(case.variant)]
    shortest = min(cut, default=math.inf)
    outcome: Outcome = "accepted" if asked >= case.limit and shortest > case.limit else "rejected"
    seen = f", the shortest that was cut had {shortest}" if cut else ", none was asked that is as long"
    reason = f"inputs over {asked:,.0f} tokens are cut{seen}"
    return Verdict("", outcome, reason, "", Interval(asked, asked, asked, len(cut)), "tokens", case.limit)


def lost(case: Case) -> Verdict:
    """Of the answers to the prompts that were cut, few are lost: right before, wrong now."""
    touched = case.evidence.touched(case.variant)
    known = case.evidence.rows(case.baseline)
    right = [row for row in touched if row in known and known[row]["correct"]]
    worse, _ = case.evidence.flips(case.variant, touched)
    reason = f"{worse} of the {len(right)} right answers to prompts that it cut are lost"
    return _at_most(case, worse, len(right), reason, "no prompt that it cuts was asked, or none had a right answer")


def cut(case: Case) -> Verdict:
    """Few answers are cut off that would have ended by themselves."""
    rows, n = case.evidence.cut(case.variant)
    return _at_most(case, len(rows), n, f"{len(rows)} of {n} answers are cut off", "no answers were checked")


def _at_most(case: Case, k: int, n: int, reason: str, nothing: str) -> Verdict:
    """k of n, judged by exact bounds that hold over the family together."""
    if not n:
        return Verdict("", "inconclusive", nothing, case.baseline)
    value = stats.proportion(k, n, 1 - 0.1 / case.family)  # 5 % on the side that is judged
    return Verdict("", against_limit(value, "<=", case.limit), reason, case.baseline, value, "share", case.limit)


def by(case: Case) -> Verdict:
    """Outputs are shortened by `max_new_tokens` and by nothing else."""
    most = case.step.params["max_new_tokens"]
    return Verdict("", "accepted", f"answers end after {most} tokens at the latest", "", unit="tokens")


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
    "over": over,
    "lost": lost,
    "by": by,
    "cut": cut,
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
    policies = tuple(s for s in variant.policies if s != step)
    prefix = variant.steps[: variant.steps.index(step)] if step in variant.steps else variant.steps
    chains = ((rest, engine, policies), (rest, engine, ()), (rest, plain, ()), (prefix, plain, ()))
    for chain in chains:
        for candidate in candidates:
            if (candidate.steps, candidate.engine, candidate.policies) == chain:
                return candidate.name
    return recipe.baseline


def _prefix(recipe: Recipe, variant: str, step: Step) -> str | None:
    """The variant that is this one's chain up to and including the step, on the baseline's engine."""
    chain = recipe.variants[variant].steps
    wanted = chain[: chain.index(step) + 1]
    plain = recipe.variants[recipe.baseline].engine
    whole = (wanted, plain, ())
    return next((v.name for v in recipe.variants.values() if (v.steps, v.engine, v.policies) == whole), None)


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
    value = (relative if threshold.relative else figure)(evidence, measured, threshold.metric)
    if value is None:
        return Verdict(rule, "inconclusive", f"{threshold.metric} was not measured")
    clock = "wall" if threshold.metric.workload else ""
    outcome = against_limit(value, threshold.op, threshold.limit)
    if not threshold.relative and value.n < (fewest := fewest_requests(threshold.metric)):
        recipe, workload = evidence.plan.recipe, threshold.metric.workload
        share = threshold.metric.name.rpartition(".")[2].upper()
        reason = f"too few requests for {share}: {value.n} of {fewest}"
        if recipe.timed_requests(workload) * evidence.budget < fewest:
            key = f"workloads.{workload}" if recipe.workloads[workload].loaded else "measure"
            reason += f"; {key}.requests: {-(-fewest // evidence.budget)} would give them in {evidence.budget} blocks"
        return Verdict(rule, "inconclusive", reason, value=value, limit=threshold.limit, clock=clock)
    reason = f"{threshold.metric}{whose} is {_show(threshold, value)} (n={value.n})"
    against = evidence.baseline if threshold.relative else ""
    unit = "x" if threshold.relative else known(threshold.metric).unit
    return Verdict(rule, outcome, reason, against, value, unit, threshold.limit, clock)


def fewest_requests(metric: Metric) -> int:
    """Requests below which the metric has no two-sided 95 % interval: 72 for a P95, 368 for a P99."""
    name = metric.name.rpartition(".")[2]
    return stats.fewest_for(QUANTILES[name]) if name in TAILS else 0


def _scored_twin(evidence: Evidence, variant: str) -> str | None:
    """Another variant with the same weights that has likelihoods, for one whose engine only generates."""
    if "perplexity" in figures(evidence, variant):
        return None
    models = evidence.plan.models
    twins = (name for name, model in models.items() if model == models[variant] and name != variant)
    return next((name for name in twins if "perplexity" in figures(evidence, name)), None)


def relative(evidence: Evidence, variant: str, metric: Metric) -> Interval | None:
    """A figure as a ratio to the baseline's: paired by block or by prompt where it can be."""
    if metric.workload:
        if variant == evidence.baseline:
            return Interval(1.0, 1.0, 1.0, evidence.blocks(variant, metric.workload))
        if metric.name.endswith(TAILS):
            return _tail_ratio(evidence, variant, metric)
        logs = evidence.paired(variant, evidence.baseline, metric.workload, evidence.wall_field(metric))
        if not logs:
            return None
        if metric.name == "throughput":
            logs = [-x for x in logs]
        return exp(stats.hodges_lehmann(logs, 0.95))
    if metric.name in ("perplexity", "length"):  # ratios by nature
        return figure(evidence, variant, metric)
    if metric.name in ("accuracy", "validity"):
        key = {"accuracy": "correct", "validity": "valid"}[metric.name]
        ours, theirs = evidence.rows(variant), evidence.rows(evidence.baseline)
        shared = sorted(ours.keys() & theirs.keys())
        if not any(theirs[r][key] for r in shared):
            return None
        return stats.ratio_of_means([ours[r][key] for r in shared], [theirs[r][key] for r in shared])
    if metric.name.startswith(TASK):
        mine, reference = (evidence.tasks[v].get(metric.name, {}) for v in (variant, evidence.baseline))
        shared = sorted(mine.keys() & reference.keys())
        if not any(reference[r] for r in shared):
            return None
        return stats.ratio_of_means([mine[r] for r in shared], [reference[r] for r in shared])
    own, base = figure(evidence, variant, metric), figure(evidence, evidence.baseline, metric)
    if own is None or base is None or not base.estimate:
        return None
    return Interval(own.estimate / base.estimate, own.low / base.estimate, own.high / base.estimate, own.n)


def _tail_ratio(evidence: Evidence, variant: str, metric: Metric) -> Interval | None:
    """A block holds too few requests for its tail to be paired: the bounds are those of two exact intervals."""
    family, _, name = metric.name.rpartition(".")
    found = [evidence.requests(v, metric.workload) for v in (variant, evidence.baseline)]
    own, base = (stats.quantile([r[FIELDS[family]] for r in rs], QUANTILES[name], 0.975) for rs in found)
    if not own.n or not base.n:
        return None
    low = own.low / base.high if own.low > 0 else 0.0
    high = own.high / base.low if base.low > 0 else math.inf
    return Interval(own.estimate / base.estimate, low, high, min(own.n, base.n))


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
    kept = evidence.survival(variant.name)
    if kept and kept.high < LOST:
        wrong.append(f"the adapter is not at work: {kept.estimate:.0%} of its shift from the base is left")
    if wrong:
        return Verdict("artifact.intact", "rejected", "; ".join(wrong[:3]))
    if not checked and variant.steps:
        return Verdict("artifact.intact", "inconclusive", "its artifact was not built")
    return Verdict("artifact.intact", "accepted", "all weights are finite and the files match their hash")
