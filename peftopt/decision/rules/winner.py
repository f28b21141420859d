"""A race for the winner: the variants that `minimize` cannot choose any more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peftopt.decision.evidence import Evidence, exp
from peftopt.decision.rules.speed import a_a, race
from peftopt.decision.rules.table import WINNER
from peftopt.decision.rules.variant import outcome_of, verdicts
from peftopt.metrics import counted
from peftopt.records import Verdict


def beaten(evidence: Evidence) -> Mapping[str, Verdict]:
    """The variants that a race for the winner goes on without, since one that every rule accepts is faster on what the
    recipe minimizes; each with the verdict on it where no rule has decided it. Nothing in a race of all.

    Each pair of variants is raced like a variant and its limit, here 1x, with the same looks and the same share of the
    error. The fastest variant that its rules would accept has at most `family` - 1 rivals, so the chance that it is
    ever beaten is below half of stats.ALPHA.
    """
    recipe = evidence.plan.recipe
    if evidence.race != "winner" or a_a(evidence):
        return {}
    outcomes = {
        name: outcome_of(verdicts(evidence, variant))[0]
        for name, variant in recipe.variants.items()
        if name != recipe.baseline and name not in evidence.plan.left_out
    }
    accepted = [name for name, found in outcomes.items() if found == "accepted"]
    lost = {name: _lost(evidence, name, accepted) for name in outcomes}
    return {name: verdict for name, verdict in lost.items() if verdict}


def _lost(evidence: Evidence, variant: str, accepted: list[str]) -> Verdict | None:
    """The verdict on a variant that one of the accepted ones beats: by the one that beats it most."""
    metric = evidence.plan.recipe.minimize
    races = {other: race(evidence, variant, other, metric, 1.0) for other in accepted if other != variant}
    slower = {other: found.interval for other, found in races.items() if found.outcome == "rejected"}
    if not slower:
        return None
    other = max(slower, key=lambda name: slower[name].estimate)
    ratio = exp(slower[other])
    span = f"{ratio.low:.2f} to {ratio.high:.2f}, {counted(ratio.n, 'block')}"
    more = f"peftopt run {Path(evidence.plan.recipe.path).name} --more"
    return Verdict(
        WINNER,
        "inconclusive",
        f"left open, since it cannot be chosen: {metric} is {ratio.estimate:.2f}x {other}'s ({span}), and {other} is "
        f"accepted; {more} has it judged, measure: {{race: all}} does from the start",
        other,
        ratio,
        "x",
        1.0,
        evidence.clock[0],
    )
