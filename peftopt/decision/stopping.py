"""What is still to be measured before the decision can be made. Pure: the runner asks, the rules answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from peftopt import stats
from peftopt.decision.evidence import FEWEST, Evidence
from peftopt.decision.rules.limits import against_limit
from peftopt.decision.rules.parents import SAME_MODEL, family, parent_of, rule_name
from peftopt.decision.rules.parity import PARTED
from peftopt.decision.rules.requirements import fewest_requests
from peftopt.decision.rules.table import ANY_CRITICAL, WHOLE
from peftopt.decision.rules.variant import verdicts
from peftopt.decision.rules.winner import beaten
from peftopt.metrics import counted, percent
from peftopt.records import Recipe, Rule, Threshold, Variant, Verdict

RACED, ANSWERED = ("gain", "not_slower"), ("parity", "critical_errors", "lost")
"""Rules that take blocks, and rules that take answers."""

LAUNCHES_TO_DECIDE = 3
"""Launches from which Student's t can clear a limit that lies far off."""

FEWEST_ANSWERS = 128
"""Prompts that a variant answers when no rule of its own needs more."""

MOST_PROMPTS = 100_000
"""Stands for more prompts than anybody has."""

SHARES = ("accuracy", "validity")
"""Metrics of answers that are right or wrong, on which a lower limit takes a number of prompts."""


def blocks(evidence: Evidence, workload: str) -> frozenset[str]:
    """The variants that need another block on this workload, references of open rules included; empty = done."""
    recipe = evidence.plan.recipe
    if recipe.baseline in evidence.failures:
        return frozenset()
    lost = beaten(evidence)
    racing = [v for v in recipe.variants.values() if v.name not in lost]
    open_ = {v.name for v in racing if _needs_block(evidence, v, workload)}
    for name in tuple(open_ - {recipe.baseline}):
        variant = recipe.variants[name]
        open_ |= {parent_of(recipe, variant, step) for step in variant.techniques}
    runnable = frozenset(name for name in open_ if name not in evidence.failures)
    return runnable | {recipe.baseline} if runnable else runnable


def _needs_block(evidence: Evidence, variant: Variant, workload: str) -> bool:
    if variant.name in evidence.failures:
        return False
    n = evidence.blocks(variant.name, workload)
    found = verdicts(evidence, variant)
    rejected = any(v.outcome == "rejected" for v in found)
    if n < FEWEST:
        # What is minimized is told of every variant; elsewhere what is rejected already costs no more time.
        return not rejected or workload == evidence.plan.recipe.minimize.workload
    if n >= evidence.budget or rejected:
        return False
    if variant.name == evidence.baseline:
        return False
    recipe = evidence.plan.recipe
    if workload == recipe.minimize.workload and n < recipe.measure.min_blocks:
        return True
    return any(v.workload == workload and v.outcome == "inconclusive" and not v.hopeless for v in found)


def racing(evidence: Evidence) -> tuple[str, ...]:
    """The workloads whose race goes on."""
    return tuple(name for name in evidence.plan.recipe.workloads if blocks(evidence, name))


def minutes(evidence: Evidence, workloads: Sequence[str] | None = None, most: int | None = None) -> float | None:
    """About how many minutes the races of these workloads (None: of all whose race goes on) take up to `most` blocks
    (None: as many as they may have); None where that is not known."""
    most = evidence.budget if most is None else most
    whole = 0.0
    for name in racing(evidence) if workloads is None else workloads:
        takes = evidence.minutes(name, max(most - evidence.blocks(evidence.baseline, name), 0))
        if takes is None:
            return None
        whole += takes
    return whole


def open_races(evidence: Evidence) -> list[Verdict]:
    """The undecided races of variants that nothing has rejected, and that go on: more blocks may settle them."""
    found = []
    recipe, lost = evidence.plan.recipe, beaten(evidence)
    for variant in (v for v in recipe.variants.values() if v.name != recipe.baseline and v.name not in lost):
        said = verdicts(evidence, variant)
        if not any(v.outcome == "rejected" for v in said):
            found += [v for v in said if v.outcome == "inconclusive" and v.blocks_needed]
    return found


def answers(recipe: Recipe, variant: Variant) -> int | None:
    """How many prompts the variant has to answer; None = all there are.

    An engine that is a technique of its own goes token by token, to score as well, and one that speculates or
    reuses prefixes decodes every answer: no more than the rules take.
    """
    if not variant.engine.technique and not any(step.technique in ("speculate", "prefix") for step in variant.policies):
        return None
    names = {WHOLE, *(rule_name(step) for step in variant.techniques)}
    rules = [*recipe.rules, *([] if any(r.technique == WHOLE for r in recipe.rules) else [ANY_CRITICAL])]
    claims = [r.limit for r in rules if r.technique in names and r.name == "critical_errors" and r.limit]
    needed = [stats.needed_n(limit, family(recipe)) for limit in claims]
    required = [_prompts_for(t, family(recipe)) for t in recipe.require if t.metric.name in SHARES]
    return max([FEWEST_ANSWERS, *needed, *(n for n in required if n < MOST_PROMPTS)])


def undecidable(recipe: Recipe, prompts: int) -> Iterator[str]:
    """What this recipe cannot decide however clear its figures turn out, and what it would take: a sentence each.

    `prompts` is how many it can ask of a variant; they matter where its answers are checked at all.
    """
    techniques = {rule_name(step) for variant in recipe.variants.values() for step in variant.techniques}
    asked = [r for r in recipe.rules if r.limit is not None and r.technique in {WHOLE, *techniques}]
    if not any(r.technique == WHOLE for r in recipe.rules):
        asked.append(ANY_CRITICAL)
    most, variants = recipe.measure.max_blocks, family(recipe)
    first = stats.looks(variants)[0]
    raced = [_name(r) for r in asked if r.name in RACED]
    if raced and first > most:
        yield (
            f"{', '.join(raced)}: a race of so many variants is first judged after {first} blocks, and "
            f"measure.max_blocks is {most}: give {stats.next_look(first)}"
        )
    if raced and (launches := -(-most // recipe.measure.relaunch)) < LAUNCHES_TO_DECIDE:
        relaunch = max(1, most // LAUNCHES_TO_DECIDE)
        yield (
            f"{', '.join(raced)}: {most} blocks come from {counted(launches, 'launch', 'launches')}, which cannot show "
            f"what differs between launches: give measure.relaunch: {relaunch}"
        )
    if not recipe.quality and (answered := [_name(r) for r in asked if r.name in ANSWERED and r.technique != WHOLE]):
        yield f"{', '.join(answered)}: no answers are checked, since the recipe has no quality section"
    for rule in asked if recipe.quality else ():
        if rule.limit and (line := _unclaimable(rule, rule.limit, prompts, variants)):
            yield line
    for threshold in recipe.require:
        metric, workload = threshold.metric, threshold.metric.workload
        fewest = 0 if threshold.relative else fewest_requests(metric, recipe)
        if workload and (possible := recipe.timed_requests(workload) * most) < fewest:
            yield f"require: {threshold.text}: takes {fewest} requests, and {most} blocks have {possible}"
        elif metric.name == "validity" and recipe.quality and not recipe.quality.tells_valid:
            asks = "give quality.schema, a regex or labels"
            yield f"require: {threshold.text}: nothing says which answers are valid: {asks}"
        elif recipe.quality and metric.name in SHARES and not _showable(threshold, prompts, variants):
            takes = _prompts_for(threshold, variants)
            enough = f"it takes {takes}" if takes < MOST_PROMPTS else "no number of them does"
            yield (
                f"require: {threshold.text}: {counted(prompts, 'prompt')} cannot show that of "
                f"{counted(variants, 'variant')}, not even where all are right: {enough}"
            )


def _showable(threshold: Threshold, prompts: int, variants: int) -> bool:
    """Whether so many right answers, none of them lost, meet a lower limit on a share or on its ratio."""
    level = 1 - stats.REQUIRE_ALPHA / variants
    best = stats.kept(0, prompts, 0, 0, level) if threshold.relative else stats.proportion(prompts, prompts, level)
    return threshold.op not in (">=", ">") or against_limit(best, threshold.op, threshold.limit) == "accepted"


def _prompts_for(threshold: Threshold, variants: int) -> int:
    """The fewest prompts with which `_showable` holds; no number of them shows 100 %."""
    return _fewest(lambda n: _showable(threshold, n, variants))


def prompts_for(recipe: Recipe, name: str) -> int:
    """The fewest prompts that can show what a rule or a requirement of this name limits, where nothing is wrong with
    any of them; 0 where no number is known."""
    variants = family(recipe)
    required = [t for t in recipe.require if name == f"require: {t.text}"]
    if required:
        return _prompts_for(required[0], variants) if required[0].metric.name in SHARES else 0
    limit = next((r.limit for r in [*recipe.rules, ANY_CRITICAL] if _name(r) == name and r.limit), None)
    if limit is None:
        return 0
    if name.endswith(".critical_errors"):
        return stats.needed_n(limit, variants)
    return _needed(max(limit, PARTED) if name.endswith(".parity") else limit, variants)


def _unclaimable(rule: Rule, limit: float, prompts: int, variants: int) -> str:
    """What so few prompts cannot claim of answers even where nothing is wrong with any, and how many would."""
    claims = f"its limit of {percent(limit, 2)}"
    if rule.name == "critical_errors":
        needed, bound = stats.needed_n(limit, variants), stats.upper_bound(0, prompts, 1 - 0.05 / variants)
        what = "without a critical error"
    elif rule.name == "lost" and rule.technique in SAME_MODEL:
        needed, bound = _needed(limit, variants), _most(prompts, variants)
        what = "that the adapter answers right and none of which is lost"
    elif rule.name == "parity":
        limit = max(limit, PARTED)
        needed, bound = _needed(limit, variants), _most(prompts, variants)
        claims += f" of tokens, that no more than {percent(limit, 2)} of answers part early,"
        what = "whose answers do not part from the adapter's"
    else:
        return ""
    if needed <= prompts:
        return ""
    return (
        f"{_name(rule)}: {claims} for {counted(variants, 'variant')} takes {needed} prompts {what}; there are "
        f"{prompts}, which can claim {percent(bound, 2)}: {needed - prompts} more are needed"
    )


def _most(prompts: int, variants: int) -> float:
    """The highest excess share that so many prompts leave open when none differs."""
    return stats.excess(0, 0, prompts, 1 - 0.1 / variants).high if prompts else 1.0


def _needed(limit: float, variants: int) -> int:
    """The fewest prompts that leave no more than `limit` open when none differs."""
    return _fewest(lambda n: _most(n, variants) <= limit)


def _fewest(enough: Callable[[int], bool]) -> int:
    """The fewest prompts that are enough, as any more are; MOST_PROMPTS where none are."""
    return bisect_left(range(MOST_PROMPTS), True, key=enough)


def _name(rule: Rule) -> str:
    return f"{rule.technique}.{rule.name}"


def turned_down_by(evidence: Evidence, variant: str) -> str:
    """The rule that has rejected the variant and that further answers cannot mend, such as on critical errors or on a
    bad file; "" for none."""
    final = ("artifact.runs", "artifact.intact")
    found = verdicts(evidence, evidence.plan.recipe.variants[variant])
    rejected = (v.rule for v in found if v.outcome == "rejected")
    return next((rule for rule in rejected if rule in final or rule.endswith(".critical_errors")), "")


def hopeless(evidence: Evidence, variant: str) -> bool:
    """Whether such a rule has rejected the variant."""
    return bool(turned_down_by(evidence, variant))
