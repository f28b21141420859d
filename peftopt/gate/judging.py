"""A baseline and this run's snapshot to the answer of a gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftopt.gate.comparing import cases
from peftopt.gate.records import Baseline, Case, Gate, Hashes, Snapshot
from peftopt.metrics import counted
from peftopt.records import Outcome

BASELINE = "baseline"
"""The case that asks whether there is a baseline that this run can be compared with."""

NAMED = 5
"""Cases that the sentence names."""

UPDATE = "run it with --update on what you accept, and commit the file"


def unable(recipe: str, reason: str) -> Gate:
    """The answer where there is nothing to compare with: undecided, never a pass."""
    case = Case(BASELINE, "inconclusive", reason)
    return Gate(recipe, "inconclusive", f"Undecided: {reason}.", (case,))


def unusable(age_days: float, most_days: float) -> str:
    """Why a baseline cannot be compared with, whatever the run shows; "" where it can."""
    if age_days > most_days:
        age, most = counted(int(age_days), "day"), counted(int(most_days), "day")
        return f"the baseline is {age} old, {most} at most are allowed: {UPDATE}"
    return ""


def judge(baseline: Baseline, now: Snapshot | None, recipe: str) -> Gate:
    """Whether a run is worse than what was accepted. `now` is the variant that the baseline ships, as this run has it;
    None where it has no such variant."""
    then = baseline.accepted
    if now is None:
        return unable(recipe, f"the baseline ships {then.variant}, which this run has not")
    found = [*_verdict(now), *cases(baseline, now)]
    outcome = _outcome(now, found)
    head = Case(BASELINE, "accepted", f"{then.variant}, accepted on {baseline.written}")
    return Gate(recipe, outcome, _sentence(outcome, now, found), (head, *found), tuple(_notes(then, now)))


def _verdict(now: Snapshot) -> Iterator[Case]:
    """What decided the variant beside its rules, such as an A/A arm that failed."""
    if now.decided_by and now.outcome != "accepted" and not now.serves_adapter:
        yield Case(now.decided_by, now.outcome, f"the variant is {now.outcome} by it: see the run's warnings")


def _outcome(now: Snapshot, found: Sequence[Case]) -> Outcome:
    """As good as the worst case. A gate that compared nothing has nothing to say."""
    outcomes = {case.outcome for case in found}
    if "rejected" in outcomes:
        return "rejected"
    if now.outcome == "not judged" and not now.serves_adapter:
        return "not judged"
    compared = any(case.outcome == "accepted" and case.limit is not None for case in found)
    return "inconclusive" if "inconclusive" in outcomes or not compared else "accepted"


def _sentence(outcome: Outcome, now: Snapshot, found: Sequence[Case]) -> str:
    if outcome == "accepted":
        compared = sum(case.limit is not None for case in found)
        return f"{now.variant} is not worse than what was accepted, in {counted(compared, 'comparison')}."
    if outcome == "not judged":
        return f"Nothing of {now.variant} was measured."
    why = [case for case in found if case.outcome == outcome]
    if not why:
        return "Undecided: nothing was compared."
    start = f"{now.variant} is worse than what was accepted" if outcome == "rejected" else "Undecided"
    if len(why) == 1:
        return f"{start}: {why[0].name}, {why[0].reason}."
    rest = f" and {len(why) - NAMED} more" if len(why) > NAMED else ""
    return f"{start}: {', '.join(case.name for case in why[:NAMED])}{rest}."


# ---- what else a reviewer should know ------------------------------------------------------------


def _notes(then: Snapshot, now: Snapshot) -> Iterator[str]:
    if then.hashes and now.hashes:
        yield from _contents(then.hashes, now.hashes)
    yield from _versions(then, now)
    if then.chain != now.chain:
        yield f"{now.variant} is made in another way: {' → '.join(now.chain)}, was {' → '.join(then.chain)}"
    if now.chosen != now.variant and not now.serves_adapter:
        yield f"this run by itself would ship {now.chosen or 'the adapter as it is served'}"
    if now.serves_adapter and now.chosen:
        yield f"this run would now ship {now.chosen}: update the baseline to gate on it"
    limits = ((name, then.rules[name].limit, now.rules[name].limit) for name in then.rules.keys() & now.rules.keys())
    for name, before, after in sorted(limits):
        if before != after:
            yield f"the limit of {name} has changed: {_limit(before)} -> {_limit(after)}"


def _contents(then: Hashes, now: Hashes) -> Iterator[str]:
    shared = sorted(then.folders.keys() & now.folders.keys())
    named = [(f"folder {name}", then.folders[name], now.folders[name]) for name in shared]
    for what, before, after in (("adapter", then.adapter, now.adapter), ("base", then.base, now.base), *named):
        if before != after:
            yield f"the {what} is another: {before[:12]} -> {after[:12]}"
    if then.answers != now.answers:
        yield f"the prompt set has changed: {then.answers[:12] or 'none'} -> {now.answers[:12] or 'none'}"


def _versions(then: Snapshot, now: Snapshot) -> Iterator[str]:
    names = sorted(then.versions.keys() | now.versions.keys())
    pairs = ((name, then.versions.get(name, "none"), now.versions.get(name, "none")) for name in names)
    changed = [f"{name} {before} -> {after}" for name, before, after in pairs if before != after]
    if changed:
        yield f"other versions: {', '.join(changed)}"


def _limit(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"


def changes(before: Baseline | None, after: Baseline) -> list[str]:
    """What an update changes in the file, a line each; for people who review it."""
    if before is None:
        return [f"new: it ships {after.accepted.variant}"]
    then, now = before.accepted, after.accepted
    lines = []
    if then.variant != now.variant:
        lines.append(f"it ships {now.variant}, was {then.variant}")
    lines += _notes(then, now)
    if then.machine != now.machine:
        lines.append("measured on another class of machine")
    for name in sorted(then.rules.keys() | now.rules.keys()):
        old, new = then.rules.get(name), now.rules.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'new' if old is None else 'gone'}")
        elif old.value and new.value and old.value.estimate != new.value.estimate:
            lines.append(f"{name}: {old.value.estimate:.3g} -> {new.value.estimate:.3g} {new.unit}")
    for metric in sorted(then.scores.keys() & now.scores.keys()):
        lost = now.scores[metric].below.keys() - then.scores[metric].below.keys()
        won = then.scores[metric].below.keys() - now.scores[metric].below.keys()
        if lost or won:
            lines.append(f"{metric}: {len(lost)} answers worse, {len(won)} better")
    return lines or ["nothing but its day"]
