"""Evidence -> Verdicts -> Decision. Pure: the same files give the same decision on any machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from peftopt import stats
from peftopt.decision.evidence import Evidence
from peftopt.decision.figures import figures
from peftopt.decision.next_step import next_step
from peftopt.decision.prompts import virtual_tokens
from peftopt.decision.rules.parents import family, parent_of, rule_name
from peftopt.decision.rules.speed import a_a, judged_speed
from peftopt.decision.rules.table import A_A, WINNER, protects
from peftopt.decision.rules.variant import outcome_of, verdicts
from peftopt.decision.rules.winner import beaten
from peftopt.decision.stopping import answers, turned_down_by
from peftopt.measurements import Answer
from peftopt.metrics import counted, percent, percent_of_level
from peftopt.records import (
    Decision,
    Interval,
    Outcome,
    Recipe,
    Variant,
    VariantDecision,
    Verdict,
)


def _decide_variant(evidence: Evidence, variant: Variant, twin_differs: bool, lost: Verdict | None) -> VariantDecision:
    found = verdicts(evidence, variant)
    outcome, rule = outcome_of(found)
    notes = []
    if outcome == "accepted" and twin_differs and variant.name != evidence.baseline:
        outcome, rule = "inconclusive", A_A
    if outcome == "inconclusive" and lost:
        found, rule = (*map(_asks_nothing, found), lost), lost.rule
    ratio = figures(evidence, variant.name).get(f"latency.ratio@{evidence.plan.recipe.minimize.workload}")
    if ratio and ratio.low > 1 and variant.name != evidence.baseline:
        notes.append(f"slower than {evidence.baseline} here: {ratio.estimate:.2f}x its latency")
    notes += [*_subset_note(evidence, variant.name), *_warm_up_notes(evidence, variant.name)]
    return VariantDecision(
        name=variant.name,
        techniques=tuple(rule_name(s) for s in variant.techniques),
        outcome=outcome,
        decided_by=rule,
        verdicts=tuple(replace(v, protects=protects(v.rule)) for v in found),
        figures={**figures(evidence, variant.name), **_break_even(evidence, variant)},
        notes=tuple(notes),
        certificates=tuple(evidence.certificates(variant.name)),
        remarks=tuple(_remarks(evidence, variant)),
        speed=judged_speed(evidence, variant),
    )


def _asks_nothing(verdict: Verdict) -> Verdict:
    """The verdict without the blocks that would decide it, since nobody waits for them."""
    return replace(verdict, blocks_needed=None, minutes_needed=None)


def _warm_up_notes(evidence: Evidence, variant: str) -> list[str]:
    warmup, found = evidence.plan.recipe.measure.warmup, []
    for workload in evidence.plan.recipe.workloads.values():
        seen = evidence.warm_up(variant, workload.name)
        discarded = 0 if workload.lengths == "natural" else warmup
        if seen and seen[0] > discarded:
            found.append(
                f"still warming up in timed requests of {workload.name}: the first {seen[0]} of a launch are slower "
                f"than the rest; measure.warmup: {seen[0] + warmup - discarded} would discard them"
            )
    return found


def _remarks(evidence: Evidence, variant: Variant) -> Iterator[str]:
    """What a reader should know of the variant beside the verdicts: its virtual tokens, its answers."""
    yield from virtual_tokens(evidence, variant)
    if variant.name == evidence.baseline:
        yield from _proposed_cap(evidence)
        return
    worse, better = evidence.flips(variant.name)
    if worse:
        yield f"answers: {worse} got worse and {better} better; one-sided exact p = {stats.flips(worse, better):.2g}"
    for name, (worse, better, asked) in evidence.task_flips(variant.name).items():
        p = f"one-sided exact p = {stats.flips(worse, better):.2g}"
        yield f"{name}: {worse} got worse and {better} better of {asked}; {p}"
    if worst := evidence.worst_slice(variant.name):
        tag, lost, won, asked = worst
        yield f"worst slice: {tag}, {lost} worse and {won} better of {asked}; p = {stats.flips(lost, won):.2g}"
    if kept := evidence.survival(variant.name):
        bounds = f"{percent(kept.low)} to {percent(kept.high)}"
        yield f"{percent(kept.estimate)} of the adapter's shift from the base is left ({bounds})"
    yield from _merged_or_apart(evidence, variant)
    touched = evidence.touched(variant.name)
    if any(step.technique == "truncate" for step in variant.policies):
        worse, better = evidence.flips(variant.name, touched)
        rows = [r for r in touched if (a := evidence.rows(evidence.baseline).get(r)) and a.correct]
        lost_rows = [r for r in rows if not evidence.rows(variant.name)[r].correct]
        which = f" ({', '.join(lost_rows[:5])}{', …' * (len(lost_rows) > 5)})" if lost_rows else ""
        asked = len(evidence.rows(variant.name))
        yield f"cuts {len(touched)} of {asked} prompts: {worse} answers lost{which}, {better} won"
    if any(step.technique == "shorten" for step in variant.policies):
        rows, asked = evidence.cut(variant.name)
        which = f" ({', '.join(rows[:5])}{', …' * (len(rows) > 5)})" if rows else ""
        yield f"cuts off {len(rows)} of {asked} answers{which}"


def _merged_or_apart(evidence: Evidence, variant: Variant) -> Iterator[str]:
    """Where the recipe has the same variant with the adapter apart: what merging gains there, in that engine and with
    those weights, which the ratio to the baseline mixes with what they bring; and, where both are quantized, which of
    the two keeps more of the fine-tune."""
    apart = tuple(step for step in variant.steps if step.technique != "merge")
    if apart == variant.steps:
        return
    for other in evidence.plan.recipe.variants.values():
        like = (other.steps, other.engine, other.policies) == (apart, variant.engine, variant.policies)
        if not like or other.name == evidence.baseline:
            continue
        metric = evidence.plan.recipe.minimize
        if gain := evidence.ratio(variant.name, other.name, metric.workload, evidence.field(metric)):
            yield (
                f"merging alone: {metric} is {gain.estimate:.2f}x that of {other.name}, where the adapter stays apart "
                f"({gain.low:.2f} to {gain.high:.2f}, {gain.n} blocks)"
            )
        if not any(step.technique == "quantize" for step in apart):
            continue
        if more := evidence.survival(variant.name, against=other.name):
            better = variant.name if more.estimate > 0 else other.name
            found = f"{better} keeps more of the fine-tune" if more.low * more.high > 0 else "no difference shown"
            yield (
                f"merged before it was quantized it keeps {percent(abs(more.estimate), 1)} of the adapter's shift "
                f"{'more' if more.estimate >= 0 else 'less'} than {other.name}, where the adapter stays apart "
                f"({more.low:+.1%} to {more.high:+.1%}): {found}"
            )


FEW_CUT = 0.01
"""The share of answers that a proposed cap may cut off."""


def _proposed_cap(evidence: Evidence) -> Iterator[str]:
    """The least `max_new_tokens` that cuts off no more than 1 % of the baseline's own answers."""
    lengths, quality = evidence.lengths(), evidence.plan.recipe.quality
    if not lengths or quality is None:
        return
    cap = lengths[math.ceil(len(lengths) * (1 - FEW_CUT)) - 1]
    if cap >= quality.new_tokens:
        return
    cuts = stats.proportion(sum(n > cap for n in lengths), len(lengths))
    share, most = percent(cuts.estimate, 1), percent(cuts.high, 1)
    yield (
        f"max_new_tokens: {cap} would cut off {share} of its answers (at most {most}; "
        f"{len(lengths)} asked, the longest took {lengths[-1]} tokens, the median {lengths[len(lengths) // 2]})"
    )


def _subset_note(evidence: Evidence, variant: str) -> list[str]:
    """Shares of unlike sets of prompts must not be compared by eye: say what the baseline gets on the same ones."""
    ours, theirs = evidence.rows(variant), evidence.rows(evidence.baseline)
    if not ours or len(ours) >= len(theirs):
        return []
    same = percent(sum(theirs[row].correct for row in ours) / len(ours), 1)
    why = _stopped(evidence, variant, len(ours))
    return [f"answered {len(ours)} of {len(theirs)} prompts{why}; on those {evidence.baseline} is right in {same}"]


def _stopped(evidence: Evidence, variant: str, answered: int) -> str:
    """Why it answered no more prompts, "" where the run ended before."""
    if variant in evidence.failures:
        return ", then it failed"
    if rule := turned_down_by(evidence, variant):
        return f", then {rule} turned it down"
    most = answers(evidence.plan.recipe, evidence.plan.recipe.variants[variant])
    return ", as many as its rules take" if most is not None and answered >= most else ""


def _break_even(evidence: Evidence, variant: Variant) -> dict[str, Interval]:
    """Requests of the minimized workload after which a cold compile has paid for itself, against the same variant
    without it. Not there where it saves nothing."""
    recipe = evidence.plan.recipe
    name = f"latency.p50@{recipe.minimize.workload}"
    ours, spent = figures(evidence, variant.name).get(name), figures(evidence, variant.name).get("compile_time")
    theirs = figures(evidence, parent_of(recipe, variant, variant.engine)).get(name)
    if ours is None or theirs is None or spent is None:
        return {}

    def requests(saved_ms: float) -> float:
        return 1e3 * spent.estimate / saved_ms if saved_ms > 0 else math.inf

    low, high = requests(theirs.high - ours.low), requests(theirs.low - ours.high)
    middle = requests(theirs.estimate - ours.estimate)
    return {"break_even": Interval(middle, low, high, ours.n)} if math.isfinite(middle) else {}


def decide(evidence: Evidence, machine: Mapping[str, object]) -> Decision:
    """Judge every variant and choose the best accepted one by `minimize`. `machine` is told on in the decision."""
    plan = evidence.plan
    recipe = plan.recipe
    twin_differs, lost = a_a(evidence) is not None, beaten(evidence)
    judged = [v for v in recipe.variants.values() if v.name not in plan.left_out]
    decided = tuple(_decide_variant(evidence, v, twin_differs, lost.get(v.name)) for v in judged)
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
        clock=evidence.clock[0],
        clock_reason=evidence.clock[1],
        chosen=chosen.name if chosen else None,
        outcome=outcome,
        sentence=_sentence(evidence, chosen, candidates),
        variants=decided,
        warnings=(*_always_wrong(decided, recipe.baseline), *_warnings(evidence), *_slow_choice(chosen, recipe)),
        notes=_notes(evidence),
        machine=machine,
        next_step=next_step(evidence, decided) if outcome == "inconclusive" else "",
    )


MOSTLY_WRONG = 0.1
"""The largest share of right answers, by its interval, with which a baseline says nothing of what others lose."""


def _always_wrong(decided: Sequence[VariantDecision], baseline: str) -> Iterator[str]:
    """A warning where the adapter itself is hardly ever right: nothing can be lost then, whatever a variant does."""
    for accuracy in (d.figures.get("accuracy") for d in decided if d.name == baseline):
        if accuracy and accuracy.n and (accuracy.estimate == 0 or accuracy.high < MOSTLY_WRONG):
            right = f"{round(accuracy.estimate * accuracy.n)} of {accuracy.n} prompts"
            asks = "are these prompts of its task, and is quality.new_tokens enough for a whole answer?"
            yield f"{baseline} itself answers {right} right, so no variant can lose a right answer: {asks}"


def _slow_choice(chosen: VariantDecision | None, recipe: Recipe) -> Iterator[str]:
    """A warning where what is shipped is slower than the baseline, such as a smaller model."""
    ratio = chosen.figures.get(f"latency.ratio@{recipe.minimize.workload}") if chosen else None
    if chosen and ratio and ratio.low > 1:
        name, baseline = chosen.name, recipe.baseline
        yield f"{name} is chosen although it is slower than {baseline} here: {ratio.estimate:.2f}x its latency"


def _minimized(evidence: Evidence, variant: str) -> float:
    ratio = _judged(evidence, variant).estimate
    return ratio if math.isfinite(ratio) else math.inf


def _judged(evidence: Evidence, variant: str) -> Interval:
    """The ratio to the baseline on what the recipe minimizes, on the clock that judges. Its level is shared by all
    variants that may be chosen, so it holds for the best of them too, after choosing."""
    metric, level = evidence.plan.recipe.minimize, 1 - 0.05 / family(evidence.plan.recipe)
    found = evidence.ratio(variant, evidence.baseline, metric.workload, evidence.field(metric), level)
    return found or Interval(math.nan, 0.0, math.inf, 0, level)


_CLOCKS = {"wall": "wall clock", "cpu": "process CPU time"}

LAUNCHES_MATTER = 0.25
"""Spread between launches, in that of the blocks of one, from which a race's stated error is no longer kept."""

MOST_DISTURBED = 0.5
"""The share of disturbed blocks from which on they are a warning: the rest is too little to check them by."""

ORDER_MATTERS = 0.01
"""How much longer the last turn of a block must take than the first for a note."""


def _warnings(evidence: Evidence) -> tuple[str, ...]:
    found = []
    if twin := a_a(evidence):
        found.append(
            f"the A/A arm failed: a second copy of {evidence.baseline} measured {twin.estimate:.3f}x itself "
            f"({twin.low:.3f} to {twin.high:.3f}), so no variant is accepted; run on a quieter machine"
        )
    for workload in evidence.plan.recipe.workloads:
        share, sentence = _disturbed(evidence, workload)
        if share >= MOST_DISTURBED:
            found.append(f"{sentence}; that widens intervals, and favours no variant: their order is random")
        apart = evidence.launch_effect(workload)
        if apart and apart > LAUNCHES_MATTER and evidence.plan.recipe.measure.relaunch > 1:
            found.append(
                f"times of {workload} spread {apart:.1f} times as much from launch to launch as within one: blocks "
                f"that share a launch say less than they seem to; measure.relaunch: 1 makes each independent"
            )
    found += [f"{where}: a turn was left out: {why}" for where, why in sorted(evidence.left_out.items())]
    for (variant, workload), failed in sorted(evidence.failed.items()):
        turns = counted(len(failed), "turn")
        why = next(iter(failed.values()))
        found.append(f"{variant}@{workload}: {turns} failed and count as slower than any that did not: {why}")
    found += [
        f"{where} was loaded apart: what differed between runs is not seen by pairs in random order"
        + "".join(f"; it lacks {what}" for what in lacks)
        for where, lacks in sorted(evidence.apart.items())
    ]
    for name in evidence.plan.recipe.variants:
        if said := unstopped(list(evidence.rows(name).values())):
            found.append(f"{name}: {said}")
    found += [f"{name}: {failure.sentence}" for name, failure in evidence.failures.items()]
    return tuple(found)


def _notes(evidence: Evidence) -> tuple[str, ...]:
    """What was noise and no bias: a reader who wonders finds it, and need not fear it."""
    found = []
    for workload in evidence.plan.recipe.workloads:
        share, sentence = _disturbed(evidence, workload)
        if 0 < share < MOST_DISTURBED:
            found.append(sentence)
        order = evidence.order_effect(workload)
        if order and not order.low <= 1 <= order.high and abs(order.estimate - 1) > ORDER_MATTERS:
            found.append(
                f"the order matters in {workload}: the last turn of a block takes {order.estimate:.2f}x the first "
                f"({order.low:.2f} to {order.high:.2f}); it is random, so this is noise and no bias, but let the "
                "machine cool or settle between turns"
            )
    return tuple(found)


def _disturbed(evidence: Evidence, workload: str) -> tuple[float, str]:
    """Which share of a workload's blocks were disturbed, and by what."""
    disturbed = evidence.disturbed(workload)
    if not disturbed:
        return 0.0, ""
    reasons = Counter(reason for block in disturbed.values() for reason in block)
    why = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3))
    blocks = evidence.blocks(evidence.baseline, workload)
    share = len(disturbed) / max(blocks, 1)
    return share, f"{len(disturbed)} of {blocks} blocks of {workload} were disturbed: {why}"


FEWEST_UNSTOPPED = 8
"""Answers of which none stopped, from which on that is worth a word."""


def unstopped(answers: Sequence[Answer]) -> str:
    """A warning where not one of the answers ended by itself; else ""."""
    if len(answers) < FEWEST_UNSTOPPED or any(answer.stopped for answer in answers):
        return ""
    most = max(answer.new_tokens for answer in answers)
    return (
        f"0 of {len(answers)} answers stopped by themselves within {most} tokens: either answers are longer than "
        "new_tokens, or the token that ends a turn in the chat template is missing from eos_token_id in "
        "generation_config.json (peftopt check names it)"
    )


def _bounds(ratio: Interval) -> str:
    if not (math.isfinite(ratio.high) and ratio.low > 0):
        return f"{ratio.estimate:.2f}x, too few launches or blocks for an interval"
    return f"{ratio.estimate:.2f}x, {ratio.low:.2f} to {ratio.high:.2f} at {percent_of_level(ratio.level)}"


def _sentence(evidence: Evidence, chosen: VariantDecision | None, candidates: Sequence[VariantDecision]) -> str:
    recipe = evidence.plan.recipe
    skipped = [d.name for d in candidates if d.name in evidence.skipped]
    if chosen:
        ratio = chosen.speed or _judged(evidence, chosen.name)
        change = percent(abs(1 - ratio.estimate))
        gain = "about" if change == "0 %" else f"{change} {'lower' if ratio.estimate < 1 else 'higher'} than"
        open_ = [d for d in candidates if d.outcome == "inconclusive"]
        lost = [d.name for d in open_ if d.decided_by == WINNER]
        undecided = [d.name for d in open_ if d.name not in lost]
        parts = [f"{', '.join(lost)} slower and left open"] if lost else []
        parts += [f"{', '.join(undecided)} undecided"] if undecided else []
        parts += [f"{', '.join(skipped)} skipped, not measured"] if skipped else []
        rest = f" ({'; '.join(parts)})" if parts else ""
        return (
            f"Ship {chosen.name}: {recipe.minimize} is {gain} the {recipe.baseline}'s "
            f"({_bounds(ratio)}, {ratio.n} blocks, "
            f"{_CLOCKS[evidence.clock[0]]}), decided by {chosen.decided_by}{rest}."
        )
    why = "; ".join(
        f"{d.name} skipped, not measured"
        if d.name in skipped
        else f"{d.name} {d.outcome}{f' by {d.decided_by}' if d.decided_by else ''}"
        for d in candidates
    )
    if any(d.outcome == "inconclusive" for d in candidates):
        return f"Undecided, so keep the {recipe.baseline} as served: {why}."
    return f"Keep the {recipe.baseline} as served: no variant was accepted ({why})."
