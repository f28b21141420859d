"""How long will a run take? The formula, what is said of it, and what `new`, `check` and `run` tell their user."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, prompts
from helpers.tiny_models import make_base, make_prompt
from hypothesis import given
from hypothesis import strategies as st

from peftopt import store
from peftopt.decision import duration
from peftopt.decision.duration import Answering, Duration, Pace, Racing, Span, Work
from peftopt.recipe import plan as planning
from peftopt.runner import duration as planned_time
from peftopt.runner import forecast
from peftopt.runner.judged import read_recipe
from peftopt.runner.run import hashed

SECONDS = st.floats(0, 1e4)
SPANS = st.tuples(SECONDS, SECONDS).map(lambda pair: Span(*sorted(pair)))
COUNTS = st.tuples(st.integers(1, 60), st.integers(1, 60)).map(lambda pair: Span(*sorted(pair)))
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: Span(*sorted(pair)))
PACES = st.builds(Pace, SPANS, SPANS)
ANSWERS = st.builds(Answering, st.integers(0, 500), st.floats(1, 1e4), COUNTS, SHARES, PACES, SPANS)
RACES = st.builds(Racing, COUNTS, st.integers(1, 9), st.integers(1, 9), st.lists(SPANS, max_size=4), SPANS)
WORK = st.builds(
    Work,
    st.lists(SPANS, max_size=4),
    st.lists(SPANS, max_size=4),
    st.lists(ANSWERS, max_size=4),
    st.dictionaries(st.sampled_from(["chat", "bulk"]), RACES, max_size=2),
    st.integers(1, 8),
)


def whole(work: Work) -> Span:
    return Duration(duration.parts(work)).whole


def no_less(more: Work, work: Work) -> bool:
    after, before = whole(more), whole(work)
    return after.least >= before.least * (1 - 1e-9) and after.most >= before.most * (1 - 1e-9)


# ---- the formula -------------------------------------------------------------------------------


@given(WORK)
def test_the_least_is_never_above_the_most(work: Work) -> None:
    assert all(0 <= span.least <= span.most * (1 + 1e-9) for span in duration.parts(work).values())
    assert whole(work).least <= whole(work).most


@given(WORK, ANSWERS, st.integers(0, 300), st.floats(0, 1e3))
def test_more_prompts_tokens_and_variants_never_take_less(work: Work, one: Answering, rows: int, tokens: float) -> None:
    with_one = replace(work, answers=[*work.answers, one])
    assert no_less(with_one, work), "a variant more"
    asked_more = replace(work, answers=[*work.answers, replace(one, rows=one.rows + rows)])
    assert no_less(asked_more, with_one), "prompts"
    longer = replace(one, new_tokens=Span(one.new_tokens.least + tokens, one.new_tokens.most + tokens))
    assert no_less(replace(work, answers=[*work.answers, longer]), with_one), "tokens of an answer"
    wordy = replace(one, prompt_tokens=one.prompt_tokens + tokens)
    assert no_less(replace(work, answers=[*work.answers, wordy]), with_one), "tokens of a prompt"


@given(RACES, SPANS, st.integers(0, 30))
def test_more_arms_blocks_requests_and_launches_never_take_less(race: Racing, arm: Span, more: int) -> None:
    work = Work(races={"chat": race})

    def changed(**values: Any) -> Work:
        return Work(races={"chat": replace(race, **values)})

    assert no_less(changed(arms=[*race.arms, arm]), work)
    assert no_less(changed(blocks=Span(race.blocks.least + more, race.blocks.most + more)), work)
    assert no_less(changed(requests=race.requests + more), work)
    assert no_less(work, changed(relaunch=race.relaunch + more)), "fewer launches"


@given(WORK, SPANS)
def test_another_build_never_takes_less_and_another_lane_never_more(work: Work, build: Span) -> None:
    assert no_less(replace(work, builds=[*work.builds, build]), work)
    assert no_less(work, replace(work, lanes=work.lanes + 1))


def test_what_is_there_already_takes_no_time() -> None:
    assert duration.parts(Work()) == {}
    done = Answering(0, 100.0, Span(10, 20), Span(0, 1), Pace(Span(1, 2), Span(1, 2)))
    assert duration.parts(Work(answers=[done])) == {}


def test_a_race_is_counted_by_hand() -> None:
    race = Racing(Span(10, 16), 2, 3, [Span(1.0, 1.0), Span(0.5, 0.5)], Span(4.0, 4.0))
    assert duration.parts(Work(races={"chat": race})) == {"the race of chat": Span(10 * 3 + 4 * 4, 16 * 3 + 6 * 4)}


# ---- what is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "says"),
    [
        (Span(20, 45), "20 to 45 s"),
        (Span(360, 900), "6 to 15 minutes"),
        (Span(10, 200), "up to 3 minutes"),
        (Span(118, 124), "2 minutes"),
        (Span(5400, 14400), "1.5 to 4.0 hours"),
    ],
)
def test_times_are_told_in_the_unit_that_people_wait_in(span: Span, says: str) -> None:
    assert duration.words(span) == says


def test_the_part_that_takes_longest_is_named() -> None:
    told = duration.sentence(Duration({"builds": Span(60, 120), "answers": Span(300, 900)}))
    assert told.startswith("a run takes about 6 to 17 minutes, most of it answers (builds ")
    even = duration.sentence(Duration({"builds": Span(300, 300), "answers": Span(300, 300)}))
    assert "most of it" not in even


def test_what_is_not_known_is_said() -> None:
    told = duration.sentence(Duration(unknown="the baseline is a server that runs elsewhere"))
    assert "not known" in told and "server" in told and "minutes" not in told
    assert "not counted: tasks" in duration.sentence(Duration({"builds": Span(1, 2)}, ["tasks"]))


def test_a_long_run_is_told_what_makes_its_largest_part_shorter() -> None:
    answers, chat = Span(1000, 3000), Span(100, 200)
    assert not duration.shorter(Duration({duration.ANSWERS: chat, "the race of chat": chat}))
    long = duration.shorter(Duration({duration.ANSWERS: answers, "the race of chat": chat}))
    assert "answers" in long and "quality.rows" in long and "chat" not in long
    both = duration.shorter(Duration({duration.ANSWERS: answers, "the race of chat": answers}))
    assert "chat" in both and "new_tokens" in both
    assert not duration.shorter(Duration(unknown="a server that runs elsewhere"))


@given(WORK)
def test_what_is_left_is_what_is_not_done(work: Work) -> None:
    takes = Duration(duration.parts(work))
    left = duration.left(takes, duration.PREPARED)
    assert bool(left) == any(name.startswith("the race") for name in takes.parts)
    assert not any(name in left for name in duration.PREPARED)


# ---- what a user meets -------------------------------------------------------------------------

RECIPE = """model: {{base: {base}, adapter: {adapter}}}
workloads:
  chat: {{prompts: {prompts}, new_tokens: 4, batch: 1}}
quality: {{prompts: {prompts}, new_tokens: 8, batch: 4}}
measure: {{requests: 1, warmup: 1, max_blocks: 10, threads: 1}}
variants:
  adapter: []
  merged: [merge]
minimize: latency.p50@chat
"""


@pytest.fixture
def recipe(deep: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    questions = prompts(tmp_path / "eval.jsonl", 12, "eval")
    path.write_text(RECIPE.format(base=deep[0], adapter=deep[1], prompts=questions))
    return path


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long layers are timed is not what is tested here."""
    monkeypatch.setattr(forecast, "SECONDS", 0.0)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every time that a worker is asked for the times of layers."""
    times: list[object] = []
    measure = forecast._asked

    def counted(*arguments: Any) -> Any:
        times.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(forecast, "_asked", counted)
    return times


def test_new_check_and_run_say_how_long_it_takes_and_measure_once(
    deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times, results = asked(monkeypatch), ("--results", tmp_path / "results")
    questions, mine = prompts(tmp_path / "eval.jsonl", 12, "eval"), tmp_path / "mine.yaml"
    own = ("--base", deep[0], "--adapter", deep[1], "--prompts", questions)
    assert command("new", mine, *own, *results) == 0
    assert "a run takes about" in capsys.readouterr().out and len(times) == 1
    assert command("check", mine, *results) == 0
    assert "a run takes about" in capsys.readouterr().out and len(times) == 1, "kept"
    small = tmp_path / "small.yaml"
    small.write_text(RECIPE.format(base=deep[0], adapter=deep[1], prompts=questions))
    assert command("check", small, *results) == 0
    assert len(times) == 2, "other variants"
    capsys.readouterr()
    command("run", small, *results)
    said = " ".join(capsys.readouterr().err.split())
    assert len(times) == 2 and "a run takes about" in said and "left: the race of chat" in said
    assert said.index("a run takes about") < said.index("build") < said.index("left: the race of chat")


@pytest.mark.parametrize("change", ["base", "prompts", "variants", "threads", "machine", "age"])
def test_a_forecast_that_is_stale_is_not_taken(
    change: str, recipe: Path, deep: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, results = asked(monkeypatch), ("--results", tmp_path / "results")
    assert command("check", recipe, *results) == command("check", recipe, *results) == 0
    assert len(times) == 1
    (kept,) = (tmp_path / "results" / forecast.FOLDER).iterdir()
    text = recipe.read_text()
    if change == "base":
        other = tmp_path / "base"
        make_base(other, "bfloat16", layers=7)
        taken = text.replace(str(deep[0]), str(other)).replace("[merge]", "[{merge: {allow_base_mismatch: true}}]")
        recipe.write_text(taken)
    elif change == "prompts":
        prompts(tmp_path / "eval.jsonl", 13, "eval")
    elif change == "variants":
        recipe.write_text(text.replace("merged: [merge]", "merged: [{merge: {certify: blocks}}]"))
    elif change == "threads":
        recipe.write_text(text.replace("threads: 1", "threads: 2"))
    elif change == "machine":
        monkeypatch.setattr("peftopt.machine.describe", lambda: {"cpu": "another"})
    else:
        os.utime(kept, (0, 0))
    assert command("check", recipe, *results) == 0
    assert len(times) == 2


def test_a_kept_forecast_that_is_damaged_is_made_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, results = asked(monkeypatch), ("--results", tmp_path / "results")
    assert command("check", recipe, *results) == 0
    (kept,) = (tmp_path / "results" / forecast.FOLDER).iterdir()
    for damaged in (kept.read_text()[:40], "{}"):
        kept.write_text(damaged)
        assert command("check", recipe, *results) == 0
    assert len(times) == 3


def test_programs_get_it_in_seconds(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def takes(*options: object) -> Any:
        assert command("check", recipe, "--results", tmp_path / "results", "--json", *options) == 0
        return json.loads(capsys.readouterr().out)["takes"]

    told = takes()
    assert 0 < told["least_s"] <= told["most_s"] and not told["unknown"]
    assert {"builds", "answers", "the race of chat"} == told["parts"].keys()
    assert sum(part["most_s"] for part in told["parts"].values()) <= told["most_s"]
    assert takes("--no-forecast") is None


def tried(recipe: Path, change: Any) -> Duration:
    """What is expected where the times of layers are others than they were measured."""
    home = store.Store(recipe.parent / "results")
    parsed, _ = read_recipe(recipe)
    sources = hashed(parsed)
    outlook = forecast.outlook(parsed, sources, home.root)
    assert outlook.few is not None
    plan = planning.plan(parsed, sources, {})
    return planned_time.expected(plan, replace(outlook, few=change(outlook.few)), home)


def test_a_variant_that_could_not_be_tried_counts_as_the_one_that_is_most_like_it(recipe: Path) -> None:
    whole = tried(recipe, lambda few: few)
    without = tried(recipe, lambda few: replace(few, tried=tuple(t for t in few.tried if t.variant != "merged")))
    assert whole.parts.keys() == without.parts.keys() and without.whole.least > 0
    nothing = tried(recipe, lambda few: replace(few, tried=()))
    assert nothing.unknown and not nothing.parts


@pytest.mark.parametrize("method", ["p-mlp", "prefix"])
def test_of_a_prompt_method_it_is_known_too(
    method: str, deep: tuple[Path, Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its virtual tokens are not cut to a few layers: the base alone is timed, and no variant has a forecast."""
    adapter = make_prompt(deep[0], tmp_path / "prompt", method)
    text = recipe.read_text().replace(str(deep[1]), str(adapter))
    recipe.write_text(text.replace("merged: [merge]", "baked: [bake]"))
    assert command("check", recipe, "--results", tmp_path / "results") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "a run takes about" in said and "no forecast of adapter, baked" in said


def test_of_a_server_elsewhere_it_is_not_known(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = "[{engine: {endpoint: {url: 'http://127.0.0.1:9', model: m}}}]"
    recipe.write_text(recipe.read_text().replace("adapter: []", f"adapter: {server}"))
    assert command("check", recipe, "--results", tmp_path / "results") == 0
    assert "not known before it starts" in " ".join(capsys.readouterr().out.split())
