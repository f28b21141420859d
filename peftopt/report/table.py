"""The tables of a decision: its variants' figures, their rules, and what the reader must be told. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from peftopt.metrics import REPORTED, TASK, counted, described, format_value
from peftopt.records import Decision, Interval, VariantDecision, Verdict
from peftopt.report import words
from peftopt.report.words import MISSING, Table, clean, clip
from peftopt.stats import fewest_for

WIDTH = 120
"""Characters the compact table fits in."""
HOW_TO_READ = (
    "0.81x (0.78–0.84) is a ratio to the baseline and its 95 % interval, the range of true ratios that the data "
    "allow. Below 1 is faster; an interval that holds 1 shows no difference. A raced rule has a wider interval, "
    "since it is looked at more than once; memory and load time show the range of their launches.",
    "Ratios are paired: every variant ran once in each block, in random order, so what the machine did to one it "
    "did to all. The baseline's own row is a second copy against itself: the noise that a gain has to exceed.",
    "Inconclusive means that the interval still holds the limit. It is not a pass: measure more.",
    "Critical errors carry their n: 0 of 320 shows a rate below 0.93 %, no less; “below 1 %” takes 299 prompts.",
)

FIRST = ("memory", "gpu_memory_allocated", "size", "load_time", "accuracy")
"""Metrics of the whole variant in the first table."""

Column = tuple[str, Callable[[VariantDecision], str]]


def rows(decision: Decision, compact: bool = False) -> Table:
    """One row per variant. Columns that no variant fills are left out.

    The full table is wider than a page, so its verdict comes first; `compact` fits a terminal.
    """
    if not compact:
        return _filled(decision, _full(decision))
    header, body = _filled(decision, _compact(decision))
    return header, _fit(header, body)


def by_workload(decision: Decision) -> Table:
    """Times and throughput of every variant under every workload; no rows where there is one workload."""
    metrics = ("ttft.p50", "tpot.p50", "latency.p50", "latency.p95", "throughput")
    header = ["workload", "variant", *(_title(m) for m in metrics)]
    names = workloads(decision)
    rows = [
        [clean(w), clean(_name(decision, v)), *(words.figure(f"{m}@{w}", v.figures.get(f"{m}@{w}")) for m in metrics)]
        for w in names
        for v in decision.variants
    ]
    return header, [row for row in rows if set(row[2:]) != {MISSING}] if len(names) > 1 else []


def further(decision: Decision) -> Table:
    """What no rule asks for but an expert looks at; no rows when none of it was measured."""
    everywhere = workloads(decision)
    main = everywhere[:1] or [""]
    columns: list[Column] = [("variant", lambda v: _name(decision, v))]
    columns += _columns(main, "ttft.p50", "ttft.p95", "latency.p99", "tpot.p50", "bandwidth")
    columns += _columns(everywhere, *_read(per_workload=True))
    columns += _columns(main, "cpu.ratio")
    columns += _columns([""], "greedy_match", "top1", "top1.min", "kl", "kl.p95", "kl.max", "kl.token")
    columns += _columns([""], "delta_survival", "length")
    columns += _columns(everywhere, "length.ratio")
    columns += _columns([""], "flips")
    columns += _columns(everywhere, "warm_up")
    columns += _columns([""], "virtual_tokens", "prompt_kv")
    columns += _columns([""], *_read(per_workload=False), "break_even")
    header, body = _filled(decision, columns)
    return header, body if len(header) > 1 else []


def _read(per_workload: bool) -> list[str]:
    """The metrics that are read off probes' records and that no column of the first table shows."""
    return [
        name
        for name, spec in REPORTED.items()
        if spec.reads and spec.per_workload == per_workload and name not in FIRST
    ]


def _title(name: str) -> str:
    """The heading of a metric's column: "P50@chat"."""
    spec = described(name)
    _, at, workload = name.partition("@")
    return f"{spec.title if spec else name}{at}{workload}"


def _columns(workloads: Sequence[str], *names: str) -> list[Column]:
    """A column for each metric and workload; [""] for metrics of the whole variant."""
    return [_column(f"{name}@{workload}" if workload else name) for name in names for workload in workloads]


def _column(name: str) -> Column:
    """A metric's column, under its title, each value written as its kind is."""
    metric, _, workload = name.partition("@")
    spec = described(metric)
    if metric == "flips":
        return _title(name), _flipped
    if metric == "warm_up":
        return _title(name), _warm_up_column(workload)
    if metric == "cpu.ratio":
        return _title(name), lambda v: words.speed(v.figures.get(name))
    if spec and spec.unit == "count":
        return _title(name), _count_column(name)
    if spec and spec.unit == "requests":
        return _title(name), _mean_column(name)
    return _title(name), _figure_column(name)


def _filled(decision: Decision, columns: Sequence[Column]) -> Table:
    """A row per variant, without the columns that no variant fills. What only too few requests fill is not filled:
    the warnings say it once, of all variants."""
    cells = [[cell(variant) for _, cell in columns] for variant in decision.variants]
    always = ("variant", "verdict", "decided by")
    kept = [n for n, (name, _) in enumerate(columns) if name in always or any(_told(row[n]) for row in cells)]
    header = [clean(columns[n][0]) for n in kept]
    body = [[clean(row[n]) for n in kept] for row in cells]
    return header, body


def _told(cell: str) -> bool:
    return cell != MISSING and not cell.startswith(words.TOO_FEW)


def _full(decision: Decision) -> list[Column]:
    main, *others = workloads(decision) or [""]
    batch = _busiest(decision)
    return [
        ("variant", lambda v: _name(decision, v)),
        ("verdict", lambda v: f"{v.outcome} ({v.decided_by})" if v.decided_by else v.outcome),
        (f"speed@{main} vs {decision.baseline}", lambda v: words.speed(_ratio(decision, v, main))),
        *((f"speed@{w}", _speed_column(decision, w)) for w in others),
        *_columns([main], "latency.p50", "latency.p95"),
        *_columns([batch], "throughput"),
        *_columns([""], *FIRST),
        *_columns([""], *_tasks(decision), "validity", "perplexity", "critical_errors"),
    ]


def _tasks(decision: Decision) -> list[str]:
    """The tasks that any variant was asked, by their metric names."""
    return sorted({name for v in decision.variants for name in v.figures if name.startswith(TASK)})


def _compact(decision: Decision) -> list[Column]:
    main = (workloads(decision) or [""])[0]
    quality = "accuracy" if any("accuracy" in v.figures for v in decision.variants) else "perplexity"
    return [
        ("variant", lambda v: f"{clip(v.name, 20)} *" if v.name == decision.baseline else clip(v.name, 20)),
        (clip(f"speed@{main}", 20), lambda v: words.speed(_ratio(decision, v, main), compact=True)),
        ("P50", lambda v: words.estimate("latency.p50", v.figures.get(f"latency.p50@{main}"))),
        ("memory", lambda v: words.estimate("memory", v.figures.get("memory"))),
        ("size", lambda v: words.estimate("size", v.figures.get("size"))),
        (quality, lambda v: words.estimate(quality, v.figures.get(quality))),
        ("critical", lambda v: words.count(v.figures.get("critical_errors"))),
        ("verdict", lambda v: v.outcome),
        ("decided by", lambda v: v.decided_by or MISSING),
    ]


def _fit(header: Sequence[str], body: list[list[str]], gap: int = 2) -> list[list[str]]:
    """The same rows, the last column clipped to what the terminal has left for it."""
    taken = sum(max(len(row[n]) for row in [header, *body]) + gap for n in range(len(header) - 1))
    return [[*row[:-1], clip(row[-1], max(WIDTH - taken, 8))] for row in body]


def _figure_column(name: str) -> Callable[[VariantDecision], str]:
    return lambda v: words.figure(name, v.figures.get(name))


def _count_column(name: str) -> Callable[[VariantDecision], str]:
    """A count: the most of any launch, or of a break-even the estimate and its range."""

    def cell(variant: VariantDecision) -> str:
        value = variant.figures.get(name)
        if value is None or math.isnan(value.estimate):
            return MISSING
        if name != "break_even":
            return f"{value.high:.0f}"
        worst = f"{value.high:,.0f}" if math.isfinite(value.high) else "never"
        return f"{value.estimate:,.0f} ({value.low:,.0f} to {worst})"

    return cell


def _mean_column(name: str) -> Callable[[VariantDecision], str]:
    def cell(variant: VariantDecision) -> str:
        value = variant.figures.get(name)
        return MISSING if value is None else f"{value.estimate:.1f} ({value.low:.1f}–{value.high:.1f})"

    return cell


def _flipped(variant: VariantDecision) -> str:
    worse = variant.figures.get("flips_worse")
    better = variant.figures.get("flips_better")
    if worse is None or better is None or not math.isfinite(worse.estimate + better.estimate):
        return MISSING
    text = f"{worse.estimate:.0f} worse, {better.estimate:.0f} better"
    p = variant.figures.get("flips_p")
    return f"{text}, p = {p.estimate:.2g}" if p and worse.estimate else text


def _warm_up_column(workload: str) -> Callable[[VariantDecision], str]:
    """ "1 request, 2.4x": how many requests of a launch are slower than the rest, and by how much the first is."""

    def cell(variant: VariantDecision) -> str:
        slow = variant.figures.get(f"warm_up@{workload}")
        first = variant.figures.get(f"first_request@{workload}")
        if slow is None or first is None or not math.isfinite(slow.estimate + first.estimate):
            return MISSING
        if not slow.estimate:
            return "none"
        return f"{counted(round(slow.estimate), 'request')}, the first {first.estimate:.2g}x"

    return cell


def _speed_column(decision: Decision, workload: str) -> Callable[[VariantDecision], str]:
    return lambda v: words.speed(_ratio(decision, v, workload))


def _name(decision: Decision, variant: VariantDecision) -> str:
    roles = [("baseline", decision.baseline), ("chosen", decision.chosen)]
    mine = ", ".join(role for role, name in roles if name == variant.name)
    return f"{variant.name} ({mine})" if mine else variant.name


def workloads(decision: Decision) -> list[str]:
    """Every workload that has a figure, the minimized one first."""
    named = {name.partition("@")[2] for v in decision.variants for name in v.figures if "@" in name}
    main = decision.minimize.partition("@")[2]
    return [w for w in [main] if w] + sorted(named - {main})


def _busiest(decision: Decision) -> str:
    """The workload with the highest throughput: the batch one."""
    throughputs = [
        (value.estimate, name.partition("@")[2])
        for v in decision.variants
        for name, value in v.figures.items()
        if name.startswith("throughput@") and math.isfinite(value.estimate)
    ]
    return max(throughputs)[1] if throughputs else ""


def _ratio(decision: Decision, variant: VariantDecision, workload: str) -> Interval | None:
    return variant.figures.get(ratio_name(decision, workload))


def ratio_name(decision: Decision, workload: str) -> str:
    """The ratio on the clock that judged; on the wall clock where the other was not read."""
    cpu = f"cpu.ratio@{workload}"
    judged = decision.clock == "cpu" and any(cpu in v.figures for v in decision.variants)
    return cpu if judged else f"latency.ratio@{workload}"


RULE_HEADER = ["rule", "outcome", "figure", "limit", "n", "against", "clock", "reason", "protects against"]


def rule_rows(variant: VariantDecision) -> Table:
    """The variant's verdicts, columns that none of them fills left out."""
    cells = [_rule_row(verdict) for verdict in variant.verdicts]
    kept = [n for n in range(len(RULE_HEADER)) if n < 2 or any(row[n] != MISSING for row in cells)]
    header = [RULE_HEADER[n] for n in kept]
    body = [[clean(row[n]) for n in kept] for row in cells]
    return header, body


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


def warnings(decision: Decision) -> list[str]:
    """The decision's warnings, the variants' notes, and which P95 rest on too few requests."""
    tails = [
        f"{v.name}@{name.partition('@')[2]}"
        for v in decision.variants
        for name, value in v.figures.items()
        if name.startswith("latency.p95@") and not words.bounded(value)
    ]
    notes = [f"{v.name}: {note}" for v in decision.variants for note in v.notes]
    lines = [*decision.warnings, *notes]
    if tails:
        lines.append(f"{words.TOO_FEW} for P95 ({fewest_for(0.95)} needed): {', '.join(tails)}")
    return [clean(line) for line in lines]
