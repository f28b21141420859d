"""`peftopt export`: what others start a gateway by is whole, says what was asked, and waits long enough for its end."""

from __future__ import annotations

import configparser
import math
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import command, errors
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.cli.export import Here, Target, deployed, parsed
from peftopt.deploy import files
from peftopt.deploy.deployed import Exported, outermost
from peftopt.deploy.files import unit_word
from peftopt.engines._server import STOP_S

ROOT = Path(__file__).parent.parent
HERE = Here(Path("/srv/peftopt"), "/opt/peftopt/bin/python", "/opt/peftopt/environments")
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc", "Zl", "Zp")))


def exported(target: str, *arguments: str) -> Exported:
    return files.TARGETS[target](deployed(arguments, Target(target), HERE))


def only(target: str, *arguments: str) -> Any:
    """The parsed file of a target: a gateway of Compose, a Deployment."""
    text = exported(target, *arguments).files[0].text
    if target == "systemd":
        unit = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=")
        unit.optionxform = str  # type: ignore[method-assign,assignment]
        unit.read_string(text)
        return unit["Service"]
    if target == "compose":
        return yaml.safe_load(text)["services"]["gateway"]
    return next(part for part in yaml.safe_load_all(text) if part["kind"] == "Deployment")


# ---- times -------------------------------------------------------------------------------------


@settings(max_examples=20)  # each reads four files
@given(
    st.floats(0, 4000).map(lambda x: round(x, 2)),
    st.floats(0, 4000).map(lambda x: round(x, 2)),
    st.booleans(),
    st.integers(1, 4),
)
def test_who_stops_a_gateway_waits_for_its_drain_and_all_that_comes_after(
    drain: float, whole: float, own: bool, workers: int
) -> None:
    source = ("--base", "b") if own else ("--upstream", "http://engine:8000")
    arguments = (*source, "--drain", str(drain), "--whole", str(whole), "--workers", str(workers))
    times = deployed(arguments, Target.K8S, HERE).times
    least = math.ceil(drain) + (STOP_S if own else 0)
    assert times.stop.seconds > least
    pod = only("k8s", *arguments)["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] == pause + times.stop.seconds and pause >= 1
    assert only("compose", *arguments)["stop_grace_period"] == f"{times.stop.seconds}s"
    assert only("systemd", *arguments)["TimeoutStopSec"] == str(times.stop.seconds)
    for told in (times.stop, times.grace, times.start):
        seconds, parts = str(told).split(" s = ")
        assert int(seconds) == sum(int(part.split(" s ")[0]) for part in parts.split(" + ")) == told.seconds
    assert bool(times.cut) == (not whole or drain < whole), "who loses an answer is told"


@settings(max_examples=10)
@given(st.integers(0, 4000))
def test_a_pod_may_take_as_long_to_start_as_its_engine(drain: int) -> None:
    container = only("k8s", "--base", "b", "--drain", str(drain))["spec"]["template"]["spec"]["containers"][0]
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 600
    assert probe["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live", "an engine that starts is no dead gateway"


# ---- what was asked ----------------------------------------------------------------------------


@settings(max_examples=30)
@given(WORDS.filter(lambda word: not word.startswith("-") and word.strip()))
def test_the_arguments_arrive_as_they_were_given(word: str) -> None:
    arguments = ("--base", "models/base", "--args", f"x{word}")
    command_ = only("compose", *arguments)["command"]
    args = only("k8s", *arguments)["spec"]["template"]["spec"]["containers"][0]["args"]
    for found in (command_, args):
        options = parsed([each.replace("$$", "$") for each in found])
        assert options.args == f"x{word}" and options.base == Path("models/base")
        assert (options.host, options.state) == ("0.0.0.0", Path("/state"))


@given(WORDS)
def test_a_word_of_a_unit_is_one_word(word: str) -> None:
    """By systemd.syntax(7): quotes and backslashes are undone, and %% and $$ are one character."""
    written = unit_word(word)
    inner = written[1:-1] if written.startswith('"') else written
    assert written.startswith('"') or not re.search(r"\s|^$", inner)
    undone = re.sub(r"\\(.)", r"\1", inner).replace("%%", "%").replace("$$", "$")
    assert undone == word


def test_a_container_sees_what_serve_reads_and_writes_to_its_state_alone() -> None:
    arguments = ("--base", "models/base", "--adapter", "support=/data/adapters/support", "--adapters-from", "/data")
    more = ("--keys", "keys.txt", "--log", "log/requests.jsonl", "--admin-key-env", "ADMIN_KEY")
    pod = only("k8s", *arguments, *more)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert {"/srv/peftopt/models/base", "/data", "/srv/peftopt/keys.txt", "/state"} <= set(paths)
    assert "/data/adapters/support" not in paths, "it lies in another"
    assert container["workingDir"] == "/srv/peftopt" and container["args"][-2:] == ["--log", "-"]
    assert container["env"][0]["name"] == "ADMIN_KEY" and "value" not in container["env"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
    binds = [volume for volume in only("compose", *arguments, *more)["volumes"] if isinstance(volume, dict)]
    assert {bind["source"] for bind in binds} == {"/srv/peftopt/models/base", "/data", "/srv/peftopt/keys.txt"}
    assert all(bind["read_only"] and bind["source"] == bind["target"] for bind in binds)
    unit = only("systemd", *arguments, *more)
    assert unit["ReadWritePaths"].split() == ["/srv/peftopt/serve-state", "/srv/peftopt/log"]
    assert unit["KillMode"] == "mixed", "SIGTERM to workers and engine would end what drains"


def test_gunicorn_starts_the_workers_and_the_supervisor_that_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("uvicorn_worker")
    stub.UvicornWorker = type("UvicornWorker", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uvicorn_worker", stub)
    arguments = ("--upstream", "http://127.0.0.1:9000", "--workers", "3", "--drain", "40", "--port", "8080")
    conf: dict[str, Any] = {}
    exec(exported("gunicorn", *arguments).files[0].text, conf)
    options = parsed(conf["SUPERVISOR"][4:])
    assert conf["workers"] == options.workers == 3 and conf["bind"] == "127.0.0.1:8080"
    assert conf["raw_env"] == [f"PEFTOPT_JOIN={options.join}"] and options.join.startswith("/srv/peftopt/serve-state/")
    assert conf["worker_class"].CONFIG_KWARGS["timeout_graceful_shutdown"] == 40 < conf["graceful_timeout"]
    assert conf["timeout"] > 60, "a worker may wait so long for the supervisor"


def test_paths_in_others_are_left_out() -> None:
    assert outermost(["/a/b", "/a", "/a", "/ab"]) == ("/a", "/ab")


# ---- by others' own programs -------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    here = Here(tmp_path, sys.executable, str(tmp_path))
    what = deployed(("--base", "b", "--args", 'x "50% $y"', "--admin-key-env", "KEY"), Target.SYSTEMD, here)
    unit = tmp_path / "peftopt.service"
    unit.write_text(files.systemd(what).files[0].text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0 and "peftopt.service" not in done.stderr, done.stderr


def test_templates_are_in_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["peftopt"]
    packed = {file for pattern in data for file in (ROOT / "peftopt").glob(pattern)}
    assert packed.issuperset((ROOT / "peftopt").rglob("*.j2")) and list(files.TEMPLATES.glob("*.j2"))


# ---- the command line --------------------------------------------------------------------------


def test_files_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("export", "k8s", "--out", tmp_path / "out", "--", "--upstream", "http://engine:8000", "--drain", "700")
    assert command(*asked) == 0 and "warning" not in errors(capsys), "the drain is as long as an answer may take"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"peftopt.yaml", "Dockerfile"}
    assert command(*asked) == 2 and "peftopt.yaml" in errors(capsys)


@pytest.mark.parametrize(
    "arguments", [("--drain", "5"), ("--base", "b", "--upstream", "u"), ("--base", "b", "--join", "x"), ("--no-such",)]
)
def test_options_that_serve_does_not_take_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert command("export", "systemd", "--out", tmp_path / "out", "--", *arguments) == 2
    assert not (tmp_path / "out").exists()
