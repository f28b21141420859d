"""What users saw of a variant in production, beside what was decided of it. It judges nothing. Pure.

Requests of a minute share their fate: windows, not requests, are the samples.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peftopt import stats
from peftopt.decision.evidence import FIELDS, Evidence
from peftopt.decision.index import VALUE
from peftopt.loadtest import moments
from peftopt.measurements import Load, Request, Sent
from peftopt.metrics import QUANTILES, counted
from peftopt.records import Decision, Interval, Threshold, Workload

WINDOW_S = 60.0
ALIKE = 1.25
"""Lengths are alike where no quantile of theirs is more than this many times the other's."""
SHOWN = ("p50", "p95")
TIMES = ("ttft", "tpot", "latency")
REFUSED = "refused"
LATEST = 1e11
"""No moment is later, in seconds since 1970: that is the year 5138."""
UNTOLD = "of a kind that is not told"
OTHER_LENGTHS = "not comparable: other lengths"

Windows = Sequence[Sequence[Sent]]
Spread = Mapping[str, Interval]
"""Quantiles by their names."""


@dataclass(frozen=True)
class Row:
    """A metric: what was `decided` and `observed` of it, a plain `word`, and the reason for it. `unit`: "ms",
    "tokens/s", "share", "tokens", "requests", or "allowed", where `decided` is the share that may be over a limit."""

    name: str
    unit: str
    decided: Interval | None
    observed: Interval | None
    word: str
    reason: str = ""


@dataclass(frozen=True)
class Served:
    """A variant in production: `requests` from `began` to `ended` (ISO 8601, UTC), those left out that their clients
    gave up; how many each version had; what the log `lacks`; no `rows` where the run has no such variant."""

    variant: str
    requests: int
    began: str
    ended: str
    versions: Mapping[str, int]
    lacks: tuple[str, ...]
    rows: tuple[Row, ...]


def served(decision: Decision, evidence: Evidence) -> list[Served]:
    """Each variant that users were answered by, in the decision's order; then names that are no variant of the run."""
    known = [variant.name for variant in decision.variants]
    names = sorted(evidence.production, key=lambda name: known.index(name) if name in known else len(known))
    return [found for name in names if (found := _served(decision, evidence, name))]


def _served(decision: Decision, evidence: Evidence, variant: str) -> Served | None:
    loads = evidence.production[variant]
    once: dict[str, Sent] = {}  # a log may have been imported twice
    versions: Counter[str] = Counter()
    for load in loads:
        for request in _timed(load):
            versions[load.title] += request.id not in once
            once.setdefault(request.id, request)
    if not once:
        return None
    windows: dict[int, list[Sent]] = defaultdict(list)
    for request in once.values():
        windows[int(request.scheduled // WINDOW_S)].append(request)
    return Served(
        variant,
        len(once),
        moments.utc(min(request.scheduled for request in once.values())),
        moments.utc(max(request.done for request in once.values())),
        +versions,
        tuple(dict.fromkeys(what for load in loads for what in load.lacks)),
        tuple(_rows(decision, evidence, variant, list(windows.values()))),
    )


def _timed(load: Load) -> Iterator[Sent]:
    """The requests of a load, their times in seconds since 1970; those left out whose times are none."""
    try:
        start = moments.since_1970(load.started)
    except ValueError:  # another hand has written it
        start = 0.0
    for request in load.requests:
        moved = replace(request, scheduled=start + request.scheduled, done=start + request.done)
        if not request.warmup and 0 <= moved.scheduled <= moved.done < LATEST:
            yield moved


def _rows(decision: Decision, evidence: Evidence, variant: str, windows: Windows) -> Iterator[Row]:
    figures = next((each.figures for each in decision.variants if each.name == variant), None)
    if figures is None:
        return
    let_in = [[request for request in window if request.kind != REFUSED] for window in windows]
    for name in _workloads(decision, evidence, variant):
        yield from _Compared(evidence, figures, variant, name, let_in).rows()
    for threshold in evidence.plan.recipe.require:
        if threshold.metric.name.partition(".")[0] in TIMES and not threshold.relative:
            yield _limit(threshold, let_in)
    yield from _failures(evidence, variant, windows, let_in)


def _workloads(decision: Decision, evidence: Evidence, variant: str) -> list[str]:
    """The workloads that the decision rests on, where the variant was measured on them."""
    recipe = evidence.plan.recipe
    named = [recipe.minimize.workload, *(threshold.metric.workload for threshold in recipe.require)]
    return [name for name in dict.fromkeys(named) if name and evidence.requests(variant, name)]


class _Compared:
    """Production beside one workload of the run: `windows` of requests that were let in."""

    def __init__(
        self, evidence: Evidence, figures: Mapping[str, Interval], variant: str, workload: str, windows: Windows
    ) -> None:
        self.figures, self.name, self.windows = figures, workload, windows
        self.workload = evidence.plan.recipe.workloads[workload]
        self.measured = evidence.requests(variant, workload)
        prompts = [each.prompt_tokens / each.batch for each in self.measured if each.prompt_tokens is not None]
        answers = [each.new_tokens / each.batch for each in self.measured]
        self.prompts = _spread([prompts]), _spread(_values(windows, lambda request: request.prompt_tokens))
        self.answers = _spread([answers]), _spread(_values(windows, lambda request: request.new_tokens))
        self.at_once = _asked_at_once(self.workload, self.measured), _at_once(windows)

    def rows(self) -> Iterator[Row]:
        """The times, the throughput, and what tells whether they can be compared."""
        for family in TIMES:
            for q in SHOWN:
                yield self._time(family, q)
        yield self._throughput()
        for what, (decided, observed) in (("prompt tokens", self.prompts), ("answer tokens", self.answers)):
            for q in SHOWN:
                yield _length(f"{what} {q.upper()}@{self.name}", decided.get(q), observed.get(q))
        yield self._beside()

    def _time(self, family: str, q: str) -> Row:
        name, field = f"{family}.{q}@{self.name}", VALUE[FIELDS[family]]
        groups = _values(self.windows, lambda request: math.inf if request.error else field(request), failed=True)
        decided, observed = self.figures.get(name), _quantile(groups, QUANTILES[q])
        other = self._other(answers=family == "latency")
        if other and decided and observed:
            return Row(name, "ms", decided, observed, OTHER_LENGTHS, other)
        word, why = _compared(decided, observed, "slower", "faster")
        return Row(name, "ms", decided, observed, word, why or self._more_beside(word))

    def _throughput(self) -> Row:
        """Of requests one after the other each one's rate, of a load the rate of a window."""
        name = f"throughput@{self.name}"
        together = self.workload.loaded
        observed = _quantile(_window_rates(self.windows) if together else _own_rates(self.windows), 0.5)
        decided = self.figures.get(name)
        row = Row(name, "tokens/s", decided, observed, "")
        if together and self.at_once[1] and self.at_once[1].estimate < self.at_once[0].estimate:
            return replace(row, word="not comparable: less was asked for", reason=self._beside_text())
        if other := self._other(answers=True):
            return replace(row, word=OTHER_LENGTHS, reason=other)
        word, why = _compared(decided, observed, "faster", "slower")
        return replace(row, word=word, reason=why or self._more_beside(word))

    def _beside(self) -> Row:
        decided, observed = self.at_once
        word, why = _compared(decided, observed, "more at once", "fewer at once")
        return Row(f"own requests at once@{self.name}", "requests", decided, observed, word, why)

    def _other(self, answers: bool) -> str:
        """How lengths differ from the run's where a time depends on them; "" where they are alike or not told."""
        for what, (decided, observed) in (("prompts", self.prompts), ("answers", self.answers)):
            for q in SHOWN:
                ours, theirs = observed.get(q), decided.get(q)
                if ours and theirs and (answers or what == "prompts") and not _alike(theirs, ours):
                    told = f"{ours.estimate:,.0f} tokens ({q.upper()}), the run's {theirs.estimate:,.0f}"
                    return f"{what} of {told}"
        return ""

    def _more_beside(self, word: str) -> str:
        """What may explain that it is slower."""
        decided, observed = self.at_once
        return self._beside_text() if word == "slower" and observed and observed.low > decided.high else ""

    def _beside_text(self) -> str:
        decided, observed = self.at_once
        assert observed
        return f"{observed.estimate:.1f} requests at once, the run's {decided.estimate:.1f}"


# ---- limits and failures -------------------------------------------------------------------------


def _limit(threshold: Threshold, windows: Windows) -> Row:
    """The share of requests over a limit, failed ones among them, against the share that may be."""
    family, _, q = threshold.metric.name.partition(".")
    field, may = VALUE[FIELDS[family]], 1 - QUANTILES[q]
    groups = _values(windows, lambda request: math.inf if request.error else field(request), failed=True)
    shares = stats.share_of_groups((sum(value > threshold.limit for value in group), len(group)) for group in groups)
    row = Row(f"over {threshold.text}", "allowed", Interval(may, may, may, 0), shares, "within")
    if shares.low > may:
        return replace(row, word="over")
    if shares.high <= may:
        return row
    return replace(row, word="too few", reason="the interval still holds what is allowed")


def _failures(evidence: Evidence, variant: str, windows: Windows, let_in: Windows) -> Iterator[Row]:
    launched = (evidence.launched_turns(variant, name) for name in evidence.plan.recipe.workloads)
    run = [bool(r.error) for launches in launched for turns in launches for turn in turns for r in turn]
    decided = stats.proportion(sum(run), len(run)) if run else None
    kinds = Counter(kind for window in let_in for request in window if (kind := _kind(request)))
    names = {"failed": {*kinds}, **{f"failed: {kind}": {kind} for kind, _ in kinds.most_common()}}
    for name, which in names.items():
        observed = stats.share_of_groups((sum(_kind(r) in which for r in window), len(window)) for window in let_in)
        word, why = _compared(decided, observed, "more", "fewer")
        yield Row(name, "share", decided, observed, word, why)
    refused = stats.share_of_groups((sum(r.kind == REFUSED for r in window), len(window)) for window in windows)
    yield Row(REFUSED, "share", None, refused, "not comparable: a run refuses nobody" if refused.estimate else "within")


def _kind(request: Sent) -> str:
    """The kind of a failure, "" for an answer."""
    return (request.kind or UNTOLD) if request.error else ""


# ---- small parts ---------------------------------------------------------------------------------


def _compared(decided: Interval | None, observed: Interval | None, above: str, below: str) -> tuple[str, str]:
    """The word for two intervals: `above` and `below` for what lies outside the decided one, "within" where they
    overlap; and why there is none."""
    if decided is None or math.isnan(decided.estimate):
        return "not comparable: not measured", "the run does not tell it"
    if observed is None or math.isnan(observed.estimate):
        return "not comparable: not told", "the log does not tell it"
    if observed.low > decided.high:
        return above, ""
    if observed.high < decided.low:
        return below, ""
    if not _bounded(decided):
        return "too few", f"the run has {counted(decided.n, 'request')}"
    if not _bounded(observed):
        return "too few", f"{counted(observed.n, 'request')}, or minutes in which they came"
    return "within", ""


def _length(name: str, decided: Interval | None, observed: Interval | None) -> Row:
    row = Row(name, "tokens", decided, observed, "within")
    if decided is None or observed is None:
        return replace(row, word="not comparable: not told")
    if _alike(decided, observed):
        return row
    return replace(row, word="longer" if observed.estimate > decided.estimate else "shorter")


def _alike(decided: Interval, observed: Interval) -> bool:
    less, more = sorted(max(each.estimate, 1.0) for each in (decided, observed))
    return more <= ALIKE * less


def _bounded(interval: Interval) -> bool:
    return math.isfinite(interval.low) and math.isfinite(interval.high)


def _values(windows: Windows, value: Callable[[Sent], float | None], failed: bool = False) -> list[list[float]]:
    """A number of each answered request, or of each that was let in, window by window."""
    kept = [[request for request in window if failed or not request.error] for window in windows]
    told = ([value(request) for request in window] for window in kept)
    return [[x for x in window if x is not None and not math.isnan(x)] for window in told]


def _quantile(groups: Sequence[Sequence[float]], q: float) -> Interval | None:
    return stats.quantile_of_groups(groups, q) if any(groups) else None


def _spread(groups: Sequence[Sequence[float]]) -> Spread:
    return {q: stats.quantile_of_groups(groups, QUANTILES[q]) for q in SHOWN} if any(groups) else {}


def _own_rates(windows: Windows) -> list[list[float]]:
    """Tokens per second of each request; a failed one gave none."""

    def rate(request: Sent) -> float | None:
        if request.error or not request.request_duration_ms:
            return 0.0
        return 1e3 * request.new_tokens / request.request_duration_ms

    return _values(windows, rate, failed=True)


def _window_rates(windows: Windows) -> list[list[float]]:
    """Tokens per second of each window."""
    return [[sum(request.new_tokens for request in window if not request.error) / WINDOW_S] for window in windows]


def _at_once(windows: Windows) -> Interval | None:
    """How many requests were under way when one came, itself among them: the mean over requests."""
    came = sorted(request.scheduled for window in windows for request in window)
    over = sorted(request.done for window in windows for request in window)
    if not came:
        return None

    def under_way(at: float) -> int:
        return bisect.bisect_right(came, at) - bisect.bisect_right(over, at)

    sums = [sum(under_way(request.scheduled) for request in window) for window in windows]
    return stats.ratio_of_means(sums, [len(window) for window in windows])


def _asked_at_once(workload: Workload, measured: Sequence[Request]) -> Interval:
    """The same of the run. Of requests that come at a rate each comes to those that are under way (Little's law)."""
    asked = float(workload.users or workload.batch)
    if workload.rate:
        held = [each.request_duration_ms / 1e3 for each in measured if each.request_duration_ms is not None]
        asked = 1 + workload.rate * math.fsum(held) / max(len(held), 1)
    return Interval(asked, asked, asked, len(measured))
