"""Where a run's time goes: the trace that `run --profile` writes, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import RECIPE, command, prompts
from hypothesis import given
from hypothesis import strategies as st

from peftopt import jobs
from peftopt.runner import trace
from peftopt.runner.trace import Busy, Span

TIMES = st.floats(0, 1000, allow_nan=False)
SPANS = st.lists(
    st.builds(
        lambda lane, what, a, b: Span(lane, what, min(a, b), max(a, b)),
        st.sampled_from(["one", "two"]),
        st.sampled_from(["open", "speed", "something new"]),
        TIMES,
        TIMES,
    )
)


@given(SPANS)
def test_wall_clock_is_never_more_than_the_work_or_than_the_time_it_lies_in(spans: list[Span]) -> None:
    for line in trace.spent(spans):
        assert line.wall_s <= line.total_s + 1e-6
        assert line.wall_s <= max(each.end for each in spans) - min(each.start for each in spans) + 1e-6


def test_work_side_by_side_counts_once_on_the_wall_clock_and_twice_in_the_sum() -> None:
    (line,) = trace.spent([Span("a", "quality", 0, 10), Span("b", "quality", 5, 15)])
    assert (line.what, line.wall_s, line.total_s) == ("answer", 15, 20)


def test_kinds_are_ordered_by_the_wall_clock_they_take() -> None:
    spans = [Span("a", "open", 0, 1), Span("a", "speed", 1, 9), Span("a", "no word for it", 9, 11)]
    assert [line.what for line in trace.spent(spans)] == ["time requests", "other", "load models"]


def test_idle_is_what_nobody_used_of_all_processors() -> None:
    assert trace.idle([Busy(1, 0.5), Busy(2, 1.5)], 2) == pytest.approx(0.5)
    assert trace.idle([], 2) == 0


def test_every_word_of_the_table_is_a_job_or_a_step_of_the_parents() -> None:
    names = {job.name() for job in vars(jobs).values() if isinstance(job, type) and issubclass(job, jobs.Job)}
    assert trace.WORDS.keys() <= names | {"judge", "rest"}


@given(SPANS)
def test_each_lane_is_a_named_thread_and_every_span_is_on_its_own(spans: list[Span]) -> None:
    events = trace.events(spans, [Busy(1.0, 2.0)])["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == sorted({each.lane for each in spans})
    done = [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert sorted(done) == sorted(
        (each.lane, each.what, round(each.start * 1e6), round((each.end - each.start) * 1e6)) for each in spans
    )


def test_a_span_that_fails_is_recorded_and_one_that_nobody_records_is_not() -> None:
    with trace.recording() as recorder, pytest.raises(ValueError, match="broken"), trace.span("a", "open"):
        raise ValueError("broken")
    with trace.span("a", "open"):
        pass
    assert [each.what for each in recorder.spans] == ["open"]


def test_a_profiled_run_says_what_took_long_and_leaves_a_trace_of_every_worker(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    recipe.write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=questions))
    command("run", recipe, "--results", tmp_path / "results", "--profile", "--no-forecast")
    said = capsys.readouterr().err
    (file,) = tmp_path.glob("results/runs/*/trace.json")
    events = json.loads(file.read_text())["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["ph"] == "M"}
    logs = {log.stem for log in file.parent.glob("logs/*.log")}
    assert lanes - {trace.PARENT} <= logs
    assert {"quality-1-merged", "speed-chat-merged"} <= lanes
    kinds = {e["cat"] for e in events if e["ph"] == "X"}
    assert {"start and import", "load models", "build", "answer", "time requests", "judge"} <= kinds
    assert str(file) in said.replace("\n", "")
    assert all(kind in said for kind in ("answer", "time requests", "idle processors"))
