"""Each rule at its limit: what is just enough, what is just too little, and on which error it is judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from helpers.records import (
    CHAINS,
    EAGER,
    INT8,
    MERGE,
    builds,
    decide,
    evidence_of,
    of,
    outcome,
    plan_of,
    quality,
    speed,
    verdict,
    whole,
)

from peftopt import stats
from peftopt.decision import rules, stopping
from peftopt.decision.evidence import Disagreement, Evidence
from peftopt.decision.rules import Case
from peftopt.recipe import plan as planning
from peftopt.recipe.thresholds import parse
from peftopt.records import (
    Interval,
    Json,
    Measurement,
    Metric,
    Outcome,
    Plan,
    Rule,
    Step,
    Threshold,
    Variant,
    Verdict,
    Workload,
)

NEVER = math.inf
Rows = Mapping[str, Mapping[str, Json]]


def ruled(plan: Plan, *table: Rule) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, rules=table))


def case(
    measurements: Sequence[Measurement], limit: float, name: str = "int8", family: int = 1, step: Step | None = None
) -> Case:
    """A rule of the last step of the variant."""
    plan = plan_of("merged", "int8", "compiled")
    step = step or {"int8": INT8, "merged": MERGE}.get(name, CHAINS[name].engine)
    parent = rules.parent_of(plan.recipe, CHAINS[name], step)
    return Case(evidence_of(plan, measurements), name, step, limit, parent, family)


def asked(first: Rows = {}, second: Rows | None = None, n: int = 60, **variants: Rows) -> list[Measurement]:  # noqa: B006
    found = quality("adapter", n, **first) + quality("adapter", n, launch=2, **(first if second is None else second))
    return found + [m for name, rows in variants.items() for m in quality(name, n, **rows)]


def rows(*numbers: int, **values: Json) -> dict[str, dict[str, Json]]:
    return {f"p{n}": dict(values) for n in numbers}


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "outcomes"),
    [
        ("<=", ["accepted", "accepted", "inconclusive", "inconclusive", "rejected"]),
        ("<", ["accepted", "inconclusive", "inconclusive", "rejected", "rejected"]),
        (">=", ["rejected", "inconclusive", "inconclusive", "accepted", "accepted"]),
        (">", ["rejected", "rejected", "inconclusive", "inconclusive", "accepted"]),
    ],
)
def test_a_requirement_asks_the_whole_interval(op: str, outcomes: list[str]) -> None:
    """Intervals of width 2 that end at 4, at the limit of 5, hold it, begin at it and begin at 6."""
    found = [rules.against_limit(Interval(x, x - 1, x + 1, 9), op, 5) for x in (3, 4, 5, 6, 7)]
    assert found == outcomes


# ---- races ---------------------------------------------------------------------------------------


def gain(plan: Plan, measurements: Sequence[Measurement]) -> Verdict:
    return verdict(decide(plan, measurements, {}), "merged", "merge.gain")


def launched(measurements: Sequence[Measurement], every: int) -> list[Measurement]:
    found: list[Measurement] = []
    for m in measurements:
        if m.probe == "speed" and m.values["block"] % every == 0:
            found.append(Measurement("launch", m.variant, "chat", values={"model_loading_time": 1.0}))
        found.append(m)
    return found


def test_a_race_tells_what_was_compared_with_what_and_what_judged() -> None:
    plan = plan_of("merged")
    found = gain(plan, speed(plan, {"merged": 0.5}, 24))
    assert (found.outcome, found.against, found.workload, found.unit) == ("accepted", "adapter", "chat", "x")
    assert (found.limit, found.clock, found.blocks_needed, found.minutes_needed) == (0.85, "wall", None, None)
    assert found.value and (found.value.n, found.value.estimate) == (10, pytest.approx(0.5, rel=0.02))
    assert "10 blocks" in found.reason and "launch" not in found.reason and "bets" not in found.reason
    assert f"{found.value.low:.2f} to {found.value.high:.2f}" in found.reason
    open_ = gain(plan, speed(plan, {"merged": 0.85}, 24, noise=0.2))
    assert open_.outcome == "inconclusive" and "clock" not in open_.reason and "launch" not in open_.reason
    nothing = gain(plan, [])
    assert (nothing.outcome, nothing.against, nothing.workload) == ("inconclusive", "adapter", "chat")
    assert "not measured" in nothing.reason and nothing.value is None


def test_a_race_tells_launches_where_they_are_fewer_than_blocks() -> None:
    plan = plan_of("merged", relaunch=2)
    two = gain(plan, launched(speed(plan, {"merged": 0.5}, 24), 2))
    assert two.outcome == "accepted" and "10 blocks of 5 launches" in two.reason
    assert "launch" not in gain(plan, launched(speed(plan, {"merged": 0.5}, 24), 1)).reason
    one = gain(plan, launched(speed(plan, {"merged": 0.5}, 24), 24))
    assert one.outcome == "inconclusive" and "no interval yet" in one.reason and one.blocks_needed


def test_a_race_of_more_than_sixty_blocks_is_judged_by_bets_alone() -> None:
    for most, bets in ((60, False), (61, True)):
        plan = plan_of("merged", max_blocks=most)
        found = gain(plan, speed(plan, {"merged": 0.5}, 24))
        assert found.outcome == "accepted" and ("by bets" in found.reason) == bets


def test_the_limit_of_a_race_is_a_ratio_and_its_error_is_shared() -> None:
    plan = plan_of("merged", "int8", "compiled", "int8_compiled")
    found = decide(ruled(plan, Rule("int8", "not_slower", 0.02)), speed(plan, {"merged": 1.0, "int8": 0.5}, 40), {})
    said = verdict(found, "int8", "int8.not_slower")
    assert (said.limit, said.against, said.outcome) == (1.02, "merged", "accepted")
    assert said.value and said.value.level == pytest.approx(1 - 0.02 * 0.1 / 4)


@pytest.mark.parametrize(("ratio", "expected"), [(0.8, "accepted"), (0.9, "rejected"), (1.1, "rejected")])
def test_a_compile_must_gain_its_limit_over_what_it_compiles(ratio: float, expected: str) -> None:
    plan = ruled(plan_of("merged", "compiled"), Rule("compile", "gain", 0.15))
    said = verdict(decide(plan, speed(plan, {"merged": 0.5, "compiled": 0.5 * ratio}), {}), "compiled", "compile.gain")
    assert (said.outcome, said.against, said.limit) == (expected, "merged", 0.85)


def test_the_twin_of_a_variant_that_has_no_scores_has_some() -> None:
    plan = plan_of("merged", "compiled", require=["kl <= 1 nats"])
    silent = [
        replace(m, values={k: v for k, v in m.values.items() if k not in ("nll", "kl", "agree")}) for m in asked()
    ]
    bare = [replace(m, variant=name) for m in silent if m.launch == 1 for name in ("merged", "compiled")]
    said = verdict(decide(plan, [*asked(), *bare], {}), "compiled", "require: kl <= 1 nats")
    assert said.outcome == "inconclusive" and "merged" not in said.reason


def test_the_twin_is_one_that_has_scores_where_another_has_none() -> None:
    plan = plan_of("merged", "compiled", require=["kl <= 1 nats"])
    again = Variant("again", (MERGE,), Step("other", "engine", ""))
    variants = {**plan.recipe.variants, "again": again}
    plan = planning.plan(replace(plan.recipe, variants=variants), {"base": "b", "adapter": "a", "calibration": ""}, {})
    bare = [
        replace(m, variant=name, values={k: v for k, v in m.values.items() if k not in ("nll", "kl", "agree")})
        for m in quality("merged", 60)
        for name in ("merged", "compiled")
    ]
    said = verdict(decide(plan, [*asked(again={}), *bare], {}), "compiled", "require: kl <= 1 nats")
    assert said.outcome == "accepted" and "again" in said.reason


def test_a_race_is_hopeless_only_while_it_has_blocks_left() -> None:
    near = whole(plan_of("merged"), {"merged": 0.855}, noise=0.1)  # 40 blocks
    for most, hopeless in ((40, False), (41, True)):
        found = gain(plan_of("merged", max_blocks=most), near)
        assert found.outcome == "inconclusive" and found.hopeless == hopeless == ("hardly suffice" in found.reason)
    assert not gain(plan_of("merged", max_blocks=41), whole(plan_of("merged"), {"merged": 0.5})).hopeless


@pytest.mark.parametrize(("disturbed", "told"), [(9, False), (10, True)])
def test_an_open_race_names_what_disturbed_a_quarter_of_its_blocks(disturbed: int, told: bool) -> None:
    plan = plan_of("merged")
    found = [
        replace(m, values={**m.values, "machine": {"steal": 0.5} if m.values["block"] < disturbed else {}})
        for m in speed(plan, {"merged": 0.85}, 40, noise=0.2)
    ]
    assert (f"{disturbed} of 40 blocks were disturbed" in gain(plan, found).reason) == told
    assert "disturbed" not in gain(plan, speed(plan, {"merged": 0.85}, 40, noise=0.2)).reason


@pytest.mark.parametrize(("step", "told"), [(0.005, False), (0.015, True)])
def test_an_open_race_names_a_clock_whose_steps_are_more_than_a_hundredth(
    step: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evidence, "resolution", lambda *_: math.log1p(step))
    plan = plan_of("merged")
    assert ("longer requests" in gain(plan, speed(plan, {"merged": 0.85}, 24, noise=0.2)).reason) == told


def loaded(order: str) -> list[Measurement]:
    requests = [{"request_duration_ms": 100.0, "ttft_ms": 9, "tpot_ms": 9, "cpu_ms": 9, "new_tokens": 64}]
    requests = [{**requests[0], "warmup": False, "scheduled": 0.0, "done": 0.1}]
    names = {"A": "adapter", "M": "merged"}
    return [Measurement("load", names[letter], "chat", values={"requests": requests}) for letter in order]


@pytest.mark.parametrize(("order", "told"), [("AMAMAM", False), ("AAAMMM", True), ("AAAAMMA", True), ("AAA", False)])
def test_loads_that_are_no_pairs_are_told_where_both_have_some(order: str, told: bool) -> None:
    found = gain(plan_of("merged"), loaded(order))
    assert found.outcome == "inconclusive" and ("alternate" in found.reason) == told


def test_loads_of_one_of_the_two_are_no_loads_that_could_alternate() -> None:
    plan = plan_of("merged")
    found = gain(plan, [*speed(plan, {"merged": 0.85}, 24, noise=0.2), *loaded("AAA")])
    assert found.outcome == "inconclusive" and "alternate" not in found.reason


# ---- policies ------------------------------------------------------------------------------------

TRUNCATE = Step("truncate", "policy", "truncate", {"over": 2048, "keep": "tail"})
CAP = Step("cap", "policy", "shorten", {"max_new_tokens": 48})


def policed(step: Step, *table: Rule, **workloads: Workload) -> Plan:
    plan = plan_of("merged")
    variants = {**plan.recipe.variants, "cut": Variant("cut", (MERGE,), EAGER, (step,))}
    recipe = replace(plan.recipe, variants=variants, rules=table)
    recipe = replace(recipe, workloads={"chat": Workload("chat", "p"), **workloads})
    return planning.plan(recipe, {"base": "b", "adapter": "a", "calibration": ""}, {})


@pytest.mark.parametrize(("touched", "judged"), [((5, 0), "chat"), ((4, 5), "long"), ((6, 9), "long"), ((4, 4), "")])
def test_a_truncation_is_raced_where_most_requests_are_cut_and_at_least_half_of_them(
    touched: tuple[int, int], judged: str
) -> None:
    plan, found = policed(TRUNCATE, Rule("truncate", "gain", 0.0), long=Workload("long", "p")), []
    for workload, share in zip(("chat", "long"), touched, strict=True):
        for m in speed(plan, {"merged": 1.0, "cut": 0.5}, 12):
            requests = [{**r, "batch": 10, "touched": share * (m.variant == "cut")} for r in m.values["requests"]]
            found.append(replace(m, workload=workload, values={**m.values, "requests": requests}))
    said = verdict(decide(plan, found, {}), "cut", "truncate.gain")
    assert (said.workload, said.against) == (judged, "merged")
    assert said.outcome == ("accepted" if judged else "inconclusive")


def test_a_cap_is_raced_where_answers_stop_by_themselves() -> None:
    free = {"free": Workload("free", "p", lengths="natural"), "more": Workload("more", "p", lengths="natural")}
    for workloads, judged in (({}, ""), (free, "free")):
        plan = policed(CAP, Rule("shorten", "gain", 0.0), Rule("shorten", "by", 1.0), **workloads)
        found = decide(plan, [replace(m, workload="free") for m in speed(plan, {"merged": 1.0, "cut": 0.5}, 12)], {})
        assert verdict(found, "cut", "shorten.gain").workload == judged
        by = verdict(found, "cut", "shorten.by")
        assert (by.outcome, by.unit) == ("accepted", "tokens") and "48 tokens" in by.reason


@pytest.mark.parametrize(
    ("over", "lengths", "expected"),
    [
        (2048, (2049, 3000), "accepted"),
        (2048, (2048, 3000), "rejected"),
        (2047, (3000,), "rejected"),
        (4096, (), "accepted"),
    ],
)
def test_only_longer_inputs_are_cut(over: int, lengths: tuple[int, ...], expected: str) -> None:
    plan = policed(replace(TRUNCATE, params={"over": over}), Rule("truncate", "over", 2048))
    cut = {f"p{n}": {"uncut_tokens": length} for n, length in enumerate(lengths)}
    said = verdict(decide(plan, asked(cut=cut), {}), "cut", "truncate.over")
    assert said.outcome == expected and said.value == Interval(over, over, over, len(lengths))
    assert (said.unit, said.limit) == ("tokens", 2048)
    assert (str(min(lengths)) if lengths else "none was asked") in said.reason


def test_lost_answers_of_a_truncation_are_of_prompts_that_it_cut_and_that_were_right() -> None:
    plan = policed(TRUNCATE, Rule("truncate", "lost", 0.2))
    first = rows(0, 1, correct=False)
    cut = rows(*range(50), uncut_tokens=3000, correct=True) | rows(2, 3, 4, uncut_tokens=3000, correct=False)
    cut |= rows(55, correct=False) | rows(0, uncut_tokens=3000, correct=False)
    said = verdict(decide(plan, asked(first, cut=cut), {}), "cut", "truncate.lost")
    assert said.value == stats.proportion(3, 48, 1 - 0.1 / 2) and said.unit == "share"
    assert said.outcome == "accepted" and said.against == "adapter"
    none = verdict(decide(plan, asked(cut={}), {}), "cut", "truncate.lost")
    assert none.outcome == "inconclusive" and none.value is None


# ---- sizes and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(749, "accepted"), (750, "accepted"), (751, "rejected")])
def test_a_quarter_smaller_is_three_quarters_or_less(size: int, expected: str) -> None:
    plan = ruled(plan_of("merged", "int8"), Rule("int8", "smaller", 0.25))
    sizes = {build.id: size if build.step == INT8 else 1000 for build in plan.builds}
    found = [Measurement("build", "", values={"id": i, "size_bytes": s, "tier0": []}) for i, s in sizes.items()]
    said = verdict(decide(plan, found, {}), "int8", "int8.smaller")
    assert (said.outcome, said.limit, said.against, said.unit) == (expected, 0.75, "merged", "x")
    assert said.value == Interval(size / 1000, size / 1000, size / 1000, 1)
    assert outcome(decide(plan, found[:1], {}), "int8", "int8.smaller") == "inconclusive"
    assert outcome(decide(plan, found[1:], {}), "int8", "int8.smaller") == "inconclusive"


@pytest.mark.parametrize("family", [1, 3])
@pytest.mark.parametrize("short", [0, 1])
def test_no_error_in_so_many_prompts_is_a_claim(family: int, short: int) -> None:
    n = stats.needed_n(0.05, family) - short
    said = rules.critical_errors(case(asked(n=n, merged={}, int8={}), 0.05, family=family))
    assert said.outcome == ("inconclusive" if short else "accepted")
    assert said.value == Interval(0, 0.0, stats.upper_bound(0, n, 1 - 0.05 / family), n)
    assert (said.against, said.unit, said.limit) == ("merged", "share", 0.05)


def test_errors_that_count_reject_and_others_are_named() -> None:
    bad = rows(1, 2, flags=["loop"])
    said = rules.critical_errors(case(asked(merged={}, int8=bad), 0.05))
    assert said.outcome == "rejected" and said.value and said.value.estimate == 2 / 60
    assert said.value.high == stats.upper_bound(2, 60) and "2 critical errors in 60 prompts" in said.reason
    assert "p1: loop" in said.reason and "adapter or merged" in said.reason
    alone = rules.critical_errors(case(asked(merged=bad), 0.05, "merged"))
    assert (alone.outcome, alone.against) == ("rejected", "adapter") and " or " not in alone.reason
    none = rules.critical_errors(case([], 0.05))
    assert (none.outcome, none.against, none.value) == ("inconclusive", "merged", None)


def test_a_merge_is_judged_on_the_variant_that_is_the_merge_alone() -> None:
    found = asked(merged=rows(1, flags=["loop"]), int8={})
    said = rules.critical_errors(case(found, 0.05, step=MERGE))
    assert said.outcome == "rejected" and said.reason.startswith("merged: ")
    plan = ruled(plan_of("int8"), *(Rule("merge", name, 0.05) for name in ("critical_errors", "parity", "lost")))
    decision = decide(plan, asked(int8={}), {})
    assert {outcome(decision, "int8", f"merge.{r}") for r in ("critical_errors", "parity", "lost")} == {"not judged"}


@pytest.mark.parametrize(("tie", "once", "expected"), [(1, 0, "accepted"), (0, 1, "inconclusive"), (1, 1, "accepted")])
def test_an_error_at_a_near_tie_is_named_and_one_in_a_prompt_asked_once_leaves_it_open(
    tie: int, once: int, expected: str
) -> None:
    """In a prompt that was asked once nothing is known of the noise, so no tie is seen there."""
    second = rows(0, noise=[0.5] * 31)
    wrong = rows(0, correct=False, critical=True, **({"parting": (3, 0.1)} if tie else {}))
    found = asked({}, second, n=60, merged={}, int8=wrong if tie else rows(5, correct=False))
    gone = "p5" if once else "none"
    found = [m for m in found if (m.variant, m.launch, m.values["row"]) != ("adapter", 2, gone)]
    said = rules.critical_errors(case(found, 0.05))
    assert said.outcome == expected
    assert ("near tie" in said.reason) == bool(tie) and ("only once" in said.reason) == (once > tie)


@pytest.mark.parametrize(
    ("table", "checked", "answered", "there"),
    [
        ((), True, True, True),
        ((Rule("variant", "critical_errors", 0.5),), True, True, True),
        ((Rule("variant", "critical_errors", None),), True, True, False),
        ((), False, True, False),
        ((), True, False, False),
    ],
)
def test_every_variant_faces_the_row_of_the_whole_where_answers_are_checked(
    table: tuple[Rule, ...], checked: bool, answered: bool, there: bool
) -> None:
    plan = ruled(plan_of("merged"), *table)
    plan = plan if checked else replace(plan, recipe=replace(plan.recipe, quality=None))
    decision = decide(plan, asked(merged={}) if answered else [], {})
    found = [v for v in of(decision, "merged").verdicts if v.rule == "variant.critical_errors"]
    assert len(found) == there
    if there:
        assert (found[0].limit, found[0].against) == (0.5 if table else 0.05, "adapter")


# ---- lost answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [1, 4])
def test_lost_answers_are_those_beyond_the_second_runs(family: int) -> None:
    second, merged = rows(1, 2, correct=False), rows(2, 3, 4, 5, correct=False)
    said = rules.lost(case(asked({}, second, merged=merged, int8={}), 0.3, "merged", family))
    assert said.value == stats.excess(3, 1, 60, 1 - 0.1 / family) and said.outcome == "accepted"
    assert (said.against, said.unit, said.limit) == ("adapter", "share", 0.3)
    assert "3 of 60" in said.reason and not said.reason.startswith("merged: ")
    other = rules.lost(case(asked({}, second, merged=merged, int8={}), 0.3, family=family, step=MERGE))
    assert other.value == said.value and other.reason.startswith("merged: ")
    assert rules.lost(case(asked(), 0.3, "merged")).outcome == "inconclusive"
    wrong = rows(*range(60), correct=False)
    assert rules.lost(case(asked(wrong, merged=wrong), 0.3, "merged")).outcome == "not judged"


@pytest.mark.parametrize(("lost", "again", "limit"), [(1, 0, 0.05), (2, 1, 0.08), (0, 0, 0.03)])
def test_too_few_right_answers_say_how_many_would_tell(lost: int, again: int, limit: float) -> None:
    second, merged = rows(*range(again), correct=False), rows(*range(again, again + lost), correct=False)
    said = rules.lost(case(asked({}, second, merged=merged, int8={}), limit, "merged", 2))
    assert said.outcome == "inconclusive"
    n = next(int(word) for word in said.reason.split("at this rate ")[1].split() if word.isdigit())

    def upper(of: int) -> float:
        return stats.excess(math.ceil(lost * of / 60), again * of // 60, of, 1 - 0.1 / 2).high

    assert upper(n) <= limit and all(upper(fewer) > limit for fewer in range(61, n))


def test_more_lost_than_the_limit_asks_for_no_more_answers() -> None:
    said = rules.lost(case(asked({}, {}, merged=rows(0, 1, 2, 3, correct=False), int8={}), 0.05, "merged"))
    assert said.outcome == "inconclusive" and "at this rate" not in said.reason


def test_answers_lost_at_the_limit_are_not_told_apart_by_any_number() -> None:
    said = rules.lost(case(asked({}, {}, merged=rows(0, 1, 2, correct=False), int8={}), 0.05, "merged"))
    assert said.outcome == "inconclusive" and f"{rules.MOST_TIMES} times" in said.reason


def test_cut_off_answers_are_bounded_over_the_family() -> None:
    plan = policed(CAP, Rule("shorten", "cut", 0.15))
    said = verdict(decide(plan, asked(cut=rows(1, 2, stopped=False)), {}), "cut", "shorten.cut")
    assert said.value == stats.proportion(2, 60, 1 - 0.1 / 2) and said.outcome == "accepted"


# ---- parity --------------------------------------------------------------------------------------


def predicted(scored: Sequence[tuple[int, int]], limit: float, family: int = 1, slices: int = 1) -> Verdict:
    found = rules._predictions(Disagreement(tuple(scored), (), 0), limit, family, slices)
    assert found is not None
    return found


def test_predictions_that_all_agree_are_bounded_by_their_count() -> None:
    """No prompt of 100 differs, so up to 3 % may, each in one of its 50 tokens."""
    for family in (1, 4):
        found = predicted([(0, 50)] * 100, 0.01, family)
        assert found.value and found.value.estimate == 0
        assert found.value.high == pytest.approx(stats.upper_bound(0, 100, 1 - 0.05 / family) / 50)
        assert (found.outcome, found.unit) == ("accepted", "share")
    assert rules._predictions(Disagreement((), (), 0), 0.01, 1) is None


def test_few_predictions_that_differ_are_bounded_by_their_count_and_size() -> None:
    scored = [(5, 50)] * 2 + [(0, 50)] * 98
    found = predicted(scored, 0.01)
    by_count = stats.upper_bound(2, 100, 0.95) * 100 * 5 / 5000
    by_spread = stats.ratio_of_means(*zip(*scored, strict=True), 0.9).high
    assert by_count > by_spread and found.value and found.value.high == pytest.approx(by_count)
    alone = predicted([(5, 50)] + [(0, 50)] * 99, 0.01)
    assert alone.value and alone.value.high == pytest.approx(stats.upper_bound(1, 100, 0.95) * 100 * 5 / 5000)
    one = predicted([(1, 50)] * 2 + [(0, 50)] * 98, 0.01)
    assert one.value and one.value.high == pytest.approx(stats.upper_bound(2, 100, 0.95) / 50)
    assert predicted([(0, 0)] * 9, 0.01).outcome == "inconclusive", "nothing was scored"
    fewer = predicted([(-5, 50)] * 2 + [(0, 50)] * 98, 0.01)
    assert fewer.value and fewer.value.high == pytest.approx(stats.upper_bound(0, 100, 0.95) / 50)
    assert "0.00 % of tokens" in fewer.reason, "less than nothing is nothing"


def test_predictions_are_rejected_only_where_it_is_sure_and_over_all_slices() -> None:
    rng_like = [(n % 5, 50) for n in range(100)]  # 4 % on average
    mean = stats.ratio_of_means(*zip(*rng_like, strict=True), 1 - 2 * 0.0025)
    assert predicted(rng_like, mean.low - 1e-6).outcome == "rejected"
    assert predicted(rng_like, mean.low + 1e-6).outcome == "inconclusive"
    whole_ = rules._predictions(Disagreement(tuple(rng_like), (), 0), mean.low - 1e-6, 1)
    assert whole_ and whole_.outcome == "rejected", "all prompts together are one slice"
    many = stats.ratio_of_means(*zip(*rng_like, strict=True), 1 - 2 * 0.0025 / 4)
    assert predicted(rng_like, mean.low - 1e-6, slices=4).outcome == "inconclusive"
    assert predicted(rng_like, many.low - 1e-6, slices=4).outcome == "rejected"
    high = stats.ratio_of_means(*zip(*rng_like, strict=True), 0.9).high
    assert predicted(rng_like, high + 1e-6).outcome == "accepted"
    assert predicted(rng_like, high - 1e-6).outcome == "inconclusive"
    assert predicted(rng_like, high + 1e-6, family=2).outcome == "inconclusive"


def answered(
    partings: Sequence[tuple[float, float]], limit: float = 0.01, family: int = 1, sound: bool = False, slices: int = 1
) -> Verdict:
    return rules._answers(Disagreement((), tuple(partings), 32), limit, family, sound, slices)


def parting(n: int, early: int, at: float = 1, again: int = 0) -> list[tuple[float, float]]:
    """`early` of n answers part at a token, `again` others in the second run only."""
    return [(at, NEVER)] * early + [(NEVER, at)] * again + [(NEVER, NEVER)] * (n - early - again)


@pytest.mark.parametrize(
    ("n", "early", "sound", "expected"),
    [
        (20, 0, False, "inconclusive"),
        (20, 0, True, "inconclusive"),  # nothing is seen in so few
        (64, 0, False, "accepted"),
        (100, 4, False, "accepted"),
        (100, 5, False, "inconclusive"),
        (100, 10, True, "accepted"),
        (100, 11, True, "inconclusive"),
        (100, 30, True, "rejected"),
    ],
)
def test_answers_may_part_early_in_a_tenth_at_most(n: int, early: int, sound: bool, expected: str) -> None:
    assert answered(parting(n, early), sound=sound).outcome == expected


def test_answers_that_part_late_may_do_so_as_often_as_the_limit_on_tokens_allows() -> None:
    """1 % a token is 15 % of answers within 16: 28 of 200 late are fine, and at the first token they are not."""
    assert answered(parting(200, 28, 31), sound=True).outcome == "accepted"
    assert answered(parting(200, 36, 31), sound=True).outcome == "inconclusive"
    assert answered(parting(200, 28, 1), sound=True).outcome == "rejected"
    assert answered(parting(200, 60, 31), limit=0.001, sound=True).outcome == "rejected"
    assert answered(parting(200, 200, 1), limit=1.0, sound=True).outcome == "accepted", "anything goes"


def test_answers_are_judged_up_to_their_end() -> None:
    """Three in five part just before the end, which one in a hundred tokens does not explain."""
    late = tuple(parting(100, 60, 60))
    assert rules._answers(Disagreement((), late, 63), 0.01, 1, sound=True).outcome == "rejected"


def test_what_the_second_run_parts_alone_speaks_for_the_variant() -> None:
    assert answered(parting(100, 14, again=0), sound=True).outcome != "accepted"
    assert answered(parting(100, 14, again=6), sound=True).outcome == "accepted"
    told = answered(parting(100, 14, again=6), sound=True)
    assert "14 of 100" in told.reason and "6 in its own" in told.reason
    assert told.value and told.value.estimate == pytest.approx(0.08 / 0.94), "of those that it leaves alone, of a token"


def test_where_the_second_run_parts_too_the_limit_holds_for_the_rest() -> None:
    """1 % a token is 15 % of answers within 16; of the half that the second run leaves alone it is 7 %."""
    alone = [(31.0, NEVER)] * 28 + [(NEVER, NEVER)] * 172
    beside = [(31.0, NEVER)] * 28 + [(31.0, 31.0)] * 100 + [(NEVER, NEVER)] * 72
    assert answered(alone, sound=True).outcome == "accepted"
    assert answered(beside, sound=True).outcome == "inconclusive"


def test_few_answers_that_are_left_decide_nothing_late() -> None:
    """Two thirds part at the second token in both runs; of the rest half part late: too few to accept or to reject."""
    found = [(2.0, 2.0)] * 66 + [(20.0, NEVER)] * 4 + [(NEVER, NEVER)] * 30
    assert answered(found, sound=True).outcome == "accepted"
    assert answered([(20.0, NEVER)] * 40 + [(NEVER, NEVER)] * 60, limit=0.001, sound=True).outcome == "rejected"


def test_answers_are_judged_where_they_part_and_half_of_them_are_enough() -> None:
    """A tenth parts after 9 tokens and another after 20: 20 % within 20 tokens, where 1 % a token allows 18 %."""
    found = [(9.0, NEVER)] * 20 + [(20.0, NEVER)] * 20 + [(NEVER, NEVER)] * 160
    assert answered(found, sound=True).outcome == "inconclusive"
    later = [(9.0, NEVER)] * 20 + [(24.0, NEVER)] * 20 + [(NEVER, NEVER)] * 160
    assert answered(later, sound=True).outcome == "accepted"
    early = [(1.0, NEVER)] * 20 + found[20:]
    assert answered(early, sound=True).outcome == "inconclusive", "also those that part at once"
    for left, expected in ((50, "inconclusive"), (49, "accepted")):
        half = [(2.0, 2.0)] * (100 - left) + [(20.0, NEVER)] * 6 + [(NEVER, NEVER)] * (left - 6)
        assert answered(half, limit=0.005, sound=True).outcome == expected


def test_parity_over_a_family_and_over_slices_takes_more() -> None:
    near = parting(64, 0)
    assert answered(near).outcome == "accepted" and answered(near, family=200).outcome == "inconclusive"
    assert answered(near, family=200, sound=True).outcome == "inconclusive", "64 prompts show nothing to so many"
    bad = next(k for k in range(64) if answered(parting(64, k)).outcome == "rejected")
    assert answered(parting(64, bad), slices=50).outcome == "inconclusive"
    usual = rules._answers(Disagreement((), tuple(parting(64, bad)), 32), 0.01, 1, sound=False)
    assert usual == answered(parting(64, bad), slices=1), "all prompts together are one slice"
    assert answered(parting(64, bad), family=50).outcome == "rejected", "only who is sure rejects, whatever the family"


def test_a_task_may_be_required_to_keep_a_share_of_the_adapters_score() -> None:
    def scored(name: str, *values: float) -> Measurement:
        samples = [{"id": str(n), "value": value} for n, value in enumerate(values)]
        return Measurement("task", name, values={"task": "t", "samples": samples})

    evidence = evidence_of(plan_of("merged"), [scored("adapter", 1, 1, 1, 0), scored("merged", 1, 1, 0, 1)])
    assert rules.relative(evidence, "merged", Metric("task.t"), 0.9) == stats.kept(1, 3, 1, 1, 0.9)
    assert rules.relative(evidence, "int8", Metric("task.t")) is None


def test_parity_says_what_it_compared_and_needs_a_second_run() -> None:
    found = rules.parity(case(asked(merged={}, compiled={}), 0.01, "compiled"))
    assert (found.outcome, found.against, found.limit) == ("accepted", "merged", 0.01) and "60 prompts" in found.reason
    once = [m for m in asked(merged={}, compiled={}) if (m.variant, m.launch) != ("adapter", 2)]
    said = rules.parity(case(once, 0.01, "compiled"))
    assert (said.outcome, said.against) == ("inconclusive", "merged") and said.value is None
    assert rules.parity(case(asked(merged={}, int8={}), 0.01, step=MERGE)).reason.startswith("merged: ")


# ---- requirements --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "most", "metric", "fewest"),
    [
        (("merged",), 60, "latency.p95", 93),
        (("merged",), 60, "latency.p50", 0),
        (("merged", "int8"), 60, "ttft.p95", 106),
        (("merged",), 2, "latency.p95", 76),
        (("merged",), 2, "latency.p99", 384),
        (("merged",), 100, "latency.p95", 89),
    ],
)
def test_the_fewest_requests_of_a_tail_by_hand(names: tuple[str, ...], most: int, metric: str, fewest: int) -> None:
    """ln(half the error of the last look / variants) / ln 0.95, rounded up."""
    recipe = plan_of(*names, max_blocks=most).recipe
    assert rules.fewest_requests(Metric(metric, "chat"), recipe) == fewest


def test_the_level_of_a_requirement_is_shared_by_looks_and_variants() -> None:
    assert rules.required_level(plan_of("merged").recipe) == 0.95
    assert rules.required_level(plan_of("merged", "int8").recipe, 0.5) == pytest.approx(1 - 0.05 / 4)


@pytest.mark.parametrize(
    ("value", "limit", "blocks"),
    [
        (Interval(10, 8, 12, 9), 11, 40),
        (Interval(10, 9.5, 12, 9), 9.5, 10),
        (Interval(10, 9, 12, 9), 9.5, 40),
        (Interval(10, 8, 12, 9), 10, 20),
        (Interval(10, 0, math.inf, 9), 11, 20),
        (Interval(10, 0, 1e9, 9), 10.001, stats.MOST_BLOCKS),
        (Interval(10, 8, 11, 9), 10.7, 21),
    ],
)
def test_blocks_that_would_clear_a_limit_grow_with_the_square_of_what_is_missing(
    value: Interval, limit: float, blocks: int
) -> None:
    assert rules._blocks_for(value, limit, 10) == blocks


def ratio(ours: Rows, theirs: Rows, level: float = 0.95) -> Interval | None:
    mine, reference = ({k: float(v["x"]) for k, v in each.items()} for each in (ours, theirs))
    return rules.score_ratio(mine, reference, level)


def test_a_ratio_of_scores_by_kind() -> None:
    right, wrong = rows(0, 1, 2, x=1), rows(3, 4, x=0)
    found = ratio(rows(0, x=0) | rows(1, 2, 3, x=1) | rows(4, x=0) | rows(9, x=1), right | wrong, 0.9)
    assert found == stats.kept(1, 3, 1, 2, 0.9)
    assert ratio(right | wrong, right | wrong) == stats.kept(0, 3, 0, 2)
    graded = rows(0, 1, x=0.5) | rows(2, x=0)
    assert ratio(graded, graded) == stats.kept(0, 2, 0, 1), "all kept their score"
    assert ratio(rows(0, x=0.4) | rows(1, 2, x=0.5), graded | rows(2, x=0.5)) == stats.ratio_of_means(
        [0.4, 0.5, 0.5], [0.5, 0.5, 0.5]
    )
    assert ratio(right, wrong) is None and ratio(wrong, wrong) is None


def test_validity_is_not_accuracy() -> None:
    """Three answers are no longer valid, of which one is no longer right either."""
    ours = rows(1, 2, valid=False) | rows(3, valid=False, correct=False)
    evidence = evidence_of(plan_of("merged"), asked(merged=ours))
    assert rules.relative(evidence, "merged", Metric("validity"), 0.9) == stats.kept(3, 60, 0, 0, 0.9)
    assert rules.relative(evidence, "merged", Metric("accuracy"), 0.9) == stats.kept(1, 60, 0, 0, 0.9)


def seen(measurements: Sequence[Measurement], *require: str) -> Evidence:
    return evidence_of(plan_of("merged", "int8", require=require), measurements)


def test_a_ratio_of_figures_has_the_bounds_of_two_intervals_that_share_the_error() -> None:
    launches = [
        Measurement("launch", name, "chat", values={"model_loading_time": s})
        for name, times in (("adapter", (10, 11, 12)), ("merged", (5, 5.5, 6, 6.5)))
        for s in times
    ]
    metric = Metric("load_time")
    found = rules.relative(seen(launches), "merged", metric, 0.9)
    own, base = stats.mean([5, 5.5, 6, 6.5], 0.95), stats.mean([10, 11, 12], 0.95)
    assert found and (found.estimate, found.n, found.level) == (pytest.approx(own.estimate / base.estimate), 3, 0.9)
    assert (found.low, found.high) == pytest.approx((own.low / base.high, own.high / base.low))
    fast = [replace(m, values={"model_loading_time": m.values["model_loading_time"] / 1e3}) for m in launches]
    again = rules.relative(seen(fast), "merged", metric, 0.9)
    assert again and (again.low, again.high) == pytest.approx((found.low, found.high)), "seconds or milliseconds"
    one = rules.relative(seen(launches[:1] + launches[3:]), "merged", metric, 0.9)
    assert one and (one.low, one.high) == (0, NEVER)
    spread = rules.relative(seen(launches[:4]), "merged", metric, 0.9)
    assert spread and (spread.low, spread.high) == (0, NEVER), "a time may be next to nothing, and no less"
    assert rules.relative(seen(launches[:3]), "merged", metric) is None
    assert rules.relative(seen(launches[3:]), "merged", metric) is None


def test_a_ratio_of_tails_has_the_bounds_of_two_intervals_that_share_the_error() -> None:
    plan = plan_of("merged", require=["latency.p95@chat <= 0.9x"])
    evidence = evidence_of(plan, speed(plan, {"merged": 0.5}, 200))
    metric = Metric("latency.p95", "chat")
    found = rules.timed_ratio(evidence, "merged", metric, 0.9, 200)
    own, base = (rules.timed(evidence, name, metric, 0.95, 200) for name in ("merged", "adapter"))
    assert found and own and base and math.isfinite(own.high) and found.level == 0.9
    assert found.estimate == own.estimate / base.estimate
    assert (found.low, found.high, found.n) == (own.low / base.high, own.high / base.low, 200)
    fast = [
        replace(m, values={**m.values, "requests": [{**r, "request_duration_ms": r["request_duration_ms"] / 1e4}]})
        for m in speed(plan, {"merged": 0.5}, 200)
        for r in m.values["requests"][1:]
    ]
    again = rules.timed_ratio(evidence_of(plan, fast), "merged", metric, 0.9, 200)
    assert again and (again.low, again.high) == pytest.approx((found.low, found.high)), "also of microseconds"
    few = rules.timed_ratio(evidence, "merged", metric, 0.9, 20)
    assert few and few.high == NEVER and few.n == 20
    one = rules.timed_ratio(evidence, "merged", metric, 0.9, 1)
    assert one and (one.low, one.high) == (0, NEVER), "one request bounds nothing"
    assert rules.timed_ratio(evidence, "int8", metric, 0.9, 20) is None
    itself = rules.timed_ratio(evidence, "adapter", metric, 0.9, 20)
    assert itself == Interval(1.0, 1.0, 1.0, 20)


def test_a_ratio_of_medians_is_paired_by_block_and_a_throughput_is_its_inverse() -> None:
    plan = plan_of("merged")
    evidence = evidence_of(plan, speed(plan, {"merged": 0.5}, 40))
    fewer = evidence_of(plan, speed(plan, {"merged": 0.5}, 12))
    time = rules.timed_ratio(evidence, "merged", Metric("latency.p50", "chat"), 0.9, 12)
    rate = rules.timed_ratio(evidence, "merged", Metric("throughput", "chat"), 0.9, 12)
    assert time and rate and time == fewer.ratio("merged", "adapter", "chat", "request_duration_ms", 0.9)
    assert (rate.low, rate.high) == pytest.approx((1 / time.high, 1 / time.low)) and 1.9 < rate.estimate < 2.1
    assert rules.timed_ratio(evidence, "int8", Metric("latency.p50", "chat"), 0.9, 12) is None


def required(text: str, measurements: Sequence[Measurement], **measure: Json) -> Verdict:
    plan = plan_of("merged", require=[text], **measure)
    return verdict(decide(plan, measurements, {}), "merged", f"require: {text}")


def test_an_open_requirement_says_what_is_missing() -> None:
    plan = plan_of("merged")
    blocks = speed(plan, {"merged": 0.5}, 16)
    nothing = required("latency.p50@chat <= 50 ms", [])
    assert (nothing.outcome, nothing.workload, nothing.blocks_needed) == ("inconclusive", "", None)
    assert "not measured" in nothing.reason
    early = required("latency.p50@chat <= 500 ms", blocks[: 3 * 9])
    assert early.outcome == "inconclusive" and early.value and early.value.n == 9, "no look yet, but figures"
    assert early.value.level == 0.95 and early.blocks_needed == 10, "clear as they are, they take one more"
    tail = required("latency.p95@chat <= 900 ms", blocks, requests=1)
    assert "P95: 16 of 93" in tail.reason and "measure.requests: 2 would give them in 60 blocks" in tail.reason
    assert (tail.blocks_needed, tail.workload, tail.clock, tail.unit) == (93, "chat", "wall", "ms")
    enough = required("latency.p95@chat <= 900 ms", blocks, requests=3)
    assert "measure.requests" not in enough.reason and enough.blocks_needed == 60
    more = required("latency.p95@chat <= 900 ms", blocks, requests=3, max_blocks=31)
    assert "measure.requests" not in more.reason and more.blocks_needed == 31
    pairs = required("latency.p95@chat <= 900 ms", blocks, requests=2, max_blocks=20)
    fewest = rules.fewest_requests(Metric("latency.p95", "chat"), plan_of("merged", max_blocks=20).recipe)
    assert fewest % 2 and pairs.blocks_needed == fewest // 2 + 1, "half a block is none"
    one = required("latency.p50@chat <= 500 ms", launched(blocks, 16), relaunch=20)
    assert "one launch" in one.reason and one.blocks_needed == 40
    two = required("latency.p50@chat <= 60 ms", launched(blocks, 8), relaunch=8)
    assert two.outcome == "inconclusive" and "one launch" not in two.reason


def test_a_met_requirement_says_by_what() -> None:
    plan = plan_of("merged")
    timed = [replace(m, values={**m.values, "machine": {"seconds": 6.0}}) for m in speed(plan, {"merged": 0.5}, 40)]
    met = required("latency.p50@chat <= 500 ms", timed)
    assert (met.outcome, met.against, met.limit, met.clock) == ("accepted", "", 500, "wall")
    assert met.value and met.value.n == 10 and met.value.level == pytest.approx(1 - 0.05 * 0.1)
    assert "10 requests of 10 launches" in met.reason and met.blocks_needed is met.minutes_needed is None
    relative = required("latency.p50@chat <= 0.9x", timed)
    assert (relative.outcome, relative.against, relative.unit) == ("accepted", "adapter", "x")
    middle = met.value.estimate
    open_ = required(f"latency.p50@chat <= {middle:.4f} ms", timed)
    assert open_.outcome == "inconclusive" and open_.blocks_needed and open_.blocks_needed > 40
    assert open_.minutes_needed == pytest.approx((open_.blocks_needed - 40) * 3 * 6 / 60)


def test_requirements_on_whole_variants_are_judged_over_the_family() -> None:
    text = "accuracy >= 90 %"
    plan = plan_of("merged", "int8", require=[text, "critical_errors <= 5 %"])
    decision = decide(plan, asked(merged=rows(1, correct=False, critical=False), int8={}), {})
    found = verdict(decision, "merged", f"require: {text}")
    assert found.value == stats.proportion(59, 60, 1 - 0.05 / 2)
    assert (found.against, found.unit, found.limit, found.workload) == ("", "share", 0.9, "")
    errors = verdict(decision, "int8", "require: critical_errors <= 5 %")
    assert errors.value and errors.value.high == stats.upper_bound(0, 60, 1 - 0.05 / 2)
    assert (errors.against, errors.limit) == ("adapter", 0.05)
    missing = verdict(decide(plan, [], {}), "merged", f"require: {text}")
    assert missing.outcome == "inconclusive" and missing.value is None


def test_the_adapter_is_held_to_limits_of_its_own_only() -> None:
    texts = ["accuracy >= 90 %", "accuracy >= 0.9x", "critical_errors <= 5 %", "latency.p50@chat <= 900 ms"]
    plan = plan_of("merged", require=texts)
    found = of(decide(plan, whole(plan, {"merged": 0.5}), {}), "adapter")
    assert [v.rule for v in found.verdicts] == [f"require: {texts[0]}", f"require: {texts[3]}"]


def test_one_launch_of_a_figure_is_told() -> None:
    memory = [Measurement("memory", "merged", values={"peak_memory_bytes": 5e8})]
    assert "one launch" in required("memory <= 1 GB", memory).reason
    assert "one launch" not in required("memory <= 1 GB", memory * 2).reason
    sized = plan_of("merged", require=["size <= 1 KB"])
    said = verdict(decide(sized, builds(sized), {}), "merged", "require: size <= 1 KB")
    assert said.outcome == "accepted" and "one launch" not in said.reason


# ---- what a variant is made of -------------------------------------------------------------------


def test_files_that_are_wrong_reject_and_those_that_were_not_built_leave_it_open() -> None:
    plan = plan_of("merged", "int8")
    for tier0, expected in (((), "accepted"), (("a", "b", "c", "d"), "rejected")):
        found = verdict(decide(plan, builds(plan, tier0), {}), "merged", "artifact.intact")
        assert found.outcome == expected and (not tier0 or found.reason == "a; b; c")
    assert outcome(decide(plan, [], {}), "merged", "artifact.intact") == "inconclusive"
    merge = next(build.id for build in plan.builds if build.step == MERGE)
    bad = [replace(m, values={**m.values, "tier0": ["NaN"]}) if m.values["id"] == merge else m for m in builds(plan)]
    assert outcome(decide(plan, bad, {}), "int8", "artifact.intact") == "rejected", "whose parent is damaged"


def test_where_nothing_was_built_no_weights_are_said_to_be_whole() -> None:
    plan = plan_of("merged")
    bare = replace(plan.recipe, variants={**plan.recipe.variants, "cut": Variant("cut", (), EAGER, (CAP,))})
    capped = planning.plan(bare, {"base": "b", "adapter": "a", "calibration": ""}, {})
    said = verdict(decide(capped, asked(cut={}), {}), "cut", "artifact.intact")
    assert said.outcome == "accepted" and "weights" not in said.reason
    assert "weights" in verdict(decide(plan, builds(plan), {}), "merged", "artifact.intact").reason


@pytest.mark.parametrize(("kept", "expected"), [(0.09, "rejected"), (0.11, "accepted")])
def test_less_than_a_tenth_of_the_adapter_is_none(kept: float, expected: str) -> None:
    plan = plan_of("merged")
    found = builds(plan) + asked(merged=rows(*range(60), shift=10.0, kept=10 * kept))
    assert outcome(decide(plan, found, {}), "merged", "artifact.intact") == expected


def test_an_adapter_that_may_be_there_is_not_said_to_be_gone() -> None:
    plan = plan_of("merged")
    uneven = rows(*range(0, 60, 2), shift=10.0, kept=0.0) | rows(*range(1, 60, 2), shift=10.0, kept=1.8)
    decision = decide(plan, builds(plan) + asked(merged=uneven), {})  # 7 to 11 %
    assert outcome(decision, "merged", "artifact.intact") == "accepted"


def test_ratios_are_at_95_percent_unless_it_is_said() -> None:
    evidence, metric = seen(asked(merged=rows(1, correct=False))), Metric("accuracy")
    assert rules.relative(evidence, "merged", metric) == rules.relative(evidence, "merged", metric, 0.95)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [*((why, "not judged") for why in ("missing library", "missing environment", "refused")), ("killed", "rejected")],
)
def test_a_variant_that_was_not_tried_is_not_judged(reason: str, expected: Outcome) -> None:
    plan = plan_of("merged")
    died = {"stage": "build", "reason": reason, "detail": "why", "hint": ""}
    decision = decide(plan, [*whole(plan, {"merged": 0.5}), Measurement("failure", "merged", values=died)], {})
    (only,) = of(decision, "merged").verdicts
    assert (only.rule, only.outcome) == ("artifact.runs", expected)
    assert reason in only.reason and "why" in only.reason and "build" in only.reason


def test_every_rule_says_what_it_protects_against() -> None:
    for rule in rules.RULES:
        assert rules.protects(f"merge.{rule}") == rules.PROTECTS[rule]
    assert rules.protects("require: latency.p50@chat <= 1.5 ms") == rules.PROTECTS["require"]
    assert rules.protects("artifact.intact") == rules.PROTECTS["artifact.intact"]
    assert rules.protects("merge.what_comes_next") == ""


@pytest.mark.parametrize(
    ("others", "step", "parent"),
    [
        (("merged", "compiled"), INT8, "compiled"),
        (("merged", "int8"), INT8, "merged"),
        (("merged", "int8"), CHAINS["compiled"].engine, "int8"),
        (("merged",), CHAINS["compiled"].engine, "adapter"),
        (("merged", "apart"), MERGE, "apart"),
        (("int8",), MERGE, "adapter"),
        ((), INT8, "adapter"),
    ],
)
def test_a_parent_is_as_like_its_variant_as_the_recipe_has(others: tuple[str, ...], step: Step, parent: str) -> None:
    recipe = plan_of(*others, "int8_compiled").recipe
    assert rules.parent_of(recipe, CHAINS["int8_compiled"], step) == parent
    assert rules.parent_of(recipe, CHAINS["int8"], EAGER) != "int8", "nothing is its own parent"


def test_a_threshold_of_another_metric_is_shown_in_its_unit() -> None:
    ms, times = parse("latency.p50@chat <= 5 ms"), parse("latency.p50@chat <= 0.9x")
    value = Interval(0.512, 0.4, math.inf, 9)

    def shown(threshold: Threshold) -> str:
        return rules._show(threshold, value)

    assert shown(times) == "0.512x (0.4x to unknown)" and shown(ms).startswith("0.512 ms (0.400 ms to unknown)")


def test_a_ratio_of_tails_has_as_many_requests_as_the_fewer_of_the_two() -> None:
    plan = plan_of("merged")
    found = [m for m in speed(plan, {"merged": 0.5}, 200) if m.variant != "merged" or m.values["block"] < 150]
    ratio = rules.timed_ratio(evidence_of(plan, found), "merged", Metric("latency.p95", "chat"), 0.9, 200)
    assert ratio and ratio.n == 150


def test_a_ratio_to_an_adapter_that_was_not_measured_there_is_unknown() -> None:
    plan = plan_of("merged")
    alone = [m for m in speed(plan, {"merged": 0.5}, 24) if m.variant == "merged"]
    for metric in ("latency.p50", "latency.p95"):
        said = required(f"{metric}@chat <= 0.9x", alone)
        assert (said.outcome, said.value, said.workload) == ("inconclusive", None, "")
        assert "not measured" in said.reason


@pytest.mark.parametrize(
    ("smaller", "not_slower", "alone"),
    [(0.1, None, True), (0.1, 0.02, False), (None, None, False), (None, 0.02, False)],
)
def test_a_merge_is_raced_by_itself_only_where_what_follows_may_cost_speed(
    smaller: float | None, not_slower: float | None, alone: bool
) -> None:
    """int8 is taken for its size where its speed is not asked for; then the merge must not pay for it."""
    table = (Rule("merge", "gain", 0.15), Rule("int8", "smaller", smaller), Rule("int8", "not_slower", not_slower))
    table += (Rule("gptq", "smaller", 0.1), Rule("gptq", "not_slower", 0.1))  # which is another quantizer
    plan = ruled(plan_of("merged", "int8"), *table)
    said = verdict(decide(plan, speed(plan, {"merged": 0.5, "int8": 2.0}), {}), "int8", "merge.gain")
    assert said.outcome == ("accepted" if alone else "rejected")


def test_a_parent_keeps_the_other_policies() -> None:
    """Of two policies each is judged against the variant that has the other one."""
    engine = CHAINS["merged"].engine
    both, cut = Variant("both", (MERGE,), engine, (TRUNCATE, CAP)), Variant("cut", (MERGE,), engine, (TRUNCATE,))
    capped, recipe = Variant("capped", (MERGE,), engine, (CAP,)), plan_of("merged").recipe
    recipe = replace(recipe, variants={**recipe.variants, "cut": cut, "capped": capped, "both": both})
    assert rules.parent_of(recipe, both, TRUNCATE) == "capped"
    assert rules.parent_of(recipe, both, CAP) == "cut"
    assert rules.parent_of(recipe, cut, TRUNCATE) == rules.parent_of(recipe, capped, CAP) == "merged"


def test_the_prompt_that_leaves_errors_open_is_named() -> None:
    found = asked({}, rows(*range(60)), merged={}, int8=rows(5, flags=["loop"]))
    found = [m for m in found if (m.variant, m.launch, m.values["row"]) != ("adapter", 2, "p5")]
    assert "p5: loop" in rules.critical_errors(case(found, 0.05)).reason


def test_an_open_race_tells_how_long_its_missing_blocks_take() -> None:
    """40 blocks of three turns of 6 s are there."""
    plan = plan_of("merged")
    timed = [
        replace(m, values={**m.values, "machine": {"seconds": 6.0}})
        for m in speed(plan, {"merged": 0.85}, 40, noise=0.2)
    ]
    found = gain(plan, timed)
    assert found.outcome == "inconclusive" and found.blocks_needed and found.blocks_needed > 40
    assert found.minutes_needed == pytest.approx((found.blocks_needed - 40) * 3 * 6 / 60)


def test_small_slices_that_are_sound_leave_no_doubt_on_the_whole() -> None:
    """A slice of six prompts shows nothing; it rejects where it surely breaks, and is silent otherwise."""
    tagged = {f"p{n}": {"slices": [f"s{n % 20}"]} for n in range(120)}
    said = rules.parity(case(asked(n=120, merged=tagged, compiled=tagged), 0.01, "compiled"))
    assert said.outcome == "accepted" and "slice" not in said.reason


def test_answers_are_also_judged_half_way_between_doubled_lengths() -> None:
    """5 in 400 part at each of the first 24 tokens and none later, where 1 % may: 26 % by then, and 21 % were allowed.

    Within 16 tokens they are too few to be sure of, and within 32 few enough.
    """
    found = list[tuple[float, float]]()
    for token in range(1, 25):
        found += [(token, NEVER)] * round((2200 - len(found)) / 80)
    said = answered([*found, *[(NEVER, NEVER)] * (2200 - len(found))])
    assert said.outcome == "rejected" and "the first 24 tokens" in said.reason and said.unit == "share"


def test_as_many_requests_as_a_tail_takes_are_not_too_few() -> None:
    """89 requests bound a P95 on both sides at the last look of 89 blocks."""
    plan = plan_of("merged", max_blocks=89)
    assert rules.fewest_requests(Metric("latency.p95", "chat"), plan.recipe) == 89
    for blocks, few in ((88, True), (89, False)):
        measured = speed(plan, {"merged": 0.5}, blocks)
        said = required("latency.p95@chat <= 90 ms", measured, requests=1, max_blocks=89)
        assert said.outcome == "inconclusive" and ("too few" in said.reason) == few
        assert "would give them" not in said.reason, "the blocks that it may have are enough"


@pytest.mark.parametrize(("scored", "expected"), [(True, "accepted"), (False, "inconclusive")])
def test_answers_that_seem_alike_are_enough_where_predictions_are_sound(scored: bool, expected: str) -> None:
    """Eight of a hundred part at once. Scores say that it is noise; without them it may as well be 15."""
    parted = rows(*range(8), tokens=[99, *range(1, 30)])
    found = asked(n=100, merged={}, compiled=parted)
    if not scored:
        found = [replace(m, values={k: v for k, v in m.values.items() if k != "agree"}) for m in found]
    assert rules.parity(case(found, 0.01, "compiled")).outcome == expected


def test_an_adapter_alone_is_held_to_its_requirements_too() -> None:
    plan = plan_of(require=["latency.p50@chat <= 900 ms"])
    (found,) = of(decide(plan, speed(plan, {}, 24), {}), "adapter").verdicts
    assert found.outcome == "accepted"


@pytest.mark.parametrize("family", [1, 5])
def test_the_prompts_that_parity_is_said_to_take_are_those_it_takes(family: int) -> None:
    """What `peftopt check` says before a run is what the rule asks after it."""
    rule = Rule("merge", "parity", 0.01)
    needed = next(n for n in range(1, 999) if not stopping._unclaimable(rule, 0.01, n, family))
    assert answered(parting(needed, 0), family=family).outcome == "accepted"
    for found, expected in ((parting(needed, 2), "accepted"), (parting(needed - 1, 2), "inconclusive")):
        assert answered(found, family=family, sound=True).outcome == expected
