"""Files of other tools that are older, odd or damaged: values as the file has them, or a refusal."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command
from helpers.records import lines_of
from helpers.tool_results import DATA, LM_EVAL, SAMPLES, VLLM, aiperf, guidellm, write

from peftopt.errors import BadInput
from peftopt.loadtest import importers

NAME = "samples_law_2026-11-26T10-11-12.345678.jsonl"
UNPLACED = {k: v for k, v in VLLM.items() if k not in ("start_times", "queue_times", "latencies")}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- vLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("latencies", [{}, {"latencies": [0.23] * 100}])
def test_vllm_without_start_times_keeps_its_own_rates(tmp_path: Path, latencies: dict[str, Any]) -> None:
    n = 100
    run = {**UNPLACED, "num_prompts": n, "completed": n, "failed": 0, "duration": 50.0, "input_lens": [10] * n}
    run |= {"output_lens": [10] * n, "ttfts": [0.05] * n, "itls": [[0.02] * 9] * n, "errors": [""] * n, **latencies}
    (found,) = importers.read(write(tmp_path / "r.json", run))
    figures = importers.as_loaded(found).figures
    assert figures.output_tokens_per_s == pytest.approx(20, rel=0.02)
    assert {round(r.ttft_ms) for r in found.requests if r.ttft_ms} == {50}
    assert {round(r.request_duration_ms) for r in found.requests} == {230}
    assert any("when each request was sent" in what for what in found.lacks)


@pytest.mark.parametrize("errors", [{"errors": None}, {"errors": [None] * 3}, {}])
def test_vllm_without_reasons_counts_failures_all_the_same(tmp_path: Path, errors: dict[str, Any]) -> None:
    run = {**{k: v for k, v in VLLM.items() if k != "errors"}, **errors, "itls": [[0.02, 0.03], [0.04, 0.04], None]}
    (found,) = importers.read(write(tmp_path / "r.json", run))
    assert [bool(r.error) for r in found.requests] == [False, False, True]


# ---- when --------------------------------------------------------------------------------------


def test_when_a_load_was_run_is_the_files_word_not_the_imports(tmp_path: Path) -> None:
    (found,) = importers.read(write(tmp_path / "r.json", VLLM))
    assert found.started == "2026-11-24T10:14:57.500+00:00", "its date is that of its end"
    bare = {k: v for k, v in VLLM.items() if k not in ("ttfts", "itls", "errors")}
    assert importers.read(write(tmp_path / "r.json", bare))[0].started == found.started
    for date in ({}, {"date": "yesterday"}, {"date": None}):
        odd = {**{k: v for k, v in VLLM.items() if k != "date"}, **date}
        (odd_found,) = importers.read(write(tmp_path / "r.json", odd))
        assert odd_found.started == "" and "started" not in odd_found.measurement("v", "now").values

    runs = importers.read(DATA / "guidellm-0.8.1.json")
    assert all(r.started.startswith("2026-11-2") and r.started.endswith("+00:00") for r in runs)
    assert datetime.fromisoformat(runs[0].started).timestamp() == pytest.approx(1795730952.577, abs=0.01)
    assert importers.read(write(tmp_path / "g.json", guidellm()))[0].started == "", "seconds since something else"
    (records,) = importers.read(write(tmp_path / "a.jsonl", aiperf()))
    assert records.started == "2025-10-07T05:00:07.532+00:00"
    assert records.measurement("v", "now", "peak").values["started"] == records.started
    summary = {"schema_version": "1.0", "aiperf_version": "0.13.0", "request_latency": {"unit": "ms", "avg": 3.5}}
    for told, kept in (
        ("2025-10-07T05:00:07+02:00", "2025-10-07T03:00:07.000+00:00"),
        ("2025-10-07T05:00:07", "2025-10-07T05:00:07.000+00:00"),
        ("?", ""),
    ):
        (whole,) = importers.read(write(tmp_path / "s.json", {**summary, "start_time": told}))
        assert whole.started == kept


# ---- failures ----------------------------------------------------------------------------------


def test_a_load_without_an_answer_is_kept_and_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {**VLLM, "completed": 0, "failed": 3, "output_lens": [0] * 3, "ttfts": [0.0] * 3, "itls": [[], [], []]}
    failed |= {"errors": ["e1", "e2", "e3"], "mean_ttft_ms": math.nan}
    out = tmp_path / "m.jsonl"
    assert command("import", write(tmp_path / "r.json", failed), "--out", out) == 4
    assert "every request failed" in capsys.readouterr().err
    assert all(r["error"] for r in lines_of(out)[0].values["requests"])
    bare = {k: v for k, v in failed.items() if k not in ("ttfts", "itls", "errors")}
    assert command("import", write(tmp_path / "r.json", bare)) == 4
    assert command("import", write(tmp_path / "r.json", VLLM)) == 0


def test_guidellms_odd_requests(tmp_path: Path) -> None:
    """One that was cancelled before it was sent, and one whose first token came before it (a clock of its own)."""
    report = guidellm()
    requests = report["benchmarks"][0]["requests"]
    never = json.loads(json.dumps(requests["successful"][0]))
    never["info"]["timings"] = {"targeted_start": 1000.0, "request_start": None, "resolve_start": None}
    requests["incomplete"] = [never]
    requests["successful"][0]["info"]["timings"]["first_token_iteration"] = 0.5
    (found,) = importers.read(write(tmp_path / "b.json", report))
    assert len(found.requests) == 2 and any("1 requests that were cancelled" in what for what in found.lacks)
    assert found.requests[0].ttft_ms is None


def test_aiperfs_failed_request_without_metrics(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in aiperf().splitlines()]
    rows[1]["metrics"] = None
    (found,) = importers.read(write(tmp_path / "a.jsonl", lines(rows)))
    assert [bool(r.error) for r in found.requests] == [False, True]


# ---- the harness -------------------------------------------------------------------------------


def test_samples_without_a_number_are_set_aside_and_counted(tmp_path: Path) -> None:
    values: list[Any] = [1.0, math.nan, None, math.inf, 0.0, 1]
    rows = [{**SAMPLES[0], "doc_id": n, "acc": v, "metrics": ["acc", "f1"], "f1": 0.5} for n, v in enumerate(values)]
    judged, other = importers.read(write(tmp_path / NAME, lines(rows)))
    assert judged.values["metric"] == "acc" and judged.values["set_aside"] == 3 and judged.values["n"] == 3
    assert {s["id"] for s in judged.values["samples"]} == {"law/0", "law/4", "law/5"}, "not of another metric"
    assert any("3 of 6" in what for what in judged.lacks)
    assert other.values["metric"] == "f1" and other.values["n"] == 6
    with pytest.raises(BadInput, match="number for each row"):
        importers.read(write(tmp_path / NAME, lines([{**SAMPLES[0], "acc": math.nan}])))


def test_decide_goes_on_with_what_was_set_aside(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "theirs" / "measurements.jsonl"
    out.parent.mkdir()
    for name in ("adapter", "merged"):
        rows = [{**SAMPLES[0], "doc_id": n, "acc": math.nan if n == 3 and name == "merged" else 1.0} for n in range(99)]
        assert command("import", write(tmp_path / NAME, lines(rows)), "--variant", name, "--out", out) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\nworkloads: {{chat: {{prompts: none.jsonl}}}}\n"
        "quality: {prompts: none.jsonl, tasks: [law]}\nvariants: {adapter: [], merged: [merge]}\n"
        "require: [task.law >= 0.98x]\nminimize: latency.p50@chat\n"
    )
    assert command("decide", out.parent, "--recipe", recipe) in (1, 3)
    assert "Traceback" not in capsys.readouterr().err


def test_samples_of_the_harness_before_0_4_6(tmp_path: Path) -> None:
    """They name neither filter nor metrics; a row that went through two filters is there twice."""
    old = [
        {"doc_id": n, "doc": {}, "target": "x", "arguments": [], "resps": [[]], "filtered_resps": []} for n in range(4)
    ]
    rows = [{**row, "acc": n % 2, "acc_norm": 1.0} for n, row in enumerate(old)] + [{**row, "acc": 0} for row in old]
    first, *others = importers.read(write(tmp_path / NAME, lines(rows)))
    assert (first.values["metric"], first.values["value"], first.values["n"]) == ("acc", 0.5, 4)
    assert {(o.values["metric"], o.values["filter"], o.values["value"]) for o in others} == {
        ("acc_norm", "none", 1.0),
        ("acc", "filter 2", 0.0),
    }


def test_scores_that_are_none_and_text_of_any_encoding(tmp_path: Path) -> None:
    scores = {"t": {"alias": "t", "perplexity,none": math.nan, "perplexity_stderr,none": "N/A", " ": " "}}
    (found,) = importers.read(write(tmp_path / "r.json", {**LM_EVAL, "results": scores}))
    assert found.values["value"] is None and any("perplexity" in what for what in found.lacks)
    odd = [{**row, "doc": {"q": "a\u2028b\u0085"}} for row in SAMPLES]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / NAME
        path.write_bytes(lines(odd).encode(encoding))
        assert importers.read(path)[0].values["n"] == 4
    (tmp_path / NAME).write_bytes(b"\xff\xff\xff")
    with pytest.raises(BadInput, match="not text") as refused:
        importers.read(tmp_path / NAME)
    assert "UTF-8" in refused.value.hint
