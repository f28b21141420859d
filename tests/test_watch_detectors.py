"""Detectors of a change in production: how seldom they may be wrong, what each hears, and what it is called."""

from __future__ import annotations

import itertools
import json
import math
import random
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.watch.detectors import Detector, threshold
from peftopt.watch.hearing import GROWTH_BYTES, RECORDS
from peftopt.watch.promise import Bound, Lengths, Promise
from peftopt.watch.spans import Buckets, Check, Engine, Sample, Span, Traffic, Values
from peftopt.watch.watching import Alarm, Watching

DAY = 86400.0
MONTH = 30 * DAY
PROMISE = Promise(
    "chat-1",
    "merged",
    sla=(Bound("ttft.p95@chat <= 500 ms", "ttft", 0.5, 0.05),),
    drift=(Bound("latency.p50", "latency", 2.0, 0.5), Bound("latency.p95", "latency", 4.0, 0.05)),
    beside=4,
    tokens_per_s=40.0,
    errors={"oom": 0.001, "timeout_first": 0.001, "engine_dead": 0.001, "upstream": 0.001},
    prompt_tokens=Lengths(10, 100, 0.02, 0.02),
    new_tokens=Lengths(10, 100, 0.02, 0.02),
    rate=2.0,
    adapters=1,
)
SLA_ONLY = Promise("chat-1", "merged", sla=PROMISE.sla)

shares = st.floats(0, 1)
means = st.floats(1e-4, 0.999)


# ---- one detector ------------------------------------------------------------------------------


def after(values: list[float], mean: float) -> Detector:
    detector = Detector(mean)
    for number, value in enumerate(values):
        detector.hear(value, 60, 60.0 * number)
    return detector


@given(st.lists(shares, max_size=60), means)
def test_the_wealth_is_a_number_and_never_negative(values: list[float], mean: float) -> None:
    detector = after(values, mean)
    assert 0 <= detector.level < math.inf
    assert all(bet.run >= 0 for bet in detector.bets)


@pytest.mark.parametrize(("value", "mean"), [(1.0, 1e-4), (0.0, 0.999), (1.0, 0.5), (0.0, 1e-4)])
def test_nothing_overflows_in_a_month_of_extremes(value: float, mean: float) -> None:
    detector = after([value] * 43_200, mean)
    assert 0 <= detector.level < math.inf


@given(st.lists(shares, min_size=1, max_size=30), means, st.data())
def test_a_higher_number_never_makes_it_less_sure(values: list[float], mean: float, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(values) - 1))
    raised = [*values[:at], data.draw(st.floats(values[at], 1)), *values[at + 1 :]]
    assert after(raised, mean).level >= after(values, mean).level - 1e-9


@given(st.integers(1, 7), st.floats(0.01, 0.6), st.integers(0, 2**16))
def test_the_mean_of_its_wealth_after_n_windows_is_n_whatever_came_before(windows: int, mean: float, seed: int) -> None:
    """All outcomes of a few windows are weighed. How high a hit is, and so how rare, the past decides in any way that
    keeps the mean: here by a die that the past seeds."""
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=windows):
        chance, detector = 1.0, Detector(mean)
        for number, hit in enumerate(outcome):
            height = mean + (1 - mean) * random.Random(f"{seed} {outcome[:number]}").random()
            chance *= mean / height if hit else 1 - mean / height
            detector.hear(height if hit else 0.0)
        expected += chance * math.expm1(detector.level)
    assert expected == pytest.approx(windows, rel=1e-6)


@given(st.lists(shares, max_size=20), st.lists(shares, max_size=20), means)
def test_a_restored_detector_goes_on_as_if_nothing_had_been(first: list[float], then: list[float], mean: float) -> None:
    whole, before = after([*first, *then], mean), after(first, mean)
    restored = Detector.restored(mean, json.loads(json.dumps(before.as_json())))
    for number, value in enumerate(then, start=len(first)):
        restored.hear(value, 60, 60.0 * number)
    assert restored == whole


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_number_that_is_not_a_share_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        Detector(0.05).hear(value)


@pytest.mark.parametrize("mean", [0.0, 1.0, math.nan])
def test_a_promise_that_nothing_or_everything_breaks_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Detector(mean)


def test_a_quiet_past_does_not_make_it_deaf() -> None:
    assert after([0.0] * 10_000 + [0.5] * 10, 0.05).level == pytest.approx(after([0.5] * 10, 0.05).level, abs=0.1)


def test_the_twin_of_the_benchmark_is_the_detector() -> None:
    benchmark = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "watching.py"))
    dice = np.random.default_rng(3)
    n = dice.integers(0, 5, (8, 400))
    misses = dice.binomial(n, np.linspace(0.02, 0.3, 8)[:, None])
    alarms = benchmark["alarms_of_detectors"](misses, n, 1000.0)
    assert alarms == [benchmark["alarms_of_detector"](*run, 1000.0) for run in zip(misses, n, strict=True)]
    assert alarms[0] == 0 and alarms[-1] > 2


# ---- spans -------------------------------------------------------------------------------------


def traffic(n: int = 60, late: int = 0, slow: int = 0, **others: object) -> Traffic:
    """Requests of a healthy adapter, of which some miss the limit, and some take longer than the run's P95."""
    healthy = Traffic(
        answered=n,
        times={"ttft": Sample([1.0] * late + [0.1] * (n - late))},
        alike={"latency": Sample([5.0] * slow + [1.0] * (n - slow))},
        prompt_tokens=Sample([50.0] * n),
        new_tokens=Sample([50.0] * n),
        tokens=50 * n,
        engine_s=1.0 * n,
    )
    return replace(healthy, **others)  # type: ignore[arg-type]


def span(number: int, adapters: dict[str, Traffic], engine: Engine | None = None) -> Span:
    return Span(60.0 * number, 60.0, adapters, engine or Engine())


def watched(
    promise: Promise, minutes: int, adapters: Callable[[int], dict[str, Traffic]], arl_s: float = MONTH
) -> tuple[Watching, list[Alarm]]:
    """What is said of so many minutes."""
    watching, alarms = Watching(promise, arl_s), []
    for minute in range(minutes):
        alarms += watching.hear(span(minute, adapters(minute)))
    return watching, alarms


CHANGED = {
    "sla": ("sla", "ttft.p95@chat <= 500 ms", traffic(late=30)),
    "drift of the median": ("drift", "latency.p50", traffic(alike={"latency": Sample([3.0] * 60)})),
    "drift of the tail": ("drift", "latency.p95", traffic(slow=20)),
    "speed": ("throughput", "tokens_per_s", traffic(engine_s=90.0)),
    "out of memory": ("errors", "oom", traffic(errors={"oom": 3})),
    "timeouts": ("errors", "timeouts", traffic(errors={"timeout_gap": 2, "timeout": 1})),
    "dead engine": ("errors", "engine_dead", traffic(errors={"engine_dead": 3})),
    "upstream": ("errors", "upstream", traffic(errors={"upstream": 3})),
    "refused": ("errors", "refused", traffic(refused=10)),
    "stale": ("adapter", "stale", traffic(checks=(Check("v", "stale"), Check("v", "own")))),
    "wrong": ("adapter", "wrong", traffic(checks=(Check("v", "wrong"),))),
    "quality": ("quality", "canary", traffic(checks=(Check("v", "own", 2.5),))),
    "short prompts": ("range", "shorter prompts", traffic(prompt_tokens=Sample([5.0] * 10 + [50.0] * 50))),
    "long prompts": ("range", "longer prompts", traffic(prompt_tokens=Sample([500.0] * 10 + [50.0] * 50))),
    "short answers": ("range", "shorter answers", traffic(new_tokens=Sample([5.0] * 10 + [50.0] * 50))),
    "long answers": ("range", "longer answers", traffic(new_tokens=Sample([500.0] * 10 + [50.0] * 50))),
    "rate": ("range", "rate", traffic(n=130)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_each_change_is_named_rightly_and_nothing_else(case: str) -> None:
    kind, name, changed = CHANGED[case]
    watching, alarms = watched(PROMISE, 160, lambda minute: {"support": traffic() if minute < 100 else changed})
    assert {(alarm.kind, alarm.name, alarm.adapter) for alarm in alarms} == {(kind, name, "support")}
    assert all(abs(alarm.since - 6000) <= 120 for alarm in alarms[:1]) and alarms[0].at > 6000
    assert watching.outcome == ("out of range" if kind == "range" else "alarm")


def test_more_adapters_than_the_run_had_are_out_of_range_and_said_once() -> None:
    adapters = {"a": traffic(), "b": traffic()}
    watching, alarms = watched(PROMISE, 50, lambda _: adapters)
    assert [(alarm.kind, alarm.name, alarm.adapter) for alarm in alarms] == [("range", "adapters", "")]
    assert watching.outcome == "out of range"


def test_an_alarm_outweighs_what_is_out_of_range() -> None:
    watching, alarms = watched(PROMISE, 60, lambda _: {"support": traffic(n=130, late=90)})
    assert {alarm.kind for alarm in alarms} == {"sla", "range"} and watching.outcome == "alarm"


def test_a_healthy_service_is_silent_and_its_gauges_are_low() -> None:
    watching, alarms = watched(PROMISE, 300, lambda _: {"support": traffic(late=1, slow=1)})
    assert not alarms and watching.outcome == "nothing shown"
    gauges = watching.gauges
    assert all(0 <= gauge.nearness < 0.3 and gauge.adapter == "support" for gauge in gauges)
    assert [g.nearness for g in gauges] == sorted((g.nearness for g in gauges), reverse=True)


def test_the_figures_are_in_the_sentence_and_in_the_gauge() -> None:
    watching, alarms = watched(SLA_ONLY, 140, lambda minute: {"support": traffic(late=1 if minute < 130 else 30)})
    assert all(word in alarms[0].what for word in ("50 %", "500 ms", "5 %", "ttft.p95@chat"))
    watching, _ = watched(SLA_ONLY, 10, lambda _: {"support": traffic(late=3)})
    assert "5 % of 600 requests" in next(gauge.seen for gauge in watching.gauges if gauge.kind == "sla")


def test_a_detector_that_has_alarmed_begins_anew() -> None:
    _, alarms = watched(SLA_ONLY, 60, lambda _: {"support": traffic(late=30)})
    gaps = [later.at - one.at for one, later in itertools.pairwise(alarms)]
    assert len(alarms) > 3 and set(gaps) == {alarms[0].at}


# ---- how seldom it is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_at_its_limit_a_promise_is_kept(rho: float) -> None:
    """Four runs of 1,500 windows where one false alarm in 43,200 is promised; requests of a window share their fate."""
    for seed in range(4):
        dice = np.random.default_rng([7, seed])

        def minute(_: int, dice: np.random.Generator = dice) -> dict[str, Traffic]:
            share = dice.beta(0.05 * (1 / rho - 1), 0.95 * (1 / rho - 1)) if rho else 0.05
            return {"support": Traffic(answered=60, times={"ttft": counted(int(dice.binomial(60, share)), 60)})}

        watching, alarms = watched(SLA_ONLY, 1500, minute)
        assert not alarms and watching.outcome == "nothing shown"


def counted(late: int, n: int) -> Buckets:
    return Buckets((0.1, 0.5, math.inf), (n - late, 0, late))


@settings(deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8))
def test_all_detectors_together_never_have_more_than_the_budget(sla: int, arrivals: list[str]) -> None:
    """Each alarms at a wealth of windows / weight. However adapters come, weights sum to 1 at most and none grows."""
    bounds = tuple(replace(PROMISE.sla[0], name=str(i)) for i in range(sla))
    watching, windows = Watching(replace(PROMISE, sla=bounds, adapters=9), MONTH), MONTH / 60
    before: dict[tuple[str, object], float] = {}
    for number, name in enumerate(arrivals):
        watching.hear(span(number, {name: traffic(n=1)}))
        weights = {
            (listener, topic): windows / math.expm1(watching._threshold(listener, each))
            for listener, heard in watching._listeners.items()
            for topic, each in heard.by_topic.items()
        }
        assert math.fsum(weights.values()) <= 1 + 1e-9
        assert all(weights[key] <= weight + 1e-12 for key, weight in before.items())
        before = weights


def test_the_more_adapters_the_surer_each_of_them_has_to_be() -> None:
    def minutes_until_seen(adapters: int) -> float:
        names = [f"adapter-{i}" for i in range(adapters)]
        _, alarms = watched(
            replace(SLA_ONLY, adapters=50), 30, lambda _: {n: traffic(late=30 if n == names[0] else 0) for n in names}
        )
        return next(alarm.at for alarm in alarms if alarm.adapter == names[0])

    assert minutes_until_seen(1) < minutes_until_seen(3) < minutes_until_seen(40)


def test_a_change_of_one_adapter_is_told_from_the_others() -> None:
    _, alarms = watched(
        replace(SLA_ONLY, adapters=20), 60, lambda _: {f"a{i}": traffic(n=6, late=0 if i else 6) for i in range(20)}
    )
    assert {alarm.adapter for alarm in alarms if alarm.kind == "sla"} == {"a0"}


@given(st.floats(1, 1e6), st.floats(1e-4, 1))
def test_a_detector_with_a_part_of_the_budget_alarms_at_the_whole_over_that_part(windows: float, weight: float) -> None:
    assert math.expm1(threshold(windows, weight)) == pytest.approx(windows / weight)


# ---- few requests ------------------------------------------------------------------------------


def test_fewer_than_twenty_requests_are_never_judged_and_never_forgotten() -> None:
    watching = Watching(SLA_ONLY, MONTH)
    for minute in range(19):
        assert not watching.hear(span(minute, {"support": traffic(n=1, late=1)}))
        assert watching.outcome == "too little"
    alarms = watching.hear(span(19, {"support": traffic(n=1, late=1)}))
    assert [alarm.kind for alarm in alarms] == ["sla"] and "20 requests" in alarms[0].what and alarms[0].since == 0


def test_tokens_of_few_requests_are_pooled_until_there_are_twenty() -> None:
    watching = Watching(replace(PROMISE, sla=(), drift=()), MONTH)
    for minute in range(40):
        watching.hear(span(minute, {"support": traffic(n=10, engine_s=20.0)}))
    (gauge,) = (gauge for gauge in watching.gauges if gauge.kind == "throughput")
    assert "100 % of 20 windows" in gauge.seen


def test_the_speed_is_not_judged_where_more_runs_at_once_than_in_the_run() -> None:
    _, alarms = watched(PROMISE, 100, lambda _: {"support": traffic(engine_s=300.0)})
    assert not alarms


def test_without_traffic_there_is_too_little() -> None:
    watching, alarms = watched(PROMISE, 200, lambda _: {})
    assert not alarms and watching.outcome == "too little"


def test_checks_without_traffic_are_too_little_to_go_by() -> None:
    """That a version is itself says nothing of how users fare."""
    watching = Watching(PROMISE, MONTH)
    checks = (Check("v", "unclear"), Check("v", "own", 1.0))
    assert not watching.hear(span(0, {"support": Traffic(checks=checks)}))
    assert watching.outcome == "too little"


@given(
    st.lists(st.sampled_from((1.0, 2.0, 3.0, 5.0, 8.0)), max_size=30), st.sampled_from((1.0, 2.5, 3.0, 9.0, math.inf))
)
def test_how_many_are_below_a_bound(numbers: list[float], bound: float) -> None:
    ends = (1.0, 2.0, 3.0, 5.0, 8.0, math.inf)
    sample: Values = Sample(numbers)
    buckets: Values = Buckets(ends, tuple(numbers.count(end) for end in ends))  # each at its bucket's end
    assert sample.below(bound) == sum(number < bound for number in numbers) >= buckets.below(bound)
    if bound in ends:
        assert buckets.below(bound) == sample.below(bound)


# ---- memory ------------------------------------------------------------------------------------


def alarms_of_memory(reserved: list[float], adapters: int = 1) -> list[str]:
    """An engine that loads one more adapter every minute and then has so many bytes reserved."""
    watching = Watching(replace(PROMISE, adapters=adapters), MONTH)
    alarms = []
    for number, each in enumerate(reserved, start=1):
        alarms += watching.hear(span(number, {}, Engine(memory_reserved=each, switches=number)))
    return [f"{alarm.kind} {alarm.what}" for alarm in alarms]


def test_memory_that_grows_with_each_load_of_an_adapter_is_a_leak() -> None:
    alarms = alarms_of_memory([1e9 + 1e6 * number for number in range(60)])
    assert alarms and alarms[0].startswith("memory") and "GB" in alarms[0]


def test_memory_that_grows_while_caches_fill_or_goes_up_and_down_is_none() -> None:
    filling = [1e9 + 1e8 * min(number, 20) for number in range(200)]
    dice = random.Random(5)
    assert alarms_of_memory(filling, adapters=10) == []
    assert alarms_of_memory([1e9 + 1e7 * dice.random() for _ in range(1000)]) == []
    assert alarms_of_memory([1e9 + GROWTH_BYTES / 500 * number for number in range(400)]) == []


def test_an_engine_that_restarts_is_compared_with_itself() -> None:
    watching = Watching(PROMISE, MONTH)
    for number in range(300):
        switches = 3 + number % (RECORDS - 1)  # it never lives long enough to be judged
        engine = Engine(memory_reserved=1e9 + 1e7 * number, switches=switches)
        assert not watching.hear(span(number, {}, engine))


# ---- state -------------------------------------------------------------------------------------


def random_minute(dice: random.Random, number: int) -> Span:
    """Anything that a span may hold."""
    adapters = {}
    for name in dice.sample(["", "a", "b", "c"], dice.randint(0, 4)):
        n = dice.randint(0, 40)
        adapters[name] = traffic(
            n=n,
            late=dice.randint(0, n),
            slow=dice.randint(0, n),
            errors={kind: dice.randint(0, 2) for kind in ("oom", "timeout", "timeout_first", "strange")},
            refused=dice.randint(0, 2),
            engine_s=dice.uniform(0, 3) * n,
            checks=(Check("v", dice.choice(("own", "unclear")), dice.choice((None, 0.5, 3.0))),) * dice.randint(0, 2),
        )
    return span(number, adapters, Engine(memory_reserved=1e9 * (1 + dice.random()), switches=number // 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40))
def test_a_restored_state_goes_on_as_one_that_never_stopped(seed: int, first: int, then: int) -> None:
    dice = random.Random(seed)
    spans = [random_minute(dice, number) for number in range(first + then)]
    whole = Watching(PROMISE, MONTH)
    broken_off = Watching(PROMISE, MONTH)
    alarms = [whole.hear(each) for each in spans]
    before = [broken_off.hear(each) for each in spans[:first]]
    restored = Watching.restored(PROMISE, json.loads(json.dumps(broken_off.as_json(), allow_nan=False)))
    assert before + [restored.hear(each) for each in spans[first:]] == alarms
    assert restored.as_json() == whole.as_json() and restored.gauges == whole.gauges


def test_a_state_of_twenty_adapters_is_small() -> None:
    watching, _ = watched(replace(PROMISE, adapters=20), 30, lambda _: {f"a{i}": traffic(late=1) for i in range(20)})
    assert len(json.dumps(watching.as_json())) < 100_000


def test_outcomes_are_of_what_was_heard_since_it_was_restored() -> None:
    watching, _ = watched(SLA_ONLY, 60, lambda _: {"support": traffic(late=30)})
    assert watching.outcome == "alarm"
    assert Watching.restored(SLA_ONLY, watching.as_json()).outcome == "nothing shown"


def test_a_state_of_another_promise_is_refused_with_a_hint() -> None:
    state = Watching(PROMISE, MONTH).as_json()
    for other in (replace(PROMISE, run="chat-2"), replace(PROMISE, rate=3.0), SLA_ONLY):
        with pytest.raises(BadInput) as refused:
            Watching.restored(other, state)
        assert "chat-1" in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 9},
        {"listeners": 3},
        {"listeners": {"": {"pool": {}, "detectors": [[0, []]]}}},
        {"listeners": {"": 1}},
        {"adapters": "a"},
        {"memory": {"unknown": 1}},
        {"memory": {"record": "much"}},
        {"arl_s": None},
        {"window_s": -1},
    ],
)
def test_a_damaged_state_is_bad_input(damage: dict[str, object]) -> None:
    state = {**Watching(PROMISE, MONTH).as_json(), **damage}
    with pytest.raises(BadInput) as refused:
        Watching.restored(PROMISE, state)  # type: ignore[arg-type]
    assert refused.value.hint


def test_a_state_without_a_part_is_bad_input() -> None:
    whole = Watching(PROMISE, MONTH).as_json()
    for missing in whole.keys() - {"run"}:
        with pytest.raises(BadInput):
            Watching.restored(PROMISE, {key: value for key, value in whole.items() if key != missing})


@pytest.mark.parametrize("arl_s", [0.0, -1.0, 30.0, math.nan])
def test_a_budget_shorter_than_a_window_is_bad_input(arl_s: float) -> None:
    with pytest.raises(BadInput):
        Watching(PROMISE, arl_s)
