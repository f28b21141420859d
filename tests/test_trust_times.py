"""Times arranged by what shares their fate: blocks, launches, loads that were run apart, turns that failed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from helpers.records import evidence_of, plan_of

from peftopt.decision.evidence import FAILED, Evidence
from peftopt.measurements import Account
from peftopt.records import TWIN, Json, Measurement, Metric, Plan, Workload

TIMES = ("request_duration_ms", "ttft_ms", "tpot_ms", "cpu_ms")


def request(ms: Json, **more: Json) -> dict[str, Json]:
    return {**dict.fromkeys(TIMES, ms), "new_tokens": 64, "warmup": False, **more}


def turn(arm: str, block: int, times: Iterable[Json], workload: str = "chat", **values: Json) -> Measurement:
    requests = [ms if isinstance(ms, dict) else request(ms) for ms in times]
    return Measurement("speed", arm, workload, values={"block": block, "requests": requests, **values})


def launch(arm: str, workload: str = "chat", **values: Json) -> Measurement:
    return Measurement("launch", arm, workload, values={"model_loading_time": 1.0, **values})


def load(arm: str, times: Iterable[Json], started: str = "", **values: Json) -> Measurement:
    requests = [ms if isinstance(ms, dict) else request(ms, scheduled=0.0, done=ms / 1e3) for ms in times]
    when = {"started": started} if started else {}
    return Measurement("load", arm, "chat", values={"requests": requests, **when, **values})


def natural(plan: Plan) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, workloads={"chat": Workload("chat", "p", lengths="natural")}))


PLAN = plan_of("merged", "int8")
FIELD = "request_duration_ms"


# ---- pairs ---------------------------------------------------------------------------------------


def test_pairs_are_of_blocks_in_which_both_were_measured_by_their_medians_in_order() -> None:
    found = [turn("merged", 3, [30, 50, 1000]), turn("merged", 1, [10]), turn("merged", 2, [10])]
    found += [turn("adapter", 1, [20, 40]), turn("adapter", 3, [100]), turn("adapter", 4, [1])]
    evidence = evidence_of(PLAN, found)
    series = evidence.series("merged", "adapter", "chat", FIELD)
    assert list(series.items()) == [(1, pytest.approx(math.log(10 / 30))), (3, pytest.approx(math.log(0.5)))]
    assert evidence.paired("merged", "adapter", "chat", FIELD) == list(series.values())
    assert evidence.series("int8", "adapter", "chat", FIELD) == {}
    assert evidence.ratio("int8", "adapter", "chat", FIELD) is None
    assert (evidence.blocks("merged", "chat"), evidence.blocks("int8", "chat"), evidence.blocks("merged", "bulk")) == (
        3,
        0,
        0,
    )


def test_a_ratio_is_that_of_paired_blocks_at_its_level() -> None:
    found = [m for n in range(12) for m in (turn("adapter", n, [100 + n]), turn("merged", n, [50 + n]))]
    evidence = evidence_of(PLAN, found)
    wide, narrow = (evidence.ratio("merged", "adapter", "chat", FIELD, level) for level in (0.99, 0.5))
    assert wide and narrow and wide.estimate == narrow.estimate
    assert 0.5 < wide.low < narrow.low < narrow.high < wide.high < 0.6
    usual = evidence.ratio("merged", "adapter", "chat", FIELD)
    assert usual and (usual.n, usual.level) == (12, 0.95)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, None])
def test_a_turn_with_a_time_that_is_none_is_left_out(bad: Json) -> None:
    evidence = evidence_of(PLAN, [turn("merged", 0, [10, bad]), turn("merged", 1, [10]), turn("adapter", 0, [10])])
    assert evidence.blocks("merged", "chat") == 1
    assert "a time that is none" in evidence.left_out["merged@chat"]
    assert evidence.series("merged", "adapter", "chat", FIELD) == {}
    assert not evidence.failed


def test_a_turn_of_warm_ups_alone_is_left_out_and_warm_ups_are_no_samples() -> None:
    warm = request(999, warmup=True)
    evidence = evidence_of(PLAN, [turn("merged", 0, [warm]), turn("merged", 1, [warm, 10])])
    assert "no raw requests" in evidence.left_out["merged@chat"]
    assert [r.request_duration_ms for r in evidence.requests("merged", "chat")] == [10]


def test_failed_turns_lose_against_turns_that_did_not_and_say_nothing_of_each_other() -> None:
    broken = request(None, error="timeout")
    found = [turn("merged", 0, [10, broken, broken]), turn("adapter", 0, [10])]
    found += [turn("merged", 1, [10]), turn("adapter", 1, [broken])]
    found += [turn("merged", 2, [broken]), turn("adapter", 2, [broken])]
    found += [turn("merged", 3, [broken]), turn("merged", 5, [10]), turn("adapter", 5, [20])]
    evidence = evidence_of(PLAN, found)
    series = evidence.series("merged", "adapter", "chat", FIELD)
    assert list(series.items()) == [(0, FAILED), (1, -FAILED), (5, pytest.approx(math.log(0.5)))]
    assert evidence.failed["merged", "chat"][0] == "2 of 3 requests failed: timeout"
    assert evidence.left_out == {}
    assert evidence.samples("merged", "chat", FIELD) == [[10, math.inf, math.inf], [10], [math.inf], [math.inf], [10]]
    assert math.log(100) < FAILED


# ---- launches ------------------------------------------------------------------------------------


def run(script: str) -> list[Measurement]:
    """ "A" and "M" launch the adapter and the merge; each digit is a block of both, of as many ms."""
    found, block = [], 0
    for letter in script:
        if letter in "AM":
            found.append(launch({"A": "adapter", "M": "merged"}[letter]))
        else:
            found += [turn("adapter", block, [int(letter)]), turn("merged", block, [int(letter)])]
            block += 1
    return found


@pytest.mark.parametrize(
    ("script", "numbers"),
    [
        ("AM11AM11", [0, 0, 1, 1]),
        ("AM1M1A1AM1", [0, 0, 0, 1]),
        ("AM1AM1AM1", [0, 1, 2]),
        ("AM111", [0, 0, 0]),
        ("A11A1", [0, 0, 1]),
    ],
)
def test_blocks_share_a_launch_as_long_as_one_worker_goes_on(script: str, numbers: list[int]) -> None:
    evidence = evidence_of(PLAN, run(script))
    assert evidence.launches_of("merged", "adapter", "chat", range(len(numbers))) == numbers
    assert evidence.launches_of("adapter", "merged", "chat", range(len(numbers))) == numbers


def test_launches_that_were_not_logged_are_not_made_up() -> None:
    evidence = evidence_of(PLAN, run("111"))
    assert evidence.launches_of("merged", "adapter", "chat", range(3)) is None
    assert evidence.launch_count("merged", "chat") == 3, "each block by itself"
    assert evidence_of(PLAN, run("AM11")).launches_of("merged", "adapter", "bulk", range(2)) is None


def test_samples_come_in_the_launches_they_share() -> None:
    evidence = evidence_of(PLAN, run("AM12M3A45M67"))
    assert evidence.samples("merged", "chat", FIELD) == [[1, 2], [3, 4, 5], [6, 7]]
    assert evidence.samples("merged", "chat", FIELD, 4) == [[1, 2], [3, 4]]
    assert evidence.launch_count("merged", "chat") == 3 and evidence.launch_count("merged", "chat", 2) == 1
    assert evidence.samples("adapter", "chat", FIELD) == [[1, 2, 3], [4, 5, 6, 7]]
    none = [request(5, ttft_ms=None), request(6)]
    assert evidence_of(PLAN, [turn("merged", 0, none)]).samples("merged", "chat", "ttft_ms") == [[6]]


def by_launch(*launches: Sequence[float], arm: str = "merged") -> list[Measurement]:
    """Blocks of the merge at these log ratios to the adapter, launch by launch."""
    found, block = [], 0
    for logs in launches:
        found += [launch("adapter"), launch(arm)]
        for log in logs:
            found += [turn("adapter", block, [100]), turn(arm, block, [100 * math.exp(log)])]
            block += 1
    return found


def test_the_launch_effect_by_hand() -> None:
    """Means 0, 1, 2 over four blocks each, which lie 0.1 off: mean squares 4 and 0.12 / 9; sqrt((300 - 1) / 4)."""
    spread = (-0.1, -0.1, 0.1, 0.1)
    launches = [[centre + x for x in spread] for centre in (0, 1, 2)]
    evidence = evidence_of(PLAN, by_launch(*launches))
    ratio = 4 / (0.12 / 9)
    assert evidence.launch_effect("chat") == pytest.approx(math.sqrt((ratio - 1) / (11 / 2)))
    assert evidence.launch_effect("bulk") is None
    pair = evidence_of(PLAN, by_launch(*launches[:2]))  # 2 over one, 0.08 over six
    assert pair.launch_effect("chat") == pytest.approx(math.sqrt((2 / (0.08 / 6) - 1) / 7))
    wide = [m for m in by_launch([3 * x for x in spread], arm="int8") if m.variant == "int8"]
    seldom = [turn("int8", block, [ms]) for block, ms in ((0, 10), (4, 100), (8, 1000))]  # once in each launch
    for more in (wide, seldom):
        assert evidence_of(PLAN, [*by_launch(*launches), *more]).launch_effect("chat") == evidence.launch_effect("chat")
    two = evidence_of(PLAN, [*by_launch(*launches), *by_launch(*launches, arm="int8")])
    assert two.launch_effect("chat") is not None
    same = evidence_of(PLAN, by_launch(spread, spread, spread))
    assert same.launch_effect("chat") is None
    assert evidence_of(PLAN, by_launch(*[[0.0, 0.0]] * 3)).launch_effect("chat") is None, "no spread to compare with"
    assert evidence_of(PLAN, by_launch(*[[x] for x in spread])).launch_effect("chat") is None
    assert evidence_of(PLAN, by_launch(spread)).launch_effect("chat") is None


# ---- loads that were run apart -------------------------------------------------------------------


def blocks_of(evidence: Evidence, arm: str) -> dict[int, float]:
    return {block: turn[0].request_duration_ms for block, turn in evidence.turns[arm, "chat"].items()}


def test_loads_open_a_block_where_a_variant_comes_again() -> None:
    order = ["adapter", "merged", "merged", "adapter", "int8", "adapter"]
    evidence = evidence_of(PLAN, [load(arm, [10 + n]) for n, arm in enumerate(order)])
    assert blocks_of(evidence, "adapter") == {0: 10, 1: 13, 2: 15}
    assert blocks_of(evidence, "merged") == {0: 11, 1: 12}
    assert blocks_of(evidence, "int8") == {1: 14}
    assert (evidence.loads("adapter", "chat"), evidence.loads("merged", "chat"), evidence.loads("adapter", "bulk")) == (
        3,
        2,
        0,
    )


def test_loads_come_after_the_blocks_of_a_run_and_in_the_order_of_time() -> None:
    raced = [turn(arm, block, [5], machine={"seconds": 1.0}) for block in range(4) for arm in ("adapter", "merged")]
    apart = [load("merged", [7], "2026-01-01T03"), load("adapter", [6], "2026-01-01T01")]
    apart += [load("adapter", [8], "2026-01-01T04"), load("merged", [9], "2026-01-01T02")]
    evidence = evidence_of(PLAN, [*raced, *apart])
    assert {b: ms for b, ms in blocks_of(evidence, "adapter").items() if b > 3} == {4: 6, 5: 8}
    assert {b: ms for b, ms in blocks_of(evidence, "merged").items() if b > 3} == {4: 9, 5: 7}
    unknown = [*apart[:3], load("merged", [9])]  # one does not say when: all stay as they are
    assert blocks_of(evidence_of(PLAN, unknown), "merged") == {0: 7, 1: 9}
    assert evidence_of(PLAN, raced).loads("merged", "chat") == 0, "turns of a run are no loads"


def test_loads_that_stopped_keep_their_place_and_fail_unless_their_user_ended_them() -> None:
    found = [load("adapter", [10]), load("merged", [10], stopped="the server is gone")]
    found += [load("adapter", [11]), load("merged", [11], stopped="interrupted"), load("adapter", [12])]
    evidence = evidence_of(PLAN, [*found, load("merged", [12])])
    assert dict(evidence.failed["merged", "chat"]) == {0: "the server is gone"}
    assert blocks_of(evidence, "merged") == {2: 12}
    assert evidence.left_out == {"merged@chat": "interrupted"}
    assert evidence.loads("merged", "chat") == 2
    assert list(evidence.series("merged", "adapter", "chat", FIELD).items()) == [(0, FAILED), (2, 0.0)]


def test_a_load_has_the_time_of_all_its_requests_and_what_it_lacks() -> None:
    requests = [request(100, scheduled=s, done=s + 0.1) for s in (0.0, 0.4)]
    evidence = evidence_of(PLAN, [load("merged", requests, lacks=["gaps"], engine={"slots": 2})])
    assert [r.turn_ms for r in evidence.requests("merged", "chat")] == [pytest.approx(500)] * 2
    assert evidence.apart == {"merged@chat": ("gaps",)}
    assert evidence.accounts["merged", "chat"] == [Account(slots=2)]
    assert all("turn_ms" not in r for r in requests), "records stay as they were"


@pytest.mark.parametrize("tokens", [63, 65])
def test_a_load_of_other_lengths_is_left_out_where_lengths_are_fixed(tokens: int) -> None:
    odd = [load("merged", [request(100, scheduled=0.0, done=0.1, new_tokens=tokens)])]
    fixed, free = evidence_of(PLAN, odd), evidence_of(natural(PLAN), odd)
    assert f"answers of {tokens} tokens, where the workload has 64" in fixed.left_out["merged@chat"]
    assert fixed.blocks("merged", "chat") == 0 and free.blocks("merged", "chat") == 1
    other = Measurement("load", "merged", "nowhere", values=odd[0].values)
    assert evidence_of(PLAN, [other]).apart == {}


# ---- clocks --------------------------------------------------------------------------------------


def test_a_coarse_clock_may_have_moved_either_time() -> None:
    coarse = [turn("adapter", n, [40, 50, 60]) for n in range(4)] + [turn("merged", n, [20, 30]) for n in range(4)]
    evidence = evidence_of(PLAN, coarse)
    assert evidence.resolution(("adapter",), "chat", FIELD) == pytest.approx(10 / 50)
    assert evidence.resolution(("adapter", "merged"), "chat", FIELD) == pytest.approx(10 / 50 + 10 / 25)
    fine = [turn("adapter", n, [40 + n / 7]) for n in range(20)]
    assert evidence_of(PLAN, fine).resolution(("adapter", "merged"), "chat", FIELD) == 0


@pytest.mark.parametrize(
    ("clock", "metric", "field"),
    [
        ("wall", "latency.p50", "request_duration_ms"),
        ("wall", "ttft.p95", "ttft_ms"),
        ("wall", "tpot.p50", "tpot_ms"),
        ("wall", "throughput", "request_duration_ms"),
        ("cpu", "ttft.p50", "cpu_ms"),
    ],
)
def test_a_race_compares_the_field_of_its_metric_on_the_clock_that_judges(clock: str, metric: str, field: str) -> None:
    evidence = evidence_of(plan_of("merged", clock=clock), [])
    assert evidence.field(Metric(metric, "chat")) == field
    assert evidence.clock[0] == clock
    assert (evidence.clock[1] == "what a user waits for") == (clock == "wall")


def test_the_throughput_of_a_load_is_a_matter_of_all_its_requests() -> None:
    """They overlap: the time of one says nothing of how many are done in a minute."""
    plan = plan_of("merged", clock="wall")
    loaded = replace(plan.recipe, workloads={"chat": Workload("chat", "p", users=2), "bulk": Workload("bulk", "p")})
    evidence = evidence_of(replace(plan, recipe=loaded), [])
    assert evidence.field(Metric("throughput", "chat")) == "turn_ms"
    assert evidence.field(Metric("latency.p50", "chat")) == evidence.field(Metric("throughput", "bulk")) == FIELD


def on_clocks(pairs: Sequence[tuple[float, float]], device: str = "cpu", threads: int = 1) -> list[Measurement]:
    """The A/A arm off by these percents (on the wall clock, in CPU time) in each block."""
    found = [launch(arm, device=device, threads=threads) for arm in ("adapter", "adapter" + TWIN)]
    for block, (wall, cpu) in enumerate(pairs):
        found.append(turn("adapter", block, [100]))
        off = request(100 * math.exp(wall / 100), cpu_ms=100 * math.exp(cpu / 100))
        found.append(turn("adapter" + TWIN, block, [off]))
    return found


@pytest.mark.parametrize(
    ("pairs", "clock"),
    [
        ([(2.1, 1)] * 6, "cpu"),
        ([(-2.1, 1), (2.1, -1)] * 3, "cpu"),
        ([(1.9, 1)] * 6, "wall"),
        ([(0.0, 0.0)] * 6, "wall"),
        ([(2.1, 1)] * 5, "wall"),
        ([(1.9, 1)] * 6 + [(50, 1)] * 9, "wall"),
        ([(2.1, 1)] * 6 + [(0, 50)] * 9, "cpu"),
    ],
)
def test_auto_takes_cpu_time_where_the_wall_clock_is_twice_as_noisy_in_the_first_six_blocks(
    pairs: list[tuple[float, float]], clock: str
) -> None:
    plan = plan_of("merged", clock="auto")
    evidence = evidence_of(plan, on_clocks(pairs))
    assert evidence.clock[0] == clock
    if len(pairs) > 5 and pairs[0][1]:
        assert f"{abs(pairs[0][0]):.2f} % on the wall clock and by 1.00 % in CPU time" in evidence.clock[1]
    assert evidence_of(plan, on_clocks(pairs, device="cuda")).clock[0] == "wall"
    assert evidence_of(plan, on_clocks(pairs, threads=2)).clock[0] == "wall"
    for odd in ({"device": "cuda", "threads": 1}, {"device": "cpu", "threads": 2}):
        assert evidence_of(plan, [*on_clocks(pairs), launch("adapter", **odd)]).clock[0] == "wall", "in any launch"
    idle = launch("int8", device="cuda", threads=4)  # it answers questions only
    assert evidence_of(plan, [*on_clocks(pairs), idle]).clock[0] == clock


# ---- what a block takes, and what disturbed it ---------------------------------------------------


def test_minutes_of_blocks_are_those_of_the_latest_turns_and_of_the_launches_before_them() -> None:
    def block(number: int, *seconds: float) -> list[Measurement]:
        return [turn(f"v{n}", number, [9], machine={"seconds": s}) for n, s in enumerate(seconds)]

    plan = plan_of("merged", relaunch=4)
    launches = [launch("merged", model_loading_time=s) for s in (10.0, 20.0, 90.0)]
    other = [launch("merged", "bulk", model_loading_time=500.0), turn("v0", 50, [9], "bulk", machine={"seconds": 99.0})]
    early = [m for n in range(20) for m in block(n, 50.0, 50.0, 50.0)]
    late = [m for n in range(20, 26) for m in block(n, 2.0, 4.0)]
    evidence = evidence_of(plan, [*launches, *other, *early, *late])
    assert evidence.minutes("chat", 4) == pytest.approx((4 * 6 + 20 * 2) / 60)
    assert evidence.minutes("chat", 5) == pytest.approx((5 * 6 + 2 * 20 * 2) / 60)
    assert evidence_of(plan, [*early, *late]).minutes("chat", 1) == pytest.approx(6 / 60)
    assert evidence_of(plan, [turn("v0", 0, [9])]).minutes("chat", 1) is None
    assert evidence_of(plan, early).minutes("bulk", 1) is None


@pytest.mark.parametrize(
    ("state", "disturbed"),
    [
        ({"steal": 0.01}, False),
        ({"steal": 0.011}, True),
        ({"throttled": 0.01}, False),
        ({"throttled": 0.011}, True),
        ({"heat_events": 0}, False),
        ({"heat_events": 1}, True),
        ({"gpu_foreign": None}, False),
        ({"cores": 4, "foreign_cores": 2.25}, False),
        ({"cores": 4, "foreign_cores": 2.26}, True),
        ({"foreign_cores": 0.0}, True),
    ],
)
def test_from_where_on_a_block_is_disturbed(state: dict[str, Json], disturbed: bool) -> None:
    """Two threads compute: of four processors two are free, and a quarter of one may be taken."""
    plan = plan_of("merged", threads=2)
    found = evidence_of(plan, [turn("merged", 3, [9], machine=state), turn("merged", 1, [9])]).disturbed("chat")
    assert list(found) == [3] * disturbed
    all_ = evidence_of(plan_of("merged"), [turn("merged", 3, [9], machine={"cores": 4, "foreign_cores": 0.2})])
    assert all_.disturbed("chat") == {} == all_.disturbed("bulk")
    more = evidence_of(plan_of("merged"), [turn("merged", 3, [9], machine={"cores": 4, "foreign_cores": 0.3})])
    assert len(more.disturbed("chat")) == 1 and more.disturbed("bulk") == {}


@pytest.mark.parametrize(("foreign", "disturbed"), [(3.25, False), (3.26, True)])
def test_one_thread_feeds_a_gpu(foreign: float, disturbed: bool) -> None:
    found = [launch("merged", device="cuda"), turn("merged", 0, [9], machine={"cores": 4, "foreign_cores": foreign})]
    assert bool(evidence_of(plan_of("merged", threads=3), found).disturbed("chat")) == disturbed


def test_a_disturbance_is_told_once_a_block() -> None:
    states = [{"steal": 0.5, "heat_events": 2}, {"steal": 0.5}]
    found = evidence_of(PLAN, [turn(f"v{n}", 0, [9], machine=s) for n, s in enumerate(states)]).disturbed("chat")
    assert found == {0: ["the host took 50 % of the CPU time", "the processor slowed down for heat"]}


def test_the_order_effect_by_hand() -> None:
    """Three arms in each of six orders; each place costs 0.1 on the log scale, so the last takes e^0.2 the first."""
    found, arms = [], {"adapter": 1, "merged": 0.5, "int8": 2}
    for block, order in enumerate(itertools.permutations(arms)):
        for place, arm in enumerate(order):
            found.append(turn(arm, block, [100 * arms[arm] * math.exp(0.1 * place)], order=place))
    effect = evidence_of(PLAN, found).order_effect("chat")
    assert effect and (effect.n, effect.level) == (6, 0.99)
    assert effect.estimate == pytest.approx(math.exp(0.2))
    lonely = [turn(arm, 9, [100], order=place) for place, arm in enumerate(["merged", "int8", "adapter" + TWIN])]
    assert evidence_of(PLAN, [*found, *lonely]).order_effect("chat") == effect, (
        "without the adapter nothing is compared"
    )
    five = [m for m in found if m.values["block"] < 5]
    assert evidence_of(PLAN, five).order_effect("chat") is None
    assert evidence_of(PLAN, found).order_effect("bulk") is None
    two = [m for m in found if m.variant != "int8"]
    assert evidence_of(PLAN, two).order_effect("chat") is None, "two turns have no line"


def test_warm_up_by_hand() -> None:
    """Of eight requests the later four are steady; what is 5 % over them is warm-up, up to the first that is not."""

    def told(*launches: list[float], **changes: Json) -> tuple[int, float] | None:
        found = []
        for n, times in enumerate(launches):
            found += [launch("merged"), turn("merged", n, [request(ms, **changes) for ms in times])]
        return evidence_of(PLAN, found).warm_up("merged", "chat")

    assert told([300, 110, 100, 110, 100, 100, 100, 100]) == (2, 3.0)
    assert told([300, 104, 130, 100, 100, 100, 100, 100]) == (1, 3.0)
    assert told([100] * 8) == (0, 1.0)
    assert told([105.1, 100, 100, 100]) == (1, pytest.approx(1.051)) and told([104.9, 100, 100, 100]) == (
        0,
        pytest.approx(1.049),
    )
    assert told([130, 100, 90, 110]) == (0, pytest.approx(1.3)), "within three median deviations of the later half"
    assert told([131, 100, 90, 110]) == (1, pytest.approx(1.31))
    assert told([200, 200, 100, 100]) == (2, 2.0), "all of the first half"
    assert told([200, 100, 100, 100], [100] * 4, [300, 100, 100, 100]) == (1, 2.0), "the median over launches"
    assert told([200, 200, 200, 90, 100, 110]) == (3, 2.0), "steady is the later half"
    assert told([200, 200, 200, 100, 100, 100], [200, 200, 100, 100]) == (3, 2.0), "as far as any launch goes"
    long, short = [200, 200, 200, 100, 100, 100], [200, 200, 100, 100]
    for other in (short, [*short, 100]):
        assert told(long, other, other) == (3, 2.0), "the later half of a short launch says nothing of warm-up"
    assert told([200, 100, 100]) is None
    loaded = replace(PLAN.recipe, workloads={"chat": Workload("chat", "p", users=2)})
    served = evidence_of(replace(PLAN, recipe=loaded), [launch("merged"), turn("merged", 0, [200, 100, 100, 100])])
    assert served.warm_up("merged", "chat") is None


def test_warm_up_is_sought_in_whole_answers() -> None:
    short = [request(25, new_tokens=4, warmup=True)] * 4
    found = [launch("merged"), turn("merged", 0, [*short, *([request(100)] * 4)])]
    assert evidence_of(PLAN, found).warm_up("merged", "chat") == (0, 1.0)
    free = [
        launch("merged"),
        turn("merged", 0, [request(900, warmup=True), *[request(100, new_tokens=n) for n in range(4)]]),
    ]
    assert evidence_of(natural(PLAN), free).warm_up("merged", "chat") == (0, 1.0)


# ---- records that are none, or of something else -------------------------------------------------


def test_what_was_not_measured_leaves_nothing_of_its_turn() -> None:
    told = {"machine": {"steal": 0.5, "seconds": 9.0}, "engine": {"slots": 2}, "order": 1}
    for bad in (request(None, error="timeout"), request(math.nan), request(5, warmup=True)):
        evidence = evidence_of(PLAN, [launch("merged"), turn("merged", 0, [bad] * 4, **told)])
        assert not evidence.disturbed("chat") and not evidence.accounts and not evidence.machine
        assert evidence.warm_up("merged", "chat") is None
    failed = [load("merged", [request(None, error="timeout", scheduled=0.0, done=1.0)], engine={"slots": 2})]
    evidence = evidence_of(PLAN, failed)
    assert not evidence.turns and not evidence.accounts
    assert evidence.failed["merged", "chat"] == {0: "1 of 1 requests failed: timeout"}


def test_loads_of_a_workload_come_after_its_own_blocks_only() -> None:
    raced = [turn("merged", block, [5], "bulk", machine={"seconds": 1.0}) for block in range(4)]
    assert blocks_of(evidence_of(PLAN, [*raced, load("merged", [7])]), "merged") == {0: 7}


def test_loads_come_after_a_last_block_that_failed() -> None:
    broken = request(None, error="timeout")
    raced = [turn(arm, block, [broken if block else 9.0]) for block in range(2) for arm in ("adapter", "merged")]
    evidence = evidence_of(PLAN, [*raced, load("adapter", [10]), load("merged", [5])])
    logs = list(evidence.series("merged", "adapter", "chat", FIELD).values())
    assert logs == [0.0, pytest.approx(math.log(0.5))]


def test_warm_ups_of_a_load_are_no_samples() -> None:
    requests = [request(999, warmup=True, scheduled=0.0, done=1.0), request(10, scheduled=1.0, done=1.01)]
    evidence = evidence_of(PLAN, [load("merged", requests)])
    assert [(r.request_duration_ms, r.turn_ms) for r in evidence.requests("merged", "chat")] == [
        (10, pytest.approx(10))
    ]


def test_each_launch_has_its_own_warm_up() -> None:
    launches = [[launch("merged"), turn("merged", n, [100.0 * (n + 2), *[100.0] * 3])] for n in range(3)]
    assert evidence_of(PLAN, [m for each in launches for m in each]).warm_up("merged", "chat") == (1, 3.0)


def test_what_failed_is_tried_again_where_its_user_says_so() -> None:
    failure = Measurement("failure", "merged", values={"stage": "build", "reason": "killed", "detail": ""})
    retry = Measurement("retry", "merged")
    assert evidence_of(PLAN, [failure]).failures.keys() == {"merged"}
    assert not evidence_of(PLAN, [failure, retry]).failures and not evidence_of(PLAN, [retry]).failures
    assert evidence_of(PLAN, [failure, retry, failure]).failures


def test_scores_of_a_task_need_their_name_and_their_rows() -> None:
    for values in ({"task": "t"}, {"samples": [{"id": "a", "value": 1}]}):
        assert not evidence_of(PLAN, [Measurement("task", "merged", values=values)]).tasks["merged"]


def test_blocks_are_granted_beside_those_of_the_recipe() -> None:
    more = [Measurement("more", "", values={"max_blocks": most}) for most in (120, 80)]
    assert [evidence_of(PLAN, more[:n]).budget for n in range(3)] == [60, 120, 120]
    assert evidence_of(PLAN, [Measurement("more", "", values={"max_blocks": 9})]).budget == 60


def test_artifacts_say_how_they_were_made_and_checked_in_order() -> None:
    steps = {build.id: build.step.plugin for build in PLAN.builds}
    told = {"merge": {"certificate": "full"}, "int8": {"certificate": "some", "quantization": "by layer"}}
    found = [
        Measurement("build", "", values={"id": i, "size_bytes": 1, "tier0": [], **told[name]})
        for i, name in steps.items()
    ]
    assert evidence_of(PLAN, found).certificates("int8") == [
        "merge: parity certificate full",
        "int8: by layer",
        "int8: parity certificate some",
    ]
    assert evidence_of(PLAN, found).certificates("merged") == ["merge: parity certificate full"]
    assert evidence_of(PLAN, found).certificates("adapter") == [] == evidence_of(PLAN, []).certificates("int8")


def test_the_share_of_prompts_that_a_policy_shortened() -> None:
    evidence = evidence_of(
        PLAN, [turn("merged", 0, [request(9, batch=4, touched=2), request(9, touched=1), request(9)])]
    )
    assert evidence.touched_share("merged", "chat") == 3 / 6
    assert evidence.touched_share("int8", "chat") == evidence.touched_share("merged", "bulk") == 0


def test_a_clock_that_one_of_the_two_did_not_have_compares_nothing() -> None:
    for ours, theirs in ((0, 5), (5, 0), (None, None), (5, math.nan)):
        found = [turn("merged", 0, [request(9, cpu_ms=ours)]), turn("adapter", 0, [request(9, cpu_ms=theirs)])]
        evidence = evidence_of(PLAN, found)
        assert evidence.series("merged", "adapter", "chat", "cpu_ms") == {}
        assert evidence.resolution(("merged", "adapter"), "chat", "cpu_ms") == 0
