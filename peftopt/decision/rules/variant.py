"""All that is said of one variant: that it runs and is whole, the table's rules, the requirements. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.requirements import requirement
from peftopt.decision.rules.table import table_verdicts, whole
from peftopt.measurements import SKIPPED
from peftopt.metrics import known, percent
from peftopt.records import Outcome, Variant, Verdict

NOT_TRIED = (SKIPPED, "missing library", "missing environment", "refused")
"""Failures that say nothing of the variant: it was not tried."""

LOST = 0.1
"""What must be left of the adapter's shift from the base for it to count as applied at all."""

_NEVER_ALONE = ("artifact.", "variant.", "require: kl ", "require: top1 ")
"""What may reject a variant but not accept it: that nothing is broken is no gain, and near the baseline divergence says
nothing of the answers' worth."""


def verdicts(evidence: Evidence, variant: Variant) -> tuple[Verdict, ...]:
    """All that is said of one variant: that it runs and is whole, the table's rules, the requirements."""
    if failure := evidence.failures.get(variant.name):
        outcome: Outcome = "not judged" if failure.reason in NOT_TRIED else "rejected"
        reason = f"{failure.stage} failed, {failure.reason}: {failure.detail}"
        reason = failure.sentence if failure.reason == SKIPPED else reason
        return (Verdict("artifact.runs", outcome, reason),)
    require = evidence.plan.recipe.require
    if variant.name == evidence.baseline:  # which is not measured against itself
        own = [t for t in require if not t.relative and not known(t.metric).compared]
        return tuple(requirement(evidence, variant.name, t) for t in own)
    found = [_intact(evidence, variant), *table_verdicts(evidence, variant), *whole(evidence, variant)]
    return (*found, *(requirement(evidence, variant.name, t) for t in require))


def outcome_of(found: Sequence[Verdict]) -> tuple[Outcome, str]:
    """A variant is as good as its worst verdict; what decided is the first of those rules, "" where none had a say."""
    order: tuple[Outcome, ...] = ("rejected", "inconclusive")
    for outcome in order:
        for verdict in found:
            if verdict.outcome == outcome:
                return outcome, verdict.rule
    accepting = [v.rule for v in found if v.outcome == "accepted" and not v.rule.startswith(_NEVER_ALONE)]
    unjudged = [v.rule for v in found if v.outcome == "not judged"]
    return ("accepted", accepting[0]) if accepting else ("not judged", unjudged[0] if unjudged else "")


def _intact(evidence: Evidence, variant: Variant) -> Verdict:
    """Tier 0: nothing wrong with the files of any artifact in the chain."""
    builds = {b.id: b for b in evidence.plan.builds}
    wrong: list[str] = []
    at, checked = evidence.plan.models[variant.name], 0
    while at:
        if at in evidence.builds:
            checked += 1
            wrong += evidence.builds[at].tier0
        at = builds[at].parent
    kept = evidence.survival(variant.name)
    if kept and kept.high < LOST:
        wrong.append(f"the adapter is not at work: {percent(kept.estimate)} of its shift from the base is left")
    if wrong:
        return Verdict("artifact.intact", "rejected", "; ".join(wrong[:3]))
    if not checked and variant.steps:
        return Verdict("artifact.intact", "inconclusive", "its artifact was not built")
    if not checked:
        return Verdict("artifact.intact", "accepted", "nothing was built for it")
    return Verdict("artifact.intact", "accepted", "all weights are finite and the files match their hash")
