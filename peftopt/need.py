"""What is still to be measured before the decision can be made. Pure: the runner asks, the rules answer."""

from __future__ import annotations

from collections.abc import Iterator

from peftopt import stats
from peftopt.evidence import FEWEST, Evidence
from peftopt.records import Recipe, Variant, Verdict
from peftopt.rules import family, fewest_requests, parent_of, rule_name, table_verdicts, verdicts
from peftopt.thresholds import counted

RACED, ANSWERED = ("gain", "not_slower"), ("parity", "critical_errors")
"""Rules that take blocks, and rules that take answers."""

FEWEST_ANSWERS = 128
"""Prompts that a variant answers when no rule of its own needs more."""


def blocks(evidence: Evidence, workload: str) -> frozenset[str]:
    """The variants that need another block on this workload, references of open rules included; empty = done."""
    recipe = evidence.plan.recipe
    if recipe.baseline in evidence.failures:
        return frozenset()
    open_ = {v.name for v in recipe.variants.values() if _needs_block(evidence, v, workload)}
    for name in tuple(open_ - {recipe.baseline}):
        variant = recipe.variants[name]
        open_ |= {parent_of(recipe, variant, step) for step in variant.techniques}
    runnable = frozenset(name for name in open_ if name not in evidence.failures)
    return runnable | {recipe.baseline} if runnable else runnable


def _needs_block(evidence: Evidence, variant: Variant, workload: str) -> bool:
    if variant.name in evidence.failures:
        return False
    n = evidence.blocks(variant.name, workload)
    found = table_verdicts(evidence, variant)
    rejected = any(v.outcome == "rejected" for v in found)
    if n < FEWEST:
        # What is minimized is told of every variant; elsewhere what is rejected already costs no more time.
        return not rejected or workload == evidence.plan.recipe.minimize.workload
    if n >= evidence.budget or rejected:
        return False
    if _lacks_requests(evidence, variant, workload):
        return True
    return any(v.workload == workload and v.outcome == "inconclusive" and not v.hopeless for v in found)


def _lacks_requests(evidence: Evidence, variant: Variant, workload: str) -> bool:
    """Whether a tail that is required takes more requests, and the budget holds as many."""
    recipe = evidence.plan.recipe
    limits = [fewest_requests(t.metric) for t in recipe.require if t.metric.workload == workload]
    possible = [n for n in limits if n <= recipe.timed_requests(workload) * evidence.budget]
    return len(evidence.requests(variant.name, workload)) < max(possible, default=0)


def open_races(evidence: Evidence) -> list[Verdict]:
    """The undecided races of variants that nothing has rejected: more blocks may settle them."""
    found = []
    for variant in evidence.plan.recipe.variants.values():
        said = verdicts(evidence, variant)
        if not any(v.outcome == "rejected" for v in said):
            found += [v for v in said if v.outcome == "inconclusive" and v.blocks_needed]
    return found


def answers(recipe: Recipe, variant: Variant) -> int | None:
    """How many prompts the variant has to answer; None = all there are.

    An engine that is a technique of its own goes token by token, to score as well: no more than the rules take.
    """
    if not variant.engine.technique:
        return None
    needed = FEWEST_ANSWERS
    for step in variant.techniques:
        for rule in recipe.rules:
            if rule.technique == rule_name(step) and rule.name == "critical_errors" and rule.limit:
                needed = max(needed, stats.needed_n(rule.limit, family(recipe, rule)))
    return needed


def undecidable(recipe: Recipe, prompts: int) -> Iterator[str]:
    """What this recipe cannot decide however clear its figures turn out, and what it would take: a sentence each.

    `prompts` is how many it can ask of a variant; they matter where its answers are checked at all.
    """
    asked = [(f"{r.technique}.{r.name}", r, family(recipe, r)) for r in recipe.rules if r.limit is not None]
    asked = [(name, rule, variants) for name, rule, variants in asked if variants]
    most = recipe.measure.max_blocks
    late = {name: first for name, rule, n in asked if rule.name in RACED and (first := stats.looks(n)[0]) > most}
    if late:
        first = max(late.values())
        yield (
            f"{', '.join(late)}: a race of so many variants is first judged after {first} blocks, and "
            f"measure.max_blocks is {most}: give {stats.next_look(first)}"
        )
    if not recipe.quality and (answered := [name for name, rule, _ in asked if rule.name in ANSWERED]):
        yield f"{', '.join(answered)}: no answers are checked, since the recipe has no quality section"
    for name, rule, n in asked if recipe.quality else ():
        if rule.name != "critical_errors" or not rule.limit or (needed := stats.needed_n(rule.limit, n)) <= prompts:
            continue
        bound = stats.upper_bound(0, prompts, 1 - 0.05 / n)
        yield (
            f"{name}: to claim {rule.limit:.2%} of {counted(n, 'variant')} takes {needed} prompts without an error; "
            f"there are {prompts}, which can claim {bound:.2%}"
        )
    for threshold in recipe.require:
        metric, workload = threshold.metric, threshold.metric.workload
        fewest = 0 if threshold.relative else fewest_requests(metric)
        if workload and (possible := recipe.timed_requests(workload) * most) < fewest:
            yield f"require: {threshold.text}: takes {fewest} requests, and {most} blocks have {possible}"


def hopeless(evidence: Evidence, variant: str) -> bool:
    """Whether a rule that further answers cannot mend has rejected the variant: a critical error, a bad file."""
    found = verdicts(evidence, evidence.plan.recipe.variants[variant])
    final = ("artifact.runs", "artifact.intact")
    return any(v.outcome == "rejected" and (v.rule in final or v.rule.endswith(".critical_errors")) for v in found)
