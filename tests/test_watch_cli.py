"""`peftopt watch` as users meet it: the real log of a gateway with planted faults, a real gateway's metrics, a
Prometheus."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import replays
from helpers.command_line import command, errors
from helpers.finished_runs import finished_run
from helpers.gateways import serving
from helpers.paced import paced
from helpers.prometheus_tools import needs_prometheus, scraping
from helpers.recorded_prometheus import recorded
from helpers.waiting import wait_until

from peftopt.watch import running

HOURS = 4.0
SLACK_S = 60.0
"""A window may hold requests of both sides of a fault's beginning."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("decided")
    (where / "base").mkdir()
    return replays.run_of_log(where / "results", where / "base")


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose limit the paced engine meets by far."""
    where = tmp_path_factory.mktemp("fast")
    return finished_run(where / "results", where, where, require=("ttft.p95@peak <= 5 s",), built=False)


class Watched:
    """What one call said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        self.code = command("watch", *arguments, "--once", "--json")
        self.out = capsys.readouterr().out
        self.records = [json.loads(line) for line in self.out.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind") == kind]  # an error has none

    @property
    def kinds(self) -> set[str]:
        return {alarm["detector"] for alarm in self.of("alarm")}


# ---- the real log --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", replays.FAULTS)
def test_a_planted_fault_is_named_rightly_and_nothing_else_is(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, expected = replays.FAULTS[name]
    log = replays.write(tmp_path / "log", replays.replay(HOURS, fault))
    watched = Watched(capsys, run, "--variant", "merged", "--logs", log, "--state", tmp_path / "state")
    assert watched.kinds <= expected and bool(watched.kinds) == bool(expected)
    assert watched.code == (0 if fault is None else 3 if expected == {"range"} else 1)
    assert {alarm["name"] for alarm in watched.of("alarm") if alarm["detector"] == "errors"} <= {"oom"}
    begins = replays.BEGINS + 1800 * HOURS
    assert all(alarm["at"] >= begins - SLACK_S and alarm["adapter"] == "triage" for alarm in watched.of("alarm"))


def test_once_goes_on_where_it_ended(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(replays.replay(HOURS, replays.slower(1.5)))
    whole = replays.write(tmp_path / "whole", iter(lines))
    expected = Watched(capsys, run, "--variant", "merged", "--logs", whole, "--state", tmp_path / "at-once")
    log, alarms, windows = tmp_path / "log", [], 0
    for end in (len(lines) // 4, len(lines) // 2, len(lines)):
        replays.write(log, iter(lines[:end]))
        watched = Watched(capsys, run, "--variant", "merged", "--logs", log, "--state", tmp_path / "state")
        assert watched.code == (1 if end == len(lines) else 0)
        alarms += watched.of("alarm")
        windows += len(watched.of("window"))
    assert windows >= len(expected.of("window"))  # one that was over by the clock was cut where the log ended
    assert {alarm["name"] for alarm in alarms} == {alarm["name"] for alarm in expected.of("alarm")}
    again = Watched(capsys, run, "--variant", "merged", "--logs", log, "--state", tmp_path / "state")
    assert (again.code, again.of("window"), again.of("alarm")) == (3, [], [])  # nobody has asked since the last --once
    assert command("watch", run, "--variant", "merged", "--logs", log, "--state", tmp_path / "state", "--once") == 3
    assert "no request since" in capsys.readouterr().out


def test_the_screen_has_the_limits_the_detectors_and_the_budget(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = replays.write(tmp_path / "log", replays.replay(HOURS, replays.out_of_memory(0.1)))
    with log.open("a") as lines:
        lines.write("not ours\n")
    options = ("--variant", "merged", "--logs", log, "--state", tmp_path / "state", "--once", "--arl", "7d")
    assert command("watch", run, *options) == 1
    screen = " ".join(capsys.readouterr().out.split())
    for part in ("P95 TTFT", "800 ms", "triage", "OOM", "batch fill", "fragmented", "GPU", "7 days", "errors triage"):
        assert part in screen
    assert "left out: 1 line" in screen and "not watched: " in screen


def test_a_run_without_limits_says_what_is_watched_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    run = replays.run_of_log(tmp_path / "results", tmp_path / "base", require=())
    log = replays.write(tmp_path / "log", replays.replay(HOURS, replays.slower(1.5)))
    watched = Watched(capsys, run, "--variant", "merged", "--logs", log)
    assert (watched.code, "sla" in watched.kinds, "drift" in watched.kinds) == (1, False, True)
    (ended,) = watched.of("outcome")
    assert any("SLA" in each for each in ended["unwatched"])
    assert (run / "watch.json").exists()


def test_since_passes_over_what_is_older(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = replays.write(tmp_path / "log", replays.replay(1.0))
    options = ("--variant", "merged", "--logs", log, "--state", tmp_path / "state", "--since", "1h")
    assert (watched := Watched(capsys, run, *options)).code == 3
    assert watched.of("window") == []


# ---- other traffic -------------------------------------------------------------------------------

RECIPE = """model: {{base: {base}, adapter: {lora}}}
workloads:
  chat: {{prompts: prompts.jsonl, new_tokens: 48, users: 2, lengths: natural, slice: short}}
measure: {{max_blocks: 40}}
variants:
  adapter: [{{engine: {{endpoint: {{url: 'http://127.0.0.1:1', model: triage}}}}}}]
  merged:  [{{engine: {{endpoint: {{url: 'http://127.0.0.1:2', model: triage}}}}}}]
tradeoffs: {{merge: {{parity: off}}}}
require: [latency.p95@chat <= 8 s]
minimize: latency.p50@chat
"""


@pytest.mark.parametrize("texts", [False, True])
def test_other_traffic_proposes_a_recipe_that_check_accepts(
    texts: bool, tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPE.format(base=tiny_base, lora=tiny_lora)
    run = replays.run_of_log(tmp_path / "results", tiny_base, recipe=recipe)
    lines = replays.replay(HOURS, replays.longer_prompts(3.0))
    said = {"prompt": "system: Be brief.\nuser: Where is\nmy parcel?", "answer": "Here."} if texts else {}
    log = replays.write(tmp_path / "log", ({**line, **said} for line in lines))
    new = tmp_path / "next.yaml"
    assert command("watch", run, "--variant", "merged", "--logs", log, "--once", "--propose", new) == 3
    assert command("check", new) == 0
    assert "cannot" not in errors(capsys).replace("cannot be decided", "")
    written = new.read_text()
    assert "rate: 0." in written and "slice" not in written and "parity: off" in written
    rows = [json.loads(row) for row in (tmp_path / "next.prompts.jsonl").read_text().splitlines()]
    if texts:
        (row,) = rows
        assert [message["content"] for message in row["messages"]] == ["Be brief.", "Where is\nmy parcel?"]
    else:
        assert min(len(row["messages"][0]["content"].split()) for row in rows) > 200


def test_a_recipe_that_is_there_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "recipe.yaml"
    own.write_text("mine\n")
    log = replays.write(tmp_path / "log", replays.replay(HOURS, replays.longer_prompts(3.0)))
    options = ("--variant", "merged", "--logs", log, "--state", tmp_path / "state", "--propose", own, "--once")
    assert command("watch", run, *options) == 3
    assert own.read_text() == "mine\n"


# ---- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        ("--logs", "none.jsonl"),
        ("--logs", "foreign.txt"),
        ("--logs", "empty.jsonl"),
        ("--server", "http://127.0.0.1:9"),
        ("--prometheus", "http://127.0.0.1:9"),
    ],
)
def test_nothing_to_read_is_said_with_what_to_do(
    source: tuple[str, str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.txt").write_text("GET / 200\n")
    (tmp_path / "empty.jsonl").touch()
    option, where = source
    named = tmp_path / where if option == "--logs" else where
    assert command("watch", run, "--variant", "merged", option, named, "--once", "--state", tmp_path / "state") == 4
    assert "hint" in errors(capsys)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--logs FILE, --server URL and --prometheus URL"),
        (["--server", "http://x", "--prometheus", "http://y"], "--logs FILE, --server URL and --prometheus URL"),
        (["--server", "http://x", "--select", 'job="a"'], "--prometheus"),
        (["--logs", "x", "--every", "0"], "--every"),
        (["--logs", "x", "--every", "1000d"], "--every"),
        (["--logs", "x", "--key-env", "KEY"], "--key-env"),
        (["--server", "http://x", "--key-env", "NOBODY_HAS_SET_THIS"], "NOBODY_HAS_SET_THIS"),
        (["--server", "http://x", "--every", "soon"], "30s"),
        (["--server", "http://x", "--arl", "0d"], "--arl"),
        (["--server", "http://x", "--every", "2h", "--arl", "1h"], "--arl"),
        (["--server", "http://x", "--variant", "none"], "adapter, merged"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("watch", run, *(arguments if "none" in arguments else ["--variant", "merged", *arguments])) == 2
    assert says in errors(capsys)


@pytest.mark.parametrize("state", ["{}", "[1]", "nonsense", '{"kind": "peftopt.watch", "format": 1}'])
def test_a_state_that_is_none_is_refused(
    state: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text(state)
    log = replays.write(tmp_path / "log", replays.replay(0.1))
    options = ("--variant", "merged", "--logs", log, "--once", "--state", tmp_path / "state")
    assert command("watch", run, *options) == 2
    assert "--state" in errors(capsys)
    assert (tmp_path / "state").read_text() == state


def test_two_watches_with_one_state_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = replays.write(tmp_path / "log", replays.replay(0.5))
    with running.alone(tmp_path / "state"):
        options = ("--variant", "merged", "--logs", log, "--once", "--state", tmp_path / "state")
        assert command("watch", run, *options) == 2
    assert "--state" in errors(capsys)
    assert command("watch", run, *options) == 0


@pytest.mark.parametrize("other", [["--every", "30s"], ["--arl", "1d"], ["--logs", "other"]])
def test_a_state_of_another_watch_is_refused(
    other: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = replays.write(tmp_path / "log", replays.replay(0.5))
    options = ("--variant", "merged", "--once", "--state", tmp_path / "state")
    assert command("watch", run, *options, "--logs", log) == 0
    logs = [] if "--logs" in other else ["--logs", log]
    assert command("watch", run, *options, *logs, *other) == 2
    assert "--state" in errors(capsys)


# ---- a server, and Prometheus --------------------------------------------------------------------


def test_a_gateways_metrics_are_watched(fast_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url) as gateway:
        options = (fast_run, "--server", gateway.url, "--state", tmp_path / "kept", "--arl", "1h")
        first = Watched(capsys, *options)
        assert (first.code, first.of("window")) == (3, [])
        for _ in range(25):
            assert gateway.ask().status_code == 200
        second = Watched(capsys, *options)
        (window,) = second.of("window")
        assert second.code == 0
        assert window["adapters"]["base"]["asked"] == 25
        assert window["adapters"]["base"]["tokens_per_s"] > 0
        broken = []
        for _ in range(2):
            for _ in range(25):
                gateway.ask("oom")
            broken.append(Watched(capsys, *options))
        assert {each.of("window")[0]["adapters"]["base"]["oom"] for each in broken} == {25}
        assert {alarm["name"] for each in broken for alarm in each.of("alarm")} == {"oom"}
        assert [each.code for each in broken] == [1 if each.of("alarm") else 0 for each in broken]


def test_a_watch_goes_on_until_it_is_interrupted(fast_run: Path, tmp_path: Path) -> None:
    with paced() as engine, serving(tmp_path, "--upstream", engine.url) as gateway:
        options = ("--server", gateway.url, "--state", tmp_path / "kept", "--every", "1s", "--arl", "1h")
        said = tmp_path / "watched.txt"
        with said.open("w") as out:
            started = [sys.executable, "-m", "peftopt.cli", "watch", fast_run, *options]
            process = subprocess.Popen(list(map(str, started)), stdout=out, stderr=out, text=True)
        try:
            wait_until(lambda: asked(gateway) and seen(said) >= 60, said.read_text)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, said.read_text()
        finally:
            process.kill()
            process.wait()
    assert "nothing shows" in said.read_text().splitlines()[-1]
    assert "false alarm" in said.read_text()


def asked(gateway: Any) -> bool:
    """Whether a request was answered: how many come before the watch's first look is not known."""
    gateway.ask()
    return True


def seen(said: Path) -> int:
    """The requests that a watch has told of."""
    return sum(int(count) for count in re.findall(r"base: (\d+) request", said.read_text()))


def looks(gateway_url: str) -> Iterator[str]:
    import httpx2

    while True:
        yield httpx2.get(f"{gateway_url}/metrics", timeout=60.0).text


def test_what_prometheus_has_kept_is_watched(
    fast_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looks at a real gateway, in the form of Prometheus' API."""
    with paced() as engine, serving(tmp_path, "--upstream", engine.url) as gateway:
        look, texts = looks(gateway.url), []
        for prompt in ("hi", "hi", "oom", "oom", "oom"):
            texts.append(next(look))
            for _ in range(25):
                gateway.ask(prompt)
        texts.append(next(look))
    with recorded(texts, step_s=60.0) as url:
        options = (fast_run, "--prometheus", url, "--state", tmp_path / "kept", "--since", "10m", "--arl", "1h")
        watched = Watched(capsys, *options)
        assert [window["adapters"]["base"]["failed"] for window in watched.of("window")] == [0, 0, 25, 25, 25]
        assert (watched.code, watched.kinds) == (1, {"errors"})
        again = Watched(capsys, *options)
        assert (again.code, again.of("window")) == (3, [])
        assert command("watch", *options, "--once", "--select", 'job="other"') == 2  # the state is of all


@needs_prometheus
def test_a_real_prometheus_is_watched(fast_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        paced() as engine,
        serving(tmp_path, "--upstream", engine.url) as gateway,
        scraping(tmp_path, gateway.url.removeprefix("http://")) as server,
    ):
        options = (fast_run, "--prometheus", server.url, "--select", 'job="test"', "--state", tmp_path / "kept")
        windows: list[dict[str, Any]] = []

        def asked() -> bool:
            gateway.ask()
            watched = Watched(capsys, *options, "--every", "1s", "--since", "10s")
            windows.extend(watched.of("window"))
            return watched.code != 4 and _of_base(windows, "asked") >= 3

        wait_until(asked)
    assert _of_base(windows, "failed") == 0


def _of_base(windows: list[dict[str, Any]], figure: str) -> int:
    return sum(window["adapters"].get("base", {}).get(figure, 0) for window in windows)
