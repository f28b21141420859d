"""A long load while adapters come and go: what grows, what is wrong and what gets worse is told, and nothing else."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.command_line import command, errors
from helpers.faulty_server import Started, started
from helpers.forked import COMMANDS
from helpers.servers import served
from helpers.tiny_models import make_lora
from helpers.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st

from peftopt.canary.fingerprint import Wrong
from peftopt.diagnose.unloading import soaked, soaking
from peftopt.diagnose.unloading.cycled import Cycled, Step
from peftopt.diagnose.unloading.cycles import Limits
from peftopt.diagnose.unloading.resting import Held
from peftopt.diagnose.unloading.soaked import Soaked, Window
from peftopt.errors import ACCEPTED, BAD_INPUT, ENVIRONMENT, INCONCLUSIVE, INTERRUPTED, REJECTED
from peftopt.loadtest.protocols import Target
from peftopt.loadtest.summary import Request

MB = 2.0**20
WINDOWS = 24
PROMPTS = {str(n): [{"role": "user", "content": f"count to {n}"}] for n in range(4)}


def request(ttft_ms: float = 20.0, error: str = "") -> Request:
    first = None if error else ttft_ms / 1e3
    return Request("1", "support", 0.0, 0.0, 1.0, first=first, last=first, new_tokens=4, error=error)


def run(
    levels: Sequence[float] = (), files: Sequence[int] = (), failed: Sequence[int] = (), ttft: Sequence[float] = ()
) -> Soaked:
    """A run of windows of 20 requests, by default a clean one. `levels` and `files` have one before the first."""
    levels = levels or [200 * MB] * (WINDOWS + 1)
    files = files or [12] * (WINDOWS + 1)
    failed = failed or [0] * WINDOWS
    ttft = ttft or [20.0] * WINDOWS
    held = [Held(host=level, gpu=None, handles=count, threads=5) for level, count in zip(levels, files, strict=True)]
    windows = [
        Window(
            tuple(request(ttft_ms, "HTTP 500: broken" if n < broken else "") for n in range(20)), 3, after, seconds=10.0
        )
        for after, broken, ttft_ms in zip(held[1:], failed, ttft, strict=True)
    ]
    return Soaked(before=held[0], windows=windows, churn=Cycled(cycles=3 * WINDOWS), asked=100)


# ---- what a run says -----------------------------------------------------------------------------


def test_a_clean_run_is_clean() -> None:
    judged = soaked.judge(run())
    assert judged.outcome == ACCEPTED and not judged.reasons
    assert {name: trend.grows for name, trend in judged.trends.items()} == dict.fromkeys(
        ("memory", "open files", "threads"), False
    )
    assert judged.hours == pytest.approx(WINDOWS * 10 / 3600)


@given(st.floats(1, 100))
def test_growth_is_told_an_hour(megabytes: float) -> None:
    judged = soaked.judge(run(levels=[200 * MB + n * megabytes * MB for n in range(WINDOWS + 1)]))
    assert judged.outcome == REJECTED and "memory" in " ".join(judged.reasons)
    assert judged.trends["memory"].per_hour.estimate == pytest.approx(360 * megabytes * MB)


def test_files_that_stay_open_are_a_leak_and_a_step_of_them_is_none() -> None:
    assert soaked.judge(run(files=[12 + 3 * n for n in range(WINDOWS + 1)])).trends["open files"].grows
    assert soaked.judge(run(files=[12 + 9 * (n > 15) for n in range(WINDOWS + 1)])).outcome == ACCEPTED


def test_one_wrong_answer_rejects() -> None:
    wrong = run()
    wrong.wrong.append(Wrong("support", "1", "sales", 2.0, 0.1))
    assert soaked.judge(wrong).outcome == REJECTED


def test_errors_that_grow_reject_and_those_that_stay_do_not() -> None:
    grows = soaked.judge(run(failed=[n // 2 for n in range(WINDOWS)]))
    stays = soaked.judge(run(failed=[1] * WINDOWS))
    assert grows.outcome == REJECTED and grows.errors == {"HTTP 500: broken": sum(n // 2 for n in range(WINDOWS))}
    assert stays.outcome == ACCEPTED and stays.early.estimate == stays.late.estimate == 0.05


def test_an_unload_that_never_returns_rejects() -> None:
    stuck = run()
    assert stuck.churn
    stuck.churn.steps.append(Step("unload", 30.0, "no answer within 30 s", late=True))
    assert soaked.judge(stuck).outcome == REJECTED


def test_what_is_not_known_is_not_clean() -> None:
    unknown = run()
    unknown.before = None
    unknown.windows = [Window(window.requests, 3, None, 10.0) for window in unknown.windows]
    assert soaked.judge(unknown).outcome == INCONCLUSIVE
    few = run()
    few.windows = few.windows[:5]
    assert soaked.judge(few).outcome == INCONCLUSIVE
    alike = run()
    alike.alike.append(("support", "sales"))
    assert soaked.judge(alike).outcome == INCONCLUSIVE
    assert soaked.judge(run(failed=[20] * WINDOWS)).outcome == ENVIRONMENT
    assert soaked.judge(Soaked()).outcome == ENVIRONMENT


def test_tails_of_the_last_third_are_paired_with_the_first() -> None:
    slower = soaked.judge(run(ttft=[20.0] * 8 + [30.0] * 8 + [40.0] * 8))
    assert slower.tails["p95"].ratio.estimate == pytest.approx(2)
    assert slower.tails["p95"].ratio.low == pytest.approx(2)
    assert slower.tails["p50"].by_window[0] == pytest.approx(20)


# ---- servers -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(f"the weights of {name}")
    return [tmp_path / "one", tmp_path / "two"]


def nothing(done: int, what: str) -> None:
    """Show nothing."""


@pytest.mark.parametrize(("fault", "named"), [({}, ""), ({"stale": True}, "loaded again"), ({"leaky": True}, "base")])
def test_the_right_adapter_answers_or_the_wrong_one_is_named(
    fault: dict[str, bool], named: str, folders: list[Path]
) -> None:
    plan = soaking.Plan(2.0, users=2, new_tokens=4, windows=2)
    with served(**fault, models=("base",), first=0.02) as server:
        seen = soaking.soak(Started(Target(server.url)), folders, PROMPTS, plan, nothing)
    assert seen.asked and not seen.alike and not seen.notes
    assert seen.churn and seen.churn.cycles and not [step for step in seen.churn.steps if step.error]
    assert bool(seen.wrong) is bool(named) and all(named in wrong.model for wrong in seen.wrong)
    assert not server.loaded, "all is unloaded in the end"


def test_a_server_that_loads_no_adapters_is_soaked_without_them(folders: list[Path]) -> None:
    plan = soaking.Plan(0.5, users=2, new_tokens=4, windows=2)
    with served(loads=False, models=("base", "support")) as server:
        seen = soaking.soak(Started(Target(server.url)), folders, PROMPTS, plan, nothing)
    assert seen.churn is None and "no adapter comes and goes" in " ".join(seen.notes)
    assert {request.model for window in seen.windows for request in window.requests} == {"base", "support"}


def test_files_that_our_server_is_made_to_keep_are_found(tiny_base_fp32: Path, tiny_lora: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_lora(tiny_base_fp32, other, std=0.2, r=8)
    plan = soaking.Plan(6.0, users=1, new_tokens=4, windows=15)
    limits = Limits(300, 300, 300)
    with started("handles", tiny_base_fp32, tmp_path) as server:
        seen = soaking.soak(server, [tiny_lora, other], PROMPTS, plan, nothing, limits)
    judged = soaked.judge(seen)
    assert judged.trends["open files"].grows and judged.outcome == REJECTED
    assert not judged.trends["threads"].grows
    assert seen.asked and not seen.wrong and not judged.errors


# ---- the verb ------------------------------------------------------------------------------------


def test_an_interrupt_ends_it_with_a_report(folders: list[Path], tmp_path: Path) -> None:
    said, out = tmp_path / "said", tmp_path / "soak.json"
    with served(models=("base",)) as server:
        words = ["--soak", 60, "--url", server.url, "--adapter", folders[0], "--adapter", folders[1], "--out", out]
        copy = COMMANDS.begin(said, "peftopt.cli", "bench", *words)
        try:
            wait_until(lambda: any(body.get("stream") for body in server.bodies), said.read_text)
            copy.send_signal(signal.SIGINT)
            assert copy.wait(60) == INTERRUPTED
        finally:
            copy.kill()
        assert not server.loaded
    assert "Traceback" not in said.read_text() and "soaked" in said.read_text()
    assert json.loads(out.read_text())["stopped"] == "interrupted"


@pytest.mark.parametrize(
    "options",
    [
        ["--soak", "1"],
        ["--soak", "1", "--base", "base"],
        ["--soak", "1", "--base", "base", "--url", "http://127.0.0.1:1"],
        ["--soak", "0", "--url", "http://127.0.0.1:1"],
        ["--soak", "1", "--url", "http://127.0.0.1:1", "--users", "0"],
        ["--soak", "1", "--url", "http://127.0.0.1:1", "--model", "merged"],
        ["--url", "http://127.0.0.1:1"],
        ["--model", "merged", "--prompts", "p.jsonl", "--adapter", "one", "--adapter", "two"],
    ],
)
def test_options_that_do_not_go_together_are_named(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("bench", *options) == BAD_INPUT
    assert "hint" in errors(capsys)


def test_no_server_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("bench", "--soak", "1", "--url", "http://127.0.0.1:1") == ENVIRONMENT
    assert "no server" in errors(capsys)
