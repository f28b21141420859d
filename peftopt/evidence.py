"""The measurements of a run, arranged by what a rule or a report asks of them, and the figures they give. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftopt import stats
from peftopt.records import Interval, Json, Measurement, Metric, Plan

TWIN = "~aa"
"""Suffix of the A/A arm: a hidden second copy of the baseline that must not differ from it."""

Rows = Mapping[str, Mapping[str, Json]]

FIELDS = {"latency": "request_duration_ms", "ttft": "ttft_ms", "tpot": "tpot_ms", "throughput": "request_duration_ms"}
"""Which of a request's durations a timed metric looks at. Lengths are fixed, so throughput is inverse duration."""

ENGINE_FIGURES = ("compile_time", "warm_start", "graphs", "graph_breaks", "recompiles", "uncompiled")
"""What an engine may say of getting ready: seconds, and counts per process."""


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
        self.loads: list[Mapping[str, Json]] = []
        for m in measurements:
            match m.probe:
                case "speed":
                    timed = [r for r in m.values["requests"] if not r["warmup"]]
                    self.turns[m.variant, m.workload][m.values["block"]] = timed
                    self.loads.append(m.values.get("machine", {}))
                case "quality":
                    self.answers[m.variant, m.launch][m.values["row"]] = m.values
                case "build":
                    self.builds[m.values["id"]] = m.values
                case "failure":
                    self.failures[m.variant] = m.values
                case "launch":
                    self.launches[m.variant].append(m.values)
                case "memory":
                    self.memory[m.variant].append(m.values)
                case "engine":
                    self.engines[m.variant].append(m.values)

    def certificates(self, variant: str) -> list[str]:
        """What the artifacts that a variant is made of were checked for, in the order they were made."""
        steps = {build.id: build for build in self.plan.builds}
        found, at = [], self.plan.models[variant]
        while build := steps.get(at):
            if line := self.builds.get(at, {}).get("certificate"):
                found.append(f"{build.step.plugin}: parity certificate {line}")
            at = build.parent
        return found[::-1]

    # ---- speed ------------------------------------------------------------------------------

    def blocks(self, variant: str, workload: str) -> int:
        """Blocks in which the variant was measured on the workload."""
        return len(self.turns.get((variant, workload), {}))

    def requests(self, variant: str, workload: str) -> list[Mapping[str, Json]]:
        """All timed requests, in order."""
        return [r for _, turn in sorted(self.turns.get((variant, workload), {}).items()) for r in turn]

    def paired(self, variant: str, against: str, workload: str, field: str) -> list[float]:
        """log(variant / against) of the block medians of a request's field, one per shared block, in order."""
        ours, theirs = self.turns.get((variant, workload), {}), self.turns.get((against, workload), {})
        shared = sorted(ours.keys() & theirs.keys())
        return [math.log(_median(ours[b], field) / _median(theirs[b], field)) for b in shared]

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

    def flips(self, variant: str) -> tuple[int, int]:
        """Prompts right before and wrong after, and the reverse."""
        ours, theirs = self.rows(variant), self.rows(self.baseline)
        shared = ours.keys() & theirs.keys()
        worse = sum(theirs[r]["correct"] and not ours[r]["correct"] for r in shared)
        better = sum(ours[r]["correct"] and not theirs[r]["correct"] for r in shared)
        return worse, better

    # ---- figures ----------------------------------------------------------------------------

    def figures(self, variant: str) -> dict[str, Interval]:
        """Everything that was measured of a variant, by metric name; what was not measured is not there."""
        found: dict[str, Interval] = {}
        for workload in self.plan.recipe.workloads:
            found |= self._speed_figures(variant, workload)
        found |= self._quality_figures(variant)
        found |= self._footprint(variant)
        return found

    def figure(self, variant: str, metric: Metric) -> Interval | None:
        return self.figures(variant).get(str(metric))

    def _speed_figures(self, variant: str, workload: str) -> dict[str, Interval]:
        requests = self.requests(variant, workload)
        if not requests:
            return {}
        found = {}
        for metric, field in (("latency", "request_duration_ms"), ("ttft", "ttft_ms"), ("tpot", "tpot_ms")):
            samples = [r[field] for r in requests if r[field] is not None]
            if samples:
                found[f"{metric}.p50@{workload}"] = stats.quantile(samples, 0.5)
                found[f"{metric}.p95@{workload}"] = stats.quantile(samples, 0.95)
        rates = [1e3 * r["new_tokens"] / r["request_duration_ms"] for r in requests]
        found[f"throughput@{workload}"] = stats.quantile(rates, 0.5)
        for name, field in (("latency.ratio", "request_duration_ms"), ("cpu.ratio", "cpu_ms")):
            if variant != self.baseline:
                logs = self.paired(variant, self.baseline, workload, field)
            else:  # the baseline's own line is its A/A arm
                logs = self.paired(variant + TWIN, variant, workload, field)
            if logs:
                found[f"{name}@{workload}"] = exp(stats.hodges_lehmann(logs, 0.95))
        return found

    def _quality_figures(self, variant: str) -> dict[str, Interval]:
        is_baseline = variant == self.baseline
        reference = self.rows(self.baseline)
        ours = self.rows(variant)
        again = self.rows(variant, 2) if is_baseline else ours
        if not ours:
            return {}
        n = len(ours)
        found = {
            "accuracy": stats.proportion(sum(r["correct"] for r in ours.values()), n),
            "score": stats.mean([r["score"] for r in ours.values()]),
            "validity": stats.proportion(sum(r["valid"] for r in ours.values()), n),
        }
        shared = sorted(again.keys() & reference.keys())
        if not shared:
            return found
        same = sum(again[r]["tokens"] == reference[r]["tokens"] for r in shared)
        found["greedy_match"] = stats.proportion(same, len(shared))
        lengths = [again[r]["new_tokens"] for r in shared], [reference[r]["new_tokens"] for r in shared]
        found["length"] = stats.ratio_of_means(*lengths)
        scored = [r for r in shared if "kl" in again[r]]
        if scored:
            tokens = [reference[r]["scored_tokens"] for r in scored]
            found["kl"] = stats.ratio_of_means([again[r]["kl"] for r in scored], tokens)
            found["top1"] = stats.ratio_of_means([again[r]["agree"] for r in scored], tokens)
            found["perplexity"] = stats.perplexity_ratio(
                [again[r]["nll"] for r in scored], [reference[r]["nll"] for r in scored], tokens
            )
        if not is_baseline:
            errors, asked = self.critical_errors(variant)
            found["critical_errors"] = Interval(len(errors) / asked, 0.0, stats.upper_bound(len(errors), asked), asked)
            worse, better = self.flips(variant)
            found["flips_worse"] = Interval(worse, worse, worse, len(shared))
            found["flips_better"] = Interval(better, better, better, len(shared))
        return found

    def _footprint(self, variant: str) -> dict[str, Interval]:
        found = {}
        if size := self.size(variant):
            found["size"] = _exactly(size)
        if launches := self.launches.get(variant):
            found["load_time"] = _range([v["model_loading_time"] for v in launches])
        for name, key in (
            ("memory", "peak_memory_bytes"),
            ("gpu_memory", "gpu_memory_allocated"),
            ("gpu_memory_allocated", "gpu_memory_allocated"),
            ("gpu_memory_reserved", "gpu_memory_reserved"),
        ):
            if peaks := [v[key] for v in self.memory.get(variant, ()) if key in v]:
                found[name] = _range(peaks)
        for name in ENGINE_FIGURES:
            if seen := [v[name] for v in self.engines.get(variant, ()) if name in v]:
                found[name] = _range(seen)
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


def _median(turn: Sequence[Mapping[str, Json]], field: str) -> float:
    return stats.median([r[field] for r in turn])


def _exactly(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _range(values: Sequence[float]) -> Interval:
    """Median and range of a few launches: too few for an interval, so the range is shown as it is."""
    return Interval(stats.median(values), min(values), max(values), len(values), level=math.nan)
