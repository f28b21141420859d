"""Versions that answer nobody: asked beside the users, judged, promoted or rolled back; also across a kill."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.gateways import BIG_S, Gateway, changed, serving
from helpers.paced import Paced, paced
from helpers.waiting import wait_until

WORSE = Path(__file__).parent.parent / "demo" / "worse.py"
PROMPTS = 160
"""As many as it takes to exclude critical errors in 2 % of prompts."""


@pytest.fixture
def two(tiny_lora: Path, tmp_path: Path) -> tuple[Path, Path]:
    return changed(tiny_lora, tmp_path / "one", 1.0), changed(tiny_lora, tmp_path / "two", 2.0)


@contextlib.contextmanager
def one_live(two: tuple[Path, Path], where: Path, workers: int = 1) -> Iterator[tuple[Paced, Gateway, str]]:
    """A gateway whose first version is live, and that version's name at the engine."""
    options = ("--adapters-from", where, "--workers", workers)
    with paced() as engine, serving(where, "--upstream", engine.url, *options) as gateway:
        assert gateway.operate("put", f"support={two[0]}")[0] == 0
        yield engine, gateway, next(iter(engine.folders))


@contextlib.contextmanager
def users(gateway: Gateway) -> Iterator[None]:
    """Users who go on asking, until this ends."""
    over = threading.Event()

    def user() -> None:
        while not over.is_set():
            assert gateway.ask("hello", "support", max_tokens=1, temperature=0).status_code == 200

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(user) for _ in range(2)]
        try:
            yield
        finally:
            over.set()
        assert all(each.result() is None for each in asking)


def prompts(where: Path, n: int = PROMPTS) -> Path:
    """A file of labelled prompts."""
    rows = [{"id": f"p{i}", "prompt": f"prompt {i}", "expected": "right", "critical": i < 3} for i in range(n)]
    file = where / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def beside(engine: Paced) -> list[dict]:
    """What the engine was asked beside the users."""
    return [body for body in engine.seen if body.get("return_token_ids")]


def listed(gateway: Gateway) -> dict[str, str]:
    rows = json.loads(gateway.operate("list", "--json")[1])["adapters"]
    return {row["arm"]: row["version"] for row in rows if row["name"] == "support"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shadow_answers_nobody_and_is_rolled_back_for_its_critical_errors(
    two: tuple[Path, Path], tmp_path: Path, workers: int
) -> None:
    with one_live(two, tmp_path, workers) as (engine, gateway, live):
        engine.speaks = lambda name, prompt: "fine" if name == live else ""
        with users(gateway):
            options = ("--shadow", "100%", "--for", "300s", "--then", "promote", "--window", "1s")
            code, said = gateway.operate("put", f"support={two[1]}", *options)
        assert code == 1 and "canary.critical_errors" in said and "empty" in said, said
        assert listed(gateway) == {"live": live.partition("@")[2]}
        assert {line["version"] for line in gateway.lines()} == {live.partition("@")[2]}, "it has answered nobody"
        asked = {body["model"] for body in beside(engine)}
        assert live in asked and len(asked) == 2
        assert gateway.metric("peftopt_shadow_requests_total") > 0
        code, said = gateway.operate("report", "support", "--json")
        rules = {rule["rule"]: rule for rule in json.loads(said)["rules"]}
        value = rules["canary.critical_errors"]["value"]
        assert code == 1 and value["n"] > 0 and 0.02 < value["low"] <= value["estimate"]
        events = [json.loads(line) for line in (gateway.state / "events.jsonl").read_text().splitlines()]
        assert [e["rule"] for e in events if e["event"] == "trial"] == ["canary.critical_errors"]


def test_greedy_answers_that_changed_reject_where_the_operator_says_so(two: tuple[Path, Path], tmp_path: Path) -> None:
    with one_live(two, tmp_path) as (engine, gateway, live):
        engine.speaks = lambda name, prompt: "fine" if name == live else "otherwise"
        with users(gateway):
            options = ("--shadow", "1.0", "--for", "300s", "--changed", "5%")
            code, said = gateway.operate("put", f"support={two[1]}", *options)
        assert code == 1 and "canary.changed" in said, said


@pytest.mark.parametrize(("answers", "code", "word"), [("right", 0, "promoted"), ("wrong", 1, "rolled back")])
def test_labelled_prompts_alone_promote_a_version_or_roll_it_back(
    two: tuple[Path, Path], tmp_path: Path, answers: str, code: int, word: str
) -> None:
    with one_live(two, tmp_path) as (engine, gateway, live):
        engine.speaks = lambda name, prompt: "right" if name == live else answers
        options = ("--prompts", prompts(tmp_path), "--for", "300s", "--then", "promote")
        ended, said = gateway.operate("put", f"support={two[1]}", *options)
        assert ended == code and word in said, said
        assert (listed(gateway)["live"] == live.partition("@")[2]) == (code == 1)
        assert all(body["max_tokens"] == 256 and body["temperature"] == 0 for body in beside(engine))
        report = gateway.operate("report", "support")[1]
        assert "canary.accuracy" in report and "canary.critical_prompts" in report


def test_a_trial_goes_on_after_the_gateway_was_killed(two: tuple[Path, Path], tmp_path: Path) -> None:
    """What was asked is not asked again, and who waits for the verdict gets it from the gateway that comes after."""
    gate = threading.Event()
    with paced() as engine, ThreadPoolExecutor(1) as operator:
        options = ("--upstream", engine.url, "--adapters-from", tmp_path)
        with serving(tmp_path, *options) as gateway:
            gateway.operate("put", f"support={two[0]}")
            live = next(iter(engine.folders))

            def speaks(name: str, prompt: str) -> str:
                if len(beside(engine)) > 60:  # the engine's thread waits, and all its requests with it
                    gate.wait(BIG_S)
                return "right" if name == live else "right "

            engine.speaks = speaks
            asked = ("--prompts", prompts(tmp_path), "--for", "300s", "--then", "promote")
            putting = operator.submit(gateway.operate, "put", f"support={two[1]}", *asked)
            wait_until(lambda: len(beside(engine)) > 60)
            os.kill(gateway.process.pid, signal.SIGKILL)
            gateway.process.wait()
        gate.set()
        kept = len((gateway.state / "trials" / _new(engine, live) / "answers.jsonl").read_text().splitlines())
        assert kept >= 3
        with serving(tmp_path, *options) as again:
            code, said = putting.result()
            assert code == 0 and "promoted" in said, said
            assert listed(again)["previous"] == live.partition("@")[2]
        assert len(beside(engine)) < 3 * PROMPTS + 12, "only what was on its way is asked again"


def test_a_worse_adapter_is_found_out_on_a_real_engine(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's way: a worse copy is put on trial with what the live version answers, and rolled back by a rule."""
    worse = tmp_path / "worse"
    monkeypatch.setattr(sys, "argv", [str(WORSE), str(worse), "--adapter", str(tiny_lora), "--scale", "0"])
    runpy.run_path(str(WORSE), run_name="__main__")
    options = ("--base", tiny_base, "--adapter", f"support={tiny_lora}", "--adapters-from", tmp_path)
    with serving(tmp_path, *options, "--engine", "eager", "--threads", 1) as gateway:

        def answer(number: int) -> str:
            asked = gateway.ask(f"prompt {number}", "support", temperature=0, max_tokens=6)
            return asked.json()["choices"][0]["message"]["content"]

        before = [answer(number) for number in range(12)]
        rows = [{"id": f"p{n}", "prompt": f"prompt {n}", "expected": text} for n, text in enumerate(before)]
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = ("--prompts", file, "--new-tokens", 6, "--for", "300s", "--then", "promote")
        code, said = gateway.operate("put", f"support={worse}", *asked)
        assert code == 1 and ("canary.accuracy" in said or "canary.critical_prompts" in said), said
        assert [answer(number) for number in range(12)] == before, "the live version answers as it did"


def _new(engine: Paced, live: str) -> str:
    return next(name for name in engine.folders if name != live)


@pytest.mark.parametrize(
    "options",
    [
        ("--shadow", "5%"),
        ("--prompts", "prompts.jsonl"),
        ("--for", "30m"),
        ("--shadow", "a lot", "--for", "30m"),
        ("--shadow", "5%", "--for", "30m", "--changed", "500%"),
        ("--shadow", "5%", "--for", "30m", "--schema", "prompts.jsonl"),
        ("--shadow", "5%", "--for", "30m"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_a_hint(tmp_path: Path, tiny_lora: Path, options: tuple[str, ...]) -> None:
    """The last: nothing answers by that name, to compare with."""
    file = prompts(tmp_path)
    given = [str(file) if option == "prompts.jsonl" else option for option in options]
    with paced() as engine, serving(tmp_path, "--upstream", engine.url, "--adapters-from", tiny_lora) as gateway:
        code, said = gateway.operate("put", f"support={tiny_lora}", *given)
        assert code == 2 and "hint" in said and not engine.folders
