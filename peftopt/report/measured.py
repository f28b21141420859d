"""How it was measured: what ran and what failed, on what, and each block's ratios. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from peftopt.records import TWIN, Decision, Json, Measurement
from peftopt.report.table import ratio_name
from peftopt.report.words import MISSING, Table, clean, flat, strings
from peftopt.stats import LOOKS


def effort(decision: Decision, measurements: Sequence[Measurement]) -> Table:
    """How much was measured of each variant."""
    body = []
    for name in [v.name for v in decision.variants]:
        mine = [m for m in measurements if m.variant == name]
        turns = [m for m in mine if m.probe == "speed"]
        counts = (
            len({str(m.values.get("block")) for m in turns}),
            sum(m.probe == "launch" for m in mine),
            sum(1 for turn in turns for _ in _timed(turn)),
            len({str(m.values.get("row")) for m in mine if m.probe == "quality"}),
        )
        body.append([clean(name), *(str(count or MISSING) for count in counts)])
    return ["variant", "blocks", "launches", "timed requests", "answers checked"], body


def facts(decision: Decision, measurements: Sequence[Measurement]) -> list[tuple[str, str]]:
    """How it was measured, in pairs of a label and its text; the machine's own words last."""
    turns = [m for m in measurements if m.probe == "speed"]
    blocks = len({str(m.values.get("block")) for m in turns})
    loads = [x for m in turns if (x := number(_mapping(m.values.get("machine")).get("load"))) is not None]
    launches = [m.values for m in measurements if m.probe == "launch"]
    planned = f"as soon as a look can decide (from {LOOKS[0]} on), {', '.join(map(str, LOOKS[1:]))}"
    clock = "process CPU time judged; wall clock shown beside it" if decision.clock == "cpu" else "wall clock judged"
    found = {
        "judged": f"{decision.minimize}, against {decision.baseline}",
        "clock": f"{clock} ({decision.clock_reason})" if decision.clock_reason else clock,
        "looks": f"planned: {planned} blocks; bets judge after every block" if blocks else "",
        "threads": _distinct(values.get("threads") for values in launches),
        "device": _distinct(values.get("device") for values in launches),
        "load average": f"{statistics.median(loads):.1f} (median), {max(loads):.1f} (highest)" if loads else "",
        **_engines(measurements),
        **{str(key): flat(value) for key, value in decision.machine.items()},
    }
    return [(clean(key), clean(text)) for key, text in found.items() if text]


def _engines(measurements: Sequence[Measurement]) -> dict[str, str]:
    """What each variant's engine said of getting ready, the same sentence of several launches once."""
    said: dict[str, dict[str, None]] = defaultdict(dict)
    for m in measurements:
        if m.probe == "engine":
            said[f"{m.variant}'s engine"] |= dict.fromkeys(strings(m.values.get("log")))
    return {name: "; ".join(lines) for name, lines in said.items()}


def block_ratios(decision: Decision, measurements: Sequence[Measurement], workload: str) -> dict[str, list[float]]:
    """Variant over baseline in each block that has both, from the medians of their timed requests.

    The baseline's own are those of its hidden second copy.
    """
    field = "cpu_ms" if ratio_name(decision, workload).startswith("cpu") else "request_duration_ms"
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        if m.probe == "speed" and m.workload == workload:
            times = [t for r in _timed(m) if (t := number(r.get(field))) is not None and t > 0]
            samples[m.variant][str(m.values.get("block"))].extend(times)
    medians = {v: {b: statistics.median(t) for b, t in blocks.items() if t} for v, blocks in samples.items()}
    base = medians.get(decision.baseline, {})
    sources = {v.name: v.name + TWIN * (v.name == decision.baseline) for v in decision.variants}
    return {
        name: [time / base[block] for block, time in medians.get(source, {}).items() if block in base]
        for name, source in sources.items()
    }


def failures(measurements: Sequence[Measurement]) -> Table:
    """What did not run, and why."""
    said = ["stage", "reason", "detail"]
    found = [[m.variant, *(m.values.get(key) or MISSING for key in said)] for m in measurements if m.probe == "failure"]
    return ["variant", *said], [list(map(clean, row)) for row in found]


def number(value: Json) -> float | None:
    """`value` if it is a finite number: records are read from files that may hold anything."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _timed(turn: Measurement) -> Iterator[Mapping[str, Json]]:
    requests = turn.values.get("requests")
    for request in requests if isinstance(requests, list | tuple) else ():
        if isinstance(request, Mapping) and not request.get("warmup"):
            yield request


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _distinct(values: Iterable[Json]) -> str:
    return ", ".join(sorted({str(value) for value in values if value not in (None, "")}))
