"""Plan + Measurements -> Verdicts -> Decision. Pure: the same files give the same decision on any machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peftopt import stats
from peftopt.evidence import FIELDS, TWIN, Evidence, exp
from peftopt.records import Decision, Interval, Json, Measurement, Outcome, Plan, Variant, VariantDecision, Verdict
from peftopt.rules import parent_of, relative, rule_name, verdicts


def _outcome(found: Sequence[Verdict]) -> tuple[Outcome, str]:
    """A variant is as good as its worst verdict; the rule that decided is the first of those."""
    order: tuple[Outcome, ...] = ("rejected", "inconclusive")
    for outcome in order:
        for verdict in found:
            if verdict.outcome == outcome:
                return outcome, verdict.rule
    accepting = [v.rule for v in found if v.outcome == "accepted" and v.rule != "artifact.intact"]
    return ("accepted", accepting[0]) if accepting else ("not judged", found[0].rule if found else "")


def _decide_variant(evidence: Evidence, variant: Variant, twin_differs: bool) -> VariantDecision:
    found = verdicts(evidence, variant)
    outcome, rule = _outcome(found)
    notes = []
    if outcome == "accepted" and twin_differs and variant.name != evidence.baseline:
        outcome, rule = "inconclusive", "measurement.a_a"
    ratio = evidence.figures(variant.name).get(f"latency.ratio@{evidence.plan.recipe.minimize.workload}")
    if ratio and ratio.low > 1 and variant.name != evidence.baseline:
        notes.append(f"slower than {evidence.baseline} here: {ratio.estimate:.2f}x its latency")
    notes += _subset_note(evidence, variant.name)
    return VariantDecision(
        name=variant.name,
        techniques=tuple(rule_name(s) for s in variant.techniques),
        outcome=outcome,
        decided_by=rule,
        verdicts=found,
        figures={**evidence.figures(variant.name), **_break_even(evidence, variant)},
        notes=tuple(notes),
        certificates=tuple(evidence.certificates(variant.name)),
    )


def _subset_note(evidence: Evidence, variant: str) -> list[str]:
    """Shares of unlike sets of prompts must not be compared by eye: say what the baseline gets on the same ones."""
    ours, theirs = evidence.rows(variant), evidence.rows(evidence.baseline)
    if not ours or len(ours) >= len(theirs):
        return []
    same = sum(theirs[row]["correct"] for row in ours) / len(ours)
    return [f"answered {len(ours)} of {len(theirs)} prompts; on those {evidence.baseline} is right in {same:.1%}"]


def _break_even(evidence: Evidence, variant: Variant) -> dict[str, Interval]:
    """Requests of the minimized workload after which a cold compile has paid for itself, against the same variant
    without it. Not there where it saves nothing."""
    recipe = evidence.plan.recipe
    name = f"latency.p50@{recipe.minimize.workload}"
    ours, spent = evidence.figures(variant.name).get(name), evidence.figures(variant.name).get("compile_time")
    theirs = evidence.figures(parent_of(recipe, variant, variant.engine)).get(name)
    if ours is None or theirs is None or spent is None:
        return {}

    def requests(saved_ms: float) -> float:
        return 1e3 * spent.estimate / saved_ms if saved_ms > 0 else math.inf

    low, high = requests(theirs.high - ours.low), requests(theirs.low - ours.high)
    middle = requests(theirs.estimate - ours.estimate)
    return {"break_even": Interval(middle, low, high, ours.n)} if math.isfinite(middle) else {}


def decide(plan: Plan, measurements: Sequence[Measurement], machine: Mapping[str, Json]) -> Decision:
    """Judge every variant and choose the best accepted one by `minimize`."""
    evidence = Evidence(plan, measurements)
    recipe = plan.recipe
    warnings = _warnings(evidence)
    twin_differs = a_a(evidence) is not None
    decided = tuple(_decide_variant(evidence, v, twin_differs) for v in recipe.variants.values())
    candidates = [d for d in decided if d.name != recipe.baseline]
    accepted = [d for d in candidates if d.outcome == "accepted"]
    chosen = min(accepted, key=lambda d: _minimized(evidence, d.name), default=None)
    outcomes = {d.outcome for d in candidates}
    if chosen:
        outcome: Outcome = "accepted"
    elif "inconclusive" in outcomes:
        outcome = "inconclusive"
    else:
        outcome = "rejected" if "rejected" in outcomes else "not judged"
    return Decision(
        recipe=recipe.name,
        baseline=recipe.baseline,
        minimize=str(recipe.minimize),
        clock=recipe.measure.clock,
        chosen=chosen.name if chosen else None,
        outcome=outcome,
        sentence=_sentence(evidence, chosen, candidates),
        variants=decided,
        warnings=warnings,
        machine=machine,
    )


def _minimized(evidence: Evidence, variant: str) -> float:
    metric = evidence.plan.recipe.minimize
    value = relative(evidence, variant, metric)
    ratio = value.estimate if value else math.inf
    return 1 / ratio if metric.name == "throughput" else ratio


def a_a(evidence: Evidence) -> Interval | None:
    """The A/A arm's interval when it excludes zero: the baseline differs from itself, so nothing can be accepted."""
    recipe = evidence.plan.recipe
    field = FIELDS[recipe.minimize.name.split(".")[0]] if recipe.measure.clock == "wall" else "cpu_ms"
    logs = evidence.paired(recipe.baseline + TWIN, recipe.baseline, recipe.minimize.workload, field)
    interval = stats.hodges_lehmann(logs, 1 - stats.ALPHA / len(stats.LOOKS))
    return exp(interval) if logs and (interval.low > 0 or interval.high < 0) else None


def _warnings(evidence: Evidence) -> tuple[str, ...]:
    found = []
    if twin := a_a(evidence):
        found.append(
            f"the A/A arm failed: a second copy of {evidence.baseline} measured {twin.estimate:.3f}x itself "
            f"({twin.low:.3f} to {twin.high:.3f}), so no variant is accepted; run on a quieter machine"
        )
    cores = evidence.plan.recipe.measure.threads or 1
    loads = sorted(m["load"] for m in evidence.loads if "load" in m)
    if loads and loads[len(loads) // 2] > cores + 1.5:
        found.append(
            f"the machine was busy: median load {loads[len(loads) // 2]:.1f} with {cores} measuring "
            f"thread{'s' * (cores != 1)}"
        )
    for name, failure in evidence.failures.items():
        hint = f"; {failure['hint']}" if failure.get("hint") else ""
        found.append(f"{name}: {failure['stage']} failed, {failure['reason']}: {failure['detail']}{hint}")
    return tuple(found)


def _sentence(evidence: Evidence, chosen: VariantDecision | None, candidates: Sequence[VariantDecision]) -> str:
    recipe = evidence.plan.recipe
    if chosen:
        ratio = relative(evidence, chosen.name, recipe.minimize)
        assert ratio is not None
        percent = abs(1 - ratio.estimate)
        word = "lower" if ratio.estimate < 1 else "higher"
        undecided = [d.name for d in candidates if d.outcome == "inconclusive"]
        rest = f" ({', '.join(undecided)} undecided)" if undecided else ""
        return (
            f"Ship {chosen.name}: {recipe.minimize} is {percent:.0%} {word} than the {recipe.baseline}'s "
            f"({ratio.estimate:.2f}x, {ratio.low:.2f} to {ratio.high:.2f}, {ratio.n} blocks, "
            f"{recipe.measure.clock} clock), decided by {chosen.decided_by}{rest}."
        )
    why = "; ".join(f"{d.name} {d.outcome} by {d.decided_by}" for d in candidates)
    if any(d.outcome == "inconclusive" for d in candidates):
        return f"Undecided, so keep the {recipe.baseline} as served: {why}."
    return f"Keep the {recipe.baseline} as served: no variant was accepted ({why})."
