"""Load: the traffic is what was asked for, nothing that came back is lost, and the sender tells on itself."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import command, prompts
from helpers.records import lines_of
from helpers.servers import served
from helpers.waiting import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt import corpus, store
from peftopt.cli import load as cli_load
from peftopt.errors import BadInput
from peftopt.loadtest import arrivals, prometheus, runs, summary
from peftopt.loadtest.client import Target
from peftopt.loadtest.protocols import Prompt
from peftopt.loadtest.runs import Traffic
from peftopt.loadtest.summary import Request, slo
from peftopt.measurements import NO_ACCOUNT, Gauge
from peftopt.models import hf
from peftopt.records import Interval

settings.register_profile("load", deadline=None)
settings.load_profile("load")

rates = st.floats(0.1, 100)
PROMPTS = {str(n): Prompt(messages=({"role": "user", "content": f"count to {n}"},)) for n in range(5)}


def request(at: float = 0.0, ttft: float = 0.1, gap: float = 0.01, n: int = 5, late: float = 0.0, **other) -> Request:
    """A request whose first token came `ttft` seconds after it was scheduled, and was sent `late` seconds late."""
    times = [at + ttft + gap * i for i in range(n)]
    gaps = tuple([gap * 1e3] * (n - 1))
    values = {"id": "1", "model": "m", "scheduled": at, "sent": at + late, "done": times[-1], "first": times[0]}
    return Request(**{**values, "last": times[-1], "gaps_ms": gaps, "new_tokens": n, **other})


# ---- traffic -----------------------------------------------------------------------------------


@given(st.sampled_from(arrivals.ARRIVALS), rates, st.integers(0, 300), st.integers(0, 9), st.floats(0.1, 10))
def test_arrivals_are_in_order_and_a_seed_gives_them_again(kind: str, rate: float, n: int, seed: int, b: float) -> None:
    times = arrivals.arrivals(kind, rate, n, seed, b)
    assert len(times) == n and times == sorted(times) and times[:1] in ([], [0.0])
    assert times == arrivals.arrivals(kind, rate, n, seed, b)
    faster = arrivals.arrivals(kind, 2 * rate, n, seed, b)
    assert faster == pytest.approx([t / 2 for t in times]), "the rate only scales time"


@pytest.mark.parametrize(("kind", "burstiness", "spread"), [("constant", 1, 0), ("poisson", 1, 1), ("gamma", 0.25, 2)])
def test_arrivals_have_their_rate_and_their_burstiness(kind: str, burstiness: float, spread: float) -> None:
    gaps = np.diff(arrivals.arrivals(kind, 20.0, 20_000, 3, burstiness))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, abs=0.1), "the coefficient of variation"


@given(st.integers(1, 8), st.sampled_from(arrivals.MIXES), st.integers(0, 200), st.integers(0, 9))
def test_a_mix_sends_every_request_somewhere(names: int, kind: str, n: int, seed: int) -> None:
    weights = {f"adapter{i}": 1.0 for i in range(names)}
    mixed = arrivals.mix(weights, kind, n, seed)
    assert len(mixed) == n and set(mixed) <= set(weights)
    if kind == "round-robin":
        counts = Counter(mixed)
        assert max(counts.values(), default=0) - min((counts[w] for w in weights), default=0) <= 1


def test_weights_and_zipf_shape_a_mix() -> None:
    weighted = Counter(arrivals.mix({"a": 3, "b": 1}, "uniform", 8000, 0))
    assert weighted["a"] / weighted["b"] == pytest.approx(3, rel=0.1)
    skewed = Counter(arrivals.mix(dict.fromkeys("abcd", 1.0), "zipf", 8000, 0))
    assert [skewed[x] / skewed["a"] for x in "abcd"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], abs=0.04)


def test_a_trace_is_read_from_its_first_request_on() -> None:
    lines = [
        '{"offset_s": 12.5, "id": "b", "model": "support"}',
        "",
        '{"offset_s": 10, "prompt_tokens": 512, "new_tokens": 128}',
        '{"timestamp": 11000, "input_length": 7, "output_length": 9, "hash_ids": [1]}',
    ]
    found = arrivals.trace(lines)
    assert [t.at for t in found] == [0.0, 1.0, 2.5]
    assert [(t.prompt_tokens, t.new_tokens) for t in found] == [(512, 128), (7, 9), (0, 0)]
    assert found[2].id == "b" and found[2].model == "support"


@pytest.mark.parametrize(
    "line", ["{", "7", '{"id": "a"}', '{"offset_s": -1, "id": "a"}', '{"offset_s": 1}', '{"offset_s": NaN, "id": "a"}']
)
def test_a_broken_line_of_a_trace_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        arrivals.trace(['{"offset_s": 0, "id": "a"}', line])


@given(st.integers(1, 400), st.integers(0, 9))
def test_a_made_up_text_is_as_long_as_asked(tokens: int, seed: int) -> None:
    text = arrivals.made_up(tokens, seed)
    assert len(text.split()) == tokens and text == arrivals.made_up(tokens, seed)


# ---- what came back ----------------------------------------------------------------------------


def test_latency_counts_from_the_scheduled_time() -> None:
    r = request(ttft=0.5, gap=0.02, n=11, late=0.3)
    assert (r.ttft_ms, r.queue_time_ms) == pytest.approx((500, 300))
    assert r.tpot_ms == pytest.approx(20) and r.request_duration_ms == pytest.approx(700)
    assert r.generation_latency_ms == pytest.approx(400)
    kept = r.record()
    assert (kept.tpot_ms, kept.request_duration_ms, kept.scheduled, kept.sent) == (
        r.tpot_ms,
        r.request_duration_ms,
        r.scheduled,
        r.sent,
    )


def test_tokens_that_came_packed_have_the_same_tpot() -> None:
    single, packed = request(n=9), request(n=9, gaps_ms=(40.0, 40.0))
    assert single.tpot_ms == packed.tpot_ms


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_failure_is_never_dropped(good: int, bad: int) -> None:
    requests = [request(i) for i in range(good)] + [request(i, error="HTTP 503") for i in range(bad)]
    found = summary.figures(requests, [slo("ttft <= 1 s")])
    assert (found.requests, found.failed, found.answered) == (good + bad, bad, good)
    if good:
        assert found.ttft_p50_ms.n == good + bad
        assert math.isinf(found.ttft_p99_ms.estimate) == (bad > 0)
    if good + bad:
        assert found.attained.estimate == pytest.approx(good / (good + bad))


def test_figures_against_a_run_known_by_hand() -> None:
    requests = [request(0.0), request(1.0, ttft=0.3), request(2.0, ttft=0.2), request(0.0, ttft=9, warmup=True)]
    found = summary.figures(requests)
    assert found.duration_s == pytest.approx(2.24) and found.offered_rate == pytest.approx(1.0)
    assert found.request_rate == pytest.approx(3 / 2.24)
    assert found.output_tokens_per_s == pytest.approx(15 / 2.24)
    assert found.ttft_mean_ms == pytest.approx(200) and found.ttft_p50_ms.estimate == pytest.approx(200)
    assert found.itl_p95_ms == pytest.approx(10)
    assert summary.by_model(requests)["m"].cold_ttft_ms == pytest.approx(9000)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("ttft <= 100 ms", True),
        ("ttft < 0.099 s", False),
        ("tpot <= 10.001 ms", True),
        ("itl <= 9 ms", False),
        ("latency <= 141 ms", True),
    ],
)
def test_service_levels(text: str, met: bool) -> None:
    assert slo(text).met(request()) is met
    assert not slo(text).met(request(error="HTTP 500")), "a failed request meets none"
    assert slo("tpot <= 1 ms").met(request(n=1)), "a single token has no gaps"


@pytest.mark.parametrize("text", ["ttft", "ttft <= 5", "ttft >= 5 ms", "speed <= 5 ms", "ttft <= 0 ms", "ttft <= 5 GB"])
def test_what_is_no_service_level(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttft <= 500 ms|more than 0"):
        slo(text)


def test_the_sender_tells_on_itself() -> None:
    prompt, late = [request(i) for i in range(50)], [request(i, late=0.02) for i in range(50)]
    assert not summary.own_delay(prompt, [0.1] * 50).matters
    assert summary.own_delay(late).matters and summary.own_delay(late).p95_ms == pytest.approx(20)
    assert summary.own_delay(prompt, [30.0] * 50).matters, "a loop that wakes up late stamps tokens late"


# ---- saturation and the highest rate -----------------------------------------------------------


def flagged(load_share: float, seed: int, seconds: float = 120.0, servers: int = 4) -> bool:
    """Whether any look at a queue of this load, twice a second, says that it is saturated."""
    rng = np.random.default_rng(seed)
    rate = load_share * servers / 0.5
    arrived = [t for t in np.cumsum(rng.exponential(1 / rate, int(rate * seconds))) if t < seconds]
    free, left = [0.0] * servers, []
    for at in arrived:
        i = free.index(min(free))
        free[i] = max(at, free[i]) + rng.exponential(0.5)
        left.append(free[i])
    done = sorted(left)
    looks = np.arange(0.5, seconds, 0.5)
    return any(summary.saturated(arrived, [d for d in done if d <= now], now) for now in looks)


def test_saturation_is_seen_and_a_busy_queue_is_none() -> None:
    assert sum(flagged(0.7, seed) for seed in range(20)) == 0
    assert sum(flagged(1.6, seed) for seed in range(20)) == 20


def test_a_server_that_starts_slowly_is_not_called_saturated() -> None:
    arrived = [i / 10 for i in range(1000)]
    done = [t + 6.0 for t in arrived]  # each takes 6 s, whatever the load
    assert not any(summary.saturated(arrived, [d for d in done if d <= now], now) for now in range(1, 60))


@given(st.floats(0.1, 500), st.floats(0.05, 50))
def test_the_search_finds_the_rate_at_which_it_breaks(knee: float, start: float) -> None:
    search = summary.highest_rate(start)
    rate, tried = next(search), []
    try:
        while True:
            tried.append(rate)
            rate = search.send(rate <= knee)
    except StopIteration as found:
        answer = found.value
    if knee < start * summary.LOWEST:
        assert answer is None or answer <= knee
    else:
        assert answer <= knee
        assert knee < answer * summary.PRECISION**2 or answer * 2 > start * summary.HIGHEST
        assert tried.count(answer) >= summary.REPEATS, "verified by repeats"
    assert len(tried) < 40


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_a_noisy_service_ends_the_search_too(seed: int) -> None:
    rng, n = np.random.default_rng(seed), 0
    search = summary.highest_rate(1.0)
    next(search)
    try:
        while n < 500:
            n += 1
            search.send(bool(rng.random() < 0.5))
    except StopIteration:
        pass
    assert n < 300


def test_prometheus_by_the_names_of_several_engines() -> None:
    text = (
        '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0",m="a b"} 3.0\n'
        'vllm:num_requests_running{engine="1"} 4\nsglang:token_usage 0.5\ntgi_queue_size NaN_is_none\n'
        "vllm:request_queue_time_seconds_sum 2.5\nvllm:request_queue_time_seconds_count 10\n"
    )
    totals = prometheus.totals(text)
    assert prometheus.moment(totals) == {"running": 7.0, "kv_cache": 0.5}
    found = prometheus.summary([{"running": 2.0}, {"running": 4.0}], {}, totals)
    assert found.running == Gauge(mean=3.0, peak=4.0, n=2) and found.queue_ms == pytest.approx(250)
    assert prometheus.summary([], {}, {}) == NO_ACCOUNT and found.fill is None, "of how many slots?"
    assert replace(found, slots=4).fill == 0.75


def test_llamacpp_counts_its_busy_slots_at_every_step_since_its_start() -> None:
    """As its server of July 2026 prints them: a mean over all steps, so the difference of two sums is a run's."""
    before, after = (
        prometheus.totals(f"llamacpp:n_decode_total {steps}\nllamacpp:n_busy_slots_per_decode {busy}\n")
        for steps, busy in ((10, 1.0), (30, 2.0))
    )
    found = prometheus.summary([{"running": 1.0}], before, after)
    assert found.busy == pytest.approx((30 * 2.0 - 10 * 1.0) / 20)
    assert replace(found, slots=4).fill == pytest.approx(2.5 / 4), "rather than looks at the running requests"
    assert prometheus.summary([], before, before).busy is None


# ---- against a server --------------------------------------------------------------------------


def loaded(url: str, rate: float = 50.0, timeout: float = 30.0, **settings) -> runs.Loaded:
    weights = dict.fromkeys(settings.pop("models", ("support",)), 1.0)
    kind = Traffic(PROMPTS, weights, **{"new_tokens": 6, "requests": 20, **settings})
    return runs.run(Target(url, timeout_s=timeout), kind, rate, lambda done, what: None)


def test_every_request_is_sent_when_due_and_kept() -> None:
    with served() as server:
        found = loaded(server.url, arrivals="constant", models=("support", "sales"), mix="round-robin")
        sent = server.seen
    requests = found.played.requests
    assert [r.scheduled for r in requests] == [i / 50 for i in range(20)]
    assert all(r.sent >= r.scheduled and not r.error and r.new_tokens == 6 for r in requests)
    assert sent == {"support": 11, "sales": 11}, "10 each, and one to warm up"
    assert [(r.model, r.warmup) for r in found.warmed] == [("support", True), ("sales", True)]
    assert found.played.unsent == 0 and found.played.stopped == ""
    values = runs.summarized(found, [])
    assert values.by_model["sales"].requests == 10
    assert len(values.requests) == 22, "raw samples, the warm-ups among them"


def test_open_loop_goes_on_sending_while_nothing_comes_back() -> None:
    """One slot of 50 ms at 50 requests a second: latencies grow, because they count from when each was due."""
    with served(first=0.05, slots=1) as server:
        found = loaded(server.url, arrivals="constant", requests=15)
        assert server.most > 5
    assert found.played.requests[-1].ttft_ms > 10 * 50 * 0.6


def test_closed_loop_keeps_so_many_users() -> None:
    with served(meeting=3) as server:
        found = loaded(server.url, concurrency=3)
        assert server.most == 3
    assert len(found.played.requests) == 20 and all(not r.error for r in found.played.requests)


def test_a_trace_is_replayed() -> None:
    lines = ['{"offset_s": 5, "id": "3"}', '{"offset_s": 5.1, "prompt_tokens": 9, "new_tokens": 3, "model": "sales"}']
    with served() as server:
        found = loaded(server.url, trace=tuple(arrivals.trace(lines)))
        bodies = server.bodies[-2:]
    assert [(r.model, r.new_tokens, r.scheduled) for r in found.played.requests] == [
        ("support", 6, 0.0),
        ("sales", 3, pytest.approx(0.1)),
    ]
    assert bodies[0]["messages"][0]["content"] == "count to 3"
    assert len(bodies[1]["messages"][0]["content"].split()) == 9


@pytest.mark.parametrize("fault", ["stall", "reset", "garbage", "early", "plain", "said"])
@pytest.mark.fault(34, "counted as failures by kind, beside what works")
def test_faults_are_counted_beside_what_works(fault: str) -> None:
    with served() as server:
        found = loaded(server.url, models=("support", fault), mix="round-robin", timeout=3 if fault == "stall" else 20)
    by_model = runs.summarized(found, [slo("ttft <= 10 s")]).by_model
    assert (by_model["support"].failed, by_model[fault].failed) == (0, 10)
    assert sum(by_model[fault].errors.values()) == 10
    assert summary.attained(found.played.requests, [slo("ttft <= 10 s")]).estimate == 0.5


@pytest.mark.fault(34, "counted, and the run goes on")
def test_a_burst_of_5xx_among_good_answers_is_counted_and_the_run_goes_on() -> None:
    """Six in a row fail, of a request in warm-up and twenty that count."""
    with served() as server:
        found = loaded(server.url, models=("burst",), arrivals="constant")
    requests = found.played.requests
    assert len(requests) == 20 and not found.played.unsent and not found.played.stopped
    failed = [r.error for r in requests if r.error]
    assert failed == ["HTTP 503: the engine is overloaded"] * 6
    in_order = [bool(r.error) for r in sorted(requests, key=lambda r: r.sent)]  # a stalled sender sends several at once
    assert not in_order[0] and not any(in_order[12:]), "which may arrive in another order, but not so much later"
    figures = runs.summarized(found, [slo("ttft <= 10 s")]).figures
    assert (figures.failed, figures.answered) == (6, 14)
    assert figures.attained.estimate == 0.7, "a failed request meets no level"
    assert math.isinf(figures.ttft_p95_ms.estimate), "and stands in every tail"


def test_the_progress_line_shows_the_rate_what_is_in_flight_the_tail_and_failures() -> None:
    seen: list[tuple[int, str]] = []
    with served(first=0.2) as server:
        kind = Traffic(
            PROMPTS, {"support": 1.0, "refused": 1.0}, 4, requests=30, mix="round-robin", arrivals="constant"
        )
        runs.run(Target(server.url), kind, 15.0, lambda done, what: seen.append((done, what)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] <= 30
    shape = re.compile(r"\d+\.\d/s, \d+ in flight(, P95 \d+ ms)?(, \d+ failed)?")
    assert all(shape.fullmatch(what) for _, what in seen), seen
    later = seen[-1][1]
    assert "P95" in later and "failed" in later and any(", 0 in flight" not in what for _, what in seen)


def test_a_server_without_an_answer_is_not_loaded_to_the_end() -> None:
    with served() as server:
        found = loaded(server.url, models=("broken",), requests=5000)
    assert "requests all failed: HTTP 503" in found.played.stopped and found.played.unsent > 4000
    assert runs.outcome(found, [], False) == 4, "nothing measured is never accepted"


def test_what_the_server_cannot_do_is_noted() -> None:
    with served(strict=True) as server:
        found = loaded(server.url)
    assert any("shorter than 6 tokens (the server refuses ignore_eos" in note for note in found.notes)


def test_the_highest_rate_is_searched_with_fresh_traffic_each_time() -> None:
    """Two slots and 40 ms a request: of eight that come at once, the last waits 120 ms at least."""
    trials: list[runs.Trial] = []
    with served(first=0.04, gap=0.0, slots=2) as server:
        kind = Traffic(PROMPTS, {"support": 1.0}, new_tokens=2, requests=8, arrivals="constant")
        levels = [slo("ttft <= 100 ms")]
        found = runs.find_rate(Target(server.url), kind, 400.0, levels, lambda done, what: None, trials.append)
    assert found.trials == trials and not trials[0].held
    assert found.highest is None or sum(t.held for t in trials if t.rate == found.highest) >= summary.REPEATS
    assert len({tuple(r.id for r in t.played.requests) for t in trials}) > 1


def test_the_search_ends_where_a_request_alone_misses_the_level() -> None:
    with served(first=0.04, gap=0.0) as server:
        kind = Traffic(PROMPTS, {"support": 1.0}, new_tokens=2, requests=4, arrivals="constant")
        found = runs.find_rate(
            Target(server.url), kind, 80.0, [slo("ttft <= 20 ms")], lambda done, what: None, lambda trial: None
        )
    apart = [summary.apart(trial.played.requests) for trial in found.trials]
    assert found.highest is None and apart == [False] * (len(apart) - 1) + [True]
    assert any("a request alone misses" in note for note in found.notes)


# ---- the command line --------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": f"count to {n}"}) + "\n" for n in range(5)))
    return path


def test_the_verb_prints_figures_and_keeps_raw_samples(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "measurements.jsonl"
    with served() as server:
        flags = ["--prompts", questions, "--requests", "40", "--rate", "30", "--model", "support", "--new-tokens", "4"]
        level = ["--slo", "ttft <= 60 s"]
        assert command("load", server.url, *flags, "--model", "sales=2", "--out", out, "--slots", "4") == 0
        printed = capsys.readouterr().out
        assert command("load", server.url, *flags, *level, "--json") == 3, "40 requests cannot show 95 %"
        values = json.loads(capsys.readouterr().out)
        assert command("load", server.url, *flags, "--slo", "latency <= 1 us") == 1
    assert "support" in printed and "sales" in printed and "of 4 slots" in printed and "sender's delay" in printed
    assert values["figures"]["attained"]["estimate"] == 1.0
    assert len(values["requests"]) == 41 and values["requests"][1]["ttft_ms"] > 0
    (kept,) = lines_of(out)
    assert kept.probe == "load" and len(kept.values["requests"]) == 42


@pytest.fixture
def recipe(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of one variant on a server, and with `workload` more of its workload's keys; half of the prompts
    are in the slice."""
    asked = prompts(tmp_path / "prompts.jsonl", 10, "chat")

    def write(url: str, workload: str) -> Path:
        endpoint = json.dumps({"url": url, "model": "sales"})
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\nseed: 3\n"
            f"workloads:\n  chat: {{prompts: {asked.name}, {workload}}}\n"
            f"  long: {{prompts: {asked.name}, slice: odd}}\n"
            f"variants:\n  served: [{{engine: {{endpoint: {endpoint}}}}}]\nbaseline: served\n"
            "minimize: latency.p50@chat\n"
        )
        return path

    return write


def test_a_recipe_says_what_is_sent_to_its_servers(
    recipe: Callable[..., Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its slice and no other prompt, encoded as in a race; its length, its users, its number of requests."""
    encode = hf.tokenizer(str(tiny_base))
    rows = corpus.read(str(tmp_path / "prompts.jsonl"), "short")
    wanted = {
        tuple(encode.apply_chat_template(list(r.messages), add_generation_prompt=True, return_dict=False)) for r in rows
    }
    out = tmp_path / "measurements.jsonl"
    with served(first=0.02) as server:
        file = recipe(server.url, "new_tokens: 3, slice: short, users: 2, requests: 12")
        assert command("load", file, "--json", "--out", out, "--results", tmp_path / "results") == 0
        values = json.loads(capsys.readouterr().out)
        sent = server.bodies[2:]  # the engine's greeting, and the warm-up
        assert server.seen == {"sales": 14} and server.most == 2
        assert {tuple(body["prompt"]) for body in sent} == wanted and len(wanted) == 5
        assert {(body["max_tokens"], body.get("ignore_eos")) for body in sent} == {(3, True)}
        assert values["variant"] == "served" and len(values["requests"]) == 13
        drawn = [Counter(arrivals.in_order([row.id for row in rows], 12, seed)) for seed in (3, 0)]
        assert Counter(r["id"] for r in values["requests"][1:]) == drawn[0] != drawn[1], "by the recipe's seed"
        assert not (tmp_path / "results" / "runs").exists(), "a load is no run"

        server.bodies.clear()
        over = ["--rate", "40", "--requests", "6", "--new-tokens", "4", "--natural", "--workload", "long", "--out", out]
        assert command("load", file, *over, "--results", tmp_path / "results") == 0
        assert {(body["max_tokens"], body.get("ignore_eos")) for body in server.bodies[2:]} == {(4, None)}
        assert not {tuple(body["prompt"]) for body in server.bodies[1:]} & wanted, "the other workload's slice"
        assert command("load", file, "--rate", "40", "--requests", "4", "--out", out) == 0
    kept = lines_of(out)
    assert [m.variant for m in kept] == ["served"] * 3
    assert [m.workload for m in kept] == ["chat", "long", ""], "a load that the options changed is no block by itself"


def test_only_the_variants_that_are_named_are_loaded(recipe: Callable[..., Path]) -> None:
    file = recipe("http://127.0.0.1:9", "new_tokens: 2")
    (line,) = re.findall("  served: .*\n", file.read_text())
    more = [line.replace("served", name).replace("sales", name) for name in ("other", "third")]
    file.write_text(file.read_text().replace(line, line + "".join(more)))

    def named(*names: str) -> list[str]:
        return list(cli_load.chosen(file, cli_load.Options(str(file), variant=list(names)))[0].variants)

    assert named() == ["served", "other", "third"]
    assert named("third") == ["third"]
    assert named("third", "served") == ["third", "served"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "sales"], "--variant NAME"),
        (["--protocol", "chat"], "leave --protocol out"),
        (["--variant", "servd"], "did you mean 'served'"),
        (["--variant", "served", "--variant", "servd"], "did you mean 'served'"),
        (["--workload", "chatt"], "did you mean 'chat'"),
    ],
)
def test_what_a_recipe_says_itself_is_refused(
    flags: list[str], says: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("load", recipe("http://127.0.0.1:9", "new_tokens: 2"), *flags) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_recipe_without_a_server_is_told_which_engines_are(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe("http://127.0.0.1:9", "new_tokens: 2")
    file.write_text(re.sub("  served: .*\n", "  served: []\n", file.read_text()))
    assert command("load", file) == 2
    assert "endpoint or llamacpp_server or vllm" in " ".join(capsys.readouterr().err.split())
    assert command("load", recipe("http://127.0.0.1:9", "new_tokens: 2")) == 4
    assert "no server at http://127.0.0.1:9" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--slo", "fast"], "'fast'"),
        (["--find-cliff", "--model", "base"], "needs several adapters"),
        (["--variant", "one", "--variant", "other"], "--variant is given 2 times"),
        (["--find-rate"], "needs a service level"),
        (["--arrivals", "bursty"], "known: poisson, gamma, constant"),
        (["--rate", "0"], "more than 0"),
        (["--model", "suport"], "serves no 'suport'"),
        ([], "serves several models"),
        (["--protocol", "grpc"], "no protocol named"),
    ],
)
def test_what_cannot_be_is_said(
    flags: list[str], says: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served() as server:
        assert command("load", server.url, "--prompts", questions, "--requests", "5", *flags) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert says in err and "Traceback" not in err


def test_a_recipe_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("load", tmp_path / "nowhere.yaml") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nowhere.yaml" in said and "no recipe" in said and "http://" in said


def test_a_server_that_is_not_there_is_said(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("load", "http://127.0.0.1:9", "--prompts", questions) == 4
    assert "no server at http://127.0.0.1:9" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.fault(2, "a load keeps what it measured")
@pytest.mark.fault(3, "a load keeps what it measured")
def test_an_interrupt_keeps_what_was_measured(number: int, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    flags = ["--prompts", questions, "--model", "base", "--rate", "20", "--requests", "1000", "--out", out]
    with served() as server:
        argv = [sys.executable, "-m", "peftopt.cli", "load", server.url, *map(str, flags)]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
        wait_until(lambda: len(server.bodies) >= 5 or child.poll() is not None, seconds=300)
        child.send_signal(number)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    (kept,) = lines_of(out)
    assert kept.values["stopped"] == "interrupted" and kept.values["requests"]


def test_bad_traffic_is_refused() -> None:
    with pytest.raises(BadInput, match="no prompts"):
        Traffic({}, {}, 4).check(1.0)
    with pytest.raises(BadInput, match="'nobody'"):
        Traffic(PROMPTS, {}, 4, trace=(arrivals.Traced(0.0, "nobody"),)).check(1.0)


# ---- more adapters than slots ------------------------------------------------------------------


def waits(*medians: float, spread: float = 0.05) -> list[Interval]:
    return [Interval(m, m * (1 - spread), m * (1 + spread), 100) for m in medians]


def test_a_cliff_is_a_step_that_is_large_and_sure() -> None:
    assert summary.cliff(waits(100, 102, 104, 300, 310)) == 3
    assert summary.cliff(waits(100, 120, 144, 170)) is None, "what only grows is no cliff"
    assert summary.cliff(waits(100, 180, spread=0.5)) is None, "nor is what may be noise"
    assert summary.cliff(waits(100)) is None and summary.cliff([]) is None
    assert summary.cliff(waits(2188, 2105, 1665, 2809), [8, 12, 1200, 1562]) == 2, "the queue tells, where waits do not"
    assert summary.cliff(waits(100, 100, 100), [40, 45, 60]) is None, "it was full with one adapter already"
    assert summary.cliff(waits(100, 100, 300), [1, None, 90]) == 2, "an engine that does not always tell is not asked"
    gone = Interval(math.inf, 90.0, math.inf, 100)
    assert summary.cliff([*waits(100), gone]) is None and summary.cliff([*waits(50), gone]) == 1


@pytest.mark.parametrize(("resident", "cliff"), [(2, 2), (5, None)])
def test_the_number_of_adapters_from_which_users_wait_is_found(
    resident: int, cliff: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "1", "messages": [{"role": "user", "content": "count"}]}\n')
    names = ("a", "b", "c", "d")
    # waits of which what a busy machine adds is a small part
    with served(models=names, resident=resident, swap=0.4, first=0.1, gap=0.001) as server:
        options = [option for name in names for option in ("--model", name)]
        options += ["--prompts", prompts, "--concurrency", 1, "--requests", 12, "--new-tokens", 4]
        options += ["--mix", "round-robin", "--find-cliff", "--out", tmp_path / "measurements.jsonl"]
        assert command("load", server.url, *options) == 0
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    for line in ("1 adapter: P50", "2 adapters: P50", "4 adapters: P50"):
        assert line in text
    assert store.read(tmp_path / "measurements.jsonl")
    assert ("beyond 2: give the engine more slots" if cliff else "none up to 4 adapters") in text
