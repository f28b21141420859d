"""What two looks at a server's metrics say of the time between them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.gateway.lines import Line
from peftopt.gateway.metrics import Metrics
from peftopt.watch.promise import Lengths, Promise
from peftopt.watch.sources import metrics, scrape
from peftopt.watch.sources.scrape import Scrape, growth
from peftopt.watch.spans import Span, Traffic

DATA = Path(__file__).parent / "data"
LIMIT_S = 0.4
PROMISE = Promise("run", "merged", beside=4, prompt_tokens=Lengths(5, 50, 0.1, 0.1))
TTFT = "peftopt_ttft_seconds"


def line(adapter: str = "support", seconds: float = 0.3, kind: str = "", **more: object) -> Line:
    """A request that took so long."""
    about = {"prompt_tokens": 20, "new_tokens": 0 if kind else 8, "status": 500 if kind else 200, "arm": "live", **more}
    one = Line("id", 100.0, 1e9, adapter=adapter, version="a", kind=kind, sent=100.0, waited=0.0, done=100.0 + seconds)
    for name, value in about.items():
        setattr(one, name, value)
    if not kind:
        one.first, one.last = 100.0 + seconds / 2, one.done
    return one


def look(counted: Metrics, at: float) -> Scrape:
    return scrape.of_text(counted.text().decode(), at, metrics.NAMES)


def between(counted: Metrics, lines: list[Line], promise: Promise = PROMISE) -> Span:
    """The span in which a gateway counted these."""
    before = look(counted, 1000.0)
    for each in lines:
        counted.count(each)
    return metrics.span(before, look(counted, 1060.0), promise)


SECONDS = st.floats(0.001, 200).filter(lambda seconds: abs(seconds - LIMIT_S) > 1e-6)
"""Not those of which a sum of floats decides on which side of the limit they are."""


@given(st.lists(SECONDS, max_size=30), st.integers(0, 3), st.integers(0, 3))
def test_a_gateways_counts_are_what_it_answered(seconds: list[float], failed: int, gone: int) -> None:
    counted = Metrics([LIMIT_S])
    counted.count(line(seconds=7.0))  # before the first look
    lines = [line(seconds=each) for each in seconds] + [line(kind="oom")] * failed + [line(kind="cancelled")] * gone
    span = between(counted, lines)
    traffic = span.adapters.get("support", Traffic())
    assert (span.began, span.seconds) == (1000.0, 60.0)
    assert (traffic.answered, dict(traffic.errors)) == (len(seconds), {"oom": failed} if failed else {})
    assert traffic.tokens == 8 * len(seconds)
    assert traffic.engine_s == pytest.approx(sum(seconds))
    if seconds:  # a limit of the decision is the end of a bucket: an exact count
        assert traffic.times["latency"].above(LIMIT_S) == sum(each > LIMIT_S for each in seconds)


def test_adapters_are_told_apart_and_versions_added_up() -> None:
    lines = [line("support"), line("support", version="b"), line("support", arm="canary"), line("sales")]
    span = between(Metrics(), lines)
    assert {name: traffic.answered for name, traffic in span.adapters.items()} == {"support": 3, "sales": 1}
    assert all(traffic.prompt_tokens.n == 0 for traffic in span.adapters.values())  # of single requests: not known


def test_refusals_and_checks_are_heard() -> None:
    counted = Metrics()
    counted.count(line("support"))
    before = look(counted, 0.0)
    counted.refused.labels("support", "wait").inc(3)
    counted.canary.labels("support", "a", "own").inc(2)
    counted.canary.labels("support", "a", "stale").inc()
    counted.canary.labels("support", "b", "wrong").inc(6)  # put, refused, and never live
    traffic = metrics.span(before, look(counted, 60.0), PROMISE).adapters["support"]
    assert (traffic.refused, traffic.asked) == (3, 3)
    assert Counter(check.verdict for check in traffic.checks) == {"own": 2, "stale": 1}


def test_the_engine_is_as_the_last_look_tells() -> None:
    counted = Metrics()
    counted.running.set(3)
    counted.gpu_reserved.labels("", "nvml").set(3e9)
    counted.gpu_reserved.labels("support@b", "nvml").set(2e9)  # the second engine of a merged model
    counted.gpu_utilization.labels("", "nvml").set(0.7)
    counted.switch.labels("support").observe(2.0)
    counted.switch.labels("sales").observe(2.0)
    engine = between(counted, []).engine
    assert (engine.running, engine.memory_reserved, engine.gpu_utilization, engine.switches) == (3, 5e9, 0.7, 2)
    assert engine.fragmentation is None and engine.memory_allocated is None


@pytest.mark.parametrize(
    ("running", "prompt_tokens", "seconds", "lengths", "compared"),
    [
        (4, 20, 0.3, PROMISE.prompt_tokens, True),
        (5, 20, 0.3, PROMISE.prompt_tokens, False),  # more at once than the run had, at a look
        (0, 20, 100.0, PROMISE.prompt_tokens, False),  # and on average, by Little's law
        (4, 51, 0.3, PROMISE.prompt_tokens, False),
        (4, 20, 0.3, None, False),  # the run does not know
    ],
)
def test_times_are_compared_where_the_span_is_like_the_run(
    running: int, prompt_tokens: int, seconds: float, lengths: Lengths | None, compared: bool
) -> None:
    counted = Metrics()
    counted.running.set(running)
    promise = Promise("run", "merged", beside=4, prompt_tokens=lengths)
    lines = [line(seconds=seconds, prompt_tokens=prompt_tokens) for _ in range(3)]
    traffic = between(counted, lines, promise).adapters["support"]
    assert traffic.times["ttft"].n == 3
    assert bool(traffic.alike) is compared


# ---- counters that end and begin -----------------------------------------------------------------


def test_a_server_that_was_started_again_counts_from_0() -> None:
    old, new = Metrics(), Metrics()
    for _ in range(10):
        old.count(line())
    for _ in range(4):
        new.count(line())
    span = metrics.span(look(old, 0.0), look(new, 60.0), PROMISE)
    assert span.adapters["support"].answered == 4


def test_a_counter_that_is_already_higher_after_a_restart_counts_from_0_too() -> None:
    old, new = Metrics(), Metrics()
    for _ in range(10):
        old.count(line("support"))
    old.count(line("sales"))
    for _ in range(5):
        new.count(line("sales"))
    span = metrics.span(look(old, 0.0), look(new, 60.0), PROMISE)
    assert span.adapters["sales"].answered == 5


def test_a_version_that_was_loaded_again_is_not_a_restart() -> None:
    counted = Metrics()
    for _ in range(10):
        counted.count(line("sales"))
        counted.count(line("support"))
    before = look(counted, 0.0)
    counted.keep([("sales", "a")])
    for _ in range(2):
        counted.count(line("support"))
    counted.count(line("sales"))
    span = metrics.span(before, look(counted, 60.0), PROMISE)
    assert {name: traffic.answered for name, traffic in span.adapters.items()} == {"support": 2, "sales": 1}


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.data())
def test_what_all_looks_tell_is_what_was_counted(steps: list[int], data: st.DataObject) -> None:
    """Over any number of restarts, nothing is told twice. What was counted after the last look before a restart is
    lost, and nothing else."""
    value, told, counted = 0, 0.0, 0
    before = scrape.of_samples(iter([("n", {}, 0.0)]), 0.0)
    for at, step in enumerate(steps, 1):
        if data.draw(st.booleans()) and step < value:
            value = 0
        value += step
        counted += step
        after = scrape.of_samples(iter([("n", {}, float(value))]), float(at))
        told += growth(before, after).total("n")
        before = scrape.of_json(json.loads(json.dumps(after.as_json())))
    assert told == counted


def test_a_server_that_is_seen_for_the_first_time_has_no_span_before() -> None:
    one = {"job": "chat", "instance": "a"}
    other = {"job": "chat", "instance": "b"}
    before = scrape.of_samples(iter([("n", one, 5.0)]), 0.0)
    after = scrape.of_samples(iter([("n", one, 7.0), ("n", other, 1e6)]), 60.0)
    assert growth(before, after).total("n") == 2


def test_histograms_with_other_ends_keep_those_that_all_have() -> None:
    def of(metrics_: Metrics, instance: str) -> list[tuple[str, dict[str, str], float]]:
        return [(name, {**dict(labels), "instance": instance}, n) for name, labels, n in look(metrics_, 0.0).series()]

    dice = random.Random(0)
    coarse, fine = Metrics(), Metrics([0.3, 0.7])
    begun = scrape.of_samples(iter(of(coarse, "a") + of(fine, "b")), 0.0)
    seconds = [dice.uniform(0.1, 3.0) for _ in range(40)]
    for number, each in enumerate(seconds):
        (coarse if number % 2 else fine).count(line(seconds=each))
    ended = scrape.of_samples(iter(of(coarse, "a") + of(fine, "b")), 60.0)
    times = metrics.span(begun, ended, PROMISE).adapters["support"].times["latency"]
    assert times.n == 40
    for limit in (0.25, 0.3, 0.7, 1.0):
        assert times.above(limit) <= sum(each > limit for each in seconds)
    assert times.above(1.0) == sum(each > 1.0 for each in seconds)


# ---- vLLM ----------------------------------------------------------------------------------------


def test_vllms_own_metrics_are_read() -> None:
    """As vLLM 0.32 wrote them around 22 requests of 8 tokens each."""
    before, after = ((DATA / f"vllm-0.32-{name}.txt").read_text() for name in ("before", "after"))
    looks = scrape.of_text(before, 0.0, metrics.NAMES), scrape.of_text(after, 60.0, metrics.NAMES)
    promise = Promise("run", "merged", beside=4, prompt_tokens=Lengths(1, 50, 0.1, 0.1))
    span = metrics.span(*looks, promise)
    (traffic,) = span.adapters.values()
    assert (traffic.answered, traffic.tokens, dict(traffic.errors), traffic.refused) == (22, 8 * 22, {}, 0)
    assert {time: values.n for time, values in traffic.times.items()} == {"latency": 22, "ttft": 22, "tpot": 22}
    assert (traffic.new_tokens.n, traffic.new_tokens.above(10), traffic.new_tokens.below(5)) == (22, 0, 0)
    assert traffic.alike and 0 < traffic.engine_s < 60
    assert (span.engine.running, span.engine.waiting, span.engine.kv_usage) == (0, 0, 0)


def test_metrics_of_neither_are_known_as_such() -> None:
    assert not metrics.known(scrape.of_text("up 1\n", 0.0, metrics.NAMES))
    with pytest.raises(ValueError):
        scrape.of_text("<html>", 0.0, metrics.NAMES)
