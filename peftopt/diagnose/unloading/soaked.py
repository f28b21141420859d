"""Judges a server under a long load while adapters are loaded and unloaded. Pure.

windows of load, each with the memory at rest after it -> trends, errors, wrong answers, tails -> an exit code
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftopt import stats
from peftopt.canary.fingerprint import Wrong
from peftopt.diagnose.unloading import leaks
from peftopt.diagnose.unloading.cycled import Cycled
from peftopt.diagnose.unloading.leaks import TOLERATED, Kept
from peftopt.diagnose.unloading.resting import Held
from peftopt.errors import ACCEPTED, ENVIRONMENT, INCONCLUSIVE, INTERRUPTED, REJECTED
from peftopt.loadtest import summary
from peftopt.loadtest.summary import Request
from peftopt.metrics import QUANTILES
from peftopt.records import Interval

LEAK_FROM = 12
"""Windows from which a growth is called a leak: each has many cycles."""

LEAST = 4 * TOLERATED
"""Bytes a window that are nobody's worry, where it has few cycles."""

COUNTED = 0.25
"""Files or threads a window that are nobody's worry: a count that stays has no growth at all."""

HOUR = 3600.0


@dataclass(frozen=True)
class Window:
    """A part of the run: its users' requests, its cycles of adapters, the memory `held` at rest after it (None: not
    known), and its length with the rest, in seconds."""

    requests: tuple[Request, ...]
    cycles: int
    held: Held | None
    seconds: float


@dataclass
class Soaked:
    """A run. `before`: the memory before the first window. The log-probabilities of `asked` answers were checked, and
    `wrong` of them were another model's; `unclear`: such requests without an answer; `alike`: pairs that no prompt
    distinguishes. `churn`: None if the server loads no adapters. `stopped`: why it ended early, "" = it did not;
    `notes`: what a reader must know."""

    before: Held | None = None
    windows: list[Window] = field(default_factory=list)
    churn: Cycled | None = None
    asked: int = 0
    wrong: list[Wrong] = field(default_factory=list)
    unclear: int = 0
    alike: list[tuple[str, str]] = field(default_factory=list)
    stopped: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trend:
    """The trend of a memory or count at rest: `per_hour`, `first` and `last` in bytes, or a count. `grows` says whether
    it does, None if that is not decided."""

    per_hour: Interval
    first: float
    last: float
    grows: bool | None


@dataclass(frozen=True)
class Tail:
    """A quantile of the time to the first token: in each window (ms; None without an answer), and its ratio of the last
    third of them to the first, paired."""

    by_window: tuple[float | None, ...]
    ratio: Interval


@dataclass(frozen=True)
class Judged:
    """The judgement of a run. `errors` by kind; `early` and `late`: the share of requests that failed in the first and
    in the last third of windows."""

    outcome: int
    reasons: tuple[str, ...]
    trends: Mapping[str, Trend]
    tails: Mapping[str, Tail]
    requests: int
    errors: Mapping[str, int]
    early: Interval
    late: Interval
    hours: float


def judge(soaked: Soaked) -> Judged:
    """The exit code, with its reasons: 1 for a leak, a wrong answer, an unload that never returned or errors that grow;
    3 if one of these is not decided; 4 if nothing was answered."""
    requests = [request for window in soaked.windows for request in window.requests]
    trends = _trends(soaked)
    early, late = _failures(soaked.windows)
    bad = [f"growth of {name}" for name, trend in trends.items() if trend.grows]
    if soaked.wrong:
        bad.append("a wrong adapter answered")
    if late.low > early.high:
        bad.append("errors grow")
    if soaked.churn and soaked.churn.late:
        bad.append(f"{soaked.churn.late.what!r} never returned")
    elif soaked.churn and soaked.churn.stopped:
        bad.append(f"adapters could not be loaded and unloaded any more: {soaked.churn.stopped}")
    open_ = [f"growth of {name} is not decided" for name, trend in trends.items() if trend.grows is None]
    if not trends:
        open_.append("memory is not known: the server's processes are not on this machine")
    if soaked.alike or not soaked.asked:
        open_.append("whether the right adapter answers is not known of all")
    outcome = REJECTED if bad else INCONCLUSIVE if open_ else ACCEPTED
    if not any(not request.error for request in requests):
        outcome, bad = ENVIRONMENT, ["nothing was answered", *bad]
    if soaked.stopped == "interrupted":
        outcome = INTERRUPTED
    return Judged(
        outcome,
        tuple(bad + open_),
        trends,
        {name: _tail(soaked.windows, q) for name, q in QUANTILES.items()},
        len(requests),
        summary.figures(requests).errors,
        early,
        late,
        sum(window.seconds for window in soaked.windows) / HOUR,
    )


def _trends(soaked: Soaked) -> dict[str, Trend]:
    """Of all that somebody tells."""
    held = [each for each in (soaked.before, *(window.held for window in soaked.windows)) if each is not None]
    if not held or not soaked.windows:
        return {}
    cycles = sum(window.cycles for window in soaked.windows) / len(soaked.windows)
    series: dict[str, tuple[list[float], float]] = {
        "memory": ([each.host for each in held], max(LEAST, TOLERATED * cycles)),
        "open files": ([float(each.handles) for each in held], COUNTED),
        "threads": ([float(each.threads) for each in held], COUNTED),
    }
    on_gpu = [each.gpu for each in held if each.gpu is not None]
    if on_gpu:
        series["GPU memory"] = (on_gpu, max(LEAST, TOLERATED * cycles))
    an_hour = len(soaked.windows) * HOUR / sum(window.seconds for window in soaked.windows)
    return {name: _trend(levels, tolerated, an_hour) for name, (levels, tolerated) in series.items()}


def _trend(levels: Sequence[float], tolerated: float, windows_an_hour: float) -> Trend:
    kept: Kept = leaks.judge(levels, tolerated=tolerated, leak_from=LEAK_FROM)
    per = kept.per_cycle
    per_hour = replace(
        per,
        estimate=per.estimate * windows_an_hour,
        low=per.low * windows_an_hour,
        high=per.high * windows_an_hour,
    )
    grows = None if kept.outcome == "undecided" else kept.outcome == "leaks"
    return Trend(per_hour, levels[0], levels[-1], grows)


def _thirds(windows: Sequence[Window]) -> tuple[Sequence[Window], Sequence[Window]]:
    """The first and the last third; a first window is no pair's."""
    third = max(1, len(windows) // 3)
    return windows[:third], windows[-third:]


def _failures(windows: Sequence[Window]) -> tuple[Interval, Interval]:
    early, late = _thirds(windows)
    counts = [[(sum(bool(r.error) for r in w.requests), len(w.requests)) for w in part] for part in (early, late)]
    return stats.share_of_groups(counts[0]), stats.share_of_groups(counts[1])


def _tail(windows: Sequence[Window], q: float) -> Tail:
    times = [[r.ttft_ms for r in w.requests if r.ttft_ms is not None and not r.error] for w in windows]
    by_window = [stats.quantile(each, q).estimate if each else None for each in times]
    third = max(1, len(windows) // 3)
    pairs = zip(by_window[:third], by_window[-third:], strict=True) if windows else ()
    logs = [math.log(late / early) for early, late in pairs if early and late]
    ratio = stats.hodges_lehmann(logs, 0.95)
    low, high = math.exp(ratio.low), math.exp(ratio.high)
    return Tail(tuple(by_window), replace(ratio, estimate=math.exp(ratio.estimate), low=low, high=high))


def errors_of_steps(churn: Cycled) -> Mapping[str, int]:
    """The errors of loads and unloads, the most frequent first."""
    return dict(Counter(f"{step.what}: {step.error}" for step in churn.steps if step.error).most_common())
