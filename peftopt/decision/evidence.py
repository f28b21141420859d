"""The measurements of a run, arranged by what a rule or a report asks of them. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from peftopt import stats
from peftopt.decision.index import VALUE, Field, Index, is_time, times
from peftopt.decision.pace import Pace, pace
from peftopt.measurements import (
    Answer,
    Disturbance,
    Request,
)
from peftopt.metrics import percent
from peftopt.records import TWIN, Interval, Metric

Rows = Mapping[str, Answer]

FEWEST = 6
"""Blocks from which an exact 95 % interval exists: every variant gets them, and "auto" chooses a clock on them."""

NOISIER = 2.0
"""How many times noisier the wall clock must be before "auto" takes the CPU's."""

FIELDS: Mapping[str, Field] = {
    "latency": "request_duration_ms",
    "ttft": "ttft_ms",
    "tpot": "tpot_ms",
    "throughput": "request_duration_ms",
}
"""Which of a request's durations a timed metric looks at. Lengths are fixed, so throughput is inverse duration."""

FAILED = math.log(1e3)
"""The log ratio of a turn that failed to one that did not: worse than any that was answered. Ranks judge, so its size
has no say."""

ANSWERED_WRONG = "critical prompt answered wrong"
"""The Tier 1 error of a critical prompt that every run of the baseline gets right."""

Series = Mapping[int, float]
"""A log ratio for each block, in order."""


@dataclass(frozen=True)
class CriticalError:
    """A Tier 1 error of a variant that the baseline makes in neither of its runs.

    `near_tie`: the adapter's own choice of that token turns on less than its run-to-run noise. `asked_once`: the
    baseline was asked this prompt in one run only, so it may make the error itself. `others`: further such errors of
    the same answer.
    """

    row: str
    flag: str
    near_tie: bool
    asked_once: bool
    others: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it rejects: not at a near tie, nor where the baseline was asked the prompt only once."""
        return not (self.near_tie or self.asked_once)


@dataclass(frozen=True)
class Disagreement:
    """How far a variant's predictions and answers are from the reference's, beside the adapter's own second run.

    `scored` holds for each prompt (tokens at which the most likely one differs, beyond the second run's; tokens
    scored); it is empty where an engine only generates. `partings` holds for each prompt after how many tokens the
    variant's answer leaves the reference's, and the second run's the first's; inf where they do not.
    """

    scored: Sequence[tuple[int, int]]
    partings: Sequence[tuple[float, float]]
    longest: int
    """Tokens of the longest answer, its end included."""

    def within(self, start: int, end: int) -> Parted:
        """What happens after `start` tokens and within `end` to answers that had not parted before."""
        left = [(ours, again) for ours, again in self.partings if ours > start and again > start]
        worse = sum(ours <= end < again for ours, again in left)
        better = sum(again <= end < ours for ours, again in left)
        return Parted(worse, better, sum(again <= end for _, again in left), len(left))


@dataclass(frozen=True)
class Parted:
    """Of `n` prompts: those whose answer parts in the variant only (`worse`), in the adapter's second run only
    (`better`), in that run at all (`again`)."""

    worse: int
    better: int
    again: int
    n: int


def acceptance_length(told: Iterable[Request | Answer], level: float = 0.95) -> Interval:
    """Tokens that a step gives, of requests or answers that tell their steps; each is a cluster."""
    counts = [(each.steps, each.accepted or 0) for each in told if each.steps]
    gained = [steps + accepted for steps, accepted in counts]
    return stats.ratio_of_means(gained, [steps for steps, _ in counts], level)


class Evidence(Index):
    """What the measurements of a run say of what a rule asks; nothing is computed twice."""

    def certificates(self, variant: str) -> list[str]:
        """How the artifacts that a variant is made of were made and checked, in the order they were made."""
        steps = {build.id: build for build in self.plan.builds}
        found, at = [], self.plan.models[variant]
        while build := steps.get(at):
            built = self.builds.get(at)
            if built and built.certificate:
                found.append(f"{build.step.plugin}: parity certificate {built.certificate}")
            if built and built.quantization:
                found.append(f"{build.step.plugin}: {built.quantization}")
            at = build.parent
        return found[::-1]

    # ---- speed ------------------------------------------------------------------------------

    def blocks(self, variant: str, workload: str) -> int:
        """Blocks in which the variant was measured on the workload."""
        return len(self.turns.get((variant, workload), {}))

    def requests(self, variant: str, workload: str) -> list[Request]:
        """All timed requests, in order."""
        return [r for _, turn in sorted(self.turns.get((variant, workload), {}).items()) for r in turn]

    def blocks_of(self, variant: str) -> int:
        """Blocks in which the variant was measured on any workload, those among them in which it failed."""
        measured = [
            turns for found in (self.turns, self.failed) for (name, _), turns in found.items() if name == variant
        ]
        return len({block for turns in measured for block in turns})

    def requests_of(self, variant: str) -> int:
        """Timed requests of the variant that count, of all workloads, failed ones among them."""
        launched = [self.launched_turns(variant, workload) for workload in self.plan.recipe.workloads]
        return sum(len(turn) for launches in launched for turns in launches for turn in turns)

    def touched_share(self, variant: str, workload: str) -> float:
        """The share of the workload's timed prompts that a policy of the variant shortened."""
        requests = self.requests(variant, workload)
        asked = sum(request.batch for request in requests)
        return sum(request.touched for request in requests) / asked if asked else 0.0

    def paired(self, variant: str, against: str, workload: str, field: Field) -> list[float]:
        """log(variant / against) of the block medians of a request's field, one per shared block, in order."""
        return list(self.series(variant, against, workload, field).values())

    def series(self, variant: str, against: str, workload: str, field: Field) -> Series:
        """The same by block. A turn that failed is worse than any that did not; where both failed, none says more."""
        found = dict(self._logs(variant, against, workload, field))
        ours, theirs = ((v, workload) for v in (variant, against))
        for block in self.failed.get(ours, {}).keys() & self.turns.get(theirs, {}).keys():
            found[block] = FAILED
        for block in self.failed.get(theirs, {}).keys() & self.turns.get(ours, {}).keys():
            found[block] = -FAILED
        return dict(sorted(found.items()))

    def _logs(self, variant: str, against: str, workload: str, field: Field) -> Series:
        """The log ratio of each block in which both were measured."""
        ours, theirs = self.turns.get((variant, workload), {}), self.turns.get((against, workload), {})
        shared = sorted(ours.keys() & theirs.keys())
        medians = {b: (_median(ours[b], field), _median(theirs[b], field)) for b in shared}
        return {b: math.log(a / c) for b, (a, c) in medians.items() if is_time(a) and is_time(c)}

    def launches_of(self, variant: str, against: str, workload: str, blocks: Iterable[int]) -> list[int] | None:
        """For each block the number of the launches it shares, of either variant; None where launches were not logged.

        A block belongs with the one before as long as one of the two workers is still the same."""
        logged = [found for v in (variant, against) if (found := self._launch_of.get((v, workload)))]
        if not logged:
            return None
        numbers: list[int] = []
        before: tuple[int | None, ...] = ()
        for block in blocks:
            now = tuple(found.get(block) for found in logged)
            shares = any(a == b for a, b in zip(before, now, strict=False))
            numbers.append(numbers[-1] + (not shares) if numbers else 0)
            before = now
        return numbers

    def ratio(self, variant: str, against: str, workload: str, field: Field, level: float = 0.95) -> Interval | None:
        """The ratio variant / against of a request's field, paired by block, with bounds that respect launches; None of
        no block."""
        series = self.series(variant, against, workload, field)
        if not series:
            return None
        return exp(stats.paired(series.values(), level, self.launches_of(variant, against, workload, series)))

    def resolution(self, variants: Iterable[str], workload: str, field: Field) -> float:
        """How far a coarse clock may have moved the log ratio of two variants; 0 for a clock that tells times apart."""
        found = 0.0
        for variant in variants:
            found += stats.resolution(times(self.requests(variant, workload), field))
        return found

    def launched_turns(self, variant: str, workload: str, blocks: int | None = None) -> list[list[Sequence[Request]]]:
        """The timed requests of the first `blocks` blocks (None = all), turn by turn, in groups that share their fate:
        a launch, or a block where launches were not logged. Failed turns are among them."""
        key = (variant, workload)
        turns = {**self.turns.get(key, {}), **self._partial.get(key, {})}
        launch_of = self._launch_of.get(key, {})
        groups: dict[int, list[Sequence[Request]]] = defaultdict(list)
        for block in sorted(turns)[:blocks]:
            groups[launch_of.get(block, block)].append(turns[block])
        return list(groups.values())

    def launch_count(self, variant: str, workload: str, blocks: int | None = None) -> int:
        """How many such groups there are."""
        return len(self.launched_turns(variant, workload, blocks))

    def samples(self, variant: str, workload: str, field: Field, blocks: int | None = None) -> list[list[float]]:
        """A field of all these requests, in those groups. A failed request took forever."""
        return [
            [value for turn in turns for request in turn if (value := _waited(request, field)) is not None]
            for turns in self.launched_turns(variant, workload, blocks)
        ]

    def loads(self, variant: str, workload: str) -> int:
        """How many loads that were run apart the variant has on the workload."""
        if f"{variant}@{workload}" not in self.apart:
            return 0
        return len(self.turns.get((variant, workload), {})) + len(self.failed.get((variant, workload), {}))

    def field(self, metric: Metric) -> Field:
        """The field of a request that a race on this metric compares, on the clock that judges."""
        return "cpu_ms" if self.clock[0] == "cpu" else self.wall_field(metric)

    def wall_field(self, metric: Metric) -> Field:
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
        timed = [launch for name, launches in self.launches.items() for launch in launches if name in self._timed]
        if any(launch.device != "cpu" for launch in timed):
            return "wall", "auto: the work is not done on this process's CPU"
        if any(launch.threads != 1 for launch in timed):
            return "wall", "auto: with several threads CPU time is not what a user waits for"
        twin, workload = self.baseline + TWIN, recipe.minimize.workload
        spreads = []
        fields: tuple[Field, Field] = (self.wall_field(recipe.minimize), "cpu_ms")
        for field in fields:
            logs = self.paired(twin, self.baseline, workload, field)[:FEWEST]
            spreads.append(stats.median(abs(x) for x in logs))
        wall, cpu = spreads
        if len(logs) < FEWEST:
            return "wall", f"auto: not yet {FEWEST} blocks of the A/A arm"
        clocks = f"{percent(wall, 2)} on the wall clock and by {percent(cpu, 2)} in CPU time"
        seen = f"two copies of {self.baseline} differed by {clocks}"
        return ("cpu" if wall > NOISIER * cpu else "wall"), f"auto: in the first {FEWEST} blocks {seen}"

    @property
    def _timed(self) -> set[str]:
        return {variant for variant, _ in self.turns}

    @cached_property
    def _paces(self) -> dict[str, Pace | None]:
        return {}

    def pace(self, workload: str) -> Pace | None:
        """How long further blocks of the workload's race take; None where that is not known."""
        if workload not in self._paces:
            measure = self.plan.recipe.measure
            self._paces[workload] = pace(self.lines, workload, measure.relaunch, 2 * measure.deadline_s)
        return self._paces[workload]

    def minutes(self, workload: str, blocks: int) -> float | None:
        """About how many minutes so many further blocks take; None where that is not known."""
        known = self.pace(workload)
        return known.minutes(blocks) if known else None

    # ---- what a machine does to a measurement -------------------------------------------------

    def disturbed(self, workload: str) -> dict[int, list[str]]:
        """Blocks in which something else was at work, and what it was."""
        devices = {launch.device for launches in self.launches.values() for launch in launches}
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
        intervals span launches where they differ (stats.paired). Shown means an F test over the paired logs of all
        variants at 1 %.
        """
        field = self.field(Metric(self.plan.recipe.minimize.name, workload))
        between = within = 0.0
        groups = blocks = 0
        for name in {name for name, workload_ in self.turns if workload_ == workload} - {self.baseline}:
            logs = self._logs(name, self.baseline, workload, field)
            labels = self.launches_of(name, self.baseline, workload, logs) or range(len(logs))
            launched: dict[int, list[float]] = defaultdict(list)
            for label, value in zip(labels, logs.values(), strict=True):
                launched[label].append(value)
            mine = list(launched.values())
            if len(mine) < 2 or len(logs) <= len(mine):
                continue
            centre = sum(map(sum, mine)) / sum(map(len, mine))
            between += sum(len(g) * (sum(g) / len(g) - centre) ** 2 for g in mine)
            within += sum((x - sum(g) / len(g)) ** 2 for g in mine for x in g)
            groups, blocks = groups + len(mine) - 1, blocks + sum(map(len, mine)) - len(mine)
        if not groups or not within:
            return None
        ratio, each = (between / groups) / (within / blocks), (groups + blocks) / groups
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

    def _whole(self, requests: Sequence[Request], workload: str) -> list[float]:
        """Durations of a launch's requests that generated all their tokens: later warm-ups are cut short. Where answers
        stop by themselves they cannot be told apart, and only the timed ones count."""
        if self.plan.recipe.workloads[workload].lengths == "natural":
            whole = [request for request in requests if not request.warmup]
        else:
            most = max((request.new_tokens for request in requests), default=0)
            whole = [request for request in requests if request.new_tokens == most]
        return [ms for request in whole if (ms := request.request_duration_ms) is not None]

    # ---- quality ----------------------------------------------------------------------------

    def rows(self, variant: str, launch: int = 1) -> Rows:
        """A variant's judged answers by prompt. The baseline's second launch is its null."""
        return self.answers.get((variant, launch), {})

    def partings(self, ours: Rows, theirs: Rows) -> dict[str, float]:
        """After how many tokens two sets of answers part, by prompt; inf where they do not. What comes after a parting
        are answers to different prompts, so it is not compared."""
        found = {}
        for row in ours.keys() & theirs.keys():
            a, b = ours[row].tokens, theirs[row].tokens
            common = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            parted = a != b or ours[row].stopped != theirs[row].stopped
            found[row] = common + 1 if parted else math.inf
        return found

    def disagreement(self, variant: str, against: str, rows: Iterable[str] | None = None) -> Disagreement:
        """How far the variant is from `against`, beside how far the baseline's second run is from its first, at the
        same positions; among `rows` where they are given."""
        first, second = self.rows(self.baseline, 1), self.rows(self.baseline, 2)
        ours, reference = self.rows(variant), self.rows(against)
        seen, null = self.partings(ours, reference), self.partings(second, first)
        shared = sorted(seen.keys() & null.keys() & set(seen if rows is None else rows))
        longest = max((len(answers[r].tokens) + 1 for r in shared for answers in (ours, reference)), default=0)
        sides = [ours, second] if against == self.baseline else [ours, second, reference]
        scored = []
        for row in shared:
            agreed = [agree for answers in sides if (agree := answers[row].agree) is not None]
            if len(agreed) < len(sides):
                continue
            n = first[row].scored_tokens
            own, *others = (n - agree for agree in agreed)
            scored.append((own - max(others), n))
        return Disagreement(tuple(scored), tuple((seen[row], null[row]) for row in shared), longest)

    def critical_errors(self, variant: str, parent: str = "") -> tuple[list[CriticalError], int]:
        """The Tier 1 errors of a variant that the baseline makes in neither of its runs, nor `parent` where one is
        given, one for each prompt; and how many different prompts were asked."""
        first, second = self.rows(self.baseline, 1), self.rows(self.baseline, 2)
        theirs = self.rows(parent)
        errors, prompts = [], set()
        for row, answer in self.rows(variant).items():
            if row not in first:
                continue
            prompts.add(answer.prompt or row)
            runs = [answers[row] for answers in (first, second) if row in answers]
            known = [*runs, *([theirs[row]] if row in theirs else [])]
            excused = {flag for other in known for flag in other.flags}
            fresh = [flag for flag in answer.flags if flag not in excused]
            tie = False
            if answer.critical and not answer.correct and all(other.correct for other in known):
                tie = not fresh and row in second and _near_tie(answer, second[row])
                fresh.append(ANSWERED_WRONG)
            if fresh:
                errors.append(CriticalError(row, fresh[0], tie, row not in second, tuple(fresh[1:])))
        return errors, len(prompts)

    def lost(self, variant: str) -> tuple[int, int, int]:
        """Of the prompts that the baseline's first run gets right: those wrong in the variant alone, those wrong in the
        baseline's second run alone, and how many there are."""
        ours, second = self.rows(variant), self.rows(self.baseline, 2)
        right = [r for r, answer in self.rows(self.baseline).items() if answer.correct and r in ours and r in second]
        worse = sum(second[r].correct and not ours[r].correct for r in right)
        better = sum(ours[r].correct and not second[r].correct for r in right)
        return worse, better, len(right)

    def slices(self, variant: str) -> dict[str, list[str]]:
        """The prompts that carry each tag."""
        found: dict[str, list[str]] = defaultdict(list)
        for row, answer in self.rows(variant).items():
            for tag in answer.slices:
                found[tag].append(row)
        return dict(sorted(found.items()))

    def reused(self, variant: str, workload: str, level: float = 0.95) -> Interval | None:
        """The share of a workload's prompt tokens that started from what earlier requests had left; None where that is
        not told."""
        requests = self.requests(variant, workload)
        told = [(r.reused, r.prompt_tokens) for r in requests if r.reused is not None and r.prompt_tokens]
        if not told:
            return None
        reused, tokens = zip(*told, strict=True)
        return stats.ratio_of_means(reused, tokens, level)

    def acceptance_lengths(self, variant: str) -> dict[str, Interval]:
        """Tokens that a step gave, of the answers that carry each tag, where some were proposed; "" is all of them."""
        answers = {row: a for row, a in self.rows(variant).items() if a.steps}
        tagged = {"": list(answers), **self.slices(variant)}
        by_slice = {tag: [answers[row] for row in rows if row in answers] for tag, rows in tagged.items()}
        return {tag: acceptance_length(several) for tag, several in by_slice.items() if several}

    def flips(self, variant: str, rows: Iterable[str] | None = None) -> tuple[int, int]:
        """Prompts right before and wrong after, and the reverse; among `rows` where they are given."""
        ours, theirs = self.rows(variant), self.rows(self.baseline)
        shared = ours.keys() & theirs.keys() & set(ours if rows is None else rows)
        worse = sum(theirs[r].correct and not ours[r].correct for r in shared)
        better = sum(ours[r].correct and not theirs[r].correct for r in shared)
        return worse, better

    def worst_slice(self, variant: str) -> tuple[str, int, int, int] | None:
        """The slice that lost most of its answers: (its tag, worse, better, asked); None where none lost any."""
        found = [(tag, *self.flips(variant, rows), len(rows)) for tag, rows in self.slices(variant).items()]
        worst = max(found, key=lambda f: (f[1] - f[2]) / f[3], default=None)
        return worst if worst and worst[1] > worst[2] else None

    def survival(self, variant: str, against: str = "") -> Interval | None:
        """How much of the adapter's shift from the base is left in the variant, or how much more than in another one;
        None where the base was not asked.

        Over the tokens of the scored answers, a = log p(adapter) - log p(base) and v the same of the variant:
        sum(a v) / sum(a^2), the variant's shift along the adapter's. 1 is all of it and 0 none; noise that knows
        nothing of the adapter, such as rounding, does not move it. Prompts are clusters.
        """
        ours, others = _kept(self.rows(variant)), _kept(self.rows(against)) if against else {}
        shared = [row for row in ours if not against or row in others]
        shifts = [shift for row in shared if (shift := self.rows(variant)[row].shift) is not None]
        if not any(shifts):
            return None
        return stats.ratio_of_means([ours[row] - others.get(row, 0.0) for row in shared], shifts)

    def cut(self, variant: str) -> tuple[list[str], int]:
        """Prompts whose answer was cut off, where the baseline's ended by itself in time; and how many were asked."""
        ours, theirs = self.rows(variant), self.rows(self.baseline)
        shared = sorted(ours.keys() & theirs.keys())
        return [r for r in shared if theirs[r].stopped and not ours[r].stopped], len(shared)

    def touched(self, variant: str) -> list[str]:
        """Prompts that a policy of the variant shortened."""
        return sorted(row for row, answer in self.rows(variant).items() if answer.uncut_tokens is not None)

    def lengths(self) -> list[int]:
        """Lengths of the baseline's own answers in tokens, end of sequence included; those it was cut off at too."""
        return sorted(answer.new_tokens for answer in self.rows(self.baseline).values())

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
        return built.size_bytes if built else None


def exp(interval: Interval) -> Interval:
    """From a log-ratio to a ratio."""
    return Interval(_exp(interval.estimate), _exp(interval.low), _exp(interval.high), interval.n, interval.level)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _median(turn: Sequence[Request], field: Field) -> float:
    return stats.median(times(turn, field))


def _waited(request: Request, field: Field) -> float | None:
    """A field of a request; a failed one took forever."""
    return math.inf if request.error else VALUE[field](request)


def _kept(rows: Rows) -> dict[str, float]:
    """What is kept of the adapter's shift in each answer that tells."""
    told = {row: answer.kept for row, answer in rows.items() if answer.kept is not None and answer.shift is not None}
    return {row: kept for row, kept in told.items() if math.isfinite(kept)}


def _near_tie(answer: Answer, second: Answer) -> bool:
    """Whether the reference hardly chose the first token at which the answer leaves its own: its margin there is within
    what changes from one of its runs to the next, at that token or in a tenth of this answer's. One difference of two
    runs is a coarse look at noise: many are 0 where logits have 8 bits."""
    parting, noise = answer.parting, second.noise
    if not parting or not noise:
        return False
    at, margin = parting
    return bool(at < len(noise) and margin <= max(noise[at], sorted(noise)[len(noise) * 9 // 10]))


_DISTURBED: Sequence[tuple[Callable[[Disturbance], float | None], float, str]] = (
    (lambda moment: moment.steal, 0.01, "the host took {} of the CPU time"),
    (lambda moment: moment.throttled, 0.01, "a quota withheld {} of the CPU time"),
    (lambda moment: moment.heat_events, 0, "the processor slowed down for heat"),
    (lambda moment: moment.gpu_foreign, 0, "another process was on the GPU"),
    (lambda moment: moment.gpu_slowed, 0, "the GPU slowed down for heat or power"),
)
"""What is read around a turn, more than which it disturbs, and how that is said."""


def _disturbances(moment: Disturbance, threads: int) -> Iterator[str]:
    for read, most, words in _DISTURBED:
        if (found := read(moment) or 0) > most:
            yield words.format(percent(found))
    cores, foreign = moment.cores, moment.foreign_cores
    if foreign is not None and foreign > cores - (threads or cores) + 0.25:
        yield "other processes took processors it needed"
