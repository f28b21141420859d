"""The log of `peftopt serve` in windows: each line counts once, however the log is cut, moved and continued."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.gateway import lines as gateway_lines
from peftopt.gateway.lines import Line
from peftopt.gateway.sampling import Sample as Sampled
from peftopt.loadtest import arrivals, importers
from peftopt.loadtest.arrivals import SERVE_CHECK
from peftopt.records import Json
from peftopt.watch.promise import Lengths, Promise
from peftopt.watch.sources.log import Log
from peftopt.watch.spans import Check, Span

EXAMPLE = Path(__file__).parent.parent / "results" / "example" / "serve" / "requests.jsonl"
PROMISE = Promise("run", "merged", beside=2, prompt_tokens=Lengths(100, 150, 0.1, 0.1))
BEGAN = 1.8e9
"""Seconds since 1970, a multiple of a minute."""

WINDOW = 60.0


def line(ended_s: float, adapter: str = "support", took_s: float = 0.5, **changes: Json) -> bytes:
    """A line of a request that ended so many seconds after BEGAN, as the gateway writes it."""
    request = Line("r", 0.0, BEGAN + ended_s - took_s, adapter=adapter, version="v1", arm="live", status=200)
    request.sent, request.first, request.last, request.done = 0.1, 0.2, took_s, took_s
    request.new_tokens, request.prompt_tokens, request.waited = 11, 120, 0.1
    return json.dumps({**request.as_json(), **changes}).encode() + b"\n"


def check(at_s: float, verdict: str = "own", adapter: str = "support", arm: str = "live") -> bytes:
    values = {"kind": SERVE_CHECK, "timestamp": 1e3 * (BEGAN + at_s), "adapter": adapter, "version": "v1", "arm": arm}
    return json.dumps({**values, "verdict": verdict, "distance": 0.5}).encode() + b"\n"


def log_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def whole(path: Path, window_s: float = WINDOW, promise: Promise = PROMISE) -> tuple[list[Span], Log]:
    log = Log([path], promise, window_s)
    return [*log.read(), *log.flush()], log


def only(path: Path) -> Span:
    (span,), _ = whole(path)
    return span


# ---- what a window says ------------------------------------------------------------------------


def test_a_real_log_has_every_request_in_the_window_in_which_it_ended() -> None:
    rows = [json.loads(text) for text in EXAMPLE.read_text().splitlines()]
    spans, log = whole(EXAMPLE, 30.0)
    ended = Counter((row["timestamp"] + row["request_duration_ms"]) // 30e3 * 30.0 for row in rows)
    assert {span.began: span.adapters["triage"].answered for span in spans} == ended
    assert sum(span.adapters["triage"].tokens for span in spans) == sum(row["new_tokens"] for row in rows)
    seconds = [value for span in spans for value in span.adapters["triage"].times["ttft"].values]  # type: ignore[attr-defined]
    assert seconds == pytest.approx([row["ttft_ms"] / 1e3 for row in rows])
    assert log.lines == len(rows) and not log.left_out and not log.notices
    assert spans[-1].engine.memory_reserved == rows[-1]["gpu_memory_reserved"], "the last sample"
    assert spans[-1].engine.fragmentation is None, "the engine did not tell what tensors have"
    assert spans[-1].engine.batch_fill == 0.25


def test_what_users_saw_is_in_seconds_and_by_adapter(tmp_path: Path) -> None:
    other = line(3, adapter="sales", took_s=2.0, batch_fill=0.5)
    span = only(log_of(tmp_path / "log", line(1, batch_fill=0.25) + line(2) + other))
    assert (span.began, span.seconds, set(span.adapters)) == (BEGAN, WINDOW, {"support", "sales"})
    support, sales = span.adapters["support"], span.adapters["sales"]
    assert (support.answered, support.tokens, sales.asked) == (2, 22, 1)
    assert sales.times["latency"].quantile(0.5) == pytest.approx(2.0)
    assert sales.times["ttft"].quantile(0.5) == pytest.approx(0.2)
    assert sales.times["tpot"].quantile(0.5) == pytest.approx(0.18)
    assert sales.engine_s == pytest.approx(1.9) and sales.batch_fill == 0.5
    assert (support.prompt_tokens.quantile(0.5), support.new_tokens.quantile(0.5)) == (120, 11)
    assert span.engine.batch_fill == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, True),
        ({"running_at_start": 1}, True),
        ({"running_at_start": 2}, False),
        ({"prompt_tokens": 100}, True),
        ({"prompt_tokens": 99}, False),
        ({"prompt_tokens": 151}, False),
        ({"prompt_tokens": None}, False),
    ],
)
def test_only_a_request_like_the_runs_is_compared_with_them(
    changes: Mapping[str, Json], alike: bool, tmp_path: Path
) -> None:
    traffic = only(log_of(tmp_path / "log", line(1, **changes))).adapters["support"]
    assert traffic.alike["latency"].n == traffic.alike["ttft"].n == traffic.alike["tpot"].n == alike
    assert traffic.times["latency"].n == 1


def test_none_is_comparable_with_a_run_that_does_not_know_its_prompts(tmp_path: Path) -> None:
    (span,), _ = whole(log_of(tmp_path / "log", line(1)), promise=Promise("run", "merged", beside=9))
    assert span.adapters["support"].alike["latency"].n == 0


def test_failures_count_by_kind_and_not_those_of_clients(tmp_path: Path) -> None:
    kinds = ["oom", "timeout_gap", "oom", "cancelled", "request", "refused", ""]
    lines = [line(n, error_kind=kind, error=kind) for n, kind in enumerate(kinds)]
    traffic = only(log_of(tmp_path / "log", b"".join(lines))).adapters["support"]
    assert traffic.errors == {"oom": 2, "timeout_gap": 1}
    assert (traffic.refused, traffic.answered, traffic.asked) == (1, 1, 5)


def test_who_asks_for_nothing_that_is_served_is_no_adapters_traffic(tmp_path: Path) -> None:
    span = only(log_of(tmp_path / "log", line(1, adapter="", error_kind="refused") + line(2, error_kind="cancelled")))
    assert span.adapters == {}


def test_checks_are_their_adapters(tmp_path: Path) -> None:
    span = only(log_of(tmp_path / "log", check(1) + line(2) + check(3, "stale") + check(4, "wrong", "sales")))
    assert [each.verdict for each in span.adapters["support"].checks] == ["own", "stale"]
    assert span.adapters["sales"].checks == (Check("v1", "wrong", 0.5),) and not span.adapters["sales"].asked


def test_the_engine_is_as_its_last_sample_was_and_loads_count_since_it_started(tmp_path: Path) -> None:
    def sampled(ended_s: float, allocated: int, start_s: float, switch_s: float | None = None) -> bytes:
        request = Line("r", 0.0, BEGAN + ended_s, adapter="support", sent=0.0, done=0.0)
        sources = {"allocated": "engine", "reserved": "engine"}
        request.sampled = Sampled(0.0, 0.5, allocated, 1000, 0.9, sources)
        request.model_loading_time, request.adapter_switch_time = start_s, switch_s
        return json.dumps(request.as_json()).encode() + b"\n"

    elsewhere = line(3, adapter_switch_time=9.0, model_loading_time=30.0, gpu_memory_reserved=None)
    content = sampled(1, 500, 7.0, 0.2) + sampled(2, 750, 7.0, 0.3) + elsewhere
    span = only(log_of(tmp_path / "log", content))
    engine = span.engine
    assert (engine.memory_allocated, engine.memory_reserved, engine.fragmentation) == (750, 1000, 0.25)
    assert (engine.kv_usage, engine.gpu_utilization, engine.switches) == (0.5, 0.9, 2), "not those of another engine"
    (first, second), _ = whole(log_of(tmp_path / "again", content + sampled(70, 100, 8.0, 0.1)))
    assert (first.engine.switches, second.engine.switches) == (2, 1), "another start"


# ---- windows -----------------------------------------------------------------------------------


def test_a_window_is_given_once_a_later_line_or_the_clock_ends_it(tmp_path: Path) -> None:
    path = log_of(tmp_path / "log", line(10) + line(20))
    log = Log([path], PROMISE, WINDOW)
    assert list(log.read()) == [] and list(log.read(now=BEGAN + 59)) == []
    (span,) = log.read(now=BEGAN + 62)
    assert span.adapters["support"].answered == 2
    with path.open("ab") as file:
        file.write(line(59) + line(65) + line(130))
    (span,) = log.read()
    assert (span.began, span.adapters["support"].answered) == (BEGAN + 60, 2), "the late one is in the open window"
    assert [span.began for span in log.flush()] == [BEGAN + 120]


def test_a_late_line_counts_into_the_window_that_is_open(tmp_path: Path) -> None:
    spans, log = whole(log_of(tmp_path / "log", line(10) + line(70) + line(50) + line(80)))
    assert [span.adapters["support"].answered for span in spans] == [1, 3] and not log.notices


@pytest.mark.parametrize(("first", "then"), [(10, -7200), (10, 7200)])
def test_a_clock_that_jumps_gives_a_new_window_and_a_notice_and_no_empty_windows(
    first: float, then: float, tmp_path: Path
) -> None:
    spans, log = whole(log_of(tmp_path / "log", line(first) + line(then) + line(then + 1)))
    assert [span.began for span in spans] == [BEGAN, BEGAN + then]
    assert [span.adapters["support"].answered for span in spans] == [1, 2] and len(log.notices) == 1


def test_a_quiet_night_makes_no_empty_windows(tmp_path: Path) -> None:
    spans, log = whole(log_of(tmp_path / "log", line(10) + line(1800)))
    assert [span.began for span in spans] == [BEGAN, BEGAN + 1800] and not log.notices


# ---- what cannot be read -----------------------------------------------------------------------


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    odd: list[bytes] = [
        line(2)[:50] + b"\n",
        b'{"kind": "other", "timestamp": 1}\n',
        b"[1, 2]\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"x" * 3_000_000 + b"\n",
        line(3, format=0),
        line(4, timestamp=-5),
        line(5, new_tokens="many"),
        line(6, request_duration_ms=1e300),
        b"\n",
    ]
    path = log_of(tmp_path / "requests.jsonl", line(1) + b"".join(odd) + line(7))
    (span,), log = whole(path)
    assert span.adapters["support"].answered == 2 == log.lines
    assert sorted(log.left_out.values()) == [1, 2, 3, 4]
    assert f"{path}:2" in log.first_left_out.values(), "the torn one"
    assert log.first_left_out.keys() == log.left_out.keys()


def test_an_older_line_without_what_is_not_needed_is_read(tmp_path: Path) -> None:
    values = json.loads(line(1))
    for name in ("running_at_start", "waiting_at_start", "batch_fill", "kv_usage", "sources", "sample_age_ms"):
        del values[name]
    assert only(log_of(tmp_path / "log", json.dumps(values).encode())).adapters["support"].answered == 1


@pytest.mark.parametrize("content", [b'{"a": 1}\n' * 3, b"\x00\x01" * 999 + b"\n", b"GET / 200\n"])
def test_a_file_without_a_line_of_ours_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironment) as refused:
        list(Log([log_of(tmp_path / "log", content)], PROMISE).read())
    assert "serve" in refused.value.hint


def test_a_log_that_is_not_there_is_refused_and_an_empty_one_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironment):
        list(Log([tmp_path / "none"], PROMISE).read())
    with pytest.raises(MissingEnvironment):
        list(Log([tmp_path], PROMISE).read())
    spans, log = whole(log_of(tmp_path / "log", b""))
    assert (spans, log.lines) == ([], 0)


@pytest.mark.parametrize("position", [{"mark": 3}, {"mark": {"inode": "x"}}, {"offset": 1}])
def test_a_position_that_is_none_is_refused(position: dict[str, Json], tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        Log([log_of(tmp_path / "log", line(1))], PROMISE, position=position)


# ---- going on ----------------------------------------------------------------------------------

END = st.floats(0, 600, allow_nan=False)
LINES = st.lists(
    st.one_of(
        st.builds(line, END, st.sampled_from(["support", "sales"]), st.floats(0, 30)),
        st.builds(line, END, error_kind=st.sampled_from(["oom", "refused", "cancelled"])),
        st.builds(line, END, sample_age_ms=st.just(3.0), adapter_switch_time=st.sampled_from([0.2, None])),
        st.builds(line, st.sampled_from([-20_000.0, 20_000.0])),
        st.builds(check, END, st.sampled_from(["own", "stale"])),
        st.sampled_from([b"{torn\n", b'{"kind": "other"}\n', b"\n"]),
    ),
    min_size=1,
    max_size=30,
).map(lambda lines: [each[:-1] + b" " * number + b"\n" for number, each in enumerate(lines)])
"""No two are the same: a file is known by its first line."""


def renamed_as_the_gateway_does(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.{1 + max(gateway_lines.set_aside(path), default=0)}"))


def renamed_as_logrotate_does(path: Path) -> None:
    for number, other in sorted(gateway_lines.set_aside(path).items(), reverse=True):
        other.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))
    path.touch()


def copied_and_cut(path: Path) -> None:
    for number, other in sorted(gateway_lines.set_aside(path).items(), reverse=True):
        other.rename(path.with_name(f"{path.name}.{number + 1}"))
    shutil.copy2(path, path.with_name(f"{path.name}.1"))
    path.write_bytes(b"")


ROTATIONS: Sequence[Callable[[Path], None]] = (
    renamed_as_the_gateway_does,
    renamed_as_logrotate_does,
    copied_and_cut,
)


def appended(path: Path, content: bytes, moment: int) -> None:
    """More of the log, written at a moment of its own: a fast test would write all of it at the same one."""
    with path.open("ab") as file:
        file.write(content)
    os.utime(path, (BEGAN + moment, BEGAN + moment))


@settings(max_examples=80)
@given(LINES, st.data())
def test_who_goes_on_gives_the_same_windows_as_who_reads_all_at_once(lines: list[bytes], data: st.DataObject) -> None:
    """The log is cut at any byte, read by a process that ends or by one that stays, and moved at any line."""
    content = b"".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    rotate = data.draw(st.sampled_from(ROTATIONS))
    moments = count(1)
    with TemporaryDirectory() as folder:
        expected, at_once = whole_or_nothing(log_of(Path(folder) / "whole", content))
        path = Path(folder) / "requests.jsonl"
        path.touch()
        log, spans, left_out = Log([path], PROMISE, WINDOW), [], Counter[str]()
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            appended(path, content[begin:end], next(moments))
            spans += read(log)
            if data.draw(st.booleans()):
                left_out += log.left_out
                log = Log([path], PROMISE, WINDOW, json.loads(json.dumps(log.position)))
            if content[:end].endswith(b"\n") and path.stat().st_size and data.draw(st.booleans()):
                rotate(path)
                appended(path, b"", next(moments))
        spans += [*read(log), *log.flush()]
    assert spans == expected
    assert left_out + log.left_out == at_once.left_out


def read(log: Log) -> list[Span]:
    """What can be read now; nothing where no line of ours has come yet."""
    try:
        return list(log.read())
    except MissingEnvironment:
        return []


def whole_or_nothing(path: Path) -> tuple[list[Span], Log]:
    log = Log([path], PROMISE, WINDOW)
    return [*read(log), *log.flush()], log


def test_a_log_that_the_gateway_sets_aside_meanwhile_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    written = gateway_lines.Log(str(path), rotate_bytes=3000)
    position: dict[str, Json] = {}
    answered = 0
    for number in range(40):
        request = Line("r", 0.0, BEGAN + 10 * number, adapter="support", done=0.1, new_tokens=1)
        written.write(request)
        os.utime(path, (BEGAN + number, BEGAN + number))
        if number % 7 == 0:
            log = Log([path], PROMISE, WINDOW, position)
            answered += sum(span.adapters["support"].answered for span in log.read())
            position = log.position
    log = Log([path], PROMISE, WINDOW, position)
    answered += sum(span.adapters["support"].answered for span in [*log.read(), *log.flush()])
    written.close()
    assert len(gateway_lines.set_aside(path)) > 5 and answered == 40


def test_who_stops_in_the_midst_of_windows_loses_none(tmp_path: Path) -> None:
    path = log_of(tmp_path / "log", b"".join(line(60 * n) for n in range(5)))
    log = Log([path], PROMISE, WINDOW)
    first = next(log.read())
    rest = [*log.read(), *log.flush()]
    assert [span.began - BEGAN for span in (first, *rest)] == [0, 60, 120, 180, 240]
    assert all(span.adapters["support"].answered == 1 for span in (first, *rest))


def test_a_file_that_is_gone_is_said_and_what_came_after_is_read(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    appended(path, line(1) + line(70), 1)
    log = Log([path], PROMISE, WINDOW)
    assert len(list(log.read())) == 1
    path.unlink()
    appended(path, line(130), 2)
    log = Log([path], PROMISE, WINDOW, log.position)
    (span,) = [*log.read(), *log.flush()]
    assert span.began == BEGAN + 120 and len(log.notices) == 1


def test_a_writer_that_stays_in_a_renamed_file_is_followed(tmp_path: Path) -> None:
    """As until SIGHUP tells it to go on in the new one."""
    path = tmp_path / "requests.jsonl"
    appended(path, line(1), 1)
    log = Log([path], PROMISE, WINDOW)
    assert list(log.read()) == []
    renamed_as_logrotate_does(path)
    assert list(log.read()) == []
    appended(tmp_path / "requests.jsonl.1", line(2), 2)
    assert list(log.read()) == []
    appended(path, line(61), 3)
    (span,) = log.read()
    assert span.adapters["support"].answered == 2


def test_several_files_are_one_log(tmp_path: Path) -> None:
    paths = [log_of(tmp_path / name, content) for name, content in (("b", line(1)), ("a", line(2) + line(70)))]
    log = Log(paths, PROMISE, WINDOW)
    (span,) = log.read()
    assert span.adapters["support"].answered == 2
    log = Log(paths, PROMISE, WINDOW, log.position)
    assert [span.adapters["support"].answered for span in [*log.read(), *log.flush()]] == [1]


# ---- who reads the log beside ------------------------------------------------------------------


def test_a_check_of_a_version_that_answers_nobody_yet_is_left_out(tmp_path: Path) -> None:
    span = only(log_of(tmp_path / "log", check(1, "wrong", arm="") + line(2) + check(3)))
    assert [each.verdict for each in span.adapters["support"].checks] == ["own"]


def test_checks_are_no_requests_for_import_and_replay(tmp_path: Path) -> None:
    path = log_of(tmp_path / "log", check(0) + line(1) + check(2) + line(3))
    (run,) = importers.read(path)
    assert len(run.requests) == 2
    traced = arrivals.trace(path.read_text().splitlines())
    assert [each.prompt_tokens for each in traced] == [120, 120] and math.isclose(traced[1].at, 2)
