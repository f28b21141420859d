"""Numbers of other tools that cannot be: an answer with one is set aside and counted, a failure stays a failure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command
from helpers.records import lines_of
from helpers.tool_results import SAMPLES, VLLM, aiperf, guidellm, write

from peftopt import store
from peftopt.errors import BadInput
from peftopt.loadtest import importers

NAN, INF = math.nan, math.inf


def of_guidellm(row: int, **timings: Any) -> dict[str, Any]:
    report = guidellm()
    requests = report["benchmarks"][0]["requests"]
    (requests["successful"] + requests["errored"])[row]["info"]["timings"].update(timings)
    return report


@pytest.mark.parametrize(
    "odd",
    [
        {"itls": [[NAN, 0.03], [0.04, 0.04], []]},
        {"itls": [[-0.5, 0.03], [0.04, 0.04], []]},
        {"latencies": [INF, 0.28, 0.0]},
        {"start_times": [NAN, 100.5, 101.0]},
        {"output_lens": [None, 3, 0]},
        {"output_lens": [NAN, 3, 0]},
        {"output_lens": [-1, 3, 0]},
    ],
)
def test_an_answer_whose_numbers_cannot_be_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: dict[str, Any]
) -> None:
    out = tmp_path / "m.jsonl"
    assert command("import", write(tmp_path / "r.json", {**VLLM, **odd}), "--out", out) == 0
    assert "1 of 3 requests" in " ".join(capsys.readouterr().err.split())
    kept = lines_of(out)[0].values["requests"]
    assert [r["id"] for r in kept] == ["1", "2"] and kept[0]["request_duration_ms"] == pytest.approx(280)


@pytest.mark.parametrize(
    ("field", "value"),
    [("start_times", NAN), ("ttfts", NAN), ("output_lens", None), ("latencies", NAN), ("itls", [NAN])],
)
def test_a_failure_stays_one_whatever_its_numbers(tmp_path: Path, field: str, value: Any) -> None:
    (found,) = importers.read(write(tmp_path / "r.json", {**VLLM, field: [*VLLM[field][:2], value]}))
    assert [bool(r.error) for r in found.requests] == [False, False, True]
    assert importers.as_loaded(found).figures.failed == 1
    assert not any("set aside" in what for what in found.lacks)


def test_other_meters_numbers_too(tmp_path: Path) -> None:
    for report in (of_guidellm(0, request_end=NAN), of_guidellm(0, request_end=1.0), of_guidellm(0, request_start=NAN)):
        (found,) = importers.read(write(tmp_path / "g.json", report))
        assert [r.error for r in found.requests] == ["HTTP 500"] and any("1 of 2" in what for what in found.lacks)
        assert math.isfinite(found.requests[0].request_duration_ms)
    rows = [json.loads(line) for line in aiperf().splitlines()]
    rows[0]["metrics"]["time_to_first_token"]["value"] = NAN
    (found,) = importers.read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [bool(r.error) for r in found.requests] == [True]


def test_a_run_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="times and lengths"):
        importers.read(
            write(tmp_path / "r.json", {**VLLM, "errors": [""] * 3, "completed": 3, "start_times": [NAN] * 3})
        )


@pytest.mark.parametrize("duration", [0, NAN, INF, -1])
def test_a_run_that_tells_neither_starts_nor_duration_has_no_rates(tmp_path: Path, duration: float) -> None:
    unplaced = {k: v for k, v in VLLM.items() if k not in ("start_times", "latencies")}
    with pytest.raises(BadInput, match="duration"):
        importers.read(write(tmp_path / "r.json", {**unplaced, "duration": duration}))


@pytest.mark.parametrize(
    "lose", [lambda run: {**run, "model_id": "a \ud83d"}, lambda run: {**run, "errors": ["", "", "half \udc00"]}]
)
def test_half_characters_of_a_file_are_printed_as_their_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lose: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    file, out = write(tmp_path / "r.json", lose(VLLM)), tmp_path / "m.jsonl"
    for flags in ([], ["--json"], ["--out", out]):
        assert command("import", file, *flags) == 0
    assert "vllm bench serve" in capsys.readouterr().out and len(store.read(out)) == 1


def test_a_file_of_one_line_is_still_json_lines(tmp_path: Path) -> None:
    (found,) = importers.read(write(tmp_path / "a.jsonl", aiperf().splitlines()[0]))
    assert len(found.requests) == 1
    (samples,) = importers.read(write(tmp_path / "s.jsonl", json.dumps(SAMPLES[1])), "law")
    assert samples.values["n"] == 1


@pytest.fixture
def five_hours_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "EST+5")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_loads_of_two_meters_are_in_the_order_of_time(five_hours_behind: None, tmp_path: Path) -> None:
    """vLLM writes the time of the wall (here 10:15 at UTC-5), AIPerf nanoseconds of UTC."""
    (wall,) = importers.read(write(tmp_path / "r.json", VLLM))
    before = 1795533297500 * 1_000_000 - 60 * 10**9
    (earlier,) = importers.read(
        write(tmp_path / "a.jsonl", aiperf(request_start_ns=before, request_end_ns=before + 10**9).splitlines()[0])
    )
    assert wall.started == "2026-11-24T15:14:57.500+00:00"
    assert earlier.started < wall.started
    unset = aiperf(request_start_ns=0, request_end_ns=10**9).splitlines()[0]
    assert importers.read(write(tmp_path / "z.jsonl", unset))[0].started == "", "a clock that does not count from 1970"
