"""The tables of a decision: its variants' values, their rules, and the reader's warnings. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftopt.metrics import REPORTED, TASK, format_value, percent_of_level
from peftopt.records import Decision, Interval, VariantDecision, Verdict
from peftopt.report import columns, words
from peftopt.report.columns import Column, Sheet
from peftopt.report.words import MISSING, Table, clean, clip
from peftopt.stats import fewest_for

WIDTH = 120
"""The width of the compact table, in characters."""

FIRST = ("memory", "gpu_memory_allocated", "size", "load_time", "accuracy")
"""Metrics of the whole variant in the first table."""

MOST_COLUMNS = 12
"""Columns that fit a page of 1280 pixels."""

MOST_FURTHER = 9
"""Columns beside the variants' names that fit such a page in a table of long titles."""


# ---- a row per variant -------------------------------------------------------------------------


def rows(decision: Decision, compact: bool = False) -> Table:
    """One row per variant. Columns that no variant fills are left out.

    The full table's verdict comes first; `compact` fits a terminal.
    """
    if not compact:
        return first(decision).table
    header, body = columns.sheet(decision, columns.filled(decision, _compact(decision))).table
    return header, _fit(header, body)


def first(decision: Decision) -> Sheet:
    """The table of variants: the columns that matter most, as many as a page is wide."""
    return columns.sheet(decision, _shown(decision)[0])


def more(decision: Decision) -> dict[str, Sheet]:
    """Further tables for experts: columns that no rule needs, and columns that the first table has no room for. By
    topic; a topic is split over several tables if a page is too narrow."""
    variant = Column("variant", lambda v: _name(decision, v))
    further = {"": _shown(decision)[1], **_further(decision)}
    sheets = {}
    for about, each in further.items():
        for part, some in enumerate(_evenly(columns.filled(decision, each), MOST_FURTHER), 1):
            name = about or "Also"
            title = name if part == 1 else f"{name}, part {part}"
            sheets[title] = columns.sheet(decision, [variant, *some])
    return sheets


def _evenly(every: Sequence[Column], most: int) -> list[Sequence[Column]]:
    """Split into the fewest parts of at most `most` columns, of nearly equal length, so that no part has one column."""
    length = math.ceil(len(every) / math.ceil(len(every) / most)) if every else 1
    return [every[start : start + length] for start in range(0, len(every), length)]


def metrics(decision: Decision) -> list[str]:
    """The metrics with a column in the tables."""
    return [name for sheet in (first(decision), *more(decision).values()) for name in sheet.metrics]


def _shown(decision: Decision) -> tuple[list[Column], list[Column]]:
    """The filled columns of the full table: those that fit a page, and the others."""
    filled = columns.filled(decision, _full(decision))
    by_rank = sorted(range(len(filled)), key=lambda n: filled[n].rank)
    kept = set(by_rank[:MOST_COLUMNS])
    return [c for n, c in enumerate(filled) if n in kept], [c for n, c in enumerate(filled) if n not in kept]


def _full(decision: Decision) -> list[Column]:
    main, *others = workloads(decision) or [""]
    batch = busiest(decision)
    return [
        Column("variant", lambda v: _name(decision, v)),
        Column("verdict", lambda v: f"{v.outcome} ({v.decided_by})" if v.decided_by else v.outcome),
        Column(
            f"speed@{main} vs {decision.baseline}{_judged_at(decision)}",
            lambda v: words.speed(speed_of(decision, v, main)),
            ratio_name(decision, main),
            ratio_name(decision, main).partition("@")[0],
        ),
        *(columns.speed(ratio_name(decision, w), f"speed@{w}", columns.OTHER_SPEEDS) for w in others),
        *columns.of_metrics([main], "latency.p50", "latency.p95"),
        *columns.of_metrics([batch], "throughput"),
        *columns.of_metrics([""], *FIRST),
        *columns.of_metrics([""], *_tasks(decision), "validity", "perplexity", "critical_errors"),
    ]


def _tasks(decision: Decision) -> list[str]:
    """The tasks with a result of any variant, by their metric names."""
    return sorted({name for v in decision.variants for name in v.figures if name.startswith(TASK)})


def _further(decision: Decision) -> dict[str, list[Column]]:
    everywhere = workloads(decision)
    main = everywhere[:1] or [""]
    return {
        "Times": [
            *columns.of_metrics(main, "ttft.p50", "ttft.p95", "latency.p99", "tpot.p50", "bandwidth"),
            *columns.of_metrics(main, "cpu.ratio"),
            *columns.of_metrics(everywhere, "warm_up"),
        ],
        "Answers": [
            *columns.of_metrics([""], "greedy_match", "top1", "top1.min", "kl", "kl.p95", "kl.max", "kl.token"),
            *columns.of_metrics([""], "delta_survival", "length"),
            *columns.of_metrics(everywhere, "length.ratio"),
            *columns.of_metrics([""], "flips"),
        ],
        "Engine": [
            *columns.of_metrics(everywhere, "reused", "acceptance_length", *_read(per_workload=True)),
            *columns.of_metrics([""], "virtual_tokens", "prompt_kv"),
            *columns.of_metrics([""], *_read(per_workload=False), "break_even"),
        ],
    }


def _read(per_workload: bool) -> list[str]:
    """The metrics from probes' records that the first table does not show."""
    return [
        name
        for name, spec in REPORTED.items()
        if spec.reads and spec.per_workload == per_workload and name not in FIRST
    ]


def _compact(decision: Decision) -> list[Column]:
    main = (workloads(decision) or [""])[0]
    quality = "accuracy" if any("accuracy" in v.figures for v in decision.variants) else "perplexity"
    return [
        Column("variant", lambda v: f"{clip(v.name, 20)} *" if v.name == decision.baseline else clip(v.name, 20)),
        Column(clip(f"speed@{main}", 20), lambda v: words.speed(speed_of(decision, v, main), compact=True)),
        Column("P50", lambda v: words.estimate("latency.p50", v.figures.get(f"latency.p50@{main}"))),
        Column("memory", lambda v: words.estimate("memory", v.figures.get("memory"))),
        Column("size", lambda v: words.estimate("size", v.figures.get("size"))),
        Column(quality, lambda v: words.estimate(quality, v.figures.get(quality))),
        Column("critical", lambda v: words.count(v.figures.get("critical_errors"))),
        Column("verdict", lambda v: v.outcome),
        Column("decided by", lambda v: v.decided_by or MISSING),
    ]


def _fit(header: Sequence[str], body: list[list[str]], gap: int = 2) -> list[list[str]]:
    """The same rows, with the last column clipped to the remaining width."""
    taken = sum(max(len(row[n]) for row in [header, *body]) + gap for n in range(len(header) - 1))
    return [[*row[:-1], clip(row[-1], max(WIDTH - taken, 8))] for row in body]


def _name(decision: Decision, variant: VariantDecision) -> str:
    roles = [("baseline", decision.baseline), ("chosen", decision.chosen)]
    mine = ", ".join(role for role, name in roles if name == variant.name)
    return f"{variant.name} ({mine})" if mine else variant.name


# ---- by workload -------------------------------------------------------------------------------


def by_workload(decision: Decision) -> Table:
    """Speed, times and throughput of every variant under every workload; no rows if there is only one workload."""
    metrics = ("ttft.p50", "tpot.p50", "latency.p50", "latency.p95", "throughput")
    header = ["workload", "variant", "speed", *(columns.title(m) for m in metrics)]
    names = workloads(decision)
    body = [
        [
            clean(workload),
            clean(_name(decision, variant)),
            words.speed(speed_of(decision, variant, workload)),
            *(words.figure(f"{m}@{workload}", variant.figures.get(f"{m}@{workload}")) for m in metrics),
        ]
        for workload in names
        for variant in decision.variants
    ]
    measured = [row for row in body if any(words.measured(cell) for cell in row[2:])]
    return words.filled((header, measured if len(names) > 1 else []))


def workloads(decision: Decision) -> list[str]:
    """Every workload with a value, the minimized one first."""
    named = {name.partition("@")[2] for v in decision.variants for name in v.figures if "@" in name}
    main = decision.minimize.partition("@")[2]
    return [w for w in [main] if w] + sorted(named - {main})


def busiest(decision: Decision) -> str:
    """The workload with the highest throughput: the batch one."""
    throughputs = [
        (value.estimate, name.partition("@")[2])
        for v in decision.variants
        for name, value in v.figures.items()
        if name.startswith("throughput@") and math.isfinite(value.estimate)
    ]
    return max(throughputs)[1] if throughputs else ""


def speed_of(decision: Decision, variant: VariantDecision, workload: str) -> Interval | None:
    """The ratio of times to the baseline's. On the minimized workload, it has the interval that is judged, on others a
    95 % interval."""
    judged = variant.speed if workload == decision.minimize.partition("@")[2] else None
    return judged or variant.figures.get(ratio_name(decision, workload))


def _judged_at(decision: Decision) -> str:
    """The level of the judged intervals, or the range of levels: ", at 99.2 %"; "" without a judged interval."""
    levels = [v.speed.level for v in decision.variants if v.speed and v.name != decision.baseline]
    if not levels:
        return ""
    low, high = percent_of_level(min(levels)), percent_of_level(max(levels))
    return f", at {high}" if low == high else f", at {low} to {high}"


def ratio_name(decision: Decision, workload: str) -> str:
    """The name of the ratio on the judging clock; on the wall clock if CPU time was not measured."""
    cpu = f"cpu.ratio@{workload}"
    judged = decision.clock == "cpu" and any(cpu in v.figures for v in decision.variants)
    return cpu if judged else f"latency.ratio@{workload}"


# ---- rules -------------------------------------------------------------------------------------

RULE_HEADER = ["rule", "outcome", "measured", "limit", "n", "against", "clock", "reason", "protects against"]


def rule_rows(variant: VariantDecision) -> Table:
    """The variant's verdicts, without empty columns."""
    body = [list(map(clean, _rule_row(verdict))) for verdict in variant.verdicts]
    return words.filled((RULE_HEADER, body), says=lambda cell: cell != MISSING)


def _rule_row(verdict: Verdict) -> list[str]:
    value = verdict.value
    return [
        verdict.rule,
        verdict.outcome,
        words.figure(words.metric_of(verdict), value),
        MISSING if verdict.limit is None else format_value(words.metric_of(verdict), verdict.limit),
        MISSING if value is None else str(value.n),
        verdict.against or MISSING,
        verdict.clock or MISSING,
        words.reason(verdict),
        verdict.protects or MISSING,
    ]


# ---- what the reader must be told --------------------------------------------------------------


def warnings(decision: Decision) -> list[str]:
    """The decision's warnings: risks to know before acting on it."""
    return [clean(line) for line in decision.warnings]


def notes(decision: Decision) -> list[str]:
    """Notes of the decision and the variants, less important than warnings, and P95 values with too few requests."""
    tails = [
        f"{v.name}@{name.partition('@')[2]}"
        for v in decision.variants
        for name, value in v.figures.items()
        if name.startswith("latency.p95@") and not words.bounded(value)
    ]
    lines = [*decision.notes, *(f"{v.name}: {note}" for v in decision.variants for note in v.notes)]
    if tails:
        lines.append(f"{words.TOO_FEW} for P95 ({fewest_for(0.95)} needed): {', '.join(tails)}")
    return [clean(line) for line in lines]
