"""The measurements of a run, arranged by what a rule or a report asks of them. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from peftopt import goodput, stats
from peftopt.records import Interval, Json, Measurement, Metric, Plan
from peftopt.thresholds import TASK

TWIN = "~aa"
"""Suffix of the A/A arm: a hidden second copy of the baseline that must not differ from it."""

Rows = Mapping[str, Mapping[str, Json]]

FEWEST = 6
"""Blocks from which an exact 95 % interval exists: every variant gets them, and "auto" chooses a clock on them."""

NOISIER = 2.0
"""How many times noisier the wall clock must be before "auto" takes the CPU's."""

FIELDS = {"latency": "request_duration_ms", "ttft": "ttft_ms", "tpot": "tpot_ms", "throughput": "request_duration_ms"}
"""Which of a request's durations a timed metric looks at. Lengths are fixed, so throughput is inverse duration."""


@dataclass(frozen=True)
class Divergence:
    """Where two sets of answers part: per prompt, 1 if they do, and the tokens compared up to there."""

    parted: Mapping[str, int]
    tokens: Mapping[str, int]


class Evidence:
    """An index over a run's measurements; nothing is computed twice, nothing is kept that was not measured."""

    def __init__(self, plan: Plan, measurements: Sequence[Measurement]) -> None:
        self.plan = plan
        self.baseline = plan.recipe.baseline
        self.turns: dict[tuple[str, str], dict[int, list[Mapping[str, Json]]]] = defaultdict(dict)
        self.answers: dict[tuple[str, int], dict[str, Mapping[str, Json]]] = defaultdict(dict)
        self.builds: dict[str, Mapping[str, Json]] = {}
        self.failures: dict[str, Mapping[str, Json]] = {}
        self.launches: dict[str, list[Mapping[str, Json]]] = defaultdict(list)
        self.memory: dict[str, list[Mapping[str, Json]]] = defaultdict(list)
        self.engines: dict[str, list[Mapping[str, Json]]] = defaultdict(list)
        self.tasks: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        """Variant -> metric ("task.NAME") -> row -> score."""
        self.surveyed: Mapping[str, Json] = {}
        self.accounts: dict[tuple[str, str], list[Mapping[str, Json]]] = defaultdict(list)
        """(variant, workload) -> what the server said of each load on it."""
        self.machine: dict[tuple[str, int], list[Mapping[str, Json]]] = defaultdict(list)
        self.budget = plan.recipe.measure.max_blocks
        """Blocks that a race may have: the recipe's, or what was granted since."""
        self.left_out: dict[str, str] = {}
        """Variant@workload -> why a turn of it is as good as not measured."""
        self.apart: dict[str, tuple[str, ...]] = {}
        """Variant@workload -> what its loads lack, where they were run apart from the race."""
        self._loads = Counter[tuple[str, str]]()
        self._orders: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
        self._loading: list[tuple[str, Mapping[str, Json]]] = []
        self._launched_blocks: dict[tuple[str, str], list[list[int]]] = defaultdict(list)
        self._launched: dict[tuple[str, str], list[list[Mapping[str, Json]]]] = defaultdict(list)
        for m in measurements:
            match m.probe:
                case "speed":
                    block, requests = m.values["block"], m.values["requests"]
                    timed = [r for r in requests if not r["warmup"]]
                    if why := _useless(timed):
                        self.left_out[f"{m.variant}@{m.workload}"] = why
                        continue
                    self.turns[m.variant, m.workload][block] = timed
                    self.machine[m.workload, block].append(m.values.get("machine", {}))
                    self.accounts[m.variant, m.workload].append(m.values.get("engine", {}))
                    if "order" in m.values:
                        self._orders[m.workload, block][m.variant] = m.values["order"]
                    if launches := self._launched[m.variant, m.workload]:
                        launches[-1] += requests
                        self._launched_blocks[m.variant, m.workload][-1].append(block)
                case "load" if m.workload in plan.recipe.workloads:
                    self._take_load(m)
                case "quality":
                    self.answers[m.variant, m.launch][m.values["row"]] = m.values
                case "task" if "samples" in m.values and "task" in m.values:  # an imported one may lack either
                    scores = self.tasks[m.variant].setdefault(TASK + m.values["task"], {})
                    scores |= {row["id"]: row["value"] for row in m.values["samples"]}  # a group's come file by file
                case "machine":
                    self.surveyed = m.values
                case "build":
                    self.builds[m.values["id"]] = m.values
                case "failure":
                    self.failures[m.variant] = m.values
                case "retry":
                    self.failures.pop(m.variant, None)
                case "launch":
                    self.launches[m.variant].append(m.values)
                    self._launched[m.variant, m.workload].append([])
                    self._launched_blocks[m.variant, m.workload].append([])
                    self._loading.append((m.workload, m.values))
                case "more":
                    self.budget = max(self.budget, m.values["max_blocks"])
                case "memory":
                    self.memory[m.variant].append(m.values)
                case "engine":
                    self.engines[m.variant].append(m.values)

    def _take_load(self, m: Measurement) -> None:
        """A load that was run apart, by `peftopt load` or another meter, is the variant's next block: also one that is
        left out has its place, or later ones would be compared with others than they ran beside."""
        raced = max((block for name, block in self.machine if name == m.workload), default=-1) + 1
        block = raced + self._loads[m.variant, m.workload]
        self._loads[m.variant, m.workload] += 1
        at, workload = f"{m.variant}@{m.workload}", self.plan.recipe.workloads[m.workload]
        self.apart[at] = tuple(m.values.get("lacks", ()))
        timed = [dict(r) for r in m.values.get("requests", ()) if not r["warmup"]]
        fixed = workload.new_tokens if workload.lengths == "fixed" else 0
        if why := m.values.get("stopped") or _useless(timed, fixed):
            self.left_out[at] = why
            return
        turn_ms = goodput.span_ms(timed)
        self.accounts[m.variant, m.workload].append(m.values.get("engine", {}))
        self.turns[m.variant, m.workload][block] = [{**r, "turn_ms": turn_ms} for r in timed]

    def certificates(self, variant: str) -> list[str]:
        """How the artifacts that a variant is made of were made and checked, in the order they were made."""
        steps = {build.id: build for build in self.plan.builds}
        found, at = [], self.plan.models[variant]
        while build := steps.get(at):
            made = self.builds.get(at, {})
            if line := made.get("certificate"):
                found.append(f"{build.step.plugin}: parity certificate {line}")
            if line := made.get("quantization"):
                found.append(f"{build.step.plugin}: {line}")
            at = build.parent
        return found[::-1]

    # ---- speed ------------------------------------------------------------------------------

    def blocks(self, variant: str, workload: str) -> int:
        """Blocks in which the variant was measured on the workload."""
        return len(self.turns.get((variant, workload), {}))

    def requests(self, variant: str, workload: str) -> list[Mapping[str, Json]]:
        """All timed requests, in order."""
        return [r for _, turn in sorted(self.turns.get((variant, workload), {}).items()) for r in turn]

    def touched_share(self, variant: str, workload: str) -> float:
        """The share of the workload's timed prompts that a policy of the variant shortened."""
        requests = self.requests(variant, workload)
        asked = sum(r.get("batch", 1) for r in requests)
        return sum(r.get("touched", 0) for r in requests) / asked if asked else 0.0

    def paired(self, variant: str, against: str, workload: str, field: str) -> list[float]:
        """log(variant / against) of the block medians of a request's field, one per shared block, in order."""
        return list(self._logs(variant, against, workload, field).values())

    def _logs(self, variant: str, against: str, workload: str, field: str) -> dict[int, float]:
        ours, theirs = self.turns.get((variant, workload), {}), self.turns.get((against, workload), {})
        shared = sorted(ours.keys() & theirs.keys())
        medians = {b: (_median(ours[b], field), _median(theirs[b], field)) for b in shared}
        return {b: math.log(a / c) for b, (a, c) in medians.items() if _is_time(a) and _is_time(c)}

    def field(self, metric: Metric) -> str:
        """The field of a request that a race on this metric compares, on the clock that judges."""
        return "cpu_ms" if self.clock[0] == "cpu" else self.wall_field(metric)

    def wall_field(self, metric: Metric) -> str:
        """The same on the wall clock. Requests of a load overlap, so that its throughput is a matter of all of them."""
        if metric.name == "throughput" and self.plan.recipe.workloads[metric.workload].loaded:
            return "turn_ms"
        return FIELDS[metric.name.split(".")[0]]

    @cached_property
    def clock(self) -> tuple[str, str]:
        """The clock that judges, "wall" or "cpu", and why.

        "auto" looks at the A/A arm alone, in the first blocks alone, so that no variant's figures have a say.
        """
        recipe = self.plan.recipe
        if recipe.measure.clock != "auto":
            users = "what a user waits for" if recipe.measure.clock == "wall" else "as the recipe says"
            return recipe.measure.clock, users
        timed = [v for name, launches in self.launches.items() for v in launches if name in self._timed]
        if any(v.get("device") != "cpu" for v in timed):
            return "wall", "auto: the work is not done on this process's CPU"
        if any(v.get("threads") != 1 for v in timed):
            return "wall", "auto: with several threads CPU time is not what a user waits for"
        twin, workload = self.baseline + TWIN, recipe.minimize.workload
        spreads = []
        for field in (self.wall_field(recipe.minimize), "cpu_ms"):
            logs = self.paired(twin, self.baseline, workload, field)[:FEWEST]
            spreads.append(stats.median(abs(x) for x in logs))
        wall, cpu = spreads
        if len(logs) < FEWEST:
            return "wall", f"auto: not yet {FEWEST} blocks of the A/A arm"
        seen = f"two copies of {self.baseline} differed by {wall:.2%} on the wall clock and by {cpu:.2%} in CPU time"
        return ("cpu" if wall > NOISIER * cpu else "wall"), f"auto: in the first {FEWEST} blocks {seen}"

    @property
    def _timed(self) -> set[str]:
        return {variant for variant, _ in self.turns}

    def minutes_per_block(self, workload: str) -> float | None:
        """How long the latest blocks have taken here, with their share of the launches; None where it is not known."""
        seconds = [
            sum(m["seconds"] for m in moments)
            for (name, _), moments in sorted(self.machine.items())
            if name == workload and all("seconds" in m for m in moments)
        ]
        if not seconds:
            return None
        loading = [v["model_loading_time"] for name, v in self._loading if name == workload]
        racing = len(self.machine[workload, max(b for w, b in self.machine if w == workload)])
        launching = stats.median(loading) * racing / self.plan.recipe.measure.relaunch if loading else 0.0
        return (stats.median(seconds[-FEWEST:]) + launching) / 60

    # ---- what a machine does to a measurement -------------------------------------------------

    def disturbed(self, workload: str) -> dict[int, list[str]]:
        """Blocks in which something else was at work, and what it was."""
        devices = {launch.get("device") for launches in self.launches.values() for launch in launches}
        threads = 1 if devices == {"cuda"} else self.plan.recipe.measure.threads  # one thread feeds a GPU
        found = {}
        for (name, block), moments in sorted(self.machine.items()):
            if name == workload and (reasons := dict.fromkeys(r for m in moments for r in _disturbances(m, threads))):
                found[block] = list(reasons)
        return found

    def order_effect(self, workload: str) -> Interval | None:
        """How many times longer the last turn of a block takes than the first, whoever's it is; None when unknown.

        A variant's place in a block is random, so this is noise and no bias; but noise that one can do something about.
        """
        field = self.field(Metric(self.plan.recipe.minimize.name, workload))
        arms = {name for name, workload_ in self.turns if workload_ == workload}
        logs = {name: self._logs(name, self.baseline, workload, field) for name in arms}
        centres = {name: stats.median(found.values()) for name, found in logs.items()}
        slopes = []
        for (name, block), orders in sorted(self._orders.items()):
            placed = [arm for arm in orders if block in logs.get(arm, {})] if name == workload else []
            if len(placed) > 2:
                places = [orders[arm] / (len(orders) - 1) for arm in placed]
                slopes.append(stats.slope(places, [logs[arm][block] - centres[arm] for arm in placed]))
        return exp(stats.hodges_lehmann(slopes, 0.99)) if len(slopes) >= FEWEST else None

    def launch_effect(self, workload: str) -> float | None:
        """How far launches differ, in standard deviations of blocks of one launch; None where that cannot be shown.

        Blocks of one launch share what differs between launches, so they say less than as many independent ones, and
        the rules take them for independent. Shown means an F test over the paired logs of all variants at 1 %.
        """
        field = self.field(Metric(self.plan.recipe.minimize.name, workload))
        between = within = 0.0
        groups = blocks = 0
        for name in {name for name, workload_ in self.turns if workload_ == workload} - {self.baseline}:
            logs = self._logs(name, self.baseline, workload, field)
            mine = [[logs[b] for b in found if b in logs] for found in self._launched_blocks.get((name, workload), ())]
            mine = [found for found in mine if found]
            if len(mine) < 2 or len(logs) <= len(mine):
                continue
            centre = sum(map(sum, mine)) / sum(map(len, mine))
            between += sum(len(g) * (sum(g) / len(g) - centre) ** 2 for g in mine)
            within += sum((x - sum(g) / len(g)) ** 2 for g in mine for x in g)
            groups, blocks = groups + len(mine) - 1, blocks + sum(map(len, mine)) - len(mine)
        if not groups or not blocks or not within:
            return None
        ratio, each = (between / groups) / (within / blocks), (groups + blocks) / max(groups, 1)
        return math.sqrt((ratio - 1) / each) if stats.exceeds(ratio, groups, blocks) else None

    def warm_up(self, variant: str, workload: str) -> tuple[int, float] | None:
        """(first requests of a launch that are slower than the rest, how many times longer the first takes).

        A request counts as warm-up while the median over launches is more than 5 % and three median deviations above
        the median of each launch's later half; what follows the first request that does not is no warm-up.
        """
        if self.plan.recipe.workloads[workload].loaded:
            return None  # the first requests of a load find an idle server: they are faster
        launches = [self._whole(requests, workload) for requests in self._launched.get((variant, workload), ())]
        launches = [times for times in launches if len(times) >= 4]
        if not launches:
            return None
        steady = [stats.median(times[len(times) // 2 :]) for times in launches]
        later = [abs(t / s - 1) for times, s in zip(launches, steady, strict=True) for t in times[len(times) // 2 :]]
        most = 1 + max(0.05, 3 * stats.median(later))
        longest = max(len(times) // 2 for times in launches)
        first = [
            stats.median(times[at] / s for times, s in zip(launches, steady, strict=True) if at < len(times) // 2)
            for at in range(longest)
        ]
        return next((at for at, ratio in enumerate(first) if not ratio > most), longest), first[0]

    def _whole(self, requests: Sequence[Mapping[str, Json]], workload: str) -> list[float]:
        """Durations of a launch's requests that generated all their tokens: later warm-ups are cut short. Where answers
        stop by themselves they cannot be told apart, and only the timed ones count."""
        if self.plan.recipe.workloads[workload].lengths == "natural":
            return [r["request_duration_ms"] for r in requests if not r["warmup"]]
        most = max((r["new_tokens"] for r in requests), default=0)
        return [r["request_duration_ms"] for r in requests if r["new_tokens"] == most]

    # ---- quality ----------------------------------------------------------------------------

    def rows(self, variant: str, launch: int = 1) -> Rows:
        """A variant's judged answers by prompt. The baseline's second launch is its null."""
        return self.answers.get((variant, launch), {})

    def divergence(self, ours: Rows, theirs: Rows) -> Divergence:
        """Compare answers token by token up to where they part: after that the prompts are no longer the same."""
        parted, tokens = {}, {}
        for row in ours.keys() & theirs.keys():
            a, b = ours[row]["tokens"], theirs[row]["tokens"]
            common = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            parted[row] = int(a != b or ours[row]["stopped"] != theirs[row]["stopped"])
            tokens[row] = common + 1
        return Divergence(parted, tokens)

    def excess_divergence(self, variant: str, against: str) -> Interval | None:
        """Share of tokens at which the variant leaves the reference, beyond the baseline's own run-to-run null."""
        seen = self.divergence(self.rows(variant), self.rows(against))
        null = self.divergence(self.rows(self.baseline, 2), self.rows(self.baseline, 1))
        shared = sorted(seen.parted.keys() & null.parted.keys())
        if not shared:
            return None
        excess = [seen.parted[r] - null.parted[r] for r in shared]
        compared = [seen.tokens[r] for r in shared]
        if not any(excess):  # no spread to estimate from: bound the rate of what was never seen
            worst = stats.upper_bound(0, len(shared)) * len(shared) / sum(compared)
            return Interval(0.0, 0.0, worst, len(shared))
        return stats.ratio_of_means(excess, compared)

    def critical_errors(self, variant: str) -> tuple[list[tuple[str, str]], int]:
        """(prompt, error) for each Tier 1 error the baseline shows in neither of its runs, and how many prompts."""
        first, second = self.rows(self.baseline, 1), self.rows(self.baseline, 2)
        errors, n = [], 0
        for row, answer in self.rows(variant).items():
            if row not in first:
                continue
            n += 1
            known = set(first[row]["flags"]) | set(second.get(row, first[row])["flags"])
            fresh = [flag for flag in answer["flags"] if flag not in known]
            was_right = first[row]["correct"] and second.get(row, first[row])["correct"]
            if answer["critical"] and was_right and not answer["correct"]:
                fresh.append("critical prompt answered wrong")
            errors += [(row, flag) for flag in fresh[:1]]
        return errors, n

    def flips(self, variant: str, rows: Iterable[str] | None = None) -> tuple[int, int]:
        """Prompts right before and wrong after, and the reverse; among `rows` where they are given."""
        ours, theirs = self.rows(variant), self.rows(self.baseline)
        shared = ours.keys() & theirs.keys() & set(ours if rows is None else rows)
        worse = sum(theirs[r]["correct"] and not ours[r]["correct"] for r in shared)
        better = sum(ours[r]["correct"] and not theirs[r]["correct"] for r in shared)
        return worse, better

    def worst_slice(self, variant: str) -> tuple[str, int, int, int] | None:
        """The slice that lost most of its answers: (its tag, worse, better, asked); None where none lost any."""
        slices: dict[str, list[str]] = defaultdict(list)
        for row, answer in self.rows(variant).items():
            for tag in answer["slices"]:
                slices[tag].append(row)
        found = [(tag, *self.flips(variant, rows), len(rows)) for tag, rows in sorted(slices.items())]
        worst = max(found, key=lambda f: (f[1] - f[2]) / f[3], default=None)
        return worst if worst and worst[1] > worst[2] else None

    def survival(self, variant: str, against: str = "") -> Interval | None:
        """How much of the adapter's shift from the base is left in the variant, or how much more than in another one;
        None where the base was not asked.

        Over the tokens of the scored answers, a = log p(adapter) - log p(base) and v the same of the variant:
        sum(a v) / sum(a^2), the variant's shift along the adapter's. 1 is all of it and 0 none; noise that knows
        nothing of the adapter, such as rounding, does not move it. Prompts are clusters.
        """
        rows = {k: r for k, r in self.rows(variant).items() if "kept" in r and math.isfinite(r["kept"])}
        others = {k: r["kept"] for k, r in self.rows(against).items() if "kept" in r} if against else {}
        shared = [k for k in rows if not against or math.isfinite(others.get(k, math.nan))]
        if not any(rows[k]["shift"] for k in shared):
            return None
        kept = [rows[k]["kept"] - others.get(k, 0.0) for k in shared]
        return stats.ratio_of_means(kept, [rows[k]["shift"] for k in shared])

    def cut(self, variant: str) -> tuple[list[str], int]:
        """Prompts whose answer was cut off, where the baseline's ended by itself in time; and how many were asked."""
        ours, theirs = self.rows(variant), self.rows(self.baseline)
        shared = sorted(ours.keys() & theirs.keys())
        return [r for r in shared if theirs[r]["stopped"] and not ours[r]["stopped"]], len(shared)

    def touched(self, variant: str) -> list[str]:
        """Prompts that a policy of the variant shortened."""
        return sorted(row for row, answer in self.rows(variant).items() if "uncut_tokens" in answer)

    def lengths(self) -> list[int]:
        """Lengths of the baseline's own answers in tokens, end of sequence included; those it was cut off at too."""
        return sorted(answer["new_tokens"] for answer in self.rows(self.baseline).values())

    def task_flips(self, variant: str) -> dict[str, tuple[int, int, int]]:
        """Of each task's rows: worse than the baseline's, better, and how many both were asked."""
        found = {}
        for name, ours in self.tasks[variant].items():
            theirs = self.tasks[self.baseline].get(name, {})
            gains = [ours[row] - theirs[row] for row in ours.keys() & theirs.keys()]
            found[name] = sum(g < 0 for g in gains), sum(g > 0 for g in gains), len(gains)
        return found

    def size(self, variant: str) -> int | None:
        """Bytes on disk of what the variant loads: its artifact, or the base and the adapter."""
        built = self.builds.get(self.plan.models.get(variant, ""))
        return built["size_bytes"] if built else None


def exp(interval: Interval) -> Interval:
    """From a log-ratio to a ratio."""
    return Interval(_exp(interval.estimate), _exp(interval.low), _exp(interval.high), interval.n, interval.level)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _is_time(value: Json) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _useless(timed: Sequence[Mapping[str, Json]], new_tokens: int = 0) -> str:
    """Why these requests say nothing of a variant's speed, "" where they do; of a load that ran apart they must all
    be answered, with `new_tokens` each where that is fixed."""
    if not timed:
        return "no raw requests, and figures without them have no intervals"
    if failed := [r["error"] for r in timed if r.get("error")]:
        return f"{len(failed)} of {len(timed)} requests failed: {failed[0]}"
    if not all(_is_time(r["request_duration_ms"]) for r in timed):
        return "a time that is none"
    if new_tokens and (odd := [r["new_tokens"] for r in timed if r["new_tokens"] != new_tokens]):
        return f"answers of {odd[0]} tokens, where the workload has {new_tokens}"
    return ""


def _median(turn: Sequence[Mapping[str, Json]], field: str) -> float:
    return stats.median([r[field] for r in turn if _is_time(r.get(field))])


_DISTURBED: Mapping[str, tuple[float, str]] = {
    "steal": (0.01, "the host took {:.0%} of the CPU time"),
    "throttled": (0.01, "a quota withheld {:.0%} of the CPU time"),
    "heat_events": (0, "the processor slowed down for heat"),
    "gpu_foreign": (0, "another process was on the GPU"),
    "gpu_slowed": (0, "the GPU slowed down for heat or power"),
}
"""What is read around a turn -> more than which it disturbs, and how that is said."""


def _disturbances(moment: Mapping[str, Json], threads: int) -> Iterator[str]:
    for key, (most, words) in _DISTURBED.items():
        if (found := moment.get(key) or 0) > most:
            yield words.format(found)
    cores, foreign = moment.get("cores", 0), moment.get("foreign_cores")
    if foreign is not None and foreign > cores - (threads or cores) + 0.25:
        yield "other processes took processors it needed"
