"""What users saw beside what was decided: imported into a finished run, shown in its reports, judged by nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.command_line import command
from helpers.finished_runs import FIRST_MS, WHOLE_MS, finished_run
from helpers.records import builds, lines_of, plan_of, speed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftopt import store
from peftopt.decision import decide as judging
from peftopt.decision import production
from peftopt.decision.evidence import Evidence
from peftopt.gateway.lines import Line
from peftopt.loadtest.moments import since_1970, utc
from peftopt.measurements import measured
from peftopt.records import Measurement
from peftopt.report import reports

ROOT = Path(__file__).parent.parent
REAL = ROOT / "results" / "example" / "serve" / "requests.jsonl"
PROMPT, ANSWER = 50, 64
"""The tokens of a run's prompts and answers."""
Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose the merged model: half of the adapter's time, and 40 requests of it alone."""
    where = tmp_path_factory.mktemp("finished")
    limits = ("ttft.p95@chat <= 60 ms", "latency.p50@chat <= 0.9x")
    folder = finished_run(where, where / "base", where / "lora", require=limits, built=False)
    (folder / "machine.json").write_text("{}")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / finished.name)


def traffic(
    n: int = 600,
    factor: float = 0.5,
    answer: int = ANSWER,
    prompt: int = PROMPT,
    every_s: float = 3.0,
    kinds: Iterable[str] = (),
) -> list[str]:
    """A log of `n` requests, one at a time, that take `factor` times what the run's adapter took; every sixth fails, as
    long as there are `kinds` of failures."""
    lines = []
    failures = list(kinds)
    for number in range(n):
        line = Line(f"r{number}", 0.0, 1.8e9 + every_s * number, adapter="support", version="aa11", arm="live")
        slower = factor * (1 + 0.01 * (number % 3))
        line.sent, line.first = 0.0, FIRST_MS * slower / 1e3
        line.last = line.done = WHOLE_MS * slower / 1e3
        line.prompt_tokens, line.new_tokens, line.status = prompt, answer, 200
        if number % 6 == 0 and failures:
            line.kind, line.status = failures.pop(), 500
            line.error = f"it was {line.kind}"
        lines.append(json.dumps(line.as_json()))
    return lines


def imported(run: Path, lines: list[str], *flags: object) -> None:
    log = run / "requests.jsonl"
    log.write_text("\n".join(lines) + "\n")
    assert command("import", log, *(flags or ("--variant", "merged")), "--out", run / "measurements.jsonl") == 0


def shown(run: Path) -> Table:
    """The rows of the section by their metric, as `peftopt report` writes them."""
    assert command("report", run) == 0
    section = (
        (run / "report.md").read_text().partition("<summary>In production</summary>")[2].partition("</details>")[0]
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    header = cells[0] if cells else []
    return {row[0]: dict(zip(header, row, strict=True)) for row in cells[2:]}


# ---- what is shown -------------------------------------------------------------------------------


def test_a_run_without_a_log_has_no_such_section(run: Path) -> None:
    assert not shown(run) and "In production" not in (run / "report.html").read_text()


def test_traffic_as_it_was_decided_on_is_within_and_nothing_is_judged_by_it(run: Path) -> None:
    assert command("decide", run) == command("decide", run)
    before = (run / "decision.json").read_bytes()
    imported(run, traffic())
    rows = shown(run)
    for metric in ("TTFT P50@chat", "latency P50@chat", "throughput@chat", "prompt tokens P50@chat", "failed"):
        assert rows[metric]["compared"] == "within", metric
    assert rows["own requests at once@chat"]["compared"] == "within"
    assert (run / "decision.json").read_bytes() == before
    command("decide", run)
    assert (run / "decision.json").read_bytes() == before
    assert "In production" in (run / "report.html").read_text()


@pytest.mark.parametrize(("factor", "word"), [(1.0, "slower"), (0.2, "faster")])
def test_other_times_are_told_plainly(run: Path, factor: float, word: str) -> None:
    imported(run, traffic(factor=factor))
    rows = shown(run)
    assert {rows[f"{name} P50@chat"]["compared"] for name in ("TTFT", "TPOT", "latency")} == {word}
    assert rows["throughput@chat"]["compared"] == word


def test_a_latency_of_other_answers_is_not_compared_and_says_which(run: Path) -> None:
    imported(run, traffic(factor=0.2, answer=20))
    rows = shown(run)
    for metric in ("latency P50@chat", "throughput@chat"):
        assert "other lengths" in rows[metric]["compared"]
        assert "20" in rows[metric]["reason"] and str(ANSWER) in rows[metric]["reason"]
    assert rows["TTFT P50@chat"]["compared"] == "faster", "the first token does not depend on the answer's length"
    assert rows["answer tokens P50@chat"]["compared"] == "shorter"


def test_no_time_of_other_prompts_is_compared(run: Path) -> None:
    imported(run, traffic(prompt=4 * PROMPT))
    rows = shown(run)
    assert all("other lengths" in rows[f"{name} P50@chat"]["compared"] for name in ("TTFT", "TPOT", "latency"))
    assert rows["prompt tokens P95@chat"]["compared"] == "longer"
    assert rows["over ttft.p95@chat &lt;= 60 ms"]["compared"] == "within", "a limit holds whatever is asked"


def test_a_few_requests_or_a_single_minute_tell_nothing(run: Path) -> None:
    imported(run, traffic(n=600, every_s=0.01))
    assert shown(run)["TTFT P50@chat"]["compared"] == "too few"


def test_requests_that_failed_are_told_by_their_kinds_and_the_refused_apart(run: Path) -> None:
    kinds = ["oom"] * 30 + ["timeout_first"] * 2 + ["refused"] * 50 + ["cancelled"] * 5
    imported(run, traffic(kinds=kinds))
    rows = shown(run)
    assert rows["failed"]["in production"].startswith("32 of 545") and rows["failed"]["compared"] == "more"
    assert rows["failed: oom"]["in production"].startswith("30 of") and rows["failed: oom"]["compared"] == "more"
    assert rows["failed: timeout_first"]["in production"].startswith("2 of")
    assert rows["refused"]["in production"].startswith("50 of 595") and "refuses nobody" in rows["refused"]["compared"]
    assert rows["over ttft.p95@chat &lt;= 60 ms"]["in production"].startswith("5.9 %"), "a failure is over any limit"


def test_a_limit_that_users_miss_more_often_than_they_may_is_over(run: Path) -> None:
    imported(run, traffic(factor=0.7))
    row = shown(run)["over ttft.p95@chat &lt;= 60 ms"]
    assert row["compared"] == "over" and row["decided"].startswith("5 %") and row["in production"].startswith("100 %")
    assert not any("0.9x" in metric for metric in shown(run)), "there is no baseline in production"


def test_users_beside_each_other_are_counted(run: Path) -> None:
    """It explains why a request takes longer than alone."""
    imported(run, traffic(factor=1.5, every_s=0.2))
    rows = shown(run)
    assert rows["own requests at once@chat"]["compared"] == "more at once"
    assert rows["TTFT P50@chat"]["compared"] == "slower" and "at once" in rows["TTFT P50@chat"]["reason"]


def test_a_log_that_is_imported_twice_counts_once(run: Path) -> None:
    imported(run, traffic())
    once = shown(run)
    imported(run, traffic())
    assert shown(run) == once and "600, from" in (run / "report.md").read_text()


def test_windows_of_a_log_are_one_production(run: Path) -> None:
    imported(run, traffic())
    whole = shown(run)
    file = run / "measurements.jsonl"
    kept = [line for line in file.read_text().splitlines() if '"peftopt serve"' not in line]
    file.write_text("\n".join(kept) + "\n")
    imported(run, traffic(), "--variant", "merged", "--window", 30)
    assert shown(run) == whole


def test_a_name_that_is_no_variant_of_the_run_is_said(run: Path) -> None:
    imported(run, traffic(), "--variant", "support")
    assert not shown(run)
    text = (run / "report.md").read_text()
    assert "In production" in text and "no such variant" in text and "merged" in text.partition("no such variant")[2]


def test_blocks_of_a_workload_are_not_production(run: Path) -> None:
    imported(run, traffic(), "--variant", "merged", "--workload", "chat")
    assert not shown(run)


def test_a_log_of_an_older_peftopt_is_shown_without_kinds(run: Path) -> None:
    imported(run, traffic(kinds=["oom"] * 30))
    file = run / "measurements.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for request in lines[-1]["values"]["requests"]:
        request.pop("kind", None)
    del lines[-1]["values"]["version"], lines[-1]["values"]["arm"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = shown(run)
    assert rows["failed"]["in production"].startswith("30 of 600")
    assert any("not told" in metric for metric in rows)


def test_a_real_log_is_read_with_its_versions_and_its_time(run: Path) -> None:
    measurements = run / "measurements.jsonl"
    arms = ("--variant", "live=adapter", "--variant", "canary=merged")
    assert command("import", REAL, *arms, "--out", measurements) == 0
    rows = shown(run)
    assert "other lengths" in rows["TTFT P50@chat"]["compared"] and rows["failed"]["compared"] == "within"
    text = (run / "report.md").read_text()
    assert "c0ece0a738a1 canary (59)" in text and "2026-11-28 17:36:42" in text and "17:42:16" in text
    (kept,) = [line for line in lines_of(measurements) if line.values.get("version") == "c0ece0a738a1"]
    assert kept.values["arm"] == "canary" and len(kept.values["requests"]) == 59


# ---- it decides nothing, and nothing breaks it ---------------------------------------------------

PLAN = plan_of("merged", "int8", require=("ttft.p95@chat <= 500 ms",))
MEASURED = [measured(line) for line in builds(PLAN) + speed(PLAN, {"merged": 0.6, "int8": 0.9}, blocks=16)]
DECIDED = judging.decide(Evidence(PLAN, MEASURED), {})
JUNIT = reports(DECIDED, Evidence(PLAN, MEASURED))["junit.xml"]
times = st.floats() | st.floats(0, 1e4)
requests = st.fixed_dictionaries(
    {
        "id": st.text(max_size=2),
        "scheduled": times,
        "done": times,
        "new_tokens": st.integers(0, 9),
        "warmup": st.just(False),
    },
    optional={
        "request_duration_ms": times,
        "ttft_ms": st.none() | times,
        "tpot_ms": st.none() | times,
        "prompt_tokens": st.none() | st.integers(0, 9),
        "error": st.sampled_from(["", "it broke"]),
        "kind": st.none() | st.sampled_from(["refused", "oom"]),
    },
)
loads = st.builds(
    lambda variant, started, sent: Measurement(
        "load",
        variant,
        values={
            "source": "peftopt serve",
            "started": started,
            "requests": [{"request_duration_ms": None, **r} for r in sent],
        },
    ),
    st.sampled_from(["adapter", "merged", "nobody"]),
    st.sampled_from(["", "soon", utc(1.8e9), utc(1.8e9 + 90)]),
    st.lists(requests, max_size=12),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(loads, max_size=4))
def test_production_changes_no_verdict_and_breaks_no_report(found: list[Measurement]) -> None:
    evidence = Evidence(PLAN, [*MEASURED, *map(measured, found)])
    assert judging.decide(evidence, {}) == DECIDED
    assert reports(DECIDED, evidence)["junit.xml"] == JUNIT
    for served in production.served(DECIDED, evidence):
        assert served.requests == sum(served.versions.values()) > 0
        assert all(row.word for row in served.rows) and bool(served.rows) == (served.variant != "nobody")


def test_a_moment_is_read_as_it_was_written() -> None:
    assert since_1970(utc(1.8e9 + 0.125)) == 1.8e9 + 0.125
    with pytest.raises(ValueError):
        since_1970("")


def test_a_file_of_measurements_keeps_what_the_section_needs(run: Path) -> None:
    imported(run, traffic(n=3, kinds=["oom"]))
    (load,) = [m.values for m in store.read(run / "measurements.jsonl") if m.probe == "load"]
    assert [request.kind for request in load.requests] == ["oom", None, None] and load.version == "aa11"  # type: ignore[union-attr]
