"""What is still to be measured before the decision can be made. Pure: the runner asks, the rules answer."""

from __future__ import annotations

from peftopt import stats
from peftopt.evidence import Evidence
from peftopt.records import Recipe, Variant
from peftopt.rules import FEWEST_FOR_P95, family, parent_of, rule_name, table_verdicts, verdicts

FEWEST = 6
"""Blocks that every variant gets: the fewest from which an exact 95 % interval exists."""

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
    recipe = evidence.plan.recipe
    if variant.name in evidence.failures:
        return False
    n = evidence.blocks(variant.name, workload)
    if n < FEWEST:
        return True
    if n >= recipe.measure.max_blocks:
        return False
    found = table_verdicts(evidence, variant)
    if any(v.outcome == "rejected" for v in found):
        return False
    tails = any(t.metric.workload == workload and t.metric.name.endswith("p95") for t in recipe.require)
    if tails and len(evidence.requests(variant.name, workload)) < FEWEST_FOR_P95:
        return True
    if workload != recipe.minimize.workload or variant.name == recipe.baseline:
        return False
    raced = {f"{rule_name(s)}.{name}" for s in variant.techniques for name in ("gain", "not_slower")}
    return any(v.rule in raced and v.outcome == "inconclusive" for v in found)


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


def hopeless(evidence: Evidence, variant: str) -> bool:
    """Whether a rule that further answers cannot mend has rejected the variant: a critical error, a bad file."""
    found = verdicts(evidence, evidence.plan.recipe.variants[variant])
    final = ("artifact.runs", "artifact.intact")
    return any(v.outcome == "rejected" and (v.rule in final or v.rule.endswith(".critical_errors")) for v in found)
