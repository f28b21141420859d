"""What a finished run promises of production, and what it says cannot be watched."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.finished_runs import FIRST_MS, USERS, WHOLE_MS, finished_run
from helpers.records import plan_of, quality
from hypothesis import given
from hypothesis import strategies as st

from peftopt import stats
from peftopt.errors import BadInput
from peftopt.measurements import measured
from peftopt.records import Decision, Json, Measurement, Workload
from peftopt.watch import promised
from peftopt.watch.promise import Bound, Promise

QUICK = Path(__file__).parent.parent / "results" / "example" / "quick"
HELD = "ttft.p95@peak <= 770 ms"
UNDECIDED = Decision("test", "adapter", "latency.p50@chat", "wall", None, "inconclusive", "", ())


def promise_of(
    requests: Sequence[Sequence[dict[str, Json]]],
    answers: Sequence[Measurement] = (),
    require: Sequence[str] = (),
    **workload: Json,
) -> Promise:
    """Of a run with one workload: the adapter's requests, a list a block."""
    plan = plan_of(require=require)
    chat = Workload("chat", "p.jsonl", **{"new_tokens": 64, **workload})
    plan = replace(plan, recipe=replace(plan.recipe, workloads={"chat": chat}))
    turns = [
        Measurement("speed", "adapter", "chat", 1, {"block": block, "requests": list(each)})
        for block, each in enumerate(requests)
    ]
    lines = [*turns, *answers]
    return promised.of_run(plan, UNDECIDED, [measured(each) for each in lines], "adapter")


def request(**changes: Json) -> dict[str, Json]:
    values = {"request_duration_ms": 740.0, "generation_latency_ms": 730.0, "ttft_ms": 100.0, "tpot_ms": 10.0}
    return {**values, "new_tokens": 65, "prompt_tokens": 50, "warmup": False, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose merged model takes half the adapter's time, with four users at once too."""
    base, lora = Path("base"), Path("lora")
    require = (HELD, "latency.p50@chat <= 5 s", "accuracy >= 0.9x", "latency.p50@chat <= 0.9x")
    return finished_run(tmp_path_factory.mktemp("results"), base, lora, require=require, built=False)


# ---- a whole run -------------------------------------------------------------------------------


def test_its_own_limits_are_the_sla(folder: Path) -> None:
    promise = promised.load(folder)
    assert promise.sla == (
        Bound(HELD, "ttft", 0.77, 0.05),
        Bound("latency.p50@chat <= 5 s", "latency", 5.0, 0.5),
    )
    assert (promise.run, promise.variant, promise.adapters) == (folder.name, "merged", 1)
    assert any("chat" in reason and "peak" in reason for reason in promise.unwatched), "requests do not say which"


def test_times_are_those_beside_the_most_requests(folder: Path) -> None:
    promise = promised.load(folder)
    assert promise.beside == USERS
    times = {(bound.time, bound.share): bound.bound_s for bound in promise.drift}
    assert times.keys() == {("ttft", 0.5), ("ttft", 0.05), ("tpot", 0.5), ("tpot", 0.05)}
    slowest = 0.5 * 1.02
    for (time, share), bound_s in times.items():
        ms = FIRST_MS if time == "ttft" else WHOLE_MS / 64
        assert 0.5 * ms / 1e3 <= bound_s <= slowest * ms / 1e3 + 1e-9
        assert share == 0.5 or bound_s == pytest.approx(slowest * ms / 1e3)


def test_the_rate_is_that_at_which_its_limits_held(folder: Path) -> None:
    rate = promised.load(folder).rate
    assert rate == pytest.approx(USERS / (0.5 * 1.01 * WHOLE_MS / 1e3), rel=0.02)
    without = promise_of([[request()]])
    assert without.rate is None and any("--find-rate" in reason for reason in without.unwatched)


def test_another_variant_is_promised_where_it_is_named(folder: Path) -> None:
    slower, chosen = (promised.load(folder, name) for name in ("adapter", ""))
    assert slower.variant == "adapter" and chosen.variant == "merged"
    assert all(a.bound_s > b.bound_s for a, b in zip(slower.drift, chosen.drift, strict=True))


def test_a_variant_that_was_not_measured_has_the_sla_and_says_what_it_lacks(folder: Path) -> None:
    """It caps its users' answers, too: their service does, since the gateway does not."""
    promise = promised.load(folder, "capped")
    assert promise.sla and promise.drift == () and promise.errors == {} and promise.tokens_per_s is None
    assert any("no timed requests" in reason for reason in promise.unwatched)


@pytest.mark.parametrize("path", ["", "results/example/serve"])
def test_what_is_no_finished_run_is_refused(path: str, tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / path if path else tmp_path
    with pytest.raises(BadInput) as refused:
        promised.load(folder)
    assert "runs" in refused.value.hint


def test_a_variant_that_the_run_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput) as refused:
        promised.load(folder, "smaller")
    assert "merged" in refused.value.hint


def test_a_real_run_without_an_sla_promises_what_it_measured_and_says_what_it_did_not() -> None:
    promise = promised.load(QUICK)
    decision = json.loads((QUICK / "decision.json").read_text())
    (chosen,) = [each for each in decision["variants"] if each["name"] == decision["chosen"]]
    (ttft,) = promise.drift
    assert ttft.bound_s == pytest.approx(chosen["figures"]["ttft.p50@chat"]["high"] / 1e3)
    assert promise.variant == decision["chosen"] and promise.sla == () and promise.beside == 1
    assert any("SLA" in reason for reason in promise.unwatched)
    assert any("ttft.p95@chat" in reason and "16 requests" in reason for reason in promise.unwatched)
    assert any(reason.startswith("accuracy >= 0.9x: ") and "canary" in reason for reason in promise.unwatched)
    answers = [json.loads(text) for text in (QUICK / "measurements.jsonl").read_text().splitlines()]
    lengths = [a["values"]["new_tokens"] for a in answers if (a["probe"], a["variant"]) == ("quality", "int8_compiled")]
    assert promise.new_tokens and promise.tokens_per_s
    assert promise.new_tokens.low >= min(lengths) and promise.new_tokens.high <= max(lengths)
    tpot = chosen["figures"]["tpot.p50@chat"]["estimate"]
    assert promise.tokens_per_s < 1e3 / tpot, "no more than one after the other"


# ---- limits that cannot be watched -------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("accuracy >= 95 %", "canary"),
        ("accuracy >= 0.9x", "canary"),
        ("validity >= 99 %", "canary"),
        ("task.arithmetic >= 80 %", "canary"),
        ("perplexity <= 1.02x", "canary"),
        ("kl <= 0.05 nats", "canary"),
        ("latency.p95@chat <= 0.85x", "baseline"),
        ("throughput@chat >= 5 tokens/s", "engine's time"),
        ("memory <= 1 GB", "growth"),
        ("size <= 1 GB", "change"),
        ("load_time <= 20 s", "starts"),
    ],
)
def test_a_limit_that_cannot_be_watched_says_why(limit: str, says: str) -> None:
    promise = promise_of([[request()]], require=[limit])
    (reason,) = [each for each in promise.unwatched if each.startswith(f"{limit}: ")]
    assert says in reason and promise.sla == ()


# ---- times -------------------------------------------------------------------------------------


def test_latency_is_compared_only_where_nothing_else_is_known() -> None:
    alone = {"ttft_ms": None, "tpot_ms": None}
    blocks = [[request(request_duration_ms=700.0 + n, **alone)] for n in range(100)]
    promise = promise_of(blocks)
    assert {bound.time for bound in promise.drift} == {"latency"}
    assert {bound.time for bound in promise_of([[request()]] * 100).drift} == {"ttft", "tpot"}


def test_too_few_requests_have_no_bound_and_that_is_said() -> None:
    promise = promise_of([[request()]] * 30)
    assert {bound.share for bound in promise.drift} == {0.5}
    assert sum("no upper bound" in reason for reason in promise.unwatched) == 2


def test_without_the_lengths_of_its_prompts_nothing_is_comparable() -> None:
    promise = promise_of([[request(prompt_tokens=None)]] * 100)
    assert promise.drift == () and promise.prompt_tokens is None
    assert any("comparable" in reason for reason in promise.unwatched)


@pytest.mark.parametrize(
    ("workload", "beside"),
    [({"users": 3}, 3), ({"batch": 5}, 5), ({"rate": 8.0}, 6), ({"rate": 0.1}, 1), ({}, 1)],
)
def test_the_most_requests_at_once_are_those_of_the_workload(workload: dict[str, Json], beside: int) -> None:
    """At a rate, those of Little's law: 8 requests a second of 0.74 s each."""
    turn_ms = {"turn_ms": 3000.0} if "batch" not in workload else {"batch": 5}
    assert promise_of([[request(**turn_ms)]] * 40, **workload).beside == beside


# ---- tokens a second ---------------------------------------------------------------------------


def test_tokens_of_the_engines_time_are_those_of_answers_as_long_as_the_judged_ones() -> None:
    """An answer of 31 tokens takes 100 ms to its first and 10 ms for each other."""
    promise = promise_of([[request()]] * 20, quality("adapter"))
    assert promise.tokens_per_s == pytest.approx(31 / 0.4)
    assert promise_of([[request()]] * 20).tokens_per_s is None, "how long others are is not known"


def test_answers_that_end_by_themselves_tell_themselves() -> None:
    blocks = [[request(new_tokens=10, generation_latency_ms=500.0), request(new_tokens=90)] for _ in range(20)]
    promise = promise_of(blocks, lengths="natural", new_tokens=100)
    assert promise.tokens_per_s == pytest.approx(100 / 1.23)
    assert promise.new_tokens and (promise.new_tokens.low, promise.new_tokens.high) == (10, 90)


def test_a_batch_takes_the_engines_time_for_each_of_its_answers() -> None:
    promise = promise_of([[request(batch=4, new_tokens=40)]] * 20, lengths="natural", batch=4)
    assert promise.tokens_per_s == pytest.approx(40 / (4 * 0.73))
    assert promise.prompt_tokens is None, "only the sum of four prompts is known"


def test_the_bound_is_below_what_launches_that_differ_took() -> None:
    blocks = [[request(ttft_ms=100.0 + 40 * (n % 3), new_tokens=31)] for n in range(20)]
    bound = promise_of(blocks, quality("adapter")).tokens_per_s
    assert bound and 31 / 0.48 < bound < 31 / 0.44


# ---- failures and lengths ----------------------------------------------------------------------


def test_failures_are_bounded_by_all_that_was_asked() -> None:
    blocks = [[request()]] * 19 + [[request(error="timeout")]]
    promise = promise_of(blocks, quality("adapter", n=80))
    assert set(promise.errors.values()) == {stats.upper_bound(1, 100, 0.975)}
    assert {"oom", "timeout_first", "engine_dead"} <= promise.errors.keys()
    assert not {"refused", "cancelled", "request"} & promise.errors.keys()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_lengths_bound_the_shares_outside(tokens: list[int]) -> None:
    promise = promise_of([[request(prompt_tokens=each)] for each in tokens])
    lengths = promise.prompt_tokens
    assert lengths and min(tokens) <= lengths.low <= lengths.high <= max(tokens)
    for bound, outside in (
        (lengths.below, sum(each < lengths.low for each in tokens)),
        (lengths.above, sum(each > lengths.high for each in tokens)),
    ):
        assert outside <= 0.05 * len(tokens) and outside / len(tokens) < bound <= 1
        assert stats.proportion(outside, len(tokens)).high == pytest.approx(bound)


def test_a_prompt_that_is_asked_often_tells_once() -> None:
    blocks = [[request(id=f"p{n % 4}", prompt_tokens=50 + n % 4)] for n in range(100)]
    lengths = promise_of(blocks, users=2).prompt_tokens
    assert lengths and math.isclose(lengths.below, stats.upper_bound(0, 4, 0.975))


def test_answers_that_were_cut_off_are_longer_than_they_tell() -> None:
    cut = {f"p{n}": {"stopped": False} for n in range(30)}
    whole, some = (promise_of([[request()]] * 20, quality("adapter", 100, **each)).new_tokens for each in ({}, cut))
    assert whole and some and some.high == whole.high == 31
    assert some.above > 0.3 > whole.above and some.below == whole.below
