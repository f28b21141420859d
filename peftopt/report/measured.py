"""How a run was measured: what ran, what failed, on which machine, and each block's ratios. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable

from peftopt.decision.evidence import FAILED, Evidence
from peftopt.decision.forecast import times
from peftopt.decision.index import Field
from peftopt.metrics import counted
from peftopt.records import TWIN, Decision, Quality, Workload
from peftopt.report.table import ratio_name
from peftopt.report.words import MISSING, Table, clean, flat, speed
from peftopt.stats import LOOKS


def effort(decision: Decision, evidence: Evidence) -> Table:
    """The number of judged blocks, launches, requests and answers of each variant."""
    body = []
    for name in [v.name for v in decision.variants]:
        counts = (
            evidence.blocks_of(name),
            len(evidence.launches.get(name, ())),
            evidence.requests_of(name),
            len(evidence.rows(name)),
        )
        body.append([clean(name), *(str(count or MISSING) for count in counts)])
    return ["variant", "blocks", "launches", "timed requests", "answers checked"], body


def facts(decision: Decision, evidence: Evidence) -> list[tuple[str, str]]:
    """Facts on the measurements as pairs of label and text; facts on the machine last."""
    moments = itertools.chain.from_iterable(evidence.machine.values())
    loads = [moment.load for moment in moments if moment.load is not None]
    launches = [launch for launches in evidence.launches.values() for launch in launches]
    recipe = evidence.plan.recipe
    planned = f"as soon as a look can decide (from {LOOKS[0]} on), {', '.join(map(str, LOOKS[1:]))}"
    clock = "process CPU time judged; wall clock shown beside it" if decision.clock == "cpu" else "wall clock judged"
    texts = {
        "model": f"{recipe.base} with the adapter {recipe.adapter}",
        **{f"workload {workload.name}": _requests(workload) for workload in recipe.workloads.values()},
        "answers checked": _answers(recipe.quality) if recipe.quality else "",
        "judged": f"{decision.minimize}, against {decision.baseline}",
        "clock": f"{clock} ({decision.clock_reason})" if decision.clock_reason else clock,
        "looks": f"planned: {planned} blocks; bets judge after every block" if evidence.turns else "",
        "threads": _distinct(launch.threads for launch in launches),
        "device": _distinct(launch.device for launch in launches),
        "load average": f"{statistics.median(loads):.1f} (median), {max(loads):.1f} (highest)" if loads else "",
        **_engines(evidence),
        **{str(key): flat(value) for key, value in decision.machine.items()},
    }
    return [(clean(key), clean(text)) for key, text in texts.items() if text]


def _requests(workload: Workload) -> str:
    """The timed requests of a workload: the prompts, and how they are sent."""
    lengths = "at most " if workload.lengths == "natural" else ""
    prompts = f"{workload.prompts}, slice {workload.slice}" if workload.slice else workload.prompts
    sent = f"{workload.batch} at once" if workload.batch > 1 else "one at a time"
    if workload.users:
        sent = counted(workload.users, "user")
    elif workload.rate:
        sent = f"{workload.rate:g} a second"
    return f"{prompts}; {lengths}{counted(workload.new_tokens, 'new token')} each, {sent}"


def _answers(quality: Quality) -> str:
    prompts = f"{quality.prompts}, slice {quality.slice}" if quality.slice else quality.prompts
    return f"{prompts}; at most {counted(quality.new_tokens, 'new token')} each"


def _engines(evidence: Evidence) -> dict[str, str]:
    """What each variant's engine logged at its start. Equal lines of several launches appear once."""
    logs: dict[str, dict[str, None]] = defaultdict(dict)
    for variant, launches in evidence.engines.items():
        for facts in launches:
            logs[f"{variant}'s engine"] |= dict.fromkeys(facts.log)
    return {name: "; ".join(lines) for name, lines in logs.items()}


def block_ratios(decision: Decision, evidence: Evidence, workload: str) -> dict[str, list[float]]:
    """Variant over baseline in each judged block, from the medians of their timed requests: infinite if the variant's
    turn failed, 0 if the baseline's failed.

    The baseline's own ratios are those of its hidden second copy.
    """
    field: Field = "cpu_ms" if ratio_name(decision, workload).startswith("cpu") else "request_duration_ms"
    ratios = {}
    for variant in decision.variants:
        source = variant.name + TWIN if variant.name == decision.baseline else variant.name
        logs = evidence.paired(source, decision.baseline, workload, field)
        ratios[variant.name] = [_ratio(log) for log in logs]
    return ratios


def _ratio(log: float) -> float:
    if abs(log) == FAILED:
        return math.inf if log > 0 else 0.0
    return math.exp(log)


def expected(decision: Decision, evidence: Evidence) -> Table:
    """The forecasts before the run beside the measured values; no rows without forecasts."""
    shown = {variant.name for variant in decision.variants}
    body = []
    for variant, workload, forecast in evidence.forecasts:
        if variant not in shown or not (forecast.kind == "speed" or forecast.warns):
            continue
        seen = None
        if forecast.kind == "speed":
            seen = evidence.ratio(variant, forecast.against, workload, "request_duration_ms", 0.95)
        cells = (workload, variant, forecast.against, times(forecast), speed(seen), forecast.reason)
        body.append([clean(cell or MISSING) for cell in cells])
    return ["workload", "variant", "against", "expected", "measured", "reason"], body


def failures(evidence: Evidence) -> Table:
    """What failed, and why."""
    rows = [(name, failed.stage, failed.reason, failed.detail) for name, failed in evidence.failures.items()]
    body = [[clean(cell or MISSING) for cell in row] for row in rows]
    return ["variant", "stage", "reason", "detail"], body


def _distinct(values: Iterable[str | int | None]) -> str:
    return ", ".join(sorted({str(value) for value in values if value not in (None, "")}))
