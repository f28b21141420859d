"""Is a figure worse than the accepted one? Each has a test, and all tests of a gate share one error budget.

Both ways of being wrong are bounded by ALPHA / 2, over all figures together. A gate passes only where every figure
passes, so each may pass by bounds of its own at that error. One figure is enough to fail, so those bounds share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain

from peftopt import stats
from peftopt.decision.evidence import ANSWERED_WRONG, exp
from peftopt.decision.rules.ratios import score_ratio
from peftopt.gate.records import Baseline, Case, Errors, Race, RuleFigure, Scores, Snapshot
from peftopt.metrics import counted, percent
from peftopt.records import Interval, Outcome

ALPHA = stats.ALPHA
"""Two-sided error of a whole gate: 1 % for failing what is not worse, 1 % for passing what is."""

NEW_ERRORS = "answers.critical_errors"
"""The case of critical errors that the accepted run does not show."""


def cases(baseline: Baseline, now: Snapshot) -> list[Case]:
    """A case for each rule, and one for each score and for new critical errors."""
    then = baseline.accepted
    shared = then.races.keys() & now.races.keys()
    family = max(1, len(shared) + len(then.scores.keys() & now.scores.keys()))
    raced = {name: _race_case(name, baseline, now, family) for name in sorted(shared)}
    names = sorted(then.rules.keys() | now.rules.keys())
    rules = [_rule(name, baseline, now, raced) for name in names]
    metrics = sorted(then.scores.keys() | now.scores.keys())
    scored = [_score_case(metric, baseline, now, family) for metric in metrics]
    return [*rules, *scored, *_new_errors(then, now)]


# ---- rules ---------------------------------------------------------------------------------------


def _rule(name: str, baseline: Baseline, now: Snapshot, raced: Mapping[str, Case]) -> Case:
    """What the rule says of this run, and where it passes, whether its figure became worse."""
    before, after = baseline.accepted.rules.get(name), now.rules.get(name)
    if after is None:
        assert before is not None
        return Case(name, "inconclusive", "it was judged when the baseline was accepted, and is not now", before.value)
    case = Case(name, after.outcome, "", before.value if before else None, after.value, after.unit)
    if after.outcome == "rejected" and not (before and before.outcome == "rejected"):
        return replace(case, reason="this run rejects it")
    if before is None:
        return replace(
            case, outcome="inconclusive", reason="the baseline has no such rule: update it in a reviewed way"
        )
    if after.outcome != "accepted":
        same = before.outcome == after.outcome
        told = f"{after.outcome}, as when the baseline was accepted" if same else f"{after.outcome} in this run"
        return replace(case, outcome="not judged" if same else "inconclusive", reason=told)
    if after.race or before.race:
        return _by_race(case, before, after, raced)
    if name.endswith(".smaller") and before.value and after.value:
        return _size(case, before.value, after.value, baseline.tolerances.size)
    return replace(case, reason=_moved(before, after))


def _moved(before: RuleFigure, after: RuleFigure) -> str:
    """Its own limit is its tolerance: what passes it is close enough to the adapter. Another limit is told of."""
    if before.limit != after.limit and before.limit is not None and after.limit is not None:
        return f"it passes; its limit was {before.limit:g} and is {after.limit:g}"
    return "it passes its own limit"


def _by_race(case: Case, before: RuleFigure, after: RuleFigure, raced: Mapping[str, Case]) -> Case:
    found = raced.get(after.race)
    if found is None or before.race != after.race:
        return replace(case, outcome="inconclusive", reason="both runs have no race on the same times: no comparison")
    return replace(found, name=case.name, accepted=found.accepted, now=found.now)


def _size(case: Case, before: Interval, after: Interval, tolerance: float) -> Case:
    """Sizes on disk are known exactly."""
    ratio = after.estimate / before.estimate if before.estimate else math.inf
    change = Interval(ratio, ratio, ratio, 1)
    outcome: Outcome = "accepted" if ratio <= 1 + tolerance else "rejected"
    reason = f"its size on disk is {ratio:.2f}x the accepted one's"
    return replace(case, outcome=outcome, reason=reason, change=change, limit=1 + tolerance)


# ---- speed ---------------------------------------------------------------------------------------


def _race_case(name: str, baseline: Baseline, now: Snapshot, family: int) -> Case:
    """Two runs at two times, so two samples: each has an interval over its own blocks and launches."""
    before, after = baseline.accepted.races[name], now.races[name]
    limit = 1 + baseline.tolerances.speed
    plain, sure = (ratio_of(after, before, level) for level in levels(family))
    case = Case(name, "inconclusive", "", _shown(before), _shown(after), "x", plain, limit)
    if unlike := _unlike(baseline.accepted, now, name):
        return replace(case, reason=unlike, change=None)
    if before.clock != after.clock:
        reason = f"judged on the {after.clock} clock, accepted on the {before.clock} clock"
        return replace(case, reason=reason, change=None)
    seen = f"{plain.estimate:.2f}x the accepted ratio ({_bounds(plain)}, {counted(_blocks(after), 'block')} now and "
    seen += f"{_blocks(before)} then)"
    if sure.low > limit:
        return replace(case, outcome="rejected", reason=f"{seen}: surely more than {percent(limit - 1)} slower")
    if plain.high <= limit:
        return replace(case, outcome="accepted", reason=f"{seen}: less than {percent(limit - 1)} slower")
    return replace(case, reason=f"{seen}: cannot tell whether {percent(limit - 1)} slower; {_needed(plain, limit)}")


def levels(family: int) -> tuple[float, float]:
    """(the level of the bounds by which a figure may pass, that of those by which it may fail)."""
    return 1 - ALPHA, 1 - ALPHA / family


def ratio_of(after: Race, before: Race, level: float) -> Interval:
    """The ratio of one race over that of the other, accepted one."""
    return exp(stats.difference(_centre(after, level), _centre(before, level)))


def _centre(race: Race, level: float) -> Interval:
    groups = [number for number, launch in enumerate(race.launches) for _ in launch]
    return stats.paired(chain.from_iterable(race.launches), level, groups)


def _shown(race: Race) -> Interval:
    return exp(_centre(race, 0.95))


def _blocks(race: Race) -> int:
    return sum(map(len, race.launches))


def _needed(change: Interval, limit: float) -> str:
    """What would settle it: bounds come closer with the root of the number of blocks."""
    gap = abs(math.log(limit / change.estimate))
    reach = math.log(change.high / change.estimate) if 0 < change.high < math.inf else math.inf
    if not math.isfinite(reach):
        return "too few blocks or launches for an interval: measure.relaunch: 1, and more blocks"
    if not gap or (reach / gap) ** 2 > 10:
        return "it is too close to the limit, or the machine too noisy, for blocks to tell"
    return f"about {math.ceil((reach / gap) ** 2)} times as many blocks in both runs would tell (measure.min_blocks)"


# ---- answers -------------------------------------------------------------------------------------


def _score_case(metric: str, baseline: Baseline, now: Snapshot, family: int) -> Case:
    """The same prompts, so pairs: what was right and is wrong, and the other way round."""
    name, tolerance = f"answers.{metric}", baseline.tolerances.answers
    before, after = baseline.accepted.scores.get(metric), now.scores.get(metric)
    if before is None or after is None:
        which = "the baseline" if before is None else "this run"
        return Case(name, "inconclusive", f"{which} did not measure it", _mean(before), _mean(after), "share")
    limit = 1 - tolerance
    case = Case(name, "inconclusive", "", _mean(before), _mean(after), "share", None, limit)
    if unlike := _unlike(baseline.accepted, now) or _other_rows(before, after):
        return replace(case, reason=unlike)
    plain, sure = (kept(after, before, level) for level in levels(family))
    if plain is None or sure is None:
        return replace(
            case, outcome="not judged", reason=f"the accepted {metric} is 0: nothing can be lost", limit=None
        )
    lost, won = sorted(after.below.keys() - before.below.keys()), before.below.keys() - after.below.keys()
    seen = f"{counted(len(lost), 'answer')} worse and {len(won)} better of {after.asked}: "
    seen += f"{plain.estimate:.3f}x what was accepted ({_bounds(plain, 3)})"
    named = f"; worse: {', '.join(lost[:5])}{', …' * (len(lost) > 5)}" if lost else ""
    case = replace(case, change=plain)
    if sure.high < limit:
        return replace(case, outcome="rejected", reason=f"{seen}: surely more than {percent(tolerance)} lost{named}")
    if plain.low >= limit:
        return replace(case, outcome="accepted", reason=f"{seen}: less than {percent(tolerance)} lost{named}")
    told = f"{seen}: cannot tell whether {percent(tolerance)} are lost{named}; more prompts would"
    return replace(case, reason=told)


def kept(after: Scores, before: Scores, level: float) -> Interval | None:
    """The mean score now as a ratio to the accepted one, paired by prompt; None where that one is 0.

    Answers that are right or wrong: those lost are a share of what was right, those won of what was wrong, two samples
    once it is known what was right. Other scores: by the delta method.
    """
    rows = before.below.keys() | after.below.keys()
    if not any([*before.below.values(), *after.below.values()]):
        return _kept_right(after.below.keys(), before.below.keys(), before.asked, level)
    whole = {f"\0{number}": 1.0 for number in range(before.asked - len(rows))}
    ours, theirs = ({row: one.below.get(row, 1.0) for row in rows} | whole for one in (after, before))
    return score_ratio(ours, theirs, level)


def _kept_right(wrong_now: Set[str], wrong_then: Set[str], asked: int, level: float) -> Interval | None:
    wrong, right = len(wrong_then), asked - len(wrong_then)
    if not right:
        return None
    lost = stats.proportion(len(wrong_now - wrong_then), right, level)
    won = stats.proportion(len(wrong_then - wrong_now), wrong, level) if wrong else Interval(0.0, 0.0, 0.0, 0, level)
    gain = wrong / right
    won = replace(won, estimate=gain * won.estimate, low=gain * won.low, high=gain * won.high)
    loss = stats.difference(lost, won)
    return Interval(1 - loss.estimate, 1 - loss.high, 1 - loss.low, asked, level)


def _mean(scores: Scores | None) -> Interval | None:
    if scores is None or not scores.asked:
        return None
    whole = scores.asked - len(scores.below)
    values = [*scores.below.values(), *[1.0] * whole]
    if set(values) <= {0.0, 1.0}:
        return stats.proportion(whole, scores.asked)
    return stats.mean(values)


def _new_errors(then: Snapshot, now: Snapshot) -> Iterator[Case]:
    """Critical errors that every answer of this run shows and none of the accepted run did. One is enough."""
    before, after = then.errors, now.errors
    if before is None and after is None:
        return
    case = Case(NEW_ERRORS, "inconclusive", "", unit="share")
    if before is None or after is None:
        which = "the baseline" if before is None else "this run"
        yield replace(case, reason=f"{which} checked no answers")
        return
    if unlike := _unlike(then, now) or _other_rows(before, after):
        yield replace(case, reason=unlike)
        return
    new = _beyond(after.always, before)
    doubtful = [row for row in _beyond(after.sometimes, before) if row not in new]
    bound = stats.upper_bound(len(new), after.asked, 1 - ALPHA / 2)
    case = replace(case, now=Interval(len(new) / after.asked, 0.0, bound, after.asked), limit=after.limit)
    if new:
        # an answer that is another than expected may turn at a near tie where the arithmetic is another
        elsewhere = then.machine != now.machine and set(new.values()) == {ANSWERED_WRONG}
        row, flag = next(iter(new.items()))
        told = f"{counted(len(new), 'new critical error')} in {after.asked} prompts, first {row}: {flag}"
        if elsewhere:
            told += "; on another class of machine near ties turn: gate on the one that the baseline has"
        yield replace(case, outcome="inconclusive" if elsewhere else "rejected", reason=told)
        return
    told = f"0 new critical errors in {after.asked} prompts: below {percent(bound, 2)} at {percent(1 - ALPHA / 2)}"
    if doubtful:
        told += f"; {', '.join(doubtful[:3])} {'hang' if len(doubtful) > 1 else 'hangs'} on noise of this run"
    if bound > after.limit:
        needed = stats.needed_n(after.limit, 1, 1 - ALPHA / 2)
        yield replace(case, reason=f"{told}; a claim of {percent(after.limit, 1)} needs {needed}")
        return
    yield replace(case, outcome="accepted", reason=told)


def _beyond(shown: Mapping[str, Sequence[str]], known: Errors) -> dict[str, str]:
    """By prompt the first of the errors that no answer of the known run shows."""
    found = {}
    for row, flags in sorted(shown.items()):
        fresh = set(flags) - {*known.always.get(row, ()), *known.sometimes.get(row, ())}
        if fresh:
            found[row] = min(fresh)
    return found


# ---- likeness ------------------------------------------------------------------------------------


def _other_rows(before: Scores | Errors, after: Scores | Errors) -> str:
    if before.rows == after.rows:
        return ""
    return f"other prompts were asked: {after.asked} now, {before.asked} when the baseline was accepted"


def _unlike(then: Snapshot, now: Snapshot, race: str = "") -> str:
    """Why the answers of two runs are no pair, or the times of one `race` not of one kind; "" where they are."""
    if then.hashes is None or now.hashes is None:
        return "this run does not say what it was made of: run the recipe again"
    for what, before, after in (
        ("base model", then.hashes.base, now.hashes.base),
        ("tokenizer or chat template", then.hashes.tokenizer, now.hashes.tokenizer),
    ):
        if before != after:
            return f"another {what} than that of the baseline"
    if not race:
        changed = then.hashes.answers != now.hashes.answers
        return "the prompt set has changed since the baseline was accepted" if changed else ""
    workload = race.partition(" over ")[0].partition("@")[2]
    if then.hashes.workloads.get(workload) != now.hashes.workloads.get(workload):
        return f"the workload {workload} has changed since the baseline was accepted"
    if then.hashes.adapter_shape != now.hashes.adapter_shape:
        return "the adapter has another rank or other targets: a ratio to it is another ratio"
    if then.machine != now.machine:
        names = sorted(then.machine.keys() | now.machine.keys())
        pairs = ((name, then.machine.get(name, "none"), now.machine.get(name, "none")) for name in names)
        told = "; ".join(
            f"{name} {after or 'none'}, was {before or 'none'}" for name, before, after in pairs if before != after
        )
        return f"another class of machine: {told}"
    return ""


def _bounds(value: Interval, places: int = 2) -> str:
    if not (math.isfinite(value.high) and math.isfinite(value.low)):
        return "no interval yet"
    return f"{value.low:.{places}f} to {value.high:.{places}f}"
