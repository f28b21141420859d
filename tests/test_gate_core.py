"""What a gate says of two snapshots, whatever they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.gates import HASHES, RACE, baseline_of, invented, snapshot_of, without
from helpers.records import plan_of, quality, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt import stats
from peftopt.decision.evidence import ANSWERED_WRONG
from peftopt.errors import BadInput
from peftopt.gate import comparing, judging, keeping, words
from peftopt.gate.records import Case, Gate, Snapshot, Tolerances
from peftopt.records import Interval, Outcome

ratios = st.floats(-3, 3, allow_nan=False)
launches = st.lists(st.lists(ratios, min_size=1, max_size=4), min_size=1, max_size=12)
rows = st.lists(st.integers(0, 399), max_size=60, unique=True)
flags = st.dictionaries(
    st.integers(0, 399).map("p{}".format),
    st.sets(st.sampled_from(["empty", "loop"]), min_size=1).map(tuple),
    max_size=5,
)
snapshots = st.builds(invented, launches, rows, st.just(400), flags, flags)


def judged(then: Snapshot, now: Snapshot) -> Gate:
    return judging.judge(baseline_of(then), now, "test")


def case(gate: Gate, name: str) -> Case:
    return next(each for each in gate.cases if each.name == name)


def steady(centre: float, blocks: int = 24, noise: float = 0.01, seed: int = 0) -> list[list[float]]:
    """Log ratios of as many launches as blocks."""
    dice = np.random.default_rng(seed)
    return [[float(math.log(centre) + x)] for x in dice.normal(0, noise, blocks)]


# ---- what always holds ---------------------------------------------------------------------------


@given(snapshots)
def test_a_run_is_never_worse_than_itself(snapshot: Snapshot) -> None:
    assert judged(snapshot, snapshot).outcome != "rejected"


@given(snapshots, st.sampled_from(["merge.gain", "merge.parity", "accuracy", RACE, "errors"]))
def test_what_is_missing_never_passes(snapshot: Snapshot, figure: str) -> None:
    assert judged(snapshot, without(snapshot, figure)).outcome != "accepted"
    assert judged(without(snapshot, figure), snapshot).outcome != "accepted"


@given(st.floats(1.16, 4), st.integers(14, 40), st.integers(0, 99))
@settings(max_examples=25)
def test_surely_slower_than_the_tolerance_fails(times: float, blocks: int, seed: int) -> None:
    gate = judged(invented(steady(0.5)), invented(steady(0.5 * times, blocks, seed=seed)))
    assert gate.outcome == "rejected" and case(gate, "merge.gain").outcome == "rejected"


@given(st.floats(0.3, 1.04), st.integers(14, 40), st.integers(0, 99))
@settings(max_examples=25)
def test_as_fast_or_faster_passes(times: float, blocks: int, seed: int) -> None:
    assert judged(invented(steady(0.5)), invented(steady(0.5 * times, blocks, seed=seed))).outcome == "accepted"


@given(st.sets(st.integers(0, 399), max_size=40), st.sets(st.integers(0, 399), max_size=60))
@settings(max_examples=25)
def test_losing_more_answers_never_looks_better(wrong: set[int], more: set[int]) -> None:
    then = invented(steady(0.5), sorted(wrong))
    order = ["accepted", "inconclusive", "rejected"]
    first, second = (
        case(judged(then, invented(steady(0.5), sorted(now))), "answers.accuracy") for now in (wrong, wrong | more)
    )
    assert order.index(first.outcome) <= order.index(second.outcome)


@given(snapshots, st.randoms())
def test_a_file_does_not_depend_on_the_order_of_what_it_holds(snapshot: Snapshot, dice: object) -> None:
    def shuffled(values: Mapping[str, object]) -> dict[str, object]:
        items = list(values.items())
        dice.shuffle(items)  # type: ignore[attr-defined]
        return dict(items)

    names = ("rules", "scores", "races", "machine", "versions")
    other = replace(snapshot, **{name: shuffled(getattr(snapshot, name)) for name in names})  # type: ignore[arg-type]
    assert keeping.render(baseline_of(snapshot)) == keeping.render(baseline_of(other))


@given(snapshots)
def test_a_file_that_is_read_is_written_as_it_was_and_judges_alike(snapshot: Snapshot) -> None:
    text = keeping.render(baseline_of(snapshot))
    read = keeping.read(text, "b.json")
    assert keeping.render(read) == text
    assert judging.judge(read, read.accepted, "test").outcome != "rejected"


# ---- what is unlike is undecided -----------------------------------------------------------------

UNLIKE: Sequence[tuple[str, Callable[[Snapshot], Snapshot], str]] = (
    ("base", lambda s: replace(s, hashes=replace(HASHES, base="another")), "base model"),
    ("tokenizer", lambda s: replace(s, hashes=replace(HASHES, tokenizer="another")), "tokenizer"),
    ("prompts", lambda s: replace(s, hashes=replace(HASHES, answers="another")), "prompt set has changed"),
    ("shape", lambda s: replace(s, hashes=replace(HASHES, adapter_shape="another")), "another rank"),
    ("workload", lambda s: replace(s, hashes=replace(HASHES, workloads={"chat": "another"})), "chat has changed"),
    ("machine", lambda s: replace(s, machine={**s.machine, "cpu": "B"}), "cpu B, was A"),
    ("unknown", lambda s: replace(s, hashes=None), "run the recipe again"),
    ("clock", lambda s: replace(s, races={RACE: replace(s.races[RACE], clock="cpu")}), "cpu clock"),
)


@pytest.mark.parametrize(("change", "told"), [each[1:] for each in UNLIKE], ids=[each[0] for each in UNLIKE])
def test_a_run_of_something_else_is_undecided_and_says_what(change: Callable[[Snapshot], Snapshot], told: str) -> None:
    same = invented(steady(0.5))
    gate = judged(same, change(same))
    assert judged(same, same).outcome == "accepted"
    assert gate.outcome == "inconclusive"
    assert any(told in each.reason for each in gate.cases if each.outcome == "inconclusive")


def test_another_adapter_of_the_same_shape_is_what_is_gated() -> None:
    then = invented(steady(0.5))
    gate = judged(then, replace(then, hashes=replace(HASHES, adapter="another")))
    assert gate.outcome == "accepted" and any("adapter is another" in note for note in gate.notes)


def test_another_draft_is_what_is_gated() -> None:
    drafted = replace(HASHES, folders={"drafted.speculate.draft": "1" * 64})
    then = replace(invented(steady(0.5)), hashes=drafted)
    gate = judged(then, replace(then, hashes=replace(drafted, folders={"drafted.speculate.draft": "2" * 64})))
    assert gate.outcome == "accepted" and any("drafted.speculate.draft is another" in note for note in gate.notes)
    assert not judged(then, replace(then, hashes=HASHES)).notes


@pytest.mark.parametrize("asked", [399, 401])
def test_answers_to_other_prompts_are_no_pairs(asked: int) -> None:
    now = invented(steady(0.5), asked=asked)
    other = replace(now, scores={"accuracy": replace(now.scores["accuracy"], rows="others")})
    assert case(judged(invented(steady(0.5)), other), "answers.accuracy").outcome == "inconclusive"


# ---- rules, answers, errors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("accepted", "accepted", "accepted"),
        ("accepted", "rejected", "rejected"),
        ("accepted", "inconclusive", "inconclusive"),
        ("accepted", "not judged", "inconclusive"),
        ("not judged", "not judged", "not judged"),
        ("rejected", "rejected", "not judged"),
        ("inconclusive", "accepted", "accepted"),
        ("not judged", "rejected", "rejected"),
    ],
)
def test_a_rule_must_still_pass(before: Outcome, after: Outcome, expected: Outcome) -> None:
    def ruled(outcome: Outcome) -> Snapshot:
        snapshot = invented(steady(0.5))
        parity = replace(snapshot.rules["merge.parity"], outcome=outcome)
        return replace(snapshot, rules={**snapshot.rules, "merge.parity": parity})

    assert case(judged(ruled(before), ruled(after)), "merge.parity").outcome == expected


@pytest.mark.parametrize(
    ("lost", "won", "expected"),
    [(0, 0, "accepted"), (14, 14, "accepted"), (16, 0, "inconclusive"), (60, 5, "rejected")],
)
def test_answers_are_compared_prompt_by_prompt(lost: int, won: int, expected: Outcome) -> None:
    then, now = range(380, 400), [*range(lost), *range(380 + won, 400)]
    gate = judged(invented(steady(0.5), list(then)), invented(steady(0.5), now))
    found = case(gate, "answers.accuracy")
    assert found.outcome == expected
    assert f"{lost} answer" in found.reason and (not lost or "p0" in found.reason)


def test_a_score_that_was_0_cannot_be_lost_and_is_not_all_there_is() -> None:
    none_right = invented(steady(0.5), range(400))
    assert case(judged(none_right, none_right), "answers.accuracy").outcome == "not judged"
    bare = replace(none_right, races={}, rules={}, errors=None)
    assert judged(bare, bare).outcome == "inconclusive", "nothing was compared"


def test_one_new_critical_error_fails_and_one_that_hangs_on_noise_is_named() -> None:
    then = invented(steady(0.5), always={"p1": ("loop",)}, sometimes={"p2": ("empty",)})
    known = invented(steady(0.5), always={"p1": ("loop",), "p2": ("empty",)})
    new = invented(steady(0.5), always={"p1": ("empty", "loop")})
    noise = invented(steady(0.5), sometimes={"p3": ("loop",)})
    assert judged(then, known).outcome == "accepted"
    assert (
        "p1: empty" in case(judged(then, new), comparing.NEW_ERRORS).reason and judged(then, new).outcome == "rejected"
    )
    assert "p3" in case(judged(then, noise), comparing.NEW_ERRORS).reason and judged(then, noise).outcome == "accepted"


def test_on_another_machine_a_wrong_answer_is_undecided_and_a_loop_is_not() -> None:
    then = invented(steady(0.5))
    for flag, expected in ((ANSWERED_WRONG, "inconclusive"), ("loop", "rejected")):
        now = invented(steady(0.5), always={"p1": (flag,)})
        elsewhere = replace(now, machine={**now.machine, "cpu": "B"})
        assert case(judged(then, now), comparing.NEW_ERRORS).outcome == "rejected"
        assert case(judged(then, elsewhere), comparing.NEW_ERRORS).outcome == expected


def test_no_new_error_in_few_prompts_is_no_claim() -> None:
    few = invented(steady(0.5), asked=60)
    found = case(judged(few, few), comparing.NEW_ERRORS)
    assert found.outcome == "inconclusive" and f"needs {stats.needed_n(0.05, 1, 0.99)}" in found.reason


def test_tolerances_of_the_file_are_those_that_judge() -> None:
    then, now = invented(steady(0.5)), invented(steady(0.65))
    assert judging.judge(baseline_of(then), now, "test").outcome == "rejected"
    loose = replace(baseline_of(then), tolerances=Tolerances(speed=0.5))
    assert judging.judge(loose, now, "test").outcome == "accepted"


def test_many_figures_share_the_error_that_fails_and_each_passes_by_its_own() -> None:
    alone, many = (comparing.levels(family) for family in (1, 10))
    assert alone == (many[0], many[0]) and many[1] == pytest.approx(1 - stats.ALPHA / 10)


# ---- a run's snapshot ----------------------------------------------------------------------------


def test_a_snapshot_has_each_rule_and_what_compares_it() -> None:
    plan = plan_of("merged", "compiled", require=["latency.p50@chat <= 0.9x", "latency.p95@chat <= 400 ms"])
    snapshot = snapshot_of(plan, whole(plan, {"merged": 0.6, "compiled": 0.3}), "compiled")
    raced = {name for name, rule in snapshot.rules.items() if rule.race == RACE}
    assert {"merge.gain", "require: latency.p50@chat <= 0.9x"} <= raced
    assert snapshot.rules["compile.gain"].race == RACE.replace("adapter", "merged")
    assert snapshot.rules["require: latency.p95@chat <= 400 ms"].race == "", "a tail has no pairs"
    assert sum(map(len, snapshot.races[RACE].launches)) == 40
    assert snapshot.scores["accuracy"].asked == 400 and not snapshot.scores["accuracy"].below


def test_what_only_some_answers_show_hangs_on_noise() -> None:
    plan = plan_of("merged")
    broken = {"flags": ["loop"]}
    answers = [*quality("adapter", p1=broken), *quality("adapter", launch=2), *quality("merged", p1=broken, p2=broken)]
    errors = snapshot_of(plan, [m for m in whole(plan, {"merged": 0.5}) if m.probe != "quality"] + answers).errors
    assert errors is not None
    assert errors.sometimes.keys() == {"p1", "p2"} and not errors.always


# ---- files and words -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{", ""),
        ('"format": 1', '"format": 2'),
        ('"speed": 0.1', '"speed": -1.0'),
        ('"asked": 400', '"asked": "many"'),
        ('"p7": 0.0', '"p7": 7.0'),
    ],
)
def test_a_damaged_file_is_refused(before: str, after: str) -> None:
    text = keeping.render(baseline_of(invented(steady(0.5), [7])))
    assert before in text
    with pytest.raises(BadInput):
        keeping.read(text.replace(before, after, 1), "b.json")


def test_a_launch_is_one_line_of_the_file() -> None:
    text = keeping.render(baseline_of(invented([[0.25, -0.5, 1.0], [0.125]])))
    assert "[0.25, -0.5, 1.0]," in text and "[0.125]" in text
    assert text.splitlines()[keeping.line_of(text, "merge.gain") - 1].strip() == '"merge.gain": {'


def test_junit_has_a_case_for_each_rule_and_fails_where_the_gate_does() -> None:
    gate = judged(invented(steady(0.5)), invented(steady(0.9), range(100)))
    root = ElementTree.fromstring(words.as_junit(gate))
    names = [case.get("name") for case in root.iter("testcase")]
    assert {"merge.gain", "merge.parity", "answers.accuracy", "gate"} <= set(names) and len(set(names)) == len(names)
    failed = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    assert failed == {"gate", "merge.gain", "answers.accuracy"}
    assert all(failure.text for failure in root.iter("failure")), "GitLab shows the content"


def hostile() -> Gate:
    bad = Case("require: a, b", "rejected", "100 % worse\n::error::forged, or not")
    return Gate("test", "rejected", "worse", (bad, Case("x", "inconclusive", "y"), Case("z", "accepted", "fine")))


def test_annotations_of_github_are_escaped_and_worst_first() -> None:
    lines = list(words.github(hostile(), "a,b:c.json", lambda name: 7))
    assert [line.partition(" ")[0] for line in lines] == ["::error", "::warning"]
    properties, _, message = lines[0].removeprefix("::error ").partition("::")
    assert "\n" not in lines[0] and "%0A" in message and "100 %25 worse" in message
    assert properties.split(",") == ["file=a%2Cb%3Ac.json", "line=7", "title=peftopt gate%3A require%3A a%2C b"]


def test_a_report_of_gitlab_has_what_it_must_and_a_fingerprint_for_each_case() -> None:
    found = json.loads(words.code_quality(hostile(), "b.json", lambda name: 3))
    assert [each["severity"] for each in found] == ["critical", "major"]
    assert len({each["fingerprint"] for each in found}) == 2
    assert all(each["location"] == {"path": "b.json", "lines": {"begin": 3}} for each in found)
    assert all(each["description"] and each["check_name"] for each in found)


def test_a_summary_shows_the_worst_first_and_no_markup_of_others() -> None:
    gate = Gate("test", "rejected", "worse", (Case("a", "accepted", "fine"), Case("b", "rejected", "| <b> | [x](y)")))
    text = words.summary(gate)
    assert text.index("| b |") < text.index("| a |") and "<b>" not in text and "](y)" not in text


# ---- the difference of two intervals -------------------------------------------------------------


@pytest.mark.parametrize(("many", "few", "spread"), [(10, 10, 1.0), (40, 6, 0.2), (6, 40, 5.0)])
def test_a_difference_holds_its_level_whatever_the_two_samples_are(many: int, few: int, spread: float) -> None:
    dice = np.random.default_rng(few)
    level, missed = 0.9, 0
    for _ in range(400):
        pair = dice.normal(0, spread, many), dice.normal(0, 1, few)
        found = stats.difference(*(stats.mean(x, level) for x in pair))
        missed += not found.low <= 0 <= found.high
    assert missed <= 400 * 0.1 + 3 * math.sqrt(400 * 0.1 * 0.9)


def test_a_difference_is_unknown_where_one_of_the_two_is_and_takes_one_level() -> None:
    known, unknown = Interval(1.0, 0.5, 2.0, 5), Interval(1.0, -math.inf, math.inf, 1)
    assert stats.difference(known, unknown).high == math.inf and stats.difference(unknown, known).low == -math.inf
    exact = Interval(0.5, 0.5, 0.5, 1)
    assert stats.difference(known, exact) == Interval(0.5, 0.0, 1.5, 1)
    with pytest.raises(ValueError, match="level"):
        stats.difference(known, replace(known, level=0.9))
