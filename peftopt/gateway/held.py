"""The load under which the service level held: from a search by `load --find-rate`, or from a run's own load. Pure.

A search gives the highest rate. A run's load that met every limit gives a lower bound: a higher rate may hold too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from peftopt import stats
from peftopt.decision.evidence import FIELDS
from peftopt.decision.index import Index, times
from peftopt.gateway.limits import Held
from peftopt.loadtest import summary
from peftopt.measurements import Account, Load, Measured, Request, Sent
from peftopt.records import Decision, Plan, Threshold

WAITED = ("ttft", "latency")
"""Times that a wait before the engine adds to."""


def of_run(plan: Plan, decision: Decision, measured: Sequence[Measured], variant: str, source: str) -> Held | None:
    """From a search that was added to a run, else from the run's own load."""
    return searched(measured, source, variant) or raced(plan, decision, measured, variant, source)


def searched(measured: Iterable[Measured], source: str, variant: str = "") -> Held | None:
    """From the last search that found a rate, of one variant or of any ("")."""
    found = None
    for each in measured:
        if isinstance(each.values, Load) and variant in ("", each.variant):
            found = _of_search(each.values, source) or found
    return found


def _of_search(load: Load, source: str) -> Held | None:
    timed = [request for request in load.requests if not (request.warmup or request.error)]
    levels = [level for text in load.slo if (level := summary.slo(text)).metric in WAITED]
    durations = times(timed, "request_duration_ms")
    if not (load.highest_rate and levels and durations):
        return None
    worked_s = _worked_s(durations, [load.engine])
    held = Held(load.highest_rate, worked_s, "", 0.0, 0.0, source, prefill=_prefill(_beside(timed, 0)))
    free = _beside(timed, held.limits().running - 1)
    found = []
    for level in levels:
        needed = stats.quantile(times(free, FIELDS[level.metric]), summary.ATTAINED)
        found.append(
            replace(held, level=level.text, limit_s=level.limit_ms / 1e3, needs_s=needed.estimate / 1e3)
            if needed.n
            else None
        )
    return _tightest(each for each in found if each)


def _worked_s(durations_ms: Sequence[float], accounts: Iterable[Account]) -> float:
    """The mean time that the engine worked on a request: without what it lay in the engine's queue, where that tells.
    Who waits there is let in too early: here, adapters would wait in turns."""
    queued = [account.queue_ms for account in accounts if account.queue_ms is not None]
    queued_ms = sum(queued) / len(queued) if queued else 0.0
    whole_ms = sum(durations_ms) / len(durations_ms)
    return max(0.0, whole_ms - queued_ms) / 1e3


def _beside(requests: Sequence[Sent], most: int) -> list[Sent]:
    """Those that met no more than so many others at the server: `most` places are taken, and one is free."""
    return [one for one in requests if sum(o.scheduled < one.scheduled < o.done for o in requests) <= most]


def _prefill(alone: Sequence[Request]) -> float:
    """Tokens of prompts per second, of requests that were alone; 0 where it is not known."""
    speeds = [1e3 * r.prompt_tokens / r.ttft_ms for r in alone if r.prompt_tokens and r.ttft_ms]
    return stats.median(speeds) if speeds else 0.0


def raced(plan: Plan, decision: Decision, measured: Sequence[Measured], variant: str, source: str) -> Held | None:
    """From the run's load with the highest rate that met every limit on its times."""
    index = Index(plan, measured)
    loads = (_of_workload(index, decision, variant, name, source) for name in plan.recipe.workloads)
    return max((held for held in loads if held), key=lambda held: held.rate, default=None)


def _of_workload(index: Index, decision: Decision, variant: str, workload: str, source: str) -> Held | None:
    """None where the workload is no load, has no limit that a wait adds to, or broke one, or may have."""
    turns = list(index.turns.get((variant, workload), {}).values())
    limits = list(_limits(index.plan, workload))
    if not (index.plan.recipe.workloads[workload].loaded and turns and limits):
        return None
    judged = next((each for each in decision.variants if each.name == variant), None)
    accepted = {v.rule for v in judged.verdicts if v.outcome == "accepted"} if judged else set()
    if judged is None or any(f"require: {limit.text}" not in accepted for limit in limits):
        return None
    rates = [1e3 * len(turn) / turn[0].turn_ms for turn in turns if turn[0].turn_ms]
    durations = times((request for turn in turns for request in turn), "request_duration_ms")
    if not (rates and durations):
        return None
    prefill = _prefill([request for name in index.plan.recipe.workloads for request in _alone(index, variant, name)])
    known = f"{source}, its load {workload}"
    worked_s = _worked_s(durations, index.accounts.get((variant, workload), ()))
    held = Held(stats.median(rates), worked_s, "", 0.0, 0.0, known, prefill)
    return _tightest(
        replace(held, level=limit.text, limit_s=limit.limit / 1e3, needs_s=figure.estimate / 1e3)
        for limit in limits
        if (figure := judged.figures.get(str(limit.metric)))
    )


def _alone(index: Index, variant: str, workload: str) -> list[Request]:
    """Requests of a workload in which one prompt is asked at a time."""
    asked = index.plan.recipe.workloads[workload]
    if asked.loaded or asked.batch > 1:
        return []
    return [request for turn in index.turns.get((variant, workload), {}).values() for request in turn]


def _limits(plan: Plan, workload: str) -> Iterator[Threshold]:
    """The recipe's own limits on times of a workload that a wait adds to."""
    for threshold in plan.recipe.require:
        family = threshold.metric.name.partition(".")[0]
        above = threshold.relative or threshold.op not in ("<=", "<")
        if family in WAITED and threshold.metric.workload == workload and not above:
            yield threshold


def _tightest(found: Iterable[Held]) -> Held | None:
    """The one that leaves the least time to wait."""
    return min(found, key=lambda held: held.limit_s - held.needs_s, default=None)
