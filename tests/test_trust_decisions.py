"""What is made of verdicts: which one decides, what is chosen, what is noted, remarked and warned of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from helpers.records import builds, decide, evidence_of, of, plan_of, quality, speed, whole

from peftopt import stats
from peftopt.decision import decide as deciding
from peftopt.decision.evidence import Evidence
from peftopt.decision.rules.variant import outcome_of
from peftopt.metrics import percent
from peftopt.records import (
    TWIN,
    Decision,
    Interval,
    Json,
    Measurement,
    Plan,
    Rule,
    Step,
    Variant,
    VariantDecision,
    Verdict,
    Workload,
)

Rows = Mapping[str, Mapping[str, Json]]


def rows(*numbers: int, **values: Json) -> dict[str, dict[str, Json]]:
    return {f"p{n}": dict(values) for n in numbers}


def judged(*verdicts: tuple[str, str]) -> tuple[str, str]:
    found: list[Verdict] = [Verdict(rule, outcome, "") for rule, outcome in verdicts]  # type: ignore[arg-type]
    return outcome_of(found)


GAIN, LOST, INTACT, WHOLE = "merge.gain", "merge.lost", "artifact.intact", "variant.critical_errors"


@pytest.mark.parametrize(
    ("verdicts", "decided"),
    [
        ([(GAIN, "accepted"), (LOST, "accepted")], ("accepted", GAIN)),
        ([(GAIN, "accepted"), (LOST, "inconclusive")], ("inconclusive", LOST)),
        ([(GAIN, "inconclusive"), (LOST, "rejected"), (INTACT, "rejected")], ("rejected", LOST)),
        ([(GAIN, "not judged"), (LOST, "accepted")], ("accepted", LOST)),
        ([(GAIN, "not judged"), (INTACT, "accepted")], ("not judged", GAIN)),
        ([(INTACT, "accepted"), (WHOLE, "accepted")], ("not judged", "")),
        ([(INTACT, "accepted"), ("require: kl <= 1 nats", "accepted")], ("not judged", "")),
        ([("require: top1 >= 9 %", "accepted")], ("not judged", "")),
        ([(INTACT, "accepted"), ("require: latency.p50@chat <= 1 s", "accepted")]
         , ("accepted", "require: latency.p50@chat <= 1 s")),
        ([], ("not judged", "")),
    ],
)  # fmt: skip
def test_a_variant_is_as_good_as_its_worst_verdict_and_nothing_broken_is_no_gain(
    verdicts: Sequence[tuple[str, str]], decided: tuple[str, str]
) -> None:
    assert judged(*verdicts) == decided


def test_the_decision_is_the_best_outcome_there_is() -> None:
    plan = plan_of("merged", "int8")
    good = whole(plan, {"merged": 0.6, "int8": 0.5})
    assert decide(plan, good, {"cores": 2}).machine == {"cores": 2}
    for ratios, expected, chosen in (
        ({"merged": 0.6, "int8": 0.5}, "accepted", "int8"),
        ({"merged": 0.5, "int8": 0.6}, "accepted", "merged"),
        ({"merged": 0.5, "int8": 1.5}, "accepted", "merged"),
        ({"merged": 0.85, "int8": 1.5}, "inconclusive", None),
        ({"merged": 1.5, "int8": 1.5}, "rejected", None),
    ):
        found = decide(plan, whole(plan, ratios), {})
        assert (found.outcome, found.chosen) == (expected, chosen)
    died = [
        Measurement("failure", name, values={"stage": "build", "reason": "refused", "detail": "", "hint": ""})
        for name in ("merged", "int8")
    ]
    assert decide(plan, [*good, *died], {}).outcome == "not judged"
    worse = [*good, replace(died[0], values={**died[0].values, "reason": "killed"}), died[1]]
    assert decide(plan, worse, {}).outcome == "rejected"


def test_a_decision_says_what_it_is_of() -> None:
    plan = plan_of("merged", "int8", clock="cpu")
    found = decide(plan, whole(plan, {"merged": 0.6, "int8": 0.5}), {})
    assert (found.recipe, found.baseline, found.minimize) == ("test", "adapter", "latency.p50@chat")
    assert (found.clock, found.clock_reason) == ("cpu", "as the recipe says")
    assert [v.name for v in found.variants] == ["adapter", "merged", "int8"]
    assert of(found, "int8").techniques == ("merge", "int8") and of(found, "adapter").techniques == ()


# ---- the sentence --------------------------------------------------------------------------------


def test_the_sentence_tells_the_gain_its_interval_and_what_is_undecided() -> None:
    plan = plan_of("merged", "int8")
    found = decide(plan, whole(plan, {"merged": 0.5, "int8": 0.5}), {})
    ratio = of(found, found.chosen or "").speed
    assert ratio and f"({ratio.estimate:.2f}x, {ratio.low:.2f} to {ratio.high:.2f} at " in found.sentence
    assert f"at {percent(ratio.level, 1)}, {ratio.n} blocks" in found.sentence
    assert "50 % lower than the adapter's" in found.sentence and "wall clock" in found.sentence
    assert "undecided" not in found.sentence
    open_ = [m for m in whole(plan, {"merged": 0.5, "int8": 0.5}) if (m.probe, m.variant) != ("quality", "int8")]
    assert "(int8 undecided)" in decide(plan, open_, {}).sentence
    few = [m for m in whole(plan, {"merged": 0.85, "int8": 1.5}) if m.probe != "speed"]
    assert decide(plan, few, {}).sentence.startswith("Undecided, so keep the adapter as served: merged inconclusive by")
    slow = decide(plan, whole(plan, {"merged": 1.5, "int8": 2.5}), {}).sentence
    assert slow.startswith("Keep the adapter as served: no variant was accepted (merged rejected by merge.gain; int8")


def small(plan: Plan) -> Plan:
    """int8 may be as slow as it likes if it is smaller."""
    table = (Rule("int8", "not_slower", None), Rule("int8", "critical_errors", 0.05))
    return replace(plan, recipe=replace(plan.recipe, rules=table))


def test_a_choice_that_is_slower_is_called_so_and_noted() -> None:
    plan = small(plan_of("int8"))
    found = decide(plan, whole(plan, {"int8": 1.5}), {})
    assert found.chosen == "int8" and "50 % higher than the adapter's" in found.sentence
    assert [n for n in of(found, "int8").notes if "slower" in n] == ["slower than adapter here: 1.50x its latency"]
    assert of(found, "adapter").notes == ()
    same = decide(plan, whole(plan, {"int8": 1.0}), {})
    assert "about the adapter's" in same.sentence and of(same, "int8").notes == ()


def test_a_choice_without_an_interval_says_so_and_comes_after_those_with_figures() -> None:
    plan = small(plan_of("int8", "apart"))
    found = decide(plan, [*whole(plan, {"apart": 1.2}), *quality("int8")], {})
    assert found.chosen == "apart"
    few = decide(plan, [*whole(plan, {"apart": 1.2}, blocks=3), *quality("int8")], {})
    assert "too few launches or blocks for an interval" in few.sentence and few.chosen == "apart"


# ---- the A/A arm ---------------------------------------------------------------------------------


def twin(ratio: float, blocks: int = 40) -> tuple[Plan, list[Measurement]]:
    plan = plan_of("merged")
    rest = [m for m in whole(plan, {"merged": 0.5}, blocks=blocks) if m.variant != "adapter" + TWIN]
    arm = [replace(m, variant="adapter" + TWIN) for m in speed(plan, {"x": ratio}, blocks) if m.variant == "x"]
    return plan, rest + arm


@pytest.mark.parametrize(("ratio", "differs"), [(0.9, True), (1.0, False), (1.1, True)])
def test_a_copy_that_differs_from_the_baseline_withholds_accepts_only(ratio: float, differs: bool) -> None:
    plan, found = twin(ratio)
    decision = decide(plan, found, {})
    merged = of(decision, "merged")
    assert (merged.outcome, merged.decided_by) == (
        ("inconclusive", "measurement.a_a") if differs else ("accepted", "merge.gain")
    )
    assert of(decision, "adapter").outcome == "not judged"
    assert any(f"{ratio:.3f}"[:4] in w and "A/A" in w for w in decision.warnings) == differs
    slow = decide(plan, [*found, *(m for m in speed(plan, {"merged": 2.0}) if m.variant == "merged")], {})
    assert (of(slow, "merged").outcome, of(slow, "merged").decided_by) == ("rejected", "merge.gain")


def test_the_a_a_arm_shares_its_error_over_the_looks() -> None:
    plan, found = twin(1.02)
    told = deciding.a_a(evidence_of(plan, found))
    assert told and told.level == pytest.approx(1 - 0.02 / 5)


# ---- notes and remarks ---------------------------------------------------------------------------


def remarks(plan: Plan, name: str, answers: Sequence[Measurement]) -> list[str]:
    return list(of(decide(plan, [*builds(plan), *answers], {}), name).remarks)


def both(**variants: Rows) -> list[Measurement]:
    found = quality("adapter", 60) + quality("adapter", 60, launch=2)
    return found + [m for name, changes in variants.items() for m in quality(name, 60, **changes)]


def test_answers_that_got_worse_are_remarked_with_their_chance() -> None:
    plan = plan_of("merged")
    lines = remarks(plan, "merged", both(merged=rows(1, 2, 3, correct=False)))
    assert f"answers: 3 got worse and 0 better; one-sided exact p = {stats.flips(3, 0):.2g}" in lines
    assert not any("answers:" in line for line in remarks(plan, "merged", both(merged={})))
    tagged = remarks(plan, "merged", both(merged=rows(1, 2, 3, correct=False, slices=["a"]) | rows(4, slices=["a"])))
    assert f"worst slice: a, 3 worse and 0 better of 4; p = {stats.flips(3, 0):.2g}" in tagged


def test_what_a_truncation_lost_is_named_up_to_five() -> None:
    plan = plan_of("merged")
    step = Step("truncate", "policy", "truncate", {"over": 99, "keep": "tail"})
    cap = Step("cap", "policy", "shorten", {"max_new_tokens": 9})
    engine = plan.recipe.variants["adapter"].engine
    variants = {
        **plan.recipe.variants,
        "cut": Variant("cut", (), engine, (step,)),
        "capped": Variant("capped", (), engine, (cap,)),
    }
    plan = replace(
        plan, recipe=replace(plan.recipe, variants=variants), models={**plan.models, "cut": "", "capped": ""}
    )
    for lost, named in ((0, ""), (5, " (p0, p1, p2, p3, p4)"), (6, " (p0, p1, p2, p3, p4, …)")):
        cut = rows(*range(10), uncut_tokens=200) | rows(*range(lost), uncut_tokens=200, correct=False)
        (line,) = [r for r in remarks(plan, "cut", both(cut=cut | rows(11, correct=False))) if r.startswith("cuts")]
        assert line == f"cuts 10 of 60 prompts: {lost} answers lost{named}, 0 won"
        ended = rows(*range(lost), stopped=False)
        (line,) = [r for r in remarks(plan, "capped", both(capped=ended)) if r.startswith("cuts off")]
        assert line == f"cuts off {lost} of 60 answers{named}"
    assert not any(line.startswith("cuts") for line in remarks(plan, "merged", both(merged={})))
    wrong = [m for m in both(cut=rows(0, 1, 2, uncut_tokens=200, correct=False)) if m.values["row"] != "p2"]
    wrong += quality("adapter", 60, **rows(0, correct=False))  # p0 was wrong before
    wrong = [m for m in wrong if (m.variant, m.values["row"]) != ("adapter", "p2")]  # and p2 was not asked
    wrong += [m for m in quality("cut", 60, **rows(2, uncut_tokens=200, correct=False)) if m.values["row"] == "p2"]
    (line,) = [r for r in remarks(plan, "cut", wrong) if r.startswith("cuts")]
    assert "1 answers lost (p1)" in line


@pytest.mark.parametrize(("long", "cap"), [(0, 31), (1, 200), (2, 200)])
def test_the_cap_that_is_proposed_cuts_off_one_answer_in_a_hundred_at_most(long: int, cap: int) -> None:
    answers = quality("adapter", 60, **rows(*range(long), new_tokens=200))
    (line,) = remarks(plan_of("merged"), "adapter", answers)
    assert line.startswith(f"max_new_tokens: {cap} would cut off 0.0 %") and "60 asked" in line
    assert f"took {200 if long else 31} tokens, the median 31" in line
    hundred = quality("adapter", 200, **rows(0, 1, new_tokens=200))
    (line,) = remarks(plan_of("merged"), "adapter", hundred)
    assert line.startswith("max_new_tokens: 31 would cut off 1.0 %")


def test_no_cap_is_proposed_that_is_none() -> None:
    answers = quality("adapter", 60, **rows(*range(60), new_tokens=256))  # quality.new_tokens
    assert remarks(plan_of("merged"), "adapter", answers) == [] == remarks(plan_of("merged"), "adapter", [])
    below = quality("adapter", 60, **rows(*range(60), new_tokens=255))
    assert len(remarks(plan_of("merged"), "adapter", below)) == 1


def test_a_share_of_fewer_prompts_is_told_beside_the_adapters_on_the_same() -> None:
    plan = plan_of("merged")
    found = quality("adapter", 60, **rows(0, 59, correct=False)) + quality("merged", 20)
    notes = of(decide(plan, found, {}), "merged").notes
    assert notes == ("answered 20 of 60 prompts; on those adapter is right in 95.0 %",)
    assert of(decide(plan, both(merged={}), {}), "merged").notes == ()


def notes_of(name: str, answers: Sequence[Measurement], *more: Measurement) -> str:
    plan = plan_of("merged", "int8", "compiled")
    (note,) = of(decide(plan, [*builds(plan), *answers, *more], {}), name).notes
    return note


def test_a_variant_that_answered_fewer_prompts_says_why() -> None:
    """The rule that ended it, that its rules take no more, or that it failed; nothing where the run ended before."""
    asked = quality("adapter", 160) + quality("adapter", 160, launch=2)
    wrong = quality("int8", 96, **rows(3, flags=["empty"]))
    plan = plan_of("int8")
    rule = of(decide(plan, [*builds(plan), *asked, *wrong], {}), "int8").decided_by
    assert rule == "int8.critical_errors"
    assert f"answered 96 of 160 prompts, then {rule} " in notes_of("int8", [*asked, *wrong])
    enough, fewer = (notes_of("compiled", [*asked, *quality("compiled", n)]) for n in (128, 127))
    assert "answered 128 of 160 prompts, as many as its rules take" in enough
    assert "answered 127 of 160 prompts;" in fewer
    failure = Measurement("failure", "merged", values={"stage": "quality", "reason": "died", "detail": "?"})
    assert "answered 20 of 160 prompts, then it failed" in notes_of("merged", [*asked, *quality("merged", 20)], failure)


# ---- break-even ----------------------------------------------------------------------------------


def test_a_compile_pays_for_itself_after_its_time_over_what_a_request_saves() -> None:
    plan = plan_of("merged", "compiled")
    found = whole(plan, {"merged": 0.8, "compiled": 0.6}, noise=0.0)
    engine = Measurement("engine", "compiled", values={"compile_time": 40.0})
    figures = of(decide(plan, [*found, engine], {}), "compiled").figures
    own, theirs = figures["latency.p50@chat"], of(decide(plan, found, {}), "merged").figures["latency.p50@chat"]
    paid = figures["break_even"]
    assert paid.estimate == pytest.approx(40e3 / (theirs.estimate - own.estimate)) and paid.n == own.n
    assert paid.low == pytest.approx(40e3 / (theirs.high - own.low)) and paid.high == math.inf
    assert "break_even" not in of(decide(plan, found, {}), "compiled").figures, "nothing was spent"
    little = whole(plan, {"merged": 0.604, "compiled": 0.6}, noise=0.0)  # less than a millisecond
    assert of(decide(plan, [*little, engine], {}), "compiled").figures["break_even"].estimate > 40e3
    even = whole(plan, {"merged": 0.6, "compiled": 0.6}, noise=0.0)
    assert "break_even" not in of(decide(plan, [*even, engine], {}), "compiled").figures, "nothing is saved"


# ---- warnings ------------------------------------------------------------------------------------


def warned(decision: Decision, *words: str) -> bool:
    return any(all(word in warning for word in words) for warning in decision.warnings)


@pytest.mark.parametrize(("disturbed", "fear"), [(3, False), (5, False), (6, True), (12, True)])
def test_disturbed_blocks_are_told_with_their_reasons_and_warned_of_from_half_on(disturbed: int, fear: bool) -> None:
    plan = plan_of("merged")
    found = [
        replace(m, values={**m.values, "machine": {"steal": 0.5} if m.values["block"] < disturbed else {}})
        for m in speed(plan, {"merged": 0.5}, 12)
    ]
    decision = decide(plan, found, {})
    sentence = f"{disturbed} of 12 blocks of chat were disturbed: the host took 50 % of the CPU time ({disturbed})"
    assert warned(decision, sentence) == fear
    assert (sentence in decision.notes) != fear
    assert not decide(plan, speed(plan, {"merged": 0.5}, 12), {}).warnings


def test_a_choice_that_is_slower_is_warned_of_and_a_turned_down_variant_is_not() -> None:
    ratio = Interval(1.3, 1.2, 1.4, 12)
    slow = VariantDecision("small", (), "accepted", "smaller", (), {"latency.ratio@chat": ratio})
    recipe = plan_of("merged").recipe
    assert list(deciding._slow_choice(None, recipe)) == []
    (warning,) = deciding._slow_choice(slow, recipe)
    assert "small" in warning and "slower" in warning
    fast = replace(slow, figures={"latency.ratio@chat": Interval(0.9, 0.8, 1.1, 12)})
    assert list(deciding._slow_choice(fast, recipe)) == []


def test_failures_are_warned_of_with_what_to_do() -> None:
    plan, died = plan_of("merged"), {"stage": "build", "reason": "killed", "detail": "no memory"}
    for hint, said in (("buy some", "; buy some"), ("", "")):
        found = decide(plan, [Measurement("failure", "merged", values={**died, "hint": hint})], {})
        assert found.warnings == (f"merged: build failed, killed: no memory{said}",)


def launched(apart: float, relaunch: int = 4, blocks: int = 24) -> list[Measurement]:
    found = []
    for block in range(blocks):
        for arm in ("adapter", "merged"):
            if block % relaunch == 0:
                found.append(Measurement("launch", arm, "chat", values={"model_loading_time": 1.0}))
            log = (apart * (-1) ** (block // relaunch) + 0.01 * (-1) ** block) * (arm == "merged")
            ms = 100 * math.exp(log)
            request = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 16}
            values = {"block": block, "requests": [{**request, "warmup": False}]}
            found.append(Measurement("speed", arm, "chat", values=values))
    return found


def test_launches_that_differ_are_warned_of_where_they_can_be_had_more_often() -> None:
    assert warned(decide(plan_of("merged", relaunch=4), launched(0.1), {}), "times of chat", "from launch to launch")
    assert warned(decide(plan_of("merged", relaunch=2), launched(0.1), {}), "times of chat", "from launch to launch")
    assert not warned(
        decide(plan_of("merged", relaunch=1), launched(0.1), {}), "times of chat", "from launch to launch"
    )
    assert not warned(
        decide(plan_of("merged", relaunch=4), launched(0.0), {}), "times of chat", "from launch to launch"
    )


def test_failed_turns_are_counted_and_explained() -> None:
    plan = plan_of("merged")
    found = [
        replace(m, values={**m.values, "requests": [{**r, "error": "HTTP 500"} for r in m.values["requests"]]})
        if m.variant == "merged" and m.values["block"] < 2
        else m
        for m in speed(plan, {"merged": 0.5}, 12)
    ]
    assert warned(decide(plan, found, {}), "merged@chat: 2 turns failed", "HTTP 500")


def test_every_workload_has_its_warnings() -> None:
    plan = plan_of("merged")
    plan = replace(plan, recipe=replace(plan.recipe, workloads={n: Workload(n, "p") for n in ("chat", "bulk")}))
    found = [
        replace(m, workload="bulk", values={**m.values, "machine": {"heat_events": 1}})
        for m in speed(plan, {"merged": 0.5}, 12)
    ]
    assert warned(decide(plan, found, {}), "12 of 12 blocks of bulk were disturbed")


def test_the_interval_of_the_choice_is_shared_by_all_that_may_be_chosen() -> None:
    plan = plan_of("merged", "int8", "compiled")
    evidence = evidence_of(plan, speed(plan, {"merged": 0.5}))
    found = deciding._judged(evidence, "merged")
    assert found == evidence.ratio("merged", "adapter", "chat", "request_duration_ms", 1 - 0.05 / 3)
    none = deciding._judged(evidence, "int8")
    assert math.isnan(none.estimate) and (none.low, none.high, none.n) == (0, math.inf, 0)
    assert none.level == pytest.approx(1 - 0.05 / 3) and deciding._minimized(evidence, "int8") == math.inf
    assert deciding._bounds(Interval(0.5, 0.4, 0.6, 9)) == "0.50x, 0.40 to 0.60 at 95.0 %"
    for low, high in ((0.0, 0.6), (0.4, math.inf)):
        assert "too few" in deciding._bounds(Interval(0.5, low, high, 9))


def test_tasks_are_remarked_with_their_chance_and_artifacts_with_their_certificates() -> None:
    plan = plan_of("merged")
    scores = {"adapter": (1, 1, 0), "merged": (0, 1, 1)}
    tasks = [
        Measurement(
            "task", name, values={"task": "t", "samples": [{"id": str(n), "value": v} for n, v in enumerate(each)]}
        )
        for name, each in scores.items()
    ]
    made = [replace(m, values={**m.values, "certificate": "full"}) for m in builds(plan)]
    merged = of(decide(plan, [*made, *tasks], {}), "merged")
    assert merged.remarks == (f"task.t: 1 got worse and 1 better of 3; one-sided exact p = {stats.flips(1, 1):.2g}",)
    assert merged.certificates == ("merge: parity certificate full",)


@pytest.mark.parametrize(("lengths", "warmup", "proposed"), [("fixed", 0, 2), ("fixed", 1, 2), ("natural", 1, 3)])
def test_warm_up_that_was_timed_is_noted(lengths: str, warmup: int, proposed: int) -> None:
    """The first two requests of a launch are slow; where answers stop by themselves warm-ups are not among them."""
    plan = plan_of("merged", warmup=warmup)
    workload = Workload("chat", "p", lengths=lengths)
    plan = replace(plan, recipe=replace(plan.recipe, workloads={"chat": workload}))
    requests = [
        {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 64, "warmup": False}
        for ms in (300.0, 200.0, 100.0, 100.0, 100.0, 100.0)
    ]
    found = [Measurement("launch", "merged", "chat", values={"model_loading_time": 1.0})]
    found.append(Measurement("speed", "merged", "chat", values={"block": 0, "requests": requests}))
    (note,) = of(decide(plan, found, {}), "merged").notes
    assert "the first 2 of a launch" in note and f"measure.warmup: {proposed} would" in note
    enough = replace(plan, recipe=replace(plan.recipe, measure=replace(plan.recipe.measure, warmup=2)))
    assert bool(of(decide(enough, found, {}), "merged").notes) == (lengths == "natural")


@pytest.mark.parametrize(("place", "told"), [(0.0075, True), (-0.0075, True), (0.004, False), (-0.004, False)])
def test_an_order_that_costs_more_than_a_hundredth_is_noted_on_either_side(place: float, told: bool) -> None:
    """Three arms in each of six orders, twice; two places cost 1.5 %, or 0.8 %."""
    found: list[Measurement] = []
    for block, order in enumerate([*itertools.permutations(["adapter", "merged", "adapter" + TWIN])] * 2):
        for at, arm in enumerate(order):
            ms = 100 * math.exp(place * at)
            request = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 16}
            values = {"block": block, "order": at, "requests": [{**request, "warmup": False}]}
            found.append(Measurement("speed", arm, "chat", values=values))
    notes = decide(plan_of("merged"), found, {}).notes
    assert any("the order matters in chat" in note for note in notes) == told


def test_the_three_commonest_disturbances_are_named() -> None:
    plan = plan_of("merged", threads=1)
    states = [{"heat_events": 1}, {"gpu_foreign": 1}, {"gpu_slowed": True}, {"throttled": 0.5}]
    found = []
    for m in speed(plan, {"merged": 0.5}, 10):
        state = next(s for s, last in zip(states, (4, 7, 9, 10), strict=True) if m.values["block"] < last)
        found.append(replace(m, values={**m.values, "machine": state}))
    (line,) = [w for w in decide(plan, found, {}).warnings if "disturbed" in w]
    assert line.count("(") == 3 and "(4)" in line and "(3)" in line and "(2)" in line


def test_verdicts_of_a_decision_say_what_they_protect_against() -> None:
    decision = decide(plan_of("merged"), both(merged={}), {})
    assert all(verdict.protects for verdict in of(decision, "merged").verdicts)


@pytest.mark.parametrize(("spread", "told"), [(0.24, False), (0.26, True)])
def test_launches_are_warned_of_from_a_quarter_of_what_blocks_of_one_differ(
    spread: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below that nobody need start servers more often, which takes most of a run's time."""
    monkeypatch.setattr(Evidence, "launch_effect", lambda self, workload: spread)
    assert (
        warned(decide(plan_of("merged", relaunch=4), launched(0.0), {}), "times of chat", "from launch to launch")
        == told
    )


def ordered(*places: float) -> list[Measurement]:
    """Three arms in each of six orders, once for each number: what a place costs in those blocks, on the log scale."""
    found: list[Measurement] = []
    orders = [*itertools.permutations(["adapter", "merged", "adapter" + TWIN])]
    for block, (place, order) in enumerate(itertools.product(places, orders)):
        for at, arm in enumerate(order):
            ms = 100 * math.exp(place * at)
            request = {"request_duration_ms": ms, "ttft_ms": ms, "tpot_ms": ms, "cpu_ms": ms, "new_tokens": 16}
            values = {"block": block, "order": at, "requests": [{**request, "warmup": False}]}
            found.append(Measurement("speed", arm, "chat", values=values))
    return found


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_order_that_may_as_well_cost_nothing_is_not_warned_of(sign: int) -> None:
    """Half of the blocks say 6 %, the other half 2 % the other way: 2 % on average, and nobody can tell from 0."""
    noisy = ordered(sign * 0.03, sign * -0.01)
    effect = evidence_of(plan_of("merged"), noisy).order_effect("chat")
    assert effect and abs(effect.estimate - 1) > 0.01 and effect.low <= 1 <= effect.high
    steady = ordered(sign * 0.03, sign * 0.01)
    told = [
        any("the order matters" in note for note in decide(plan_of("merged"), each, {}).notes)
        for each in (noisy, steady)
    ]
    assert told == [False, True]


def test_the_bound_on_what_a_cap_cuts_is_the_exact_one() -> None:
    """Two of 200 answers are longer; that many more may be among the next."""
    answers = quality("adapter", 200, **rows(0, 1, new_tokens=200))
    (line,) = remarks(plan_of("merged"), "adapter", answers)
    assert f"at most {100 * stats.proportion(2, 200).high:.1f} %" in line


@pytest.mark.parametrize(("answers", "stopped", "told"), [(7, 0, False), (8, 0, True), (8, 1, False), (60, 1, False)])
def test_answers_none_of_which_stops_are_told_from_eight_on(answers: int, stopped: int, told: bool) -> None:
    """One that ends by itself shows that the model knows how to, and few say nothing."""
    plan = plan_of("merged")
    lengths = {f"p{n}": {"stopped": n < stopped, "new_tokens": 20 + n} for n in range(answers)}
    line = deciding.unstopped(list(evidence_of(plan, quality("merged", answers, **lengths)).rows("merged").values()))
    assert bool(line) == told
    assert not told or (f"0 of {answers} " in line and f"within {19 + answers} tokens" in line)
    assert warned(decide(plan, quality("merged", answers, **lengths), {}), "merged: 0 of") == told


def test_one_open_variant_leaves_the_whole_undecided_whatever_became_of_the_others() -> None:
    plan = plan_of("merged", "int8")
    found = decide(plan, whole(plan, {"merged": 0.85, "int8": 1.5}), {})
    assert {of(found, name).outcome for name in ("merged", "int8")} == {"inconclusive", "rejected"}
    assert found.sentence.startswith("Undecided")


def test_a_variant_that_was_left_out_of_a_run_is_not_judged_from_an_older_one() -> None:
    plan = plan_of("merged", "int8")
    found = whole(plan, {"merged": 0.6, "int8": 0.5})
    without = decide(replace(plan, left_out=("int8",)), found, {})
    assert [v.name for v in without.variants] == ["adapter", "merged"] and without.chosen == "merged"


def test_the_adapter_is_never_chosen_over_itself_however_well_it_meets_its_requirements() -> None:
    plan = plan_of("merged", require=["latency.p50@chat <= 900 ms"])
    found = decide(plan, whole(plan, {"merged": 1.5}), {})
    assert of(found, "adapter").outcome == "accepted" and of(found, "merged").outcome == "rejected"
    assert (found.chosen, found.outcome) == (None, "rejected") and found.sentence.startswith("Keep the adapter")


def test_a_turn_that_says_nothing_of_a_variant_is_warned_of() -> None:
    plan = plan_of("merged")
    found = speed(plan, {"merged": 0.5}, 12)
    odd = [{**request, "request_duration_ms": math.nan} for request in found[-1].values["requests"]]
    broken = [*found[:-1], replace(found[-1], values={**found[-1].values, "requests": odd})]
    assert warned(decide(plan, broken, {}), "merged@chat", "left out") and not decide(plan, found, {}).warnings


def test_what_keeps_more_of_the_fine_tune_is_asked_of_quantized_weights_only() -> None:
    """Unquantized, the merge is the adapter but for rounding."""
    plan = plan_of("merged", "compiled")
    apart = Variant("apart_compiled", (), plan.recipe.variants["compiled"].engine)
    variants = {**plan.recipe.variants, "apart_compiled": apart}
    plan = replace(plan, recipe=replace(plan.recipe, variants=variants), models={**plan.models, "apart_compiled": ""})
    told = rows(*range(60), shift=10.0, kept=9.0)
    timed = speed(plan, {"merged": 0.5, "compiled": 0.4, "apart_compiled": 0.8}, 12)
    lines = remarks(plan, "compiled", [*timed, *both(compiled=told, apart_compiled=told)])
    assert any("merging alone" in line and "apart_compiled" in line for line in lines)
    assert not any("quantized" in line for line in lines)


def test_loads_that_were_run_apart_are_warned_of_with_what_they_lack() -> None:
    request = {"request_duration_ms": 100.0, "ttft_ms": 9, "tpot_ms": 9, "cpu_ms": 9, "new_tokens": 64}
    values = {"requests": [{**request, "warmup": False, "scheduled": 0.0, "done": 0.1}], "lacks": ["gaps", "lengths"]}
    found = decide(plan_of("merged"), [Measurement("load", "merged", "chat", values=values)], {})
    assert warned(found, "merged@chat was loaded apart", "it lacks gaps", "it lacks lengths")
