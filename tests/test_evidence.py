"""What the machine did to a measurement, which clock judges, and what is left of the adapter."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.records import decide, evidence_of, of, plan_of, quality, speed, whole
from hypothesis import given
from hypothesis import strategies as st

from peftopt import machine
from peftopt.decision.figures import figures as figures_of
from peftopt.measurements import SERVED, Forecast
from peftopt.records import TWIN, Json, Measurement
from peftopt.report import table


def around(measurements: list[Measurement], **state: Json) -> list[Measurement]:
    """The same turns with a state of the machine around each."""
    return [Measurement(m.probe, m.variant, m.workload, 1, {**m.values, "machine": state}) for m in measurements]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"cores": 4, "foreign_cores": 3.2}, None),  # three processors are free for others
        ({"cores": 4, "foreign_cores": 3.4}, "other processes"),
        ({"cores": 4, "steal": 0.03}, "host took 3 %"),
        ({"throttled": 0.2}, "quota withheld 20 %"),
        ({"heat_events": 1.0}, "slowed down for heat"),
        ({"gpu_foreign": 1, "gpu_slowed": False}, "another process was on the GPU"),
        ({"gpu_foreign": 0, "gpu_slowed": True}, "the GPU slowed down"),
        ({"load": 40.0}, None),  # an average of the last minute says little of this turn
        ({}, None),
    ],
)
@pytest.mark.fault(16, "the block is flagged with the reason")
def test_blocks_are_flagged_for_what_was_at_work_in_them(state: dict[str, Json], reason: str | None) -> None:
    plan = plan_of("merged", threads=1)
    found = evidence_of(plan, around(speed(plan, {"merged": 0.8}, 12), **state)).disturbed("chat")
    assert len(found) == (12 if reason else 0)
    assert all(reason and reason in text for reasons in found.values() for text in reasons)


def test_on_a_gpu_one_processor_is_enough_and_its_own_memory_is_the_floor() -> None:
    plan = plan_of("merged")
    turns = around(speed(plan, {"merged": 0.8}, 12), cores=16, foreign_cores=3.0)
    assert len(evidence_of(plan, turns).disturbed("chat")) == 12, "on a CPU every processor computes"
    launches = [
        Measurement("launch", arm, "chat", values={"device": "cuda", "model_loading_time": 1.0, **weights})
        for arm, weights in (("adapter", {}), ("merged", {"weight_bytes": 4e9, "kv_bytes": 0}))
    ]
    memory = Measurement("memory", "merged", values={"gpu_memory_allocated": 3e8, "gpu_memory_reserved": 4e8})
    survey = Measurement("machine", "", values={"read_bytes_per_s": 1e10, "gpu_read_bytes_per_s": 4e12})
    engine = Measurement("engine", "merged", values={"why": "kernels", "gpu_busy": 0.25, "log": []})
    for request in (r for turn in turns for r in turn.values["requests"]):
        request["prompt_tokens"] = 0
    found = evidence_of(plan, [survey, *launches, *turns, memory, engine])
    assert not found.disturbed("chat")
    figures = figures_of(found, "merged")
    assert figures["fragmentation"].estimate == pytest.approx(0.25)
    assert figures["gpu_busy"].estimate == 0.25
    tpot = figures["tpot.p50@chat"].estimate
    assert figures["bandwidth@chat"].estimate == pytest.approx(1.0 / tpot, rel=0.01)


@pytest.mark.fault(16, "a race that it leaves open names it")
def test_a_disturbed_race_is_warned_of_and_named_where_it_stays_open() -> None:
    plan = plan_of("merged", threads=1)
    turns = around(speed(plan, {"merged": 0.85}, 24, noise=0.2), cores=1, foreign_cores=0.9)
    decision = decide(plan, turns, {})
    assert any("24 of 24 blocks of chat were disturbed" in w for w in decision.warnings)
    verdict = next(v for v in of(decision, "merged").verdicts if v.rule == "merge.gain")
    assert "24 of 24 blocks were disturbed (other processes took processors it needed)" in verdict.reason


def test_a_process_is_waited_for_until_it_rests(tmp_path: Path) -> None:
    flag = tmp_path / "enough"
    code = f"import os, time\nwhile not os.path.exists({str(flag)!r}): pass\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not machine.cpu_s([process.pid]):
            time.sleep(0.01)
        assert any(not machine.rest([process.pid], limit_s=0.2) for _ in range(50)), "it is busy, when it is let"
        flag.touch()
        assert machine.rest([process.pid], limit_s=60)
    finally:
        process.kill()
        process.wait()
    assert machine.rest([process.pid]), "what is gone rests"


def test_what_others_took_is_what_we_did_not() -> None:
    before = {"clock": 10.0, "busy": 100.0, "steal": 1.0, "throttled": 0.0, "events": 0.0}
    after = {"clock": 12.0, "busy": 103.5, "steal": 1.0, "throttled": 0.0, "events": 2.0}
    found = machine.disturbance(before, after, own_s=2.0, pids=set())
    assert (found["foreign_cores"], found["seconds"], found["heat_events"]) == (0.75, 2.0, 2.0)
    assert machine.disturbance(before, after, own_s=9.0, pids=set())["foreign_cores"] == 0
    assert {"load", "cores", "steal", "throttled"} <= found.keys()
    assert machine.disturbance(machine.moment(), machine.moment(), 0.0, set())["seconds"] < 5


@pytest.mark.parametrize(
    ("on_gpu", "ours", "foreign"),
    [
        ({5, 6}, {5, 6}, 0),
        ({5, 6, 7}, {5, 6}, 1),
        ({901, 902}, {5, 6}, 0),
        ({901, 902, 903}, {5, 6}, 1),
        (set(), {5}, 0),
    ],
)
def test_foreign_gpu_processes_are_told_from_ours_also_under_other_numbers(
    on_gpu: set[int], ours: set[int], foreign: int
) -> None:
    lines = ["61, 0x0000000000000004", "70, 0x0000000000000001"]
    assert machine.gpu_state(lines, on_gpu, ours) == {
        "gpu_foreign": foreign,
        "gpu_slowed": False,
        "gpu_temperature_c": 70,
    }
    assert machine.gpu_state(["61, 0x0000000000000040"], set(), set())["gpu_slowed"]


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_times_and_rates_of_few_requests_are_at_least_nothing(blocks: int) -> None:
    plan = plan_of("merged")
    figures = figures_of(evidence_of(plan, speed(plan, {"merged": 0.8}, blocks)), "merged")
    assert figures["latency.p50@chat"].low == figures["throughput@chat"].low == 0, "and not minus infinity"
    assert all(interval.low >= 0 for interval in figures.values())


def test_memory_on_a_gpu_is_that_of_the_processes_that_serve() -> None:
    lines = ["901, 512 MiB", "902, 70000 MiB", "903, [N/A]"]
    assert machine.gpu_held(lines, {901, 902, 903}) == (512 + 70000) * 2**20
    assert machine.gpu_held(lines, {903}) is None, "the driver does not tell"
    assert machine.gpu_held(lines, {5}) is None
    assert machine.gpu_held([], {901}) is None
    assert machine.gpu_held(["901, ", "901", "", "[N/A], 5 MiB"], {901}) is None, "whatever a driver says"
    assert machine.gpu_state(["61", "", "62, N/A"], set(), set()) == {
        "gpu_foreign": 0,
        "gpu_slowed": False,
        "gpu_temperature_c": 62,
    }
    plan = plan_of("merged")
    held = Measurement("memory", "merged", values={"gpu_memory_reserved": 4e9})
    figures = figures_of(evidence_of(plan, [held]), "merged")
    assert figures["gpu_memory_reserved"].estimate == 4e9
    assert "fragmentation" not in figures, "nobody has told what of it is in use"


# ---- order and warm-up -----------------------------------------------------------------------------


def test_what_a_server_fills_of_its_slots_and_an_adapters_switch_are_figures_of_the_report() -> None:
    plan = plan_of("merged")
    told = {"running": {"mean": 1.5, "peak": 2.0, "n": 9}, "slots": 4}
    measured = [
        replace(m, values={**m.values, "engine": told}) if m.probe == "speed" else m
        for m in whole(plan, {"merged": 0.5})
    ]
    launch = {"model_loading_time": 1.0, "device": "cpu", "threads": 1}
    for name, seconds in (("adapter", 0.028), ("merged", None)):
        measured.append(Measurement("launch", name, "chat", values={**launch, "adapter_switch_time": seconds}))
    decision = decide(plan, measured, {})
    figures = {v.name: v.figures for v in decision.variants}
    assert figures["merged"]["server_fill@chat"].estimate == 0.375
    assert (
        figures["adapter"]["adapter_switch_time"].estimate == 0.028 and "adapter_switch_time" not in figures["merged"]
    )
    sheets = table.more(decision).values()
    cells = {name: cell for sheet in sheets for name, cell in zip(sheet.header, sheet.body[0], strict=True)}
    assert cells["of its slots@chat"] == "37.5 %" and cells["adapter switch"] == "0.0280 s"


def test_what_users_saw_and_what_was_expected_stand_beside_what_was_measured() -> None:
    """Only a load that a gateway served, and that is of no workload, is what users saw."""
    plan = plan_of("merged")
    loads = [("served", SERVED, ""), ("another tool's", "vllm bench", ""), ("a block", SERVED, "chat")]
    told = [Measurement("load", "merged", load, values={"source": by, "title": what}) for what, by, load in loads]
    told.append(Measurement("forecast", "merged", "chat", values={"kind": "speed", "against": "adapter", "ratio": 0.8}))
    index = evidence_of(plan, told)
    assert [load.title for load in index.production["merged"]] == ["served"]
    assert index.forecasts == [("merged", "chat", Forecast(kind="speed", against="adapter", ratio=0.8))]


def in_order(blocks: int, later: float, seed: int = 0) -> list[Measurement]:
    """Blocks in random order in which the last turn takes `later` times the first."""
    dice, found = random.Random(seed), []
    for block in range(blocks):
        arms = dice.sample(["adapter", "adapter" + TWIN, "merged", "int8"], 4)
        for order, arm in enumerate(arms):
            ms = 100 * (0.7 if arm == "merged" else 1) * later ** (order / 3) * (1 + dice.gauss(0, 0.01))
            request = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 16}
            values = {"block": block, "order": order, "requests": [{**request, "warmup": False}]}
            found.append(Measurement("speed", arm, "chat", values=values))
    return found


def test_an_order_that_matters_is_measured_and_one_that_does_not_is_not_claimed() -> None:
    plan = plan_of("merged", "int8")
    matters = evidence_of(plan, in_order(16, 1.1)).order_effect("chat")
    assert matters and matters.low < 1.1 < matters.high and matters.low > 1.05
    none = evidence_of(plan, in_order(16, 1.0)).order_effect("chat")
    assert none and none.low < 1 < none.high
    assert evidence_of(plan, in_order(3, 1.1)).order_effect("chat") is None
    assert any("x the first" in w for w in decide(plan, in_order(16, 1.1), {}).notes)
    assert not any("order" in w for w in decide(plan, in_order(16, 1.0), {}).notes)


def launched(cold: list[float], warmup: int, launches: int = 4, blocks: int = 5) -> list[Measurement]:
    """Launches whose first requests take `cold` times the rest; later warm-ups are cut to four tokens."""
    dice, found = random.Random(1), []
    for launch in range(launches):
        found.append(Measurement("launch", "merged", "chat", values={"model_loading_time": 1.0}))
        factors = [*cold]
        for block in range(blocks):
            requests = []
            for n in range(warmup + 1):
                whole = n >= warmup or not block
                ms = (100 if whole else 25) * (factors.pop(0) if factors and whole else 1) * (1 + dice.gauss(0, 0.01))
                times = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms}
                requests.append({**times, "new_tokens": 16 if whole else 4, "warmup": n < warmup})
            values = {"block": launch * blocks + block, "requests": requests}
            found.append(Measurement("speed", "merged", "chat", values=values))
    return found


@pytest.mark.parametrize(
    ("cold", "warmup", "found", "warned"),
    [([], 1, 0, False), ([3.0], 1, 1, False), ([3.0, 1.3], 1, 2, True), ([3.0, 1.3], 2, 2, False), ([2.0], 0, 1, True)],
)
def test_warm_up_is_found_not_assumed(cold: list[float], warmup: int, found: int, warned: bool) -> None:
    plan = plan_of("merged", warmup=warmup)
    measurements = launched(cold, warmup)
    seen = evidence_of(plan, measurements).warm_up("merged", "chat")
    assert seen is not None and seen[0] == found
    assert seen[1] == pytest.approx(cold[0] if cold else 1.0, rel=0.05)
    notes = [n for n in of(decide(plan, measurements, {}), "merged").notes if "warming up" in n]
    assert bool(notes) == warned
    assert not notes or f"measure.warmup: {found}" in notes[0]


# ---- the clock -------------------------------------------------------------------------------------


def on_two_clocks(wall: float, cpu: float, device: str = "cpu", threads: int = 1) -> list[Measurement]:
    """An A/A arm whose two copies differ by about this much on either clock."""
    dice = random.Random(3)
    values = {"device": device, "threads": threads, "model_loading_time": 1.0}
    found = [Measurement("launch", arm, "chat", values=values) for arm in ("adapter", "adapter" + TWIN)]
    for block in range(10):
        for arm in ("adapter", "adapter" + TWIN):
            ms, cpu_ms = (100 * (1 + dice.uniform(-x, x)) for x in (wall, cpu))
            request = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": cpu_ms, "new_tokens": 16}
            found.append(
                Measurement("speed", arm, "chat", values={"block": block, "requests": [{**request, "warmup": False}]})
            )
    return found


@pytest.mark.parametrize(
    ("seen", "clock", "why"),
    [
        (on_two_clocks(0.3, 0.01), "cpu", "two copies of adapter differed"),
        (on_two_clocks(0.01, 0.01), "wall", "two copies of adapter differed"),
        (on_two_clocks(0.3, 0.01, device="cuda"), "wall", "not done on this process's CPU"),
        (on_two_clocks(0.3, 0.01, threads=2), "wall", "several threads"),
        (on_two_clocks(0.3, 0.01)[:8], "wall", "not yet 6 blocks"),
    ],
)
def test_auto_takes_the_cpu_clock_where_it_means_the_same_and_is_quieter(
    seen: list[Measurement], clock: str, why: str
) -> None:
    found = evidence_of(plan_of("merged", clock="auto"), seen).clock
    assert found[0] == clock and why in found[1]


def test_no_variants_figures_have_a_say_in_the_clock() -> None:
    plan = plan_of("merged", clock="auto")
    seen = on_two_clocks(0.3, 0.01)
    more = [Measurement("speed", "merged", m.workload, 1, m.values) for m in seen if m.probe == "speed"]
    assert evidence_of(plan, seen + more).clock == evidence_of(plan, seen).clock


# ---- answers ---------------------------------------------------------------------------------------


def shifted(kept: float, n: int = 40) -> Mapping[str, Mapping[str, Json]]:
    return {f"p{i}": {"shift": 50.0 + i, "kept": kept * (50.0 + i) + (-1) ** i} for i in range(n)}


@pytest.mark.fault(35, "the variant is rejected: the adapter's shift is not in its answers")
def test_an_adapter_that_is_lost_rejects_and_one_that_is_kept_is_told() -> None:
    plan = plan_of("merged")
    base = [m for m in whole(plan, {"merged": 0.5}) if m.variant != "merged" or m.probe == "speed"]
    kept = of(decide(plan, base + quality("merged", **shifted(0.97)), {}), "merged")
    assert kept.outcome == "accepted" and any("97 % of the adapter's shift" in line for line in kept.remarks)
    assert kept.figures["delta_survival"].low < 0.97 < kept.figures["delta_survival"].high
    lost = of(decide(plan, base + quality("merged", **shifted(0.01)), {}), "merged")
    assert lost.decided_by == "artifact.intact" and "not at work" in lost.verdicts[0].reason


@pytest.mark.parametrize(
    ("merged", "apart", "says"),
    [
        (0.95, 0.90, "(+4.1 % to +5.9 %): int8 keeps more of the fine-tune"),
        (0.90, 0.95, "(-5.9 % to -4.1 %): apart keeps more of the fine-tune"),
        (0.95, 0.95, "no difference shown"),
    ],
)
def test_merged_or_apart_below_a_quantizer_is_a_finding(merged: float, apart: float, says: str) -> None:
    plan = plan_of("merged", "int8", "apart")
    seen = [m for m in whole(plan, {"merged": 0.5, "int8": 0.5, "apart": 0.5}) if m.probe == "speed"]
    dice = random.Random(1)
    rows = {name: shifted(kept) for name, kept in (("int8", merged), ("apart", apart))}
    for row in rows["int8"].values():
        row["kept"] += dice.gauss(0, 1.5)
    seen += [m for name, found in rows.items() for m in quality(name, **found)]
    decision = decide(plan, seen, {})
    (line,) = [r for r in of(decision, "int8").remarks if "fine-tune" in r or "no difference" in r]
    assert says.split(": ")[-1] in line and "merged before it was quantized" in line
    assert not [r for name in ("apart", "merged") for r in of(decision, name).remarks if "stays apart" in r]


def test_what_merging_alone_gains_is_told_where_the_adapter_stays_apart_in_the_same_engine() -> None:
    plan = plan_of("merged", "int8", "apart")
    decision = decide(plan, speed(plan, {"merged": 0.5, "int8": 0.3, "apart": 0.4}), {})
    (line,) = [r for r in of(decision, "int8").remarks if "merging alone" in r]
    assert "latency.p50@chat is 0.75x that of apart" in line
    others = [r for name in ("adapter", "merged", "apart") for r in of(decision, name).remarks]
    assert not any("merging alone" in r for r in others), "against the baseline the ratio says it already"


def test_flips_and_the_worst_slice_are_told_with_their_exact_p() -> None:
    plan = plan_of("merged")
    wrong = {f"p{n}": {"correct": False, "slices": ["long"]} for n in range(200, 205)}
    tagged = {f"p{n}": {"slices": ["long"]} for n in range(205, 230)} | {"p1": {"slices": ["short"]}}
    base = [m for m in whole(plan, {"merged": 0.5}) if m.variant != "merged" or m.probe == "speed"]
    found = of(decide(plan, base + quality("merged", **wrong, **tagged), {}), "merged")
    assert "answers: 5 got worse and 0 better; one-sided exact p = 0.031" in found.remarks
    assert "worst slice: long, 5 worse and 0 better of 30; p = 0.031" in found.remarks
    assert found.figures["flips"].estimate == 5 / 400 and found.figures["flips_p"].estimate == 2**-5


def test_tails_of_the_divergence_are_kept() -> None:
    plan = plan_of("merged")
    bad = {"p7": {"kl": 3.1, "kl_worst": 2.9, "agree": 20}}
    base = [m for m in whole(plan, {"merged": 0.5}) if m.variant != "merged" or m.probe == "speed"]
    figures = of(decide(plan, base + quality("merged", **bad), {}), "merged").figures
    assert figures["kl.max"].estimate == pytest.approx(0.1) and figures["kl.token"].estimate == 2.9
    assert figures["top1.min"].estimate == pytest.approx(20 / 31)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(-50, 50), st.floats(-9, 9))
def test_a_slope_is_a_slope(x: list[float], slope: float, start: float) -> None:
    from peftopt.stats import slope as found

    x = [n + v / 1000 for n, v in enumerate([*x, 1.0])]
    assert found(x, [start + slope * v for v in x]) == pytest.approx(slope, abs=1e-6)


def by_launch(spread: float, relaunch: int = 4, blocks: int = 24) -> list[Measurement]:
    """Blocks whose launches differ by `spread` standard deviations of a block."""
    dice, found, effect = random.Random(2), [], dict[str, float]()
    for block in range(blocks):
        for arm in ("adapter", "merged", "int8"):
            if block % relaunch == 0:
                found.append(Measurement("launch", arm, "chat", values={"model_loading_time": 1.0}))
                effect[arm] = dice.gauss(0, 0.02 * spread)
            ms = 100 * (1 + effect[arm] + dice.gauss(0, 0.02))
            request = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 16}
            values = {"block": block, "requests": [{**request, "warmup": False}]}
            found.append(Measurement("speed", arm, "chat", values=values))
    return found


def test_launches_that_differ_are_told_from_launches_that_do_not() -> None:
    plan = plan_of("merged", "int8", relaunch=4)
    found = evidence_of(plan, by_launch(2.0)).launch_effect("chat")
    assert found is not None and 1 < found < 4
    assert evidence_of(plan, by_launch(0.0)).launch_effect("chat") is None
    assert any("from launch to launch" in w for w in decide(plan, by_launch(2.0), {}).warnings)
    assert evidence_of(plan, by_launch(2.0, relaunch=1)).launch_effect("chat") is None, (
        "one block each: nothing to compare"
    )


def test_only_what_was_left_out_before_it_was_tried_counts_as_skipped() -> None:
    def failed(name: str, reason: str) -> Measurement:
        values = {"stage": "preflight", "reason": reason, "detail": "needs torchao", "hint": "pip install torchao"}
        return Measurement("failure", name, values=values)

    plan = plan_of("merged", "int8")
    found = [failed("int8", "skipped"), failed("merged", "killed (SIGKILL)")]
    assert evidence_of(plan, found).skipped == {"int8"}


@pytest.mark.parametrize(("right", "warned"), [(0, True), (3, True), (8, False), (100, False)])
def test_an_adapter_that_is_hardly_ever_right_is_warned_of_and_no_variant_is(right: int, warned: bool) -> None:
    plan = plan_of("merged")
    wrong: dict[str, Any] = {f"p{n}": {"correct": False, "score": 0.0} for n in range(right, 100)}
    never: dict[str, Any] = {f"p{n}": {"correct": False, "score": 0.0} for n in range(100)}
    answers = [*quality("adapter", 100, **wrong), *quality("adapter", 100, launch=2, **wrong)]
    decision = decide(plan, [*speed(plan, {"merged": 0.7}), *answers, *quality("merged", 100, **never)], {})
    told = [warning for warning in decision.warnings if "answers" in warning and "right" in warning]
    assert [warning.split()[0] for warning in told] == (["adapter"] if warned else [])
    if warned:
        assert f"{right} of 100 prompts" in told[0]
