"""What a finished run promises of production: its own limits, times, rates and lengths. Pure, but for `load`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt import stats, store
from peftopt.decision import figures
from peftopt.decision.evidence import FIELDS, Evidence
from peftopt.decision.index import is_time, times
from peftopt.gateway import decided, held
from peftopt.measurements import Measured, Request
from peftopt.metrics import QUANTILES, TASK, counted, format_value
from peftopt.records import Decision, Metric, Plan, Threshold, Workload
from peftopt.watch.promise import Bound, Lengths, Promise
from peftopt.watch.spans import Sample, Time

LEVEL = 0.95
"""Of every interval here, two-sided."""

UPPER = (1 + LEVEL) / 2
"""How sure an upper bound is."""

TAIL = 0.05
"""The share of the run's prompts, and of its answers, that are shorter than `Lengths.low`, and longer than its high."""

ERRORS = ("oom", "timeout_connect", "timeout_first", "timeout_gap", "timeout", "engine_dead", "upstream", "gateway")
"""Kinds of errors that are the service's, but for "refused": see gateway.lines.Line.kind."""

TIMES: tuple[Time, ...] = ("latency", "ttft", "tpot")
QUANTILE_OF: Mapping[str, tuple[Time, float]] = {
    f"{time}.{name}": (time, quantile) for time in TIMES for name, quantile in QUANTILES.items()
}
"""Metric -> which time of a request, and which quantile of it."""

FIND_RATE = "peftopt load URL --find-rate does"

_TRUTH = "needs answers whose truth is known; the canary prompts stand in"
_BASELINE = "compares with the baseline, which production does not ask"
_PEAK = "was the peak of the run's process; production is watched for growth with each adapter that is loaded"
UNWATCHED = {
    "accuracy": _TRUTH,
    "flips": _TRUTH,
    "critical_errors": _TRUTH,
    "validity": "needs the texts of answers, which are not kept; the canary prompts stand in",
    **dict.fromkeys(
        ("perplexity", "kl", "top1", "greedy_match", "delta_survival", "length"),
        f"{_BASELINE}; the canary prompts stand in",
    ),
    "memory": _PEAK,
    "gpu_memory": _PEAK,
    "size": "does not change while it is served",
    "load_time": "is known when an engine starts, not while it answers",
    "throughput": "depends on how much is asked; tokens per second of the engine's time stand in",
}
"""Metric -> why production cannot be held against a limit on it."""


def load(folder: Path, variant: str = "") -> Promise:
    """Of a run's folder: of its chosen variant, or of another one that is named. Raises BadInput for a folder that is
    no finished run, and a run that chose nothing."""
    run = decided.finished(folder, variant)
    measured = store.read(folder / "measurements.jsonl")
    return of_run(run.plan, run.decision, measured, run.variant, folder.resolve().name)


def of_run(plan: Plan, decision: Decision, measured: Sequence[Measured], variant: str, run: str = "") -> Promise:
    """What a run promises of a variant; `run` is its name.

    Times, tokens per second and the lengths of prompts are those of one workload, the one with the most requests at
    once that was measured often enough: what held there holds beside fewer. Intervals and bounds are at LEVEL.
    """
    evidence = Evidence(plan, measured)
    sla, unwatched = _required(plan.recipe.require)
    asked = _asked(evidence, variant)
    drift, lacking = _drift(asked)
    tokens_per_s, no_tokens = _tokens_per_s(asked)
    new_tokens = _new_tokens(asked)
    load = held.of_run(plan, decision, measured, variant, run)
    gaps = {
        "lengths of prompts": "" if asked.prompt_tokens else "the run does not know them of single requests",
        "tokens per second": no_tokens,
        "lengths of answers": "" if new_tokens else "the run's answers have a fixed length, and no others were asked",
        "rate of requests": "" if load else f"the run tells none that its limits hold at; {FIND_RATE}",
    }
    unwatched += lacking + [f"{what}: {reason}" for what, reason in gaps.items() if reason]
    return Promise(
        run=run or decision.recipe,
        variant=variant,
        sla=sla,
        drift=drift,
        beside=asked.beside,
        tokens_per_s=tokens_per_s,
        errors=_errors(evidence, variant),
        prompt_tokens=asked.prompt_tokens,
        new_tokens=new_tokens,
        rate=load.rate if load else None,
        unwatched=tuple(unwatched),
    )


# ---- the recipe's own limits -------------------------------------------------------------------


def _required(require: Sequence[Threshold]) -> tuple[tuple[Bound, ...], list[str]]:
    """The limits that can be watched, and of the others why not."""
    watched = [limit for limit in require if limit.metric.name in QUANTILE_OF and not limit.relative]
    bounds = [_bound(limit.text, limit.metric, limit.limit) for limit in watched]
    unwatched = [f"{limit.text}: {_reason(limit)}" for limit in require if limit not in watched]
    workloads = dict.fromkeys(limit.metric.workload for limit in watched)
    if not bounds:
        unwatched.append("an SLA: the recipe limits no latency, ttft or tpot in ms or s; the run's own times stand in")
    elif len(workloads) > 1:
        names = ", ".join(workloads)
        unwatched.append(f"{names} apart: a request does not say which it is of, so every limit is held against all")
    return tuple(bounds), unwatched


def _bound(name: str, metric: Metric, limit_ms: float) -> Bound:
    time, quantile = QUANTILE_OF[metric.name]
    return Bound(name, time, limit_ms / 1e3, round(1 - quantile, 6))


def _reason(limit: Threshold) -> str:
    name = limit.metric.name
    if name in UNWATCHED:
        return UNWATCHED[name]
    return _TRUTH if name.startswith(TASK) else f"{_BASELINE}; the run's own times stand in"


# ---- what the run measured ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What a variant was asked in one workload, and with how many requests at once."""

    evidence: Evidence
    variant: str
    workload: Workload
    beside: int
    prompt_tokens: Lengths | None

    @property
    def answered(self) -> list[list[Request]]:
        """Timed requests that did not fail, by launch."""
        launches = self.evidence.launched_turns(self.variant, self.workload.name)
        return [[r for turn in turns for r in turn if not r.error] for turns in launches]


def _asked(evidence: Evidence, variant: str) -> _Asked:
    """The workload with the most requests at once, among those whose times have upper bounds. Of equals the one whose
    time is minimized."""
    recipe = evidence.plan.recipe
    each = [_of_workload(evidence, variant, workload) for workload in recipe.workloads.values()]

    def rank(asked: _Asked) -> tuple[bool, int, bool]:
        bounds, _ = _drift(asked)
        return bool(bounds), asked.beside, asked.workload.name == recipe.minimize.workload

    return max(each, key=rank)


def _of_workload(evidence: Evidence, variant: str, workload: Workload) -> _Asked:
    requests = evidence.requests(variant, workload.name)
    durations = times(requests, "request_duration_ms")
    beside = workload.users or workload.batch
    if workload.rate and durations:  # by Little's law
        beside = max(1, math.ceil(workload.rate * sum(durations) / len(durations) / 1e3))
    alike = [
        other.name
        for other in evidence.plan.recipe.workloads.values()
        if (other.prompts, other.slice) == (workload.prompts, workload.slice)
    ]
    singles = _singles(request for name in alike for request in evidence.requests(variant, name))
    return _Asked(evidence, variant, workload, beside, _lengths([r.prompt_tokens for r in singles]))


def _singles(requests: Iterable[Request]) -> list[Request]:
    """Those of one prompt each; of a prompt that is known by its id the first."""
    by_id = {request.id or f"{number}": request for number, request in enumerate(requests) if request.batch == 1}
    return list(by_id.values())


def _lengths(tokens: Iterable[int | None], cut: Sequence[int] = ()) -> Lengths | None:
    """Of so many tokens each, and of those that were `cut` off at so many: nobody knows how much longer they were."""
    ended = [float(each) for each in tokens if each is not None]
    known = Sample([*ended, *map(float, cut)])
    if not known.n:
        return None
    low, high = known.quantile(TAIL), known.quantile(1 - TAIL)
    shorter = sum(each < low for each in known.values)
    longer = Sample(ended).above(high) + len(cut)
    return Lengths(low, high, *(stats.upper_bound(k, known.n, UPPER) for k in (shorter, longer)))


def _drift(asked: _Asked) -> tuple[tuple[Bound, ...], list[str]]:
    """The upper bounds of the variant's own quantiles, and where there is none why. Latency depends on how long answers
    are, so it counts only where nothing else is known."""
    if not any(asked.answered):
        return (), ["the run's own times: it has no timed requests of this variant"]
    if asked.prompt_tokens is None:
        return (), ["the run's own times: it does not know how long its prompts were, so no request is comparable"]
    told = [
        time
        for time in TIMES
        if any(map(len, asked.evidence.samples(asked.variant, asked.workload.name, FIELDS[time])))
    ]
    bounds, lacking = [], []
    for time in [time for time in told if time != "latency"] or told:
        for name in ("p50", "p95"):
            metric = Metric(f"{time}.{name}", asked.workload.name)
            interval = figures.timed(asked.evidence, asked.variant, metric, LEVEL)
            if interval and math.isfinite(interval.high):
                text = f"{metric} <= {format_value(metric.name, interval.high)} as in the run"
                bounds.append(_bound(text, metric, interval.high))
            else:
                n = interval.n if interval else 0
                lacking.append(f"{metric} as in the run: {counted(n, 'request')} give it no upper bound")
    return tuple(bounds), lacking


def _tokens_per_s(asked: _Asked) -> tuple[float | None, str]:
    """The lower bound of new tokens per second of the engine's time, and where there is none why.

    An answer of a fixed length tells what one takes that is as long as the quality answers are: tokens and time both
    grow by as much with each token after the first, so their mean length is all that counts.
    """
    mean = 0.0
    if asked.workload.lengths == "fixed":
        lengths = [answer.new_tokens for answer in asked.evidence.rows(asked.variant).values()]
        if not lengths:
            return None, "the run's answers have a fixed length, and how long others are is not known"
        mean = sum(lengths) / len(lengths)
    launches = [[_tokens_and_s(request, mean) for request in requests] for requests in asked.answered]
    sums = [tuple(map(sum, zip(*launch, strict=True))) for launch in launches if launch]
    if not sums:
        return None, "the run has no timed requests of this variant"
    low = stats.ratio_of_means([tokens for tokens, _ in sums], [seconds for _, seconds in sums], LEVEL).low
    if math.isfinite(low) and low > 0:
        return low, ""
    return None, f"{counted(len(sums), 'launch', 'launches')} of the run give it no lower bound"


def _tokens_and_s(request: Request, mean: float) -> tuple[float, float]:
    """The new tokens of a request's answers and the seconds that each of them took at the engine, as if they had so
    many tokens each; 0 = as they were. (0, 0) where that is not known."""
    if not mean:
        tokens = float(request.new_tokens)
        ms = request.generation_latency_ms or request.request_duration_ms or 0.0
    elif request.ttft_ms is None or request.tpot_ms is None:
        return 0.0, 0.0
    else:
        tokens = request.batch * mean
        ms = request.ttft_ms + (mean - 1) * request.tpot_ms
    return (tokens, request.batch * ms / 1e3) if is_time(ms) else (0.0, 0.0)


def _new_tokens(asked: _Asked) -> Lengths | None:
    """Of answers that ended by themselves: the workload's own, else those that were judged. One that was cut off was
    longer than it tells."""
    if asked.workload.lengths == "natural" and asked.workload.batch == 1:
        most = asked.workload.new_tokens
        lengths = [(r.new_tokens, r.new_tokens < most) for launch in asked.answered for r in launch]
    else:
        lengths = [(answer.new_tokens, answer.stopped) for answer in asked.evidence.rows(asked.variant).values()]
    return _lengths([n for n, ended in lengths if ended], [n for n, ended in lengths if not ended])


def _errors(evidence: Evidence, variant: str) -> dict[str, float]:
    """By kind, the share of requests that the run does not exclude, of all that it asked, the judged answers too. The
    run does not tell kinds apart, so a failure counts for each."""
    launches = [turns for name in evidence.plan.recipe.workloads for turns in evidence.launched_turns(variant, name)]
    requests = [request for turns in launches for turn in turns for request in turn]
    answers = sum(len(rows) for (name, _), rows in evidence.answers.items() if name == variant)
    failed = sum(bool(request.error) for request in requests)
    if not (asked := len(requests) + answers):
        return {}
    return dict.fromkeys(ERRORS, stats.upper_bound(failed, asked, UPPER))
