"""Figures, verdicts and raw records as plain words: what every report and the console show alike. Pure."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftopt.evidence import TWIN
from peftopt.records import Decision, Interval, Json, Measurement, VariantDecision, Verdict
from peftopt.stats import LOOKS, MOST_BLOCKS, fewest_for
from peftopt.thresholds import TASK, format_value

MISSING = "—"
WIDTH = 120
"""Characters the compact table fits in."""
EXAMPLES = 5
HOW_TO_READ = (
    "0.81x (0.78–0.84) is a ratio to the baseline and its 95 % interval, the range of true ratios that the data "
    "allow. Below 1 is faster; an interval that holds 1 shows no difference. A raced rule has a wider interval, "
    "since it is looked at more than once; memory and load time show the range of their launches.",
    "Ratios are paired: every variant ran once in each block, in random order, so what the machine did to one it "
    "did to all. The baseline's own row is a second copy against itself: the noise that a gain has to exceed.",
    "Inconclusive means that the interval still holds the limit. It is not a pass: measure more.",
    "Critical errors carry their n: 0 of 320 shows a rate below 0.93 %, no less; “below 1 %” takes 299 prompts.",
)

Table = tuple[list[str], list[list[str]]]
"""A header and its rows, every cell a plain string: escaping is the renderer's."""
Column = tuple[str, Callable[[VariantDecision], str]]

_ILLEGAL = re.compile("[^\t\n\r -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: object) -> str:
    """`text` without control characters, lone surrogates and bidirectional overrides: no report may hold them."""
    return _ILLEGAL.sub("\ufffd", str(text))


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


# ---- the table of variants ---------------------------------------------------------------------


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
    header = ["workload", "variant", "TTFT P50", "TPOT P50", "P50", "P95", "throughput"]
    metrics = ("ttft.p50", "tpot.p50", "latency.p50", "latency.p95", "throughput")
    names = workloads(decision)
    rows = [
        [clean(w), clean(_name(decision, v)), *(figure(f"{m}@{w}", v.figures.get(f"{m}@{w}")) for m in metrics)]
        for w in names
        for v in decision.variants
    ]
    return header, [row for row in rows if set(row[2:]) != {MISSING}] if len(names) > 1 else []


def further(decision: Decision) -> Table:
    """What no rule asks for but an expert looks at; no rows when none of it was measured."""
    main = (workloads(decision) or [""])[0]
    columns: list[Column] = [
        ("variant", lambda v: _name(decision, v)),
        (f"TTFT P50@{main}", _figure_column(f"ttft.p50@{main}")),
        (f"TTFT P95@{main}", _figure_column(f"ttft.p95@{main}")),
        (f"P99@{main}", _figure_column(f"latency.p99@{main}")),
        (f"TPOT P50@{main}", _figure_column(f"tpot.p50@{main}")),
        (f"of memory bandwidth@{main}", _figure_column(f"bandwidth@{main}")),
        *((f"in the server's queue@{w}", _figure_column(f"server_queue@{w}")) for w in workloads(decision)),
        *((f"requests in a batch@{w}", _mean_column(f"server_batch@{w}")) for w in workloads(decision)),
        *((f"of its slots@{w}", _figure_column(f"server_fill@{w}")) for w in workloads(decision)),
        *((f"KV cache taken@{w}", _figure_column(f"server_kv_cache@{w}")) for w in workloads(decision)),
        (f"CPU time@{main}", lambda v: speed(v.figures.get(f"cpu.ratio@{main}"))),
        ("same answer", _figure_column("greedy_match")),
        ("same next token", _figure_column("top1")),
        ("in the worst prompt", _figure_column("top1.min")),
        ("KL per token", _figure_column("kl")),
        ("P95 of prompts", _figure_column("kl.p95")),
        ("worst prompt", _figure_column("kl.max")),
        ("worst token", _figure_column("kl.token")),
        ("adapter's shift kept", _figure_column("delta_survival")),
        ("answer length", _figure_column("length")),
        *((f"answer length@{w}", _figure_column(f"length.ratio@{w}")) for w in workloads(decision)),
        ("answers flipped", _flipped),
        *((f"warm-up@{w}", _warm_up_column(w)) for w in workloads(decision)),
        ("GPU memory reserved", _figure_column("gpu_memory_reserved")),
        ("reserved but unused", _figure_column("fragmentation")),
        ("GPU busy", _figure_column("gpu_busy")),
        ("adapter switch", _figure_column("adapter_switch_time")),
        ("compile time", _figure_column("compile_time")),
        ("start from the compile cache", _figure_column("warm_start")),
        *((title, _count_column(name)) for name, title in _COUNTS.items()),
    ]
    header, body = _filled(decision, columns)
    return header, body if len(header) > 1 else []


def _filled(decision: Decision, columns: Sequence[Column]) -> Table:
    """A row per variant, without the columns in which no variant has anything to say."""
    cells = [[cell(variant) for _, cell in columns] for variant in decision.variants]
    said = ("variant", "verdict", "decided by")
    kept = [n for n, (name, _) in enumerate(columns) if name in said or any(row[n] != MISSING for row in cells)]
    return [clean(columns[n][0]) for n in kept], [[clean(row[n]) for n in kept] for row in cells]


def _full(decision: Decision) -> list[Column]:
    main, *others = workloads(decision) or [""]
    batch = _busiest(decision)
    return [
        ("variant", lambda v: _name(decision, v)),
        ("verdict", lambda v: f"{v.outcome} ({v.decided_by})" if v.decided_by else v.outcome),
        (f"speed@{main} vs {decision.baseline}", lambda v: speed(_ratio(decision, v, main))),
        *((f"speed@{w}", _speed_column(decision, w)) for w in others),
        (f"P50@{main}", _figure_column(f"latency.p50@{main}")),
        (f"P95@{main}", _figure_column(f"latency.p95@{main}")),
        (f"throughput@{batch}", _figure_column(f"throughput@{batch}")),
        ("peak memory", _figure_column("memory")),
        ("GPU memory", _figure_column("gpu_memory_allocated")),
        ("size on disk", _figure_column("size")),
        ("load time", _figure_column("load_time")),
        ("accuracy", _figure_column("accuracy")),
        *((name, _figure_column(name)) for name in _tasks(decision)),
        ("schema validity", _figure_column("validity")),
        ("perplexity", _figure_column("perplexity")),
        ("critical errors", _figure_column("critical_errors")),
    ]


def _tasks(decision: Decision) -> list[str]:
    """The tasks that any variant was asked, by their metric names."""
    return sorted({name for v in decision.variants for name in v.figures if name.startswith(TASK)})


def _compact(decision: Decision) -> list[Column]:
    main = (workloads(decision) or [""])[0]
    quality = "accuracy" if any("accuracy" in v.figures for v in decision.variants) else "perplexity"
    return [
        ("variant", lambda v: clip(v.name, 20) + " *" * (v.name == decision.baseline)),
        (clip(f"speed@{main}", 20), lambda v: speed(_ratio(decision, v, main), compact=True)),
        ("P50", lambda v: estimate("latency.p50", v.figures.get(f"latency.p50@{main}"))),
        ("memory", lambda v: estimate("memory", v.figures.get("memory"))),
        ("size", lambda v: estimate("size", v.figures.get("size"))),
        (quality, lambda v: estimate(quality, v.figures.get(quality))),
        ("critical", lambda v: _count(v.figures.get("critical_errors"))),
        ("verdict", lambda v: v.outcome),
        ("decided by", lambda v: v.decided_by or MISSING),
    ]


def _fit(header: Sequence[str], body: list[list[str]], gap: int = 2) -> list[list[str]]:
    """The same rows, the last column clipped to what the terminal has left for it."""
    taken = sum(max(len(row[n]) for row in [header, *body]) + gap for n in range(len(header) - 1))
    return [[*row[:-1], clip(row[-1], max(WIDTH - taken, 8))] for row in body]


def _figure_column(name: str) -> Callable[[VariantDecision], str]:
    return lambda v: figure(name, v.figures.get(name))


_COUNTS = {
    "graphs": "graphs",
    "graph_breaks": "graph breaks",
    "recompiles": "recompiles",
    "uncompiled": "requests answered uncompiled",
    "eager_prompts": "requests with an eager prompt",
    "break_even": "requests to break even",
}


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
    worse, better = (variant.figures.get(f"flips_{way}") for way in ("worse", "better"))
    if worse is None or better is None or not math.isfinite(worse.estimate + better.estimate):
        return MISSING
    text, p = f"{worse.estimate:.0f} worse, {better.estimate:.0f} better", variant.figures.get("flips_p")
    return f"{text}, p = {p.estimate:.2g}" if p and worse.estimate else text


def _warm_up_column(workload: str) -> Callable[[VariantDecision], str]:
    """ "1 request, 2.4x": how many requests of a launch are slower than the rest, and by how much the first is."""

    def cell(variant: VariantDecision) -> str:
        found, first = (variant.figures.get(f"{name}@{workload}") for name in ("warm_up", "first_request"))
        if found is None or first is None or not math.isfinite(found.estimate + first.estimate):
            return MISSING
        if not found.estimate:
            return "none"
        return f"{found.estimate:.0f} request{'s' * (found.estimate != 1)}, the first {first.estimate:.2g}x"

    return cell


def _speed_column(decision: Decision, workload: str) -> Callable[[VariantDecision], str]:
    return lambda v: speed(_ratio(decision, v, workload))


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
    seen = [
        (value.estimate, name.partition("@")[2])
        for v in decision.variants
        for name, value in v.figures.items()
        if name.startswith("throughput@") and math.isfinite(value.estimate)
    ]
    return max(seen)[1] if seen else ""


def _ratio(decision: Decision, variant: VariantDecision, workload: str) -> Interval | None:
    return variant.figures.get(ratio_name(decision, workload))


def ratio_name(decision: Decision, workload: str) -> str:
    """The ratio on the clock that judged; on the wall clock where the other was not read."""
    cpu = f"cpu.ratio@{workload}"
    judged = decision.clock == "cpu" and any(cpu in v.figures for v in decision.variants)
    return cpu if judged else f"latency.ratio@{workload}"


# ---- one figure --------------------------------------------------------------------------------


def figure(name: str, value: Interval | None) -> str:
    """ "41.2 ms (40.1–42.0)": an estimate and its interval, in the words its metric is read in."""
    if value is None or not math.isfinite(value.estimate):
        return MISSING
    if name.partition("@")[0] == "critical_errors":
        return critical(value)
    middle = _text(name, value.estimate)
    if (tail := re.search(r"(?:latency|ttft|tpot)\.(p95|p99)", name)) and not _bounded(value):
        return f"too few requests for {tail[1].upper()}: {value.n}"
    if math.isnan(value.low) or math.isnan(value.high) or value.low == value.high:
        return middle
    return f"{middle} ({_range(middle, _text(name, value.low), _text(name, value.high))})"


def estimate(name: str, value: Interval | None) -> str:
    return MISSING if value is None or not math.isfinite(value.estimate) else _text(name, value.estimate)


def speed(ratio: Interval | None, compact: bool = False) -> str:
    """ "0.81x (0.78–0.84), 19 % faster"; "SLOWER" is said as plainly."""
    shown = figure("latency.ratio", ratio)
    if ratio is None or shown == MISSING:
        return MISSING
    change = f"{shown}, {100 * abs(ratio.estimate - 1):.{int(abs(ratio.estimate - 1) < 0.05)}f} %"
    if ratio.low > 1:
        return shown.replace(" (", " SLOWER (", 1) if compact else f"{change} SLOWER"
    if compact:
        return shown
    return f"{change} faster" if ratio.high < 1 else f"{shown}, no difference shown"


def critical(value: Interval) -> str:
    """ "0 of 320, < 0.93 %": what was seen, and the upper bound that the sample size supports."""
    bound = f", < {value.high * 100:.2g} %" if math.isfinite(value.high) else ""
    return _count(value) + bound


def _count(value: Interval | None) -> str:
    if value is None or not math.isfinite(value.estimate):
        return MISSING
    return f"{round(value.estimate * value.n)} of {value.n}"


_READ_AS = {
    **{"ms": "latency.p50", "s": "load_time", "bytes": "memory", "share": "accuracy"},
    **{"tokens/s": "throughput", "nats": "kl", "bandwidth": "accuracy"},
    **{"compile_time": "load_time", "warm_start": "load_time", "adapter_switch_time": "load_time"},
    **{"fragmentation": "accuracy", "gpu_busy": "accuracy"},
    **{"server_queue": "latency.p50", "server_kv_cache": "accuracy", "server_fill": "accuracy"},
    **{"gpu_memory_allocated": "memory", "gpu_memory_reserved": "memory"},
    **{"tpot.p95": "tpot.p50", "tpot.p99": "tpot.p50", "top1.min": "top1"},
    **dict.fromkeys(("kl.p95", "kl.max", "kl.token"), "kl"),
}
"""A unit, or a figure no recipe can name -> a metric that is written the same way; all others are ratios."""


def _text(name: str, value: float) -> str:
    name = name.partition("@")[0]
    return format_value(_READ_AS.get(name, name), value)


def _bounded(value: Interval) -> bool:
    return math.isfinite(value.low) and math.isfinite(value.high)


def _range(middle: str, low: str, high: str) -> str:
    """ "0.78–0.84": the unit is said once, where all three share it."""
    parts = [re.fullmatch(r"(-?[\d.,]+|-?∞)(.*)", text) for text in (middle, low, high)]
    units = {part[2] for part in parts if part and "∞" not in part[1]}
    if all(parts) and len(units) == 1:
        low, high = low.removesuffix(unit := units.pop()), high.removesuffix(unit)
    return f"{low} to {high}" if low.startswith("-") else f"{low}–{high}"


# ---- verdicts ----------------------------------------------------------------------------------

RULE_HEADER = ["rule", "outcome", "figure", "limit", "n", "against", "clock", "reason"]


def rule_rows(variant: VariantDecision) -> Table:
    """The variant's verdicts, columns that none of them fills left out."""
    cells = [_rule_row(verdict) for verdict in variant.verdicts]
    kept = [n for n in range(len(RULE_HEADER)) if n < 2 or any(row[n] != MISSING for row in cells)]
    return [RULE_HEADER[n] for n in kept], [[clean(row[n]) for n in kept] for row in cells]


def _rule_row(verdict: Verdict) -> list[str]:
    value = verdict.value
    return [
        verdict.rule,
        verdict.outcome,
        figure(_metric(verdict), value),
        MISSING if verdict.limit is None else _text(_metric(verdict), verdict.limit),
        MISSING if value is None else str(value.n),
        verdict.against or MISSING,
        verdict.clock or MISSING,
        reason(verdict),
    ]


def reason(verdict: Verdict) -> str:
    """The verdict's sentence, and for an inconclusive one what would settle it."""
    needed = verdict.blocks_needed
    if verdict.outcome != "inconclusive" or needed is None:
        return verdict.reason or MISSING
    more, minutes = max(needed - (verdict.value.n if verdict.value else 0), 1), verdict.minutes_needed
    took = f" (about {max(minutes, 1):.0f} min)" if minutes is not None and math.isfinite(minutes) else ""
    still = f"about {more} more blocks needed{took}" if needed < MOST_BLOCKS else "too close to the limit to tell"
    return f"{verdict.reason}; {still}" if verdict.reason else still


def _metric(verdict: Verdict) -> str:
    """The name that says how to write the figure: of a requirement its metric, else the unit."""
    if verdict.rule.endswith(".critical_errors"):
        return "critical_errors"
    required = re.match(r"require: ([\w.]+)", verdict.rule)
    return required[1] if required and verdict.unit != "x" else verdict.unit


# ---- what the reader must be told --------------------------------------------------------------


def warnings(decision: Decision) -> list[str]:
    """The decision's warnings, the variants' notes, and which P95 rest on too few requests."""
    tails = [
        f"{v.name}@{name.partition('@')[2]}"
        for v in decision.variants
        for name, value in v.figures.items()
        if name.startswith("latency.p95@") and not _bounded(value)
    ]
    few = f"too few requests for P95 ({fewest_for(0.95)} needed): {', '.join(tails)}"
    notes = [f"{v.name}: {note}" for v in decision.variants for note in v.notes]
    return [clean(line) for line in [*decision.warnings, *notes, *[few][: len(tails)]]]


def failures(measurements: Sequence[Measurement]) -> Table:
    """What did not run, and why."""
    said = ["stage", "reason", "detail"]
    found = [[m.variant, *(m.values.get(key) or MISSING for key in said)] for m in measurements if m.probe == "failure"]
    return ["variant", *said], [list(map(clean, row)) for row in found]


# ---- answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flip:
    """An answer that changed: the baseline's and the variant's, and what is wrong or right about it now.

    `gravity`: 1 broken as in no run of the baseline, 2 a critical prompt now wrong, 3 another, 4 now right.
    """

    gravity: int
    row: str
    change: str
    expected: str
    before: str
    after: str


def flips(decision: Decision, measurements: Sequence[Measurement], most: int = EXAMPLES) -> dict[str, list[Flip]]:
    """Example answers that flipped, by variant, the gravest first."""
    answers = _answers(measurements)
    before = answers.get(decision.baseline, {})
    found: dict[str, list[Flip]] = {v.name: [] for v in decision.variants}
    for name in found.keys() & answers.keys() - {decision.baseline}:
        pairs = [(before[row], after) for row, after in answers[name].items() if row in before]
        flipped = [flip for pair in pairs if (flip := _flip(*pair))]
        found[name] = sorted(flipped, key=lambda flip: flip.gravity)[:most]
    return found


_Answers = dict[str, dict[str, list[Mapping[str, Json]]]]


def _answers(measurements: Sequence[Measurement]) -> _Answers:
    """variant -> row -> its answers, one per run."""
    found: _Answers = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        if m.probe == "quality":
            found[m.variant][str(m.values.get("row"))].append(m.values)
    return found


def _flip(before: Sequence[Mapping[str, Json]], after: Sequence[Mapping[str, Json]]) -> Flip | None:
    old, new = before[0], after[0]
    known = {flag for answer in before for flag in _strings(answer.get("flags"))}
    if broken := [flag for flag in _strings(new.get("flags")) if flag not in known]:
        gravity, change = 1, ", ".join(broken)
    elif bool(old.get("correct")) == bool(new.get("correct")):
        return None
    elif new.get("correct"):
        gravity, change = 4, "now right"
    else:
        gravity, change = (2, "critical prompt now wrong") if new.get("critical") else (3, "now wrong")
    shown = (old.get("row"), change, old.get("expected", ""), old.get("output", ""), new.get("output", ""))
    return Flip(gravity, *map(clean, shown))


def slices(decision: Decision, measurements: Sequence[Measurement]) -> Table:
    """Share of right answers by slice: a row each, a column per variant, with the change to the baseline."""
    answers = _answers(measurements)
    names = [v.name for v in decision.variants if v.name in answers]
    counts = {name: _slice_counts(answers[name]) for name in names}
    base = counts.get(decision.baseline, {})
    keys = sorted({key for found in counts.values() for key in found} - {_ALL})
    header = [clean(cell) for cell in ("slice", *names)]
    if not keys:
        return header, []
    body = [
        [key, *(_slice_cell(counts[n].get(key), base.get(key) if n != decision.baseline else None) for n in names)]
        for key in (_ALL, *keys)
    ]
    return header, [list(map(clean, row)) for row in body]


_ALL = "all"


def _slice_counts(answers: Mapping[str, list[Mapping[str, Json]]]) -> dict[str, tuple[int, int]]:
    """slice -> (right, asked), from the first run of each row."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for runs in answers.values():
        for key in {_ALL, *_strings(runs[0].get("slices"))}:
            right, asked = found[key]
            found[key] = right + bool(runs[0].get("correct")), asked + 1
    return found


def _slice_cell(mine: tuple[int, int] | None, base: tuple[int, int] | None) -> str:
    if mine is None:
        return MISSING
    share = 100 * mine[0] / mine[1]
    change = "" if base is None else f", {share - 100 * base[0] / base[1]:+.0f}"
    return f"{share:.0f} % ({mine[0]} of {mine[1]}{change})"


# ---- how it was measured -----------------------------------------------------------------------


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
        **{str(key): _flat(value) for key, value in decision.machine.items()},
    }
    return [(clean(key), clean(text)) for key, text in found.items() if text]


def _engines(measurements: Sequence[Measurement]) -> dict[str, str]:
    """What each variant's engine said of getting ready, the same sentence of several launches once."""
    said: dict[str, dict[str, None]] = defaultdict(dict)
    for m in measurements:
        if m.probe == "engine":
            said[f"{m.variant}'s engine"] |= dict.fromkeys(_strings(m.values.get("log")))
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


def _strings(value: Json) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def _distinct(values: Iterable[Json]) -> str:
    return ", ".join(sorted({str(value) for value in values if value not in (None, "")}))


def _flat(value: Json) -> str:
    """A nested value on one line: "torch 2.6.0, peft 0.18.0"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text}" for key, item in value.items() if (text := _flat(item)))
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_flat, value)))
    return "" if value is None else str(value)
