"""Merge or keep apart: plans of traffic, what they say of a log, the simulation, what fits, and the rule."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import command, errors
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.diagnose import keeping
from peftopt.diagnose.planning import (
    breakeven,
    options,
    plan,
    planning,
    simulation,
    speed_asking,
    traffic,
    traffic_log,
)
from peftopt.diagnose.planning.options import Option, Room
from peftopt.diagnose.planning.simulation import Due, Engine
from peftopt.diagnose.planning.speeds import Costs, Drawn, Speeds, Times, resampled, typical
from peftopt.diagnose.planning.traffic import Traffic
from peftopt.diagnose.setting import Setting
from peftopt.errors import ACCEPTED, BAD_INPUT, ENVIRONMENT, INCONCLUSIVE, REJECTED, BadInput
from peftopt.loadtest.client import Reply
from peftopt.loadtest.summary import slo
from peftopt.measurements import as_json

QUICK = settings(max_examples=60, deadline=None)

# ---- measured times, made up -------------------------------------------------------------------


def costs(step_s: float, per_row_s: float = 0.0, switch_s: float = 0.0, request_s: float = 0.01) -> Costs:
    same = tuple(step_s + per_row_s * max(rows - 1, 0) for rows in range(9))
    return Costs(request_s, 0.0001, same, tuple(t + switch_s * max(rows - 1, 0) for rows, t in enumerate(same)))


def drawn(merged: Costs | None = None, apart: Costs | None = None, sharing: float = 2.0) -> Drawn:
    return Drawn(merged or costs(0.03), apart or costs(0.05), sharing, load_s=0.5, merge_s=5.0, start_s=10.0)


def times(prefill_s: float, step_s: float) -> Times:
    return Times(
        prefill={16: (prefill_s, prefill_s * 1.1), 128: (prefill_s * 2, prefill_s * 2.1)},
        step={rows: (step_s * (1 + rows / 10), step_s * (1.02 + rows / 10)) for rows in (1, 2, 4, 8)},
    )


def speeds(merged_s: float = 0.03, apart_s: float = 0.05, mixed_s: float = 0.0) -> Speeds:
    return Speeds(
        engine="eager",
        merged=times(0.05, merged_s),
        apart=times(0.08, apart_s),
        mixed={rows: (apart_s * (1 + rows / 10) + mixed_s * rows,) for rows in (2, 4, 8)},
        rows=8,
        sharing=(2.0, 2.1),
        engine_bytes=10**9,
        apart_bytes=10**9,
        adapter_bytes=10**7,
        kv_bytes_per_token=1000,
        kv_tokens=8 * 192,
        load_s=(0.5,),
        merge_s=(5.0,),
        start_s=(10.0,),
    )


def planned(text: str = "") -> Traffic:
    return traffic.traffic(f"adapters=4 rps=1 slo='ttft <= 1 s' memory=100GB {text}".strip())


# ---- a plan's text -----------------------------------------------------------------------------


def test_a_plan_says_all_that_its_text_does() -> None:
    read = traffic.traffic(
        "adapters=40 zipf=1.1 rps=12 slo='ttft <= 500 ms' slo='latency <= 4 s' reload=2/day prompt=100 new=20 "
        "memory=24GiB gpus=2"
    )
    assert (read.adapters, read.zipf, read.rps, read.gpus) == (40, 1.1, 12.0, 2)
    assert [level.limit_ms for level in read.slos] == [500.0, 4000.0]
    assert math.isclose(read.reloads_per_s * 86_400, 2)
    assert read.lengths == ((100, 20),) and read.longest == 120
    assert read.memory_bytes == 24 * 2**30


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("adapters=0", "adapters"),
        ("adapters=many", "adapters"),
        ("zipf=-1", "zipf"),
        ("zipf=nan", "zipf"),
        ("rps=0", "rps"),
        ("rps=inf", "rps"),
        ("slo='fast'", "slo"),
        ("reload=daily", "reload"),
        ("reload=1/fortnight", "reload"),
        ("memory=24", "memory"),
        ("memory=24bytes", "memory"),
        ("prompt=1.5", "prompt"),
        ("adapter=3", "adapters"),
        ("rps=1 rps=2", "twice"),
        ("fast", "key=value"),
        ("slo='ttft", "--plan"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named_and_has_a_hint(text: str, names: str) -> None:
    with pytest.raises(BadInput) as wrong:
        traffic.given(text)
    assert names in f"{wrong.value.message} {wrong.value.hint}"
    assert wrong.value.hint


@pytest.mark.parametrize("missing", ["adapters", "rps", "slo"])
def test_a_plan_that_lacks_what_decides_says_how_to_add_it(missing: str) -> None:
    parts = {"adapters": "adapters=4", "rps": "rps=1", "slo": "slo='ttft <= 1 s'"}
    with pytest.raises(BadInput) as wrong:
        traffic.traffic(" ".join(part for key, part in parts.items() if key != missing))
    assert f"{missing}=" in wrong.value.hint


@given(st.text(max_size=60))
def test_any_text_is_a_plan_or_a_mistake_of_the_users(text: str) -> None:
    try:
        traffic.traffic(text)
    except BadInput as error:
        assert error.hint


@given(st.integers(1, 200), st.floats(0, 3), st.floats(0, 3))
def test_more_skew_gives_the_most_popular_adapters_no_less(adapters: int, one: float, other: float) -> None:
    low, high = (traffic.shares(adapters, exponent) for exponent in sorted((one, other)))
    assert math.isclose(sum(low), 1) and math.isclose(sum(high), 1)
    assert all(sum(high[:place]) >= sum(low[:place]) - 1e-9 for place in range(1, adapters + 1))


@given(st.integers(2, 50), st.floats(0, 2.5))
def test_the_exponent_is_read_off_shares(adapters: int, zipf: float) -> None:
    counts = [round(share * 10**9) for share in traffic.shares(adapters, zipf)]
    assert math.isclose(traffic.fitted_zipf(counts), zipf, abs_tol=0.01)


# ---- a log -------------------------------------------------------------------------------------


def line(at_s: float, adapter: str, **more: object) -> str:
    values = {
        "kind": "peftopt.serve",
        "format": 1,
        "timestamp": 1e12 + at_s * 1e3,
        "adapter": adapter,
        "error_kind": "",
        "request_duration_ms": 100.0,
        "prompt_tokens": 30,
        "new_tokens": 10,
    }
    return json.dumps({**values, **more})


def test_a_log_says_adapters_skew_rate_and_lengths(tmp_path: Path) -> None:
    names = ["popular", "popular", "popular", "other"] * 25
    rows = [line(number / 2, name, new_tokens=5 + number % 2) for number, name in enumerate(names)]
    log = tmp_path / "requests.jsonl"
    log.write_text("\n".join([*rows, "torn", line(1, "nobody", error_kind="request")]) + "\n")
    read = traffic.traffic("slo='ttft <= 1 s'", traffic_log.read(log))
    assert read.names == ("popular", "other") and read.adapters == 2
    assert math.isclose(read.rps, 2)
    assert read.zipf > 1  # three times as popular: log2(3)
    assert set(read.lengths) == {(30, 5), (30, 6)}
    assert any("line" in note for note in read.notes)


def test_a_plans_words_go_before_a_logs(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text("\n".join(line(number, f"a{number % 3}") for number in range(60)) + "\n")
    fields = traffic_log.read(log)
    read = traffic.traffic("slo='ttft <= 1 s' rps=7 new=99 adapters=9", fields)
    assert (read.rps, read.adapters, read.names) == (7.0, 9, ())
    assert read.lengths[0] == (30, 99)


def test_a_log_of_more_than_an_hour_is_planned_for_its_busiest() -> None:
    quiet = [traffic_log.Asked(60.0 * minute, "a", 10, 10) for minute in range(600)]
    busy = [traffic_log.Asked(18_000 + second, "a", 10, 10) for second in range(3600)]
    assert math.isclose(traffic_log.of_requests([*quiet, *busy])["rps"], 1 + 1 / 60, rel_tol=0.01)


def test_a_log_that_says_too_little_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text(line(0, "a") + "\n")
    with pytest.raises(BadInput):
        traffic_log.read(log)


# ---- the simulation ----------------------------------------------------------------------------


def test_a_lone_request_takes_its_prefill_and_its_steps() -> None:
    engine = Engine(costs(0.03, request_s=0.1), rows=8)
    (request,) = simulation.simulate([Due(1.0, 0, 100, 11)], [0], [engine], sharing=2.0)
    assert math.isclose(request.ttft_ms or 0, 110)
    assert math.isclose(request.tpot_ms or 0, 30)
    assert math.isclose(request.done, 1.0 + 0.11 + 10 * 0.03)


def test_two_engines_that_compute_at_once_take_turns() -> None:
    engine = Engine(costs(0.03, request_s=0.1), rows=8)
    due = [Due(0.0, 0, 0, 11), Due(0.0, 1, 0, 11)]
    both = simulation.simulate(due, [0, 1], [engine, engine], sharing=2.0)
    assert all(math.isclose(request.done, 2 * 0.4) for request in both)
    free = simulation.simulate(due, [0, 1], [engine, engine], sharing=1.0)
    assert all(math.isclose(request.done, 0.4) for request in free)


def test_a_full_engine_lets_a_request_wait_for_a_row() -> None:
    engine = Engine(costs(0.1, request_s=0.1), rows=1)
    first, second = simulation.simulate([Due(0.0, 0, 0, 5), Due(0.01, 0, 0, 1)], [0, 0], [engine], 1.0)
    assert math.isclose(first.done, 0.5) and math.isclose(second.done, 0.6)


def test_a_request_joins_between_two_steps_and_its_prompt_stops_the_others() -> None:
    engine = Engine(costs(0.1, request_s=0.25), rows=2)
    first, second = simulation.simulate([Due(0.0, 0, 0, 5), Due(0.4, 0, 0, 2)], [0, 0], [engine], 1.0)
    assert math.isclose(second.first or 0, 0.45 + 0.25)
    assert math.isclose(max(first.gaps_ms), 350)
    assert math.isclose(first.done, 0.25 + 4 * 0.1 + 0.25)


arriving = st.lists(
    st.tuples(st.floats(0, 5), st.integers(0, 3), st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=40
).map(lambda rows: [Due(*row) for row in sorted(rows)])


@QUICK
@given(arriving, st.integers(1, 8), st.floats(1, 3), st.integers(1, 3))
def test_every_request_is_answered_once_and_no_faster_than_alone(
    due: list[Due], rows: int, sharing: float, engines: int
) -> None:
    cost = costs(0.02, 0.003, 0.01)
    routes = [request.adapter % engines for request in due]
    answered = simulation.simulate(due, routes, [Engine(cost, rows)] * engines, sharing)
    assert [request.scheduled for request in answered] == [request.at for request in due]
    for request, wanted in zip(answered, due, strict=True):
        alone = cost.prefill(1, wanted.prompt_tokens) + (wanted.new_tokens - 1) * cost.step(1, 1)
        assert request.done - request.scheduled >= alone - 1e-6
        assert request.new_tokens == wanted.new_tokens


@QUICK
@given(arriving, st.floats(1, 3))
def test_an_engine_computes_no_more_than_time_has_passed(due: list[Due], sharing: float) -> None:
    """The last answer comes no sooner than all steps of one row each could have been shared by all rows."""
    cost = costs(0.02)
    answered = simulation.simulate(due, [0] * len(due), [Engine(cost, 8)], sharing)
    tokens = sum(request.new_tokens - 1 for request in due)
    assert max(request.done for request in answered) >= tokens / 8 * 0.02 - 1e-6


# ---- speeds ------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(3, 20), st.floats(0.001, 0.5), st.floats(0, 0.9))
def test_a_step_is_timed_while_all_rows_are_under_way(rows: int, tokens: int, step: float, late: float) -> None:
    """Rows begin one after the other, by less than a step."""
    replies = []
    for row in range(rows):
        begun = row * late * step
        times = [round(1e9 * (1 + begun + token * step)) for token in range(tokens)]
        replies.append(Reply(sent=0, times=times, counted=tokens))
    assert math.isclose(speed_asking.step_s(replies), step, rel_tol=1e-3)


def test_tokens_that_come_several_in_a_message_are_counted() -> None:
    times = [round(1e9 * (1 + 0.2 * message)) for message in range(6)]
    assert math.isclose(speed_asking.step_s([Reply(sent=0, times=times, counted=11)]), 0.1)


def test_steps_between_the_measured_batches_lie_between_them() -> None:
    cost = typical(speeds(mixed_s=0.02)).apart
    assert cost.step(2, 1) < cost.step(3, 1) < cost.step(4, 1)
    assert cost.step(4, 1) < cost.step(4, 2) < cost.step(4, 4)


def test_a_draw_lies_within_what_was_measured() -> None:
    import numpy as np

    measured = speeds()
    for seed in range(20):
        one = resampled(measured, np.random.default_rng(seed))
        assert min(measured.sharing) <= one.sharing <= max(measured.sharing)
        assert min(measured.merged.step[1]) <= one.merged.same[1] <= max(measured.merged.step[1])


@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4))
def test_more_rows_never_take_less_time(measured: list[float]) -> None:
    noisy = speeds()
    step = {rows: (value,) for rows, value in zip((1, 2, 4, 8), measured, strict=True)}
    cost = typical(replace(noisy, apart=replace(noisy.apart, step=step))).apart
    assert list(cost.same) == sorted(cost.same)
    assert all(cost.mixed[rows] >= cost.same[rows] for rows in range(9))


# ---- what fits ---------------------------------------------------------------------------------

rooms = st.builds(
    Room,
    memory_bytes=st.integers(0, 10**12),
    devices=st.integers(1, 8),
    merged_bytes=st.integers(1, 10**11),
    apart_bytes=st.integers(1, 10**11),
    adapter_bytes=st.integers(0, 10**9),
)


@given(rooms, st.integers(0, 10**12), st.integers(1, 60))
def test_more_memory_never_fits_less(space: Room, more: int, adapters: int) -> None:
    larger = replace(space, memory_bytes=space.memory_bytes + more)
    assert larger.copies >= space.copies
    assert larger.copies_beside(adapters) >= space.copies_beside(adapters)
    for option in options.options(adapters, space):
        assert larger.fits(option) or not space.fits(option)


@given(rooms, st.integers(1, 60))
def test_what_is_said_to_fit_fits_and_one_more_does_not(space: Room, adapters: int) -> None:
    copies = space.copies
    if copies:
        assert space.fits(Option(copies, copies, 0))
    assert not space.fits(Option(copies + 1, copies + 1, 0))
    beside = space.copies_beside(adapters)
    assert beside < 0 or space.fits(Option(adapters, beside, 1))
    if -1 < beside < adapters - 1:
        assert not space.fits(Option(adapters, beside + 1, 1))


def test_longer_requests_take_more_memory_than_was_measured() -> None:
    short, long = (options.room(speeds(), planned(f"prompt={tokens}")) for tokens in (128, 1128))
    assert long.merged_bytes - short.merged_bytes == 8 * 1000 * 1000


@given(st.integers(1, 60), rooms)
def test_to_merge_and_unmerge_in_place_is_no_option(adapters: int, space: Room) -> None:
    for option in options.options(adapters, space):
        assert option.merged + option.apart == adapters
        assert (option.engines > 0) == (option.apart > 0)


# ---- the rule ----------------------------------------------------------------------------------


@QUICK
@given(st.integers(2, 20), st.floats(0, 2), st.floats(0, 2), st.integers(0, 99))
def test_more_skew_never_makes_merging_the_hottest_worse(adapters: int, one: float, other: float, seed: int) -> None:
    """Of requests that do not meet, each one that asks a merged adapter is served faster."""
    goodputs = []
    for zipf in sorted((one, other)):
        # apart takes 1.61 s, merged 0.97 s: the service level lies between
        told = traffic.traffic(f"adapters={adapters} rps=0.001 zipf={zipf} slo='latency <= 1.2 s' new=32")
        due = plan.requests(told, 60, seed)
        answered = options.serve(Option(adapters, 1, 1), drawn(), 8, 1, due)
        goodputs.append(plan.measured(answered, told).goodput)
    assert goodputs[0] <= goodputs[1] + 1e-9


def chosen(told: Traffic, measured: Speeds) -> plan.Evaluated:
    return plan.evaluate(measured, told, draws=10)


def test_one_finished_adapter_is_merged() -> None:
    result = chosen(replace(planned(), adapters=1, rps=0.5), speeds())
    assert result.best and result.best.option.family == "all merged" and result.sure


def test_adapters_that_hold_their_level_apart_stay_apart() -> None:
    result = chosen(replace(planned(), rps=0.2), speeds())
    assert result.best and result.best.option.family == "apart" and result.sure


def test_adapters_that_miss_their_level_apart_are_merged_as_far_as_they_fit() -> None:
    tight = replace(planned(), slos=(slo("tpot <= 45 ms"),), rps=0.2)
    assert (everything := chosen(tight, speeds()).best) and everything.option.family == "all merged"
    small = chosen(replace(tight, memory_bytes=int(3.5e9), zipf=1.5), speeds())
    assert small.best and small.best.option == Option(4, 2, 1)
    refused = next(each for each in small.options if each.option.family == "all merged")
    assert not refused.fits and "3 of 4" in refused.why


def test_nothing_is_recommended_where_nothing_fits_or_nothing_holds() -> None:
    nothing = chosen(replace(planned(), memory_bytes=10**6), speeds())
    assert nothing.best is None and not any(each.fits for each in nothing.options)
    hopeless = chosen(replace(planned(), slos=(slo("ttft <= 1 ms"),)), speeds())
    assert hopeless.best is None and not hopeless.sure


def test_options_that_the_measurements_cannot_tell_apart_are_undecided() -> None:
    wide = {rows: (0.02, 0.03, 0.07, 0.09) for rows in (1, 2, 4, 8)}
    unsure = speeds()
    unsure = replace(unsure, merged=replace(unsure.merged, step=wide), apart=replace(unsure.apart, step=wide))
    told = replace(planned(), adapters=1, rps=0.2, slos=(slo("tpot <= 50 ms"),))
    result = plan.evaluate(unsure, told, draws=40)
    assert not result.sure and result.rivals


def test_a_plan_at_its_limits_is_computed() -> None:
    for text in ("adapters=1 rps=0.000001", "adapters=300 rps=500 zipf=10 new=1", "adapters=2 gpus=3 rps=5"):
        told = traffic.traffic(f"{text} slo='latency <= 1 s' memory=30GB reload=1000/s prompt=1")
        result = plan.evaluate(speeds(), told, draws=2)
        for each in result.options:
            assert each.goodput is None or 0 <= each.goodput.estimate <= told.rps * 1.0001


@QUICK
@given(st.floats(0, 1e5), st.floats(0, 1e5))
def test_more_reloads_never_give_more_goodput(one: float, other: float) -> None:
    often = [replace(planned(), reloads_per_s=per_day / 86_400) for per_day in sorted((one, other))]
    space = options.room(speeds(), often[0])
    for option in (Option(4, 0, 1), Option(4, 4, 0)):
        less, more = (
            plan.outcome(option, drawn(), 8, told, space, plan.requests(told, 40, 0)).goodput for told in often
        )
        assert more <= less + 1e-9


# ---- break-even --------------------------------------------------------------------------------


def test_break_even_in_adapters_ends_where_copies_do_not_fit() -> None:
    tight = replace(planned(), slos=(slo("tpot <= 45 ms"),), rps=0.2, memory_bytes=int(6.5e9))
    result = chosen(tight, speeds())
    adapters, _, reloads = breakeven.breakevens(speeds(), result, draws=2)
    assert adapters.most == 6 and adapters.value and adapters.value.estimate == math.inf
    assert reloads.value and 0 < reloads.value.low < math.inf


def test_where_apart_holds_the_levels_one_adapter_is_the_break_even() -> None:
    result = chosen(replace(planned(), rps=0.5), speeds())
    adapters, zipf, reloads = breakeven.breakevens(speeds(), result, draws=2)
    assert adapters.value and adapters.value.estimate == 1
    assert zipf.value and zipf.value.estimate == math.inf
    assert reloads.value and reloads.value.estimate == 0


def test_skew_makes_it_pay_to_merge_the_hottest() -> None:
    told = replace(planned(), adapters=6, rps=1.0, slos=(slo("tpot <= 60 ms"),), memory_bytes=int(2.5e9))
    result = chosen(told, speeds(mixed_s=0.03))
    _, zipf, _ = breakeven.breakevens(speeds(mixed_s=0.03), result, draws=2)
    assert zipf.value and zipf.value.estimate < math.inf


# ---- the command line --------------------------------------------------------------------------


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed and kept does not depend on how many draws there are."""
    monkeypatch.setattr(plan, "DRAWS", 4)
    monkeypatch.setattr(breakeven, "DRAWS", 1)


def measured_before(folder: Path, times: Speeds) -> list[str]:
    """A folder in which an engine's times are kept, and the options that name what was measured."""
    keeping.begin(Setting(base="base", adapters={"support": "lora"}), folder)
    (folder / speed_asking.SPEEDS).write_text(json.dumps(as_json(times)))
    return ["diagnose", "--base", "base", "--adapter", "support=lora", "--out", str(folder), "--quiet"]


@pytest.mark.usefixtures("few_draws")
def test_a_plan_is_judged_by_times_that_were_measured_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = measured_before(tmp_path, speeds())
    assert command(*words, "--plan", "adapters=1 rps=0.5 slo='ttft <= 1 s' memory=9GB") == ACCEPTED
    assert "merge" in capsys.readouterr().out
    kept = json.loads((tmp_path / planning.PLAN).read_text())
    assert kept["recommended"]["family"] == "all merged" and kept["sure"]
    assert kept["options"][0]["goodput_rate"]["estimate"] <= 0.5
    assert {"plan.html", "plan.md"} <= {file.name for file in tmp_path.iterdir()}
    assert planning.section(tmp_path)


@pytest.mark.usefixtures("few_draws")
def test_json_says_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = measured_before(tmp_path, speeds())
    command(*words, "--plan", "adapters=3 rps=0.2 slo='ttft <= 1 s' memory=2GB", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / planning.PLAN).read_text())
    assert printed["merged_engines_that_fit"] == 2
    assert [option["fits"] for option in printed["options"] if option["family"] == "all merged"] == [False]


@pytest.mark.usefixtures("few_draws")
def test_a_plan_that_no_option_holds_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = measured_before(tmp_path, speeds())
    assert command(*words, "--plan", "adapters=2 rps=1 slo='ttft <= 1 ms' memory=9GB") == REJECTED
    assert "nothing" in capsys.readouterr().out


@pytest.mark.usefixtures("few_draws")
def test_a_plan_from_a_log_names_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text("\n".join(line(number * 9, "only") for number in range(40)) + "\n")
    words = measured_before(tmp_path / "out", speeds())
    more = ["--plan-from", log, "--plan", "slo='ttft <= 1 s' memory=9GB"]
    assert command(*words, *more) == ACCEPTED
    assert "only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named", "code"),
    [
        (["--plan", "adapters=3"], "rps=", BAD_INPUT),
        (["--plan", "adapters=3 rps=1"], "slo=", BAD_INPUT),
        (["--plan", "adapters=3 rps=fast"], "rps", BAD_INPUT),
        (["--plan", "adaptors=3"], "adapters", BAD_INPUT),
        (["--plan-from", "nowhere.jsonl"], "nowhere.jsonl", ENVIRONMENT),
        (["--plan", traffic.EXAMPLE, "--more", "batching"], "--more", BAD_INPUT),
        (["--plan", traffic.EXAMPLE, "--engine", "llamacpp_server"], "--engine", BAD_INPUT),
        (["--plan", traffic.EXAMPLE, "--engine", "http://127.0.0.1:1"], "--engine", BAD_INPUT),
        (["--plan", traffic.EXAMPLE, "--run", "nowhere"], "nowhere", BAD_INPUT),
        (["--plan", traffic.EXAMPLE], "nowhere", BAD_INPUT),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(
    options: list[str],
    named: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("diagnose", "--base", "nowhere", "--adapter", "nowhere", *options) == code
    assert named in errors(capsys)


def test_times_of_another_setting_are_not_taken_for_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = measured_before(tmp_path, speeds())
    assert command(*words, "--plan", traffic.EXAMPLE, "--threads", "7") == BAD_INPUT
    assert "--out" in errors(capsys)


def test_broken_times_are_the_users_to_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = measured_before(tmp_path, speeds())
    for text in ("{}", "[]", "torn", '{"merged": {"prefill": {"x": []}}}'):
        (tmp_path / speed_asking.SPEEDS).write_text(text)
        assert command(*words, "--plan", traffic.EXAMPLE) == BAD_INPUT
        assert errors(capsys)


@pytest.mark.usefixtures("few_draws")
def test_our_own_engine_is_measured_and_its_plan_judged(
    tiny_lora: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BLOCKS", 2), ("FEWEST_BLOCKS", 2), ("LOADS", 1)):
        monkeypatch.setattr(speed_asking, name, value)
    out = tmp_path / "out"
    words = ["diagnose", "--base", tiny_base, "--adapter", f"support={tiny_lora}", "--out", out, "--threads", "1"]
    plan_text = "adapters=3 rps=0.1 zipf=1 slo='ttft <= 60 s' memory=9GB prompt=20 new=4"
    assert command(*words, "--plan", plan_text) in (ACCEPTED, INCONCLUSIVE)
    times = speed_asking.read(out)
    assert {len(samples) for samples in (*times.merged.step.values(), *times.mixed.values())} == {2}
    assert list(times.apart.step) == list(speed_asking.ROWS) and len(times.apart.prefill) == 2
    assert times.engine_bytes > 10**7 and times.kv_bytes_per_token > 0
    assert json.loads((out / planning.PLAN).read_text())["recommended"]
