"""A version on trial, the pure core: what rejects, what accepts, and how often either is wrong."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.corpus import Row
from peftopt.gateway import bets
from peftopt.gateway.bets import Tally
from peftopt.gateway.labelled import LIVE, NEW, RUNS, Labelled, doubtful
from peftopt.gateway.registry import plain
from peftopt.gateway.said import Said, Vocabulary, answer, flags, harshest, kindest, read
from peftopt.gateway.trial import Judged, Terms, Trial
from peftopt.measurements import Answer, structured
from peftopt.records import Outcome

VOCABULARY = Vocabulary(special=frozenset({7}), end=frozenset({2}))


# ---- shares ------------------------------------------------------------------------------------


def tally(seed: int, new: float, live: float, n: int = 400) -> Tally:
    """Pairs in which each goes wrong with a chance of its own."""
    dice, found = random.Random(seed), Tally()
    for _ in range(n):
        found.add(dice.random() < new, dice.random() < live)
    return found


@given(st.integers(0, 10**6))
def test_a_share_at_its_limit_is_seldom_decided(seed: int) -> None:
    """One wrong verdict in 200 on a side is what it promises; of so few draws hardly any may be one."""
    if bets.judge(tally(seed, 0.05, 0.03), 0.02, 1e-6) != "inconclusive":
        raise AssertionError("one in a million")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400), st.sampled_from((0.0, 0.02, 0.1)))
def test_an_interval_says_what_the_verdict_says(worse: int, better: int, alike: int, limit: float) -> None:
    """Accepted, where all of it lies below the limit; rejected, where all of it lies above."""
    seen = Tally(worse, better, worse + better + alike)
    value, outcome = bets.interval(seen, 0.005), bets.judge(seen, limit, 0.005)
    assert -1 <= value.low <= value.high <= 1
    assert (outcome == "accepted") == (value.high <= limit) and (outcome == "rejected") == (value.low >= limit)
    if seen.n:
        assert value.low <= value.estimate <= value.high


# ---- times -------------------------------------------------------------------------------------


def tried(ratio: float, failing: float = 0.0, windows: int = 60, seed: int = 0) -> Judged:
    """A canary `ratio` times as slow as the live version, on an engine whose windows share a noise."""
    dice, trial = random.Random(seed), Trial.begin("support@new", Terms(window_s=1.0))
    judged = trial.judge()
    for window in range(windows):
        shared = dice.gauss(0, 0.15)
        for n in range(40):
            arm = "canary" if n % 4 == 0 else "live"
            ms = 100 * math.exp(shared + dice.gauss(0, 0.25)) * (ratio if arm == "canary" else 1)
            failed = arm == "canary" and dice.random() < failing
            trial.windows.hear(window + n / 50, arm, f"user-{dice.randrange(1000)}", ms, failed)
        trial.windows.close(window + 1.0)
        judged = trial.judge()
        assert trial.judge(brief=True).outcome == judged.outcome
        if judged.outcome != "inconclusive":
            break
    return judged


def test_a_canary_as_good_is_accepted_a_slower_or_failing_one_rejected_by_name() -> None:
    assert tried(1.0).outcome == "accepted"
    slow = tried(1.5)
    assert (slow.outcome, slow.rule) == ("rejected", "canary.latency")
    failing = tried(1.0, failing=0.1)
    assert (failing.outcome, failing.rule) == ("rejected", "canary.failures")


def test_a_canary_at_the_limit_is_not_decided() -> None:
    outcomes = Counter(tried(1.10, seed=seed, windows=30).outcome for seed in range(20))
    assert outcomes["inconclusive"] >= 18
    assert Counter(tried(1.0, failing=0.02, seed=seed).outcome for seed in range(10))["inconclusive"] >= 9


def test_a_long_trial_is_judged_after_every_window_as_it_is_at_once() -> None:
    """Thousands of windows, none of which decides: what was bet on before is not bet on again."""
    dice, limit, trial = random.Random(3), math.log(1.10), Trial.begin("support@new", Terms(window_s=1.0))
    for _ in range(3_000):
        trial.windows.ratios.append(dice.gauss(limit, 0.2))
        assert trial.judge(brief=True).outcome == "inconclusive"
    again = structured(Trial, plain(trial), "trial")
    assert again.judge() == trial.judge() and trial.judge().verdicts[-1].value.n == 3_000


def test_windows_in_which_an_arm_was_hardly_asked_say_nothing() -> None:
    trial = Trial.begin("support@new", Terms(window_s=1.0, least=5))
    for window in range(50):
        trial.windows.hear(window + 0.1, "live", "a", 100.0, False)
        trial.windows.hear(window + 0.2, "canary", "b", 900.0, False)
    trial.windows.close(60.0)
    assert trial.judge().outcome == "inconclusive" and not trial.windows.ratios
    trial.passed_s = 60.0
    assert not trial.over
    trial.passed_s = 1800.0
    assert trial.over


def test_where_halves_of_the_live_version_differ_nothing_is_accepted() -> None:
    trial = Trial.begin("support@new", Terms(window_s=1.0, least=3))
    dice = random.Random(1)
    for window in range(120):
        for n in range(60):
            user = f"user-{dice.randrange(1000)}"
            half = hashlib.blake2b(user.encode(), digest_size=1).digest()[0] % 2
            ms = 100.0 * (1.5 if half else 1.0) + dice.random()
            trial.windows.hear(window + n / 80, "live", user, ms, False)
            trial.windows.hear(window + n / 80, "canary", user, 100.0 + dice.random(), False)
    assert trial.windows.differs(math.log(1.10), 0.01) and trial.judge().outcome == "inconclusive"


def test_a_user_whose_name_is_not_text_is_heard_too() -> None:
    trial = Trial.begin("support@new", Terms(window_s=1.0))
    trial.windows.hear(0.1, "live", "\ud800", 100.0, False)
    assert trial.judge().outcome == "inconclusive"


# ---- answers to users' prompts -----------------------------------------------------------------

GOOD, BAD = Said(100.0, "all is well", (1, 3, 4), ids=True, stopped=True), Said(100.0, "", (), ids=True, stopped=True)


def shadowed(seed: int, new: float, live: float = 0.03, changes: float = 0.0, n: int = 600) -> Judged:
    """A shadow that answers nothing in a share of prompts, beside a live version with a share of its own, looked at
    after every prompt; `changes`: a share of its greedy answers are others, and of a second run of the live one's 5 %.
    """
    dice, trial = random.Random(seed), Trial.begin("s@new", Terms(shadow=0.05, changed=0.1, window_s=1.0), users=False)

    def said(fails: float, other: float) -> Said:
        text = GOOD.text if dice.random() >= other else "otherwise"
        ms = 100.0 * math.exp(dice.gauss(0, 0.3))
        return replace(BAD if dice.random() < fails else replace(GOOD, text=text), ms=ms)

    judged = trial.judge()
    for at in range(n):
        ours, first, second = said(new, 0.05 + changes), said(live, 0.05), said(live, 0.05)
        trial.shadow.add(ours, first, second, True, trial.terms, VOCABULARY)
        trial.windows.failed.add(False, False)
        trial.windows.pair(at / 10, ours.ms, first.ms, second.ms)
        judged = trial.judge() if at % 20 == 19 else judged
        if judged.outcome == "rejected":
            break
    return judged


def test_a_shadow_like_the_live_version_is_rejected_in_one_trial_of_a_hundred_at_most() -> None:
    """Though both answer nothing now and then, and other words from run to run."""
    outcomes = Counter(shadowed(seed, 0.03).outcome for seed in range(100))
    assert outcomes["rejected"] <= 1


def test_a_shadow_with_critical_errors_is_rejected_by_that_rule() -> None:
    found = [shadowed(seed, 0.03 + 0.10) for seed in range(20)]
    assert sum((each.outcome, each.rule) == ("rejected", "canary.critical_errors") for each in found) >= 19
    verdict = next(v for v in found[0].verdicts if v.rule == "canary.critical_errors")
    assert verdict.value and 0.02 < verdict.value.low < verdict.value.high and "empty" in verdict.reason


def test_other_answers_reject_only_where_the_operator_says_how_many_may_change() -> None:
    assert shadowed(1, 0.0, 0.0, changes=0.5).rule == "canary.changed"
    trial = Trial.begin("s@new", Terms(shadow=0.05), users=False)
    for _ in range(600):
        trial.shadow.add(replace(GOOD, text="otherwise"), GOOD, GOOD, True, trial.terms, VOCABULARY)
    judged = trial.judge()
    assert judged.outcome == "inconclusive" and "canary.changed" not in {v.rule for v in judged.verdicts}
    assert next(v for v in judged.verdicts if v.rule == "canary.critical_errors").outcome == "accepted"


def test_an_answer_of_another_version_rejects_at_once() -> None:
    trial = Trial.begin("s@new", Terms())
    trial.wrong = "s@new: answered as s@old would"
    judged = trial.judge()
    assert (judged.outcome, judged.rule) == ("rejected", "canary.wrong_adapter") and "s@old" in judged.said


def test_a_trial_is_the_same_after_it_was_written_and_read() -> None:
    trial = Trial.begin("s@new", Terms(shadow=0.05, changed=0.1, schema={"type": "object"}), users=False, prompts=3)
    for at in range(50):
        trial.shadow.add(BAD, GOOD, GOOD, True, trial.terms, VOCABULARY)
        trial.windows.pair(at * 30.0, 100.0, 90.0, 91.0)
    read_again = structured(Trial, json.loads(json.dumps(plain(trial))), "trial")
    assert read_again.judge().verdicts == trial.judge().verdicts
    assert len(read_again.windows.ratios) == 49, "the window that is half open is dropped"


# ---- what an answer says -----------------------------------------------------------------------


def reply(text: str | None, finish: str = "stop", **more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish, **more}]}).encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (reply("fine", token_ids=[5, 6, 2]), set()),
        (reply(""), {"empty"}),
        (reply("fine", token_ids=[5, 7, 2]), {"special token"}),
        (reply("again " * 100, "length"), {"loop", "degenerate"}),
        (b"{not json", {"no answer"}),
        (b'{"choices": 5}', {"no answer"}),
    ],
)
def test_critical_errors_of_an_answer_are_those_of_the_offline_half(body: bytes, expected: set[str]) -> None:
    assert flags(read(200, body, 10.0, VOCABULARY.end), None, VOCABULARY) == expected


def test_a_schema_is_kept_and_a_call_of_a_tool_is_no_empty_answer() -> None:
    said = read(200, reply("[1]"), 10.0)
    assert flags(said, {"type": "object"}, VOCABULARY) == {"invalid output"}
    calls = json.dumps({"choices": [{"message": {"content": None, "tool_calls": [{"id": "x"}]}}]}).encode()
    assert not flags(read(200, calls, 10.0), {"type": "object"}, VOCABULARY)
    assert flags(read(500, b"", 10.0), None, VOCABULARY) == {"no answer"}


# ---- labelled prompts --------------------------------------------------------------------------


def row(number: int) -> Row:
    return Row(f"p{number}", ({"role": "user", "content": f"prompt {number}"},), "right", critical=number < 20)


def answered(total: int, wrong: set[int], empty: frozenset[int] = frozenset(), asked: int | None = None) -> Labelled:
    """Prompts that the live version answers right twice, and the new one but for some."""
    found = Labelled(total)
    for number in range(total if asked is None else asked):
        for run in RUNS:
            text = "wrong" if run[0] == NEW and number in wrong else "right"
            text = "" if run[0] == NEW and number in empty else text
            found.add(run, answer(row(number), Said(1.0, text, stopped=True), None, VOCABULARY))
    return found


def outcomes(labelled: Labelled, **terms: float) -> dict[str, Outcome]:
    trial = Trial.begin("s@new", Terms(**terms), users=False, prompts=labelled.total)  # type: ignore[arg-type]
    return {verdict.rule.removeprefix("canary."): verdict.outcome for verdict in trial.judge(labelled).verdicts}


def test_a_version_that_answers_as_well_is_accepted_by_its_prompts_alone() -> None:
    judged = Trial.begin("s@new", Terms(), users=False, prompts=400).judge(answered(400, set()))
    assert judged.outcome == "accepted"
    assert {v.rule for v in judged.verdicts} == {
        "canary.wrong_adapter",
        "canary.critical_prompts",
        "canary.accuracy",
    }


def test_lost_answers_reject_by_accuracy_and_critical_prompts_by_theirs() -> None:
    assert outcomes(answered(400, set(range(100, 140))))["accuracy"] == "rejected"
    assert outcomes(answered(400, {3}))["critical_prompts"] == "rejected", "a critical prompt is wrong now"
    assert outcomes(answered(400, set(), frozenset({399})))["critical_prompts"] == "rejected"
    assert outcomes(answered(400, {300}))["critical_prompts"] == "accepted"
    assert outcomes(answered(400, set(range(100, 140))), lost=0.2)["accuracy"] == "accepted"


def test_few_prompts_claim_nothing_and_what_is_clear_is_said_before_the_last() -> None:
    assert set(outcomes(answered(20, set())).values()) == {"accepted", "inconclusive"}
    half = outcomes(answered(400, set(), asked=200))
    assert half["accuracy"] == half["critical_prompts"] == "inconclusive", "not before all are asked"
    assert outcomes(answered(400, set(range(400)), asked=40))["accuracy"] == "rejected"
    assert outcomes(Labelled(400))["accuracy"] == "inconclusive"


def test_a_version_like_the_live_one_is_seldom_rejected_by_prompts_that_flip_by_chance() -> None:
    """One prompt in fifty is answered wrong or not at all in half of its runs, whoever is asked; a critical error is
    asked again, as the gateway does it."""
    rejected = 0
    for seed in range(60):
        dice, found = random.Random(seed), Labelled(300)

        def said(number: int, dice: random.Random = dice) -> Answer:
            text = "" if number % 50 == 0 and dice.random() < 0.5 else "right"
            return answer(row(number), Said(1.0, text, stopped=True), None, VOCABULARY)

        for number in range(300):
            first, second, new = (said(number) for _ in RUNS)
            if doubtful(new, (first, second)):
                new = kindest([new, said(number), said(number)])
                second = harshest([second, said(number), said(number)])
            for run, each in zip(RUNS, (first, second, new), strict=True):
                found.add(run, each)
        rejected += "rejected" in outcomes(found).values()
    assert rejected <= 6, "of six such prompts each is wrongly told with a chance of 0.5^7"


def test_only_what_the_live_version_does_not_do_is_asked_again() -> None:
    good, empty = (answer(row(1), Said(1.0, text, stopped=True), None, VOCABULARY) for text in ("right", ""))
    assert doubtful(empty, (good, good)) and not doubtful(good, (good, good)) and not doubtful(empty, (good, empty))
    assert LIVE != NEW and kindest([empty, good]).correct and not harshest([good, empty]).correct
