"""A race for the winner: who is left open and why, what is still measured, and what does not change by it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from helpers.records import builds, decide, evidence_of, of, outcome, plan_of, quality, speed, verdict, whole

from peftopt.decision import stopping
from peftopt.decision.rules.table import WINNER
from peftopt.decision.rules.winner import beaten
from peftopt.recipe import plan as planning
from peftopt.records import TWIN, Decision, Json, Measurement, Plan, Rule
from peftopt.report import reports
from peftopt.report.headline import headline
from peftopt.stats import ALPHA, Race, race

NAMES = ("int8", "compiled")
OPEN, FAST = 0.85, 0.3
"""A ratio on the limit of merge.gain, and one that is far below it."""


def winner(*names: str, **measure: Json) -> Plan:
    return plan_of(*(names or NAMES), race="winner", **measure)


def told(plan: Plan, slower: float = OPEN, compiled: float = FAST, blocks: int = 12) -> list[Measurement]:
    return whole(plan, {"int8": slower, "compiled": compiled}, blocks=blocks)


def asked(plan: Plan, found: Sequence[Measurement], workload: str = "chat") -> frozenset[str]:
    return stopping.blocks(evidence_of(plan, found), workload)


def reversed_(found: Sequence[Measurement]) -> list[Measurement]:
    """The same lines, in which the compiled variant gets an answer wrong that it must get right."""
    rest = [m for m in found if m.probe != "quality" or m.variant != "compiled"]
    return [*rest, *quality("compiled", p3={"correct": False})]


# ---- who is left open ----------------------------------------------------------------------------


def test_a_variant_that_an_accepted_one_beats_is_measured_no_more_on_any_workload() -> None:
    plan, all_ = winner(), plan_of(*NAMES)
    found = told(plan)
    assert asked(all_, found) == {"adapter", "int8"} and asked(plan, found) == frozenset()
    assert asked(all_, found, "bulk") == {"adapter", *NAMES} and asked(plan, found, "bulk") == {"adapter", "compiled"}


def test_the_verdict_says_what_it_lost_to_and_asks_for_no_blocks() -> None:
    plan = winner()
    decision = decide(plan, told(plan), {})
    int8, why = of(decision, "int8"), verdict(decision, "int8", WINNER)
    assert (int8.outcome, int8.decided_by) == ("inconclusive", WINNER)
    assert why.against == "compiled" and why.value and why.value.low > 1
    assert "compiled" in why.reason and "peftopt run test.yaml --more" in why.reason and "race: all" in why.reason
    assert outcome(decision, "int8", "merge.gain") == "inconclusive"
    assert not any(v.blocks_needed or v.minutes_needed for v in int8.verdicts)


def test_the_run_is_decided_and_no_text_calls_it_undecided() -> None:
    plan = winner()
    found = told(plan)
    decision = decide(plan, found, {})
    assert (decision.outcome, decision.chosen, decision.next_step) == ("accepted", "compiled", "")
    assert "int8" in decision.sentence and "undecided" not in decision.sentence
    assert "int8 undecided" in decide(plan_of(*NAMES), found, {}).sentence
    assert "Next:" not in headline(decision)
    texts = reports(decision, evidence_of(plan, found))
    assert all(WINNER in texts[name] for name in ("report.md", "report.html", "junit.xml"))
    assert 'failures="0" errors="0"' in texts["junit.xml"]


def test_nothing_is_left_open_for_one_that_is_not_accepted() -> None:
    plan = winner()
    found = told(plan)
    assert beaten(evidence_of(plan, found)).keys() == {"int8"}
    turned_down = reversed_(found)
    assert outcome(decide(plan, turned_down, {}), "compiled", "variant.critical_errors") == "rejected"
    unanswered = [m for m in found if m.probe != "quality" or m.variant != "compiled"]
    for rest in (turned_down, unanswered):
        assert beaten(evidence_of(plan, rest)) == {} and asked(plan, rest) >= {"adapter", "int8"}


def test_nothing_is_left_open_on_a_machine_that_differs_from_itself() -> None:
    plan = winner()
    arm = [m for m in speed(plan, {}, 12) if m.variant == "adapter"]
    slow = [m for m in speed(plan, {"adapter" + TWIN: 1.2}, 12) if m.variant == "adapter" + TWIN]
    found = [m for m in told(plan) if m.probe != "speed" or not m.variant.startswith("adapter")] + arm + slow
    assert beaten(evidence_of(plan, found)) == {}
    assert of(decide(plan, found, {}), "int8").decided_by == "merge.gain"


@pytest.mark.parametrize(("compiled", "lost"), [(0.45, True), (0.5, False), (0.55, False)])
def test_only_one_that_is_shown_to_be_slower_is_left_open(compiled: float, lost: bool) -> None:
    plan = winner()
    answered = [m for m in told(plan, 0.5, compiled) if m.probe != "quality" or m.variant != "int8"]
    found = [*answered, *quality("int8", 20)]  # too few to accept it
    assert ("int8" in beaten(evidence_of(plan, found))) == lost
    assert (of(decide(plan, found, {}), "int8").decided_by == WINNER) == lost


@pytest.mark.parametrize(("slower", "decided"), [(0.5, ("accepted", "merge.gain")), (1.2, ("rejected", "merge.gain"))])
def test_a_slower_variant_that_is_decided_keeps_its_verdict_and_takes_no_more_time(
    slower: float, decided: tuple[str, str]
) -> None:
    plan = winner()
    found = told(plan, slower)
    judged = of(decide(plan, found, {}), "int8")
    assert (judged.outcome, judged.decided_by) == decided and WINNER not in {v.rule for v in judged.verdicts}
    assert asked(plan, found, "bulk") == {"adapter", "compiled"}


def test_the_fastest_of_those_that_beat_a_variant_is_named() -> None:
    plan = winner("merged", *NAMES)
    plan = replace(plan, recipe=replace(plan.recipe, rules=(Rule("merge", "gain", 0.15),)))
    found = whole(plan, {"merged": 0.5, "int8": OPEN, "compiled": FAST}, blocks=12)
    assert beaten(evidence_of(plan, found)).keys() == {"merged", "int8"}
    assert verdict(decide(plan, found, {}), "int8", WINNER).against == "compiled"


def test_what_lost_is_still_measured_where_another_is_judged_against_it() -> None:
    """int8 alone loses to compiled; int8_compiled may still win, and its compiling is judged against int8."""
    plan = winner("merged", "int8", "compiled", "int8_compiled")
    rules = (Rule("merge", "gain", 0.15), Rule("compile", "gain", 0.5))
    plan = replace(plan, recipe=replace(plan.recipe, rules=rules))
    ratios = {"merged": OPEN, "int8": 0.5, "compiled": 0.3, "int8_compiled": 0.25}
    found = whole(plan, ratios, blocks=13)
    assert beaten(evidence_of(plan, found)).keys() == {"merged", "int8"}
    assert asked(plan, found) == {"adapter", "int8", "compiled", "int8_compiled"}


def test_the_fewest_blocks_of_a_decided_race_are_for_those_that_may_be_chosen() -> None:
    plan = winner(min_blocks=24)
    assert asked(plan, told(plan, 0.5)) == {"adapter", "compiled"}


def test_variants_that_are_judged_no_more_beat_none() -> None:
    plan = winner()
    alone = planning.rejudged(plan, plan_of("int8").recipe)
    assert of(decide(alone, told(plan), {}), "int8").decided_by == "merge.gain"


# ---- more blocks ---------------------------------------------------------------------------------


def test_blocks_that_are_granted_for_all_bring_back_what_was_left_open() -> None:
    plan = winner()
    found = told(plan)
    assert stopping.open_races(evidence_of(plan, found)) == []
    granted = [*found, Measurement("more", "", values={"max_blocks": 24, "race": "all"})]
    evidence = evidence_of(plan, granted)
    assert [v.rule for v in stopping.open_races(evidence)] == ["merge.gain"] and evidence.budget == 24
    assert asked(plan, granted) == {"adapter", "int8"} and asked(plan, granted, "bulk") == {"adapter", *NAMES}
    further = [*found, Measurement("more", "", values={"max_blocks": 90})]
    assert asked(plan, further) == frozenset(), "blocks for the races that go on bring nothing back"


# ---- what does not change ------------------------------------------------------------------------


def raced(plan: Plan, blocks: Mapping[int, Mapping[str, Measurement]], rest: Sequence[Measurement]) -> Decision:
    """The decision of a run that measures the turns that the race asks for, of those there are."""
    found = list(rest)
    for turns in blocks.values():
        wants = asked(plan, found)
        if not wants:
            break
        found += [turns[arm] for arm in (*sorted(wants), "adapter" + TWIN)]
    return decide(plan, found, {})


@pytest.mark.parametrize("seed", range(6))
def test_the_same_variant_is_chosen_and_the_verdicts_on_all_that_is_judged_are_the_same(seed: int) -> None:
    dice, names = random.Random(seed), ("merged", "int8", "compiled", "int8_compiled")
    ratios = dict(zip(names, dice.sample([0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.84, 0.95, 1.1], 4), strict=True))
    plans = [replace(plan, recipe=replace(plan.recipe, quality=None)) for plan in (plan_of(*names), winner(*names))]
    blocks: dict[int, dict[str, Measurement]] = {}
    for name, ratio in {"adapter": 1.0, "adapter" + TWIN: 1.0, **ratios}.items():
        for turn in speed(plans[0], {name: ratio}, 24):
            if turn.variant == name:
                (warm, request), jitter = turn.values["requests"], dice.gauss(1, 0.04)
                times = {key: value * jitter for key, value in request.items() if key.endswith("_ms")}
                values = {**turn.values, "requests": [warm, {**request, **times}]}
                blocks.setdefault(turn.values["block"], {})[name] = replace(turn, values=values)
    all_, only = (raced(plan, blocks, builds(plan)) for plan in plans)
    judged = [v for v in only.variants if v.decided_by != WINNER]
    assert all_.chosen == only.chosen
    assert [v.outcome for v in judged] == [of(all_, v.name).outcome for v in judged]


def test_a_pair_is_raced_with_a_variants_share_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the fastest of k variants, which has k - 1 rivals, is beaten by chance in less than half of ALPHA."""
    plan = winner("merged", "int8", "compiled", "int8_compiled")
    shares = []

    def heard(d: object, limit: float, family: int, *rest: object) -> Race:
        shares.append(ALPHA / 2 / family * (family - 1) if limit == 0 else 0.0)
        return race(d, limit, family, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("peftopt.stats.race", heard)
    beaten(
        evidence_of(plan, whole(plan, dict.fromkeys(("merged", "int8", "compiled", "int8_compiled"), 0.5), blocks=12))
    )
    assert 0 < max(shares) < ALPHA / 2
