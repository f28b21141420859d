"""The trade-off table: which rules there are, what each protects against, and all that apply to a variant. Pure."""

from __future__ import annotations

from dataclasses import replace

from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.answers import critical_errors, critical_errors_of, cut, lost
from peftopt.decision.rules.case import Case
from peftopt.decision.rules.exact import by, over, smaller
from peftopt.decision.rules.parents import family, parent_of, rule_name
from peftopt.decision.rules.parity import parity
from peftopt.decision.rules.speed import gain, not_slower
from peftopt.records import Rule, Variant, Verdict

WHOLE = "variant"
"""The row of the trade-off table that every variant faces as a whole, whatever it is made of."""

ANY_CRITICAL = Rule(WHOLE, "critical_errors", 0.05)
"""That row for a table that does not have it: nobody ships a broken model because a table is old."""

A_A = "measurement.a_a"
"""The rule that leaves a variant open where the baseline differs from itself."""

WINNER = "race.winner"
"""The rule that leaves a variant open where the race is for the winner, and another one is."""

RULES = {
    "gain": gain,
    "parity": parity,
    "critical_errors": critical_errors,
    "lost": lost,
    "not_slower": not_slower,
    "smaller": smaller,
    "over": over,
    "by": by,
    "cut": cut,
}

PROTECTS = {
    "artifact.runs": "a variant that cannot be served",
    "artifact.intact": "damaged weights, and a model in which the adapter is not at work",
    A_A: "a machine on which even a copy of the baseline looks faster or slower than itself",
    WINNER: "time spent on a variant that cannot be chosen",
    "gain": "giving something up for a gain that is noise",
    "parity": "a model that is no longer the adapter you evaluated",
    "critical_errors": "answers that break your service: empty, endless, unreadable, or wrong where it must be right",
    "lost": "a quiet loss of right answers",
    "not_slower": "a smaller model that is slower",
    "smaller": "a slower model that saves nothing",
    "over": "cutting inputs that would have fitted",
    "by": "shortening answers in a way that clients cannot see",
    "cut": "answers that end in the middle",
    "require": "missing what you promised your users",
}
"""What each rule keeps from being shipped: by name, by the half after the dot, or by "require"."""


def protects(rule: str) -> str:
    """What a verdict of this rule protects against, for the report; "" for a rule of another version."""
    half = "require" if rule.startswith("require: ") else rule.rpartition(".")[2]
    return PROTECTS.get(rule) or PROTECTS.get(half, "")


def table_verdicts(evidence: Evidence, variant: Variant) -> list[Verdict]:
    """Every rule of the trade-off table that applies to the variant, technique by technique."""
    recipe = evidence.plan.recipe
    verdicts = []
    for step in variant.techniques:
        for rule in (r for r in recipe.rules if r.technique == rule_name(step) and r.name in RULES):
            name = f"{rule.technique}.{rule.name}"
            if rule.limit is None:
                continue
            case = Case(evidence, variant.name, step, rule.limit, parent_of(recipe, variant, step), family(recipe))
            verdicts.append(replace(RULES[rule.name](case), rule=name))
    return verdicts


def whole(evidence: Evidence, variant: Variant) -> list[Verdict]:
    """The row that every variant faces as a whole, against the adapter: all its critical errors, whoever made them."""
    recipe = evidence.plan.recipe
    rule = next((r for r in recipe.rules if r.technique == WHOLE), ANY_CRITICAL)
    if rule.limit is None or recipe.quality is None or not evidence.rows(evidence.baseline):
        return []
    case = Case(evidence, variant.name, variant.engine, rule.limit, evidence.baseline, family(recipe))
    return [replace(critical_errors_of(case, variant.name, evidence.baseline), rule=f"{WHOLE}.{rule.name}")]
