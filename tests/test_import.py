"""Results of other tools become our records; what they lack is said, and what is broken is refused."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
from helpers.command_line import command
from helpers.harness_tasks import CHOICE
from helpers.records import lines_of
from helpers.tool_results import DATA, LM_EVAL, SAMPLES, VLLM, aiperf, guidellm, write

from peftopt import store
from peftopt.errors import BadInput
from peftopt.gateway.lines import Line
from peftopt.loadtest import importers


def test_vllm_bench_serve_with_its_raw_samples(tmp_path: Path) -> None:
    (found,) = importers.read(write(tmp_path / "r.json", VLLM))
    first, _, failed = found.requests
    assert (first.scheduled, first.ttft_ms, first.tpot_ms) == pytest.approx((0, 100, 25))
    assert first.gaps_ms == pytest.approx((20, 30)) and first.request_duration_ms == pytest.approx(150)
    assert failed.error == "ConnectionError: reset" and failed.ttft_ms is None
    assert importers.as_loaded(found).figures.failed == 1
    assert importers.as_loaded(found).figures.ttft_mean_ms == pytest.approx(VLLM["mean_ttft_ms"])
    assert any("scheduled" in what for what in found.lacks)
    assert found.reported["mean_ttft_ms"] == 150.0


def test_vllm_bench_serve_without_them_and_appended(tmp_path: Path) -> None:
    bare = {k: v for k, v in VLLM.items() if k not in ("ttfts", "itls", "errors", "input_lens", "output_lens")}
    found = importers.read(write(tmp_path / "r.json", "\n".join([json.dumps(bare), json.dumps(VLLM)])))
    assert len(found) == 2 and not found[0].requests and found[1].requests
    assert any("--save-detailed" in what for what in found[0].lacks)


def test_guidellm_counts_from_the_targeted_time(tmp_path: Path) -> None:
    (found,) = importers.read(write(tmp_path / "benchmarks.json", guidellm()))
    good, bad = found.requests
    assert (good.ttft_ms, good.queue_time_ms, good.tpot_ms) == pytest.approx((700, 500, 100))
    assert bad.error == "HTTP 500" and bad.scheduled == 1.0
    assert found.title == "poisson 2.0/s, 2 requests" and found.source == "GuideLLM 0.8.0"
    assert any("2 of 5 were kept" in what for what in found.lacks) and any("ITL" in what for what in found.lacks)
    with pytest.raises(BadInput, match="report format 3, not 1 or 2"):
        importers.read(write(tmp_path / "newer.json", guidellm(version=3)))


def test_guidellm_s_second_report_format_as_0_8_1_wrote_it() -> None:
    """Trimmed from real files: at a constant rate, by two users, and at a Poisson rate by workers that began early."""
    constant, users, early = importers.read(DATA / "guidellm-0.8.1.json")
    assert constant.source == "GuideLLM 0.8.1" and constant.title == "constant 5.0/s, 3 requests"
    assert [r.scheduled for r in constant.requests] == pytest.approx([0, 0.2, 0.4], abs=1e-5)
    first = constant.requests[0]
    assert (first.prompt_tokens, first.new_tokens, first.error) == (7, 5, "")
    assert first.queue_time_ms == pytest.approx(9.2, abs=0.1) and first.ttft_ms == pytest.approx(61, abs=1)
    assert first.tpot_ms == pytest.approx(20.5, abs=0.2), "4 gaps of 20 ms"
    assert not any("scheduled" in what for what in constant.lacks) and any("3 of 12" in what for what in constant.lacks)
    assert users.title == "concurrent, 2 requests" and users.requests[1].ttft_ms == pytest.approx(65.5, abs=1)
    assert any("scheduled" in what for what in early.lacks), "its due times are on another clock"
    assert [r.queue_time_ms for r in early.requests] == [0, 0, 0] and early.requests[0].ttft_ms < 100
    assert "503" in early.requests[2].error


def test_aiperf_records_and_summary(tmp_path: Path) -> None:
    (found,) = importers.read(write(tmp_path / "profile_export.jsonl", aiperf()))
    good, bad = found.requests
    assert (good.ttft_ms, good.tpot_ms, good.new_tokens) == pytest.approx((255, 5, 4))
    assert good.gaps_ms == (5.0, 6.0, 4.0) and "499 RequestCancellationError" in bad.error
    assert any("scheduled" in what for what in found.lacks)
    issued = 1759813207532900363 - 100_000_000
    (found,) = importers.read(write(tmp_path / "issued.jsonl", aiperf(credit_issued_ns=issued)))
    assert found.requests[0].ttft_ms == pytest.approx(355, abs=0.01) and found.lacks == ()
    summary = {"schema_version": "1.0", "aiperf_version": "0.13.0", "request_latency": {"unit": "ms", "avg": 3.5}}
    (found,) = importers.read(write(tmp_path / "summary.json", summary))
    assert found.reported == {"request_latency_avg": 3.5} and "raw samples" in found.lacks[0]
    with pytest.raises(BadInput, match=r"schema 2\.0"):
        importers.read(write(tmp_path / "newer.json", {**summary, "schema_version": "2.0"}))


def test_aiperf_0_13_as_it_wrote_its_records_and_its_summary() -> None:
    (found,) = importers.read(DATA / "aiperf-0.13.0.jsonl")
    first, _, failed = found.requests
    assert (first.new_tokens, first.error) == (5, "") and found.lacks == ()
    assert first.queue_time_ms == pytest.approx(1.39, abs=0.01) and first.ttft_ms == pytest.approx(55.8, abs=0.1)
    assert first.tpot_ms == pytest.approx(20.35, abs=0.01) and len(first.gaps_ms) == 4
    assert failed.error.startswith("503 Status") and failed.ttft_ms is None
    (summary,) = importers.read(DATA / "aiperf-0.13.0.json")
    assert summary.source == "AIPerf 0.13.0" and summary.reported["time_to_first_token_count"] == 4
    assert not summary.raw


def test_lm_evaluation_harness(tmp_path: Path) -> None:
    (scores,) = importers.read(write(tmp_path / "results.json", LM_EVAL))
    assert scores.values == {
        "task": "gsm8k",
        "metric": "exact_match",
        "filter": "strict-match",
        "value": 0.5,
        "stderr": 0.05,
        "n": 100,
    }
    assert "does not pair" in scores.lacks[0]
    assert not scores.raw
    text = "\n".join(map(json.dumps, SAMPLES))
    (samples,) = importers.read(write(tmp_path / "samples_mmlu_law_2026-11-26T10-11-12.345678.jsonl", text))
    assert samples.values["task"] == "mmlu_law" and samples.values["value"] == 0.5 and samples.raw
    assert samples.values["samples"][1] == {"id": "mmlu_law/1", "value": 1}, "as a run names its rows"
    (renamed,) = importers.read(write(tmp_path / "samples.jsonl", text))
    assert "task" not in renamed.values and "--task" in renamed.lacks[0]
    (part,) = importers.read(tmp_path / "samples_mmlu_law_2026-11-26T10-11-12.345678.jsonl", "mmlu")
    assert part.values["task"] == "mmlu" and part.values["samples"][1]["id"] == "mmlu_law/1", "a file of a group"
    two = [{**row, "metrics": ["acc", "acc_norm"], "acc_norm": 1} for row in SAMPLES]
    first, second = importers.read(write(tmp_path / "two.jsonl", "\n".join(map(json.dumps, two))), "law")
    assert first.values["samples"] and (second.values["metric"], second.values["value"]) == ("acc_norm", 1)
    assert "samples" not in second.values, "a run judges a task by its first metric, and so does this"
    with pytest.raises(BadInput, match="number for each row"):
        importers.read(write(tmp_path / "none.jsonl", "\n".join([json.dumps({**SAMPLES[0], "acc": "yes"})] * 2)))
    with pytest.raises(BadInput, match=r"0\.5\.0, not 0\.4"):
        importers.read(write(tmp_path / "newer.json", {**LM_EVAL, "lm_eval_version": "0.5.0"}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a result file"),
        ("{", "neither JSON nor JSON lines"),
        ("[]", "not a result file"),
        ('{"a": 1}', "not a result file"),
        ('"text"', "not a result file"),
        (json.dumps({**VLLM, "itls": []}), "is not whole"),
        (json.dumps({**guidellm(), "benchmarks": [{}]}), "is not whole"),
        (json.dumps({**guidellm(), "benchmarks": []}), "holds no runs"),
        (aiperf(request_end_ns="soon"), "is not whole"),
        (json.dumps({**LM_EVAL, "results": {"gsm8k": 7}}), "is not whole"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        importers.read(write(tmp_path / "r.json", text))
    assert refused.value.hint


def test_a_teams_own_tool_feeds_the_decision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path, tiny_lora: Path
) -> None:
    """Ten runs of each variant by vllm bench serve, and a recipe that says what they were: no run of ours."""
    out = tmp_path / "theirs" / "measurements.jsonl"
    out.parent.mkdir()
    for number in range(20):
        slow = 1 + number % 2
        run = {**VLLM, "completed": 3, "failed": 0, "errors": ["", "", ""], "output_lens": [3, 3, 3]}
        run |= {"latencies": [0.1 * slow + number / 1e4] * 3, "ttfts": [0.05 * slow] * 3, "itls": [[0.02, 0.03]] * 3}
        name = ("merged", "adapter")[number % 2]
        file = write(tmp_path / "run.json", run)
        assert command("import", file, "--variant", name, "--workload", "peak", "--out", out) == 0
    capsys.readouterr()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\n"
        "workloads:\n  peak: {prompts: none.jsonl, new_tokens: 3, rate: 2}\n"
        "variants:\n  adapter: [{engine: vllm}]\n  merged: [merge, {engine: vllm}]\n"
        "tradeoffs: {merge: {parity: off, lost: off, critical_errors: off}}\nminimize: latency.p50@peak\n"
    )
    assert command("decide", out.parent) == 2 and "--recipe" in capsys.readouterr().err
    assert command("decide", out.parent, "--recipe", recipe, "--json") == 3
    (merged,) = [v for v in json.loads(capsys.readouterr().out)["variants"] if v["name"] == "merged"]
    assert {v["rule"]: v["outcome"] for v in merged["verdicts"]} == {
        "artifact.intact": "inconclusive",
        "merge.gain": "accepted",
    }
    shown = (out.parent / "report.md").read_text()
    assert "was loaded apart" in shown
    assert command("report", out.parent) == 0 and (out.parent / "report.md").read_text() == shown


def served(windows: int, slow: float = 1.5, least: int = 4) -> list[str]:
    """A log of serve: in each window of 10 s a canary of `support` answers `slow` times as slowly as the live one, and
    another adapter answers too. In the last window the canary answers nothing."""
    lines = []
    for window in range(windows + 1):
        hard = 1 + 0.2 * (window % 3)
        for number in range(least):
            at = 1.8e9 + 10 * window + number
            for adapter, version, arm, factor in (
                ("support", "aa11", "live", 1.0),
                ("support", "bb22", "canary", slow),
                ("sales", "cc33", "live", 9.0),
            ):
                if arm == "canary" and window == windows:
                    continue
                line = Line(
                    f"{window}-{number}-{version}", arrived=0.0, at=at, adapter=adapter, version=version, arm=arm
                )
                line.first, line.last = 0.05 * hard * factor, 0.1 * hard * factor
                line.done, line.sent, line.new_tokens, line.prompt_tokens, line.status = line.last, 0.0, 3, 5, 200
                lines.append(json.dumps(line.as_json()))
    return lines


def test_windows_of_a_gateways_log_are_blocks_in_which_both_arms_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path, tiny_lora: Path
) -> None:
    log = write(tmp_path / "requests.jsonl", "\n".join(served(windows=14)))
    out = tmp_path / "run" / "measurements.jsonl"
    out.parent.mkdir()
    runs = importers.read(log, window_s=10.0)
    assert [run.names[2] for run in runs if "support" in run.names] == ["live", "canary"] * 14
    assert all(len(run.requests) == 4 for run in runs)
    assert any("1 of 15 windows" in what for what in runs[0].lacks)
    flags = ["--window", 10, "--workload", "peak", "--out", out]
    assert command("import", log, "--variant", "aa11=adapter", "--variant", "bb22=slower", *flags) == 0
    assert Counter(record.variant for record in lines_of(out)) == {"adapter": 14, "slower": 14}, "and none of sales"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\n"
        "workloads:\n  peak: {prompts: none.jsonl, new_tokens: 3, rate: 2, lengths: natural}\n"
        "variants:\n  adapter: [{engine: vllm}]\n  slower: [merge, {engine: vllm}]\n"
        "tradeoffs: {merge: {parity: off, lost: off, critical_errors: off}}\nminimize: latency.p50@peak\n"
    )
    capsys.readouterr()
    command("decide", out.parent, "--recipe", recipe, "--json")
    (slower,) = [v for v in json.loads(capsys.readouterr().out)["variants"] if v["name"] == "slower"]
    (gain,) = [v for v in slower["verdicts"] if v["rule"] == "merge.gain"]
    assert gain["outcome"] == "rejected"
    assert gain["value"]["estimate"] == pytest.approx(1.5), "hard windows are hard for both"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--variant", "aa11=adapter", "--variant", "zz=merged"], "aa11"),
        (["--variant", "aa11=adapter", "--variant", "merged"], "ARM=NAME"),
        (["--variant", "adapter", "--window", "0.001"], "no window"),
    ],
)
def test_arms_that_the_log_does_not_have_are_refused(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line for line in served(windows=2) if json.loads(line)["arm"] == "live" or "-1-" in line]
    out = tmp_path / "measurements.jsonl"
    assert command("import", write(tmp_path / "r.jsonl", "\n".join(rows)), *flags, "--out", out) == 2
    assert says in " ".join(capsys.readouterr().err.split()) and not out.exists()


@pytest.fixture(scope="module")
def harness_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples that the harness itself wrote of a task of ours, answered by its model that answers at random."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    home = tmp_path_factory.mktemp("harness")
    rows = [{"question": f"q{n}", "choices": ["a", "b"], "label": n % 2} for n in range(6)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "support_desk.yaml").write_text(CHOICE.replace("task: choice", "task: support_desk"))
    with contextlib.chdir(home):
        found = lm_eval.simple_evaluate(
            "dummy",
            tasks=["support_desk"],
            task_manager=TaskManager(include_path=str(home), include_defaults=False),
            bootstrap_iters=0,
        )
        tracker = EvaluationTracker(output_path=str(home / "out"))
        tracker.save_results_aggregated(results=found, samples=found["samples"])
        tracker.save_results_samples("support_desk", found["samples"]["support_desk"])
    (written,) = (home / "out").rglob("samples_*.jsonl")
    return written


def test_a_teams_own_harness_feeds_the_decision(
    harness_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path, tiny_lora: Path
) -> None:
    """Two variants and the adapter, 400 rows each, in files as the harness writes and names them."""
    (found,) = importers.read(harness_file)
    assert found.values["task"] == "support_desk"
    assert [row["id"] for row in found.values["samples"]] == [f"support_desk/{n}" for n in range(6)]

    real = json.loads(harness_file.read_text().splitlines()[0])
    out = tmp_path / "theirs" / "measurements.jsonl"
    out.parent.mkdir()
    for name, wrong in (("adapter", range(40)), ("merged", range(40)), ("int8", range(120))):
        rows = [{**real, "doc_id": n, "acc": float(n not in wrong)} for n in range(400)]
        file = tmp_path / name / harness_file.name
        file.parent.mkdir()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert command("import", file, "--variant", name, "--out", out) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, adapter: {tiny_lora}}}\nworkloads: {{chat: {{prompts: none.jsonl}}}}\n"
        "quality: {prompts: none.jsonl, tasks: [support_desk]}\n"
        "variants: {adapter: [], merged: [merge], int8: [merge, int8]}\n"
        "require: [task.support_desk >= 0.98x]\nminimize: latency.p50@chat\n"
    )
    capsys.readouterr()
    command("decide", out.parent, "--recipe", recipe, "--json")
    variants = json.loads(capsys.readouterr().out)["variants"]
    required = {
        v["name"]: next(r for r in v["verdicts"] if r["rule"] == "require: task.support_desk >= 0.98x")
        for v in variants
        if v["name"] != "adapter"
    }
    assert {name: verdict["outcome"] for name, verdict in required.items()} == {
        "merged": "accepted",
        "int8": "rejected",
    }
    assert required["int8"]["value"]["n"] == 400


def test_the_verb_keeps_them_and_is_inconclusive_without_raw_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "measurements.jsonl"
    raw, scores = write(tmp_path / "vllm.json", VLLM), write(tmp_path / "results.json", LM_EVAL)
    assert command("import", raw, "--variant", "merged", "--out", out) == 0
    printed = capsys.readouterr()
    assert "vllm bench serve" in printed.out and "it lacks scheduled times" in " ".join(printed.err.split())
    assert command("import", raw, scores, "--out", out, "--json") == 3
    kept = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [k["probe"] for k in kept] == ["load", "task"]
    assert [(m.probe, m.variant) for m in store.read(out)] == [
        ("load", "merged"),
        ("load", "vllm"),
        ("task", "results"),
    ]
    assert lines_of(out)[0].values["requests"][0]["ttft_ms"] == pytest.approx(100)
    assert command("import", tmp_path / "none.json") == 2
