"""A run's evidence and decision to the snapshot that a gate keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from peftopt import identity
from peftopt.decision.evidence import ANSWERED_WRONG, Evidence
from peftopt.decision.index import Field
from peftopt.decision.rules.parents import rule_name
from peftopt.decision.rules.table import ANY_CRITICAL, WHOLE
from peftopt.gate.records import Errors, Hashes, Race, RuleFigure, Scores, Snapshot
from peftopt.measurements import Answer
from peftopt.records import NO_INVARIANTS, Decision, Metric, Threshold, VariantDecision, Verdict
from peftopt.report.words import flat

MACHINE = ("cpu", "cores", "gpu")
"""What makes a machine's class, beside the threads that the recipe gives."""


def shipped(decision: Decision) -> str:
    """What a decided run ships: the chosen variant, or the adapter as it is served."""
    return decision.chosen or decision.baseline


def snapshot(evidence: Evidence, decision: Decision, variant: str, hashes: Hashes | None) -> Snapshot | None:
    """What a gate keeps of a variant; None where the run has none of that name."""
    decided = next((each for each in decision.variants if each.name == variant), None)
    if decided is None:
        return None
    recipe = evidence.plan.recipe
    chain = recipe.variants[variant]
    races: dict[str, Race] = {}
    rules = {verdict.rule: _rule(evidence, variant, verdict, races) for verdict in decided.verdicts}
    versions = decision.machine.get("versions")
    return Snapshot(
        recipe=decision.recipe,
        variant=variant,
        serves_adapter=variant == decision.baseline,
        outcome=decided.outcome,
        decided_by=_beside_the_rules(decided),
        chosen=decision.chosen or "",
        chain=tuple(f"{rule_name(step)} {flat(step.params)}".strip() for step in chain.techniques),
        rules=rules,
        races=races,
        scores=_scores(evidence, variant),
        errors=_errors(evidence, variant),
        hashes=hashes,
        machine=_machine(decision.machine, recipe.measure.threads),
        versions={str(name): str(each) for name, each in versions.items()} if isinstance(versions, Mapping) else {},
    )


def _beside_the_rules(decided: VariantDecision) -> str:
    """What decided the variant where none of its rules did, such as a failed A/A arm; else ""."""
    known = {verdict.rule for verdict in decided.verdicts}
    return "" if decided.decided_by in known else decided.decided_by


def _machine(described: Mapping[str, object], threads: int) -> dict[str, str]:
    found = {name: flat(described[name]) for name in MACHINE if name in described}
    return found | {"threads": str(threads or found.get("cores", ""))} if found else {}


# ---- rules and speed -----------------------------------------------------------------------------


def _rule(evidence: Evidence, variant: str, verdict: Verdict, races: dict[str, Race]) -> RuleFigure:
    """The rule's figure; its race is put among `races`, once for all rules that rest on it."""
    metric = _raced(evidence, verdict)
    name = ""
    if metric is not None:
        against = verdict.against or evidence.baseline
        name = f"{metric} over {against}"
        if name not in races:
            races[name] = _race(evidence, variant, against, metric, bool(verdict.rule.startswith("require: ")))
        if not races[name].launches:
            races.pop(name)
            name = ""
    return RuleFigure(verdict.outcome, verdict.value, verdict.unit, verdict.limit, verdict.against, name)


def _raced(evidence: Evidence, verdict: Verdict) -> Metric | None:
    """The timed metric that the rule is about, where blocks can pair it; None for a tail, and for any other rule."""
    recipe = evidence.plan.recipe
    required = _required(recipe.require, verdict.rule)
    if required is not None:
        metric = required.metric
        tail = not metric.name.endswith(".p50") and metric.name != "throughput"
        return None if tail or not metric.workload else metric
    return Metric(recipe.minimize.name, verdict.workload) if verdict.workload else None


def _required(thresholds: Sequence[Threshold], rule: str) -> Threshold | None:
    return next((each for each in thresholds if rule == f"require: {each.text}"), None)


def _race(evidence: Evidence, variant: str, against: str, metric: Metric, required: bool) -> Race:
    """Requirements are about what users wait for, so the wall clock; a race of the table has the clock that judged."""
    field: Field = evidence.wall_field(metric) if required else evidence.field(metric)
    series = {} if variant == against else evidence.series(variant, against, metric.workload, field)
    launches = evidence.launches_of(variant, against, metric.workload, series) or list(range(len(series)))
    pairs = zip(launches, series.values(), strict=True)
    groups = (tuple(ratio for _, ratio in group) for _, group in groupby(pairs, key=lambda pair: pair[0]))
    return Race("wall" if required else evidence.clock[0], tuple(groups))


# ---- answers -------------------------------------------------------------------------------------


def _scores(evidence: Evidence, variant: str) -> dict[str, Scores]:
    """Each answer's score, where there is something that it could miss."""
    quality = evidence.plan.recipe.quality
    answers = evidence.rows(variant)
    found: dict[str, Scores] = {}
    if any(answer.expected for answer in answers.values()):
        found["accuracy"] = scores({row: float(answer.correct) for row, answer in answers.items()})
    if answers and quality and (quality.schema or quality.invariants != NO_INVARIANTS):
        found["validity"] = scores({row: float(answer.valid) for row, answer in answers.items()})
    for task, by_row in sorted(evidence.tasks[variant].items()):
        if by_row:
            found[task] = scores(by_row)
    return found


def scores(by_row: Mapping[str, float]) -> Scores:
    """Scores by row, as they are kept."""
    below = {row: score for row, score in sorted(by_row.items()) if score < 1}
    return Scores(len(by_row), rows_hash(by_row), below)


def rows_hash(rows: Mapping[str, object]) -> str:
    """Names a set of rows by their ids."""
    return identity.of_value(sorted(rows))


def _errors(evidence: Evidence, variant: str) -> Errors | None:
    answers = evidence.rows(variant)
    if not answers:
        return None
    again = [evidence.rows(evidence.baseline, launch) for launch in (1, 2)]
    always, sometimes = {}, {}
    for row, answer in sorted(answers.items()):
        runs = [_shown(answer), *(_shown(run[row]) for run in again if row in run)]
        steady = set(runs[0]).intersection(*runs[1:])
        always[row] = tuple(sorted(steady))
        sometimes[row] = tuple(sorted(set().union(*runs) - steady))
    rules = evidence.plan.recipe.rules
    limit = next((rule.limit for rule in rules if rule.technique == WHOLE), None) or ANY_CRITICAL.limit
    assert limit is not None
    return Errors(len(answers), rows_hash(answers), limit, _some(always), _some(sometimes))


def _shown(answer: Answer) -> set[str]:
    """The critical errors of one answer by itself."""
    wrong = {ANSWERED_WRONG} if answer.critical and answer.expected and not answer.correct else set()
    return {*answer.flags, *wrong}


def _some(by_row: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {row: shown for row, shown in by_row.items() if shown}
