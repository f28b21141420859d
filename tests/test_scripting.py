"""What a script and a shell get: one shape of JSON, errors in it, no colours off a terminal, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import RECIPE, command, prompts
from typer.main import get_command

from peftopt.cli.shared import app
from peftopt.errors import CLOSED_PIPE

ROOT = Path(__file__).parents[1]
QUICK = ROOT / "results" / "example" / "quick"
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|38|48|4[0-7])[0-9;]*m")


def verbs(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            yield from verbs(each, (*before, name))
        else:
            yield (*before, name), each


VERBS = dict(verbs(get_command(app)))


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one object that a verb printed, on one line."""
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


# ---- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_has_json(words: tuple[str, ...]) -> None:
    assert any("--json" in option.opts for option in VERBS[words].params)


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_an_option_that_is_not_known_is_an_error_in_json_too(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words, "--no-such-option", "--json") == 2
    error = said(capsys)["error"]
    assert error["exit_code"] == 2 and "--no-such-option" in error["message"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, tiny_lora: Path) -> Path:
    """A folder with a run, a base, an adapter, prompts and a recipe."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(QUICK, tmp_path / "results" / "runs" / "20261128T000000-quick-1")
    asked = prompts(tmp_path / "p.jsonl", 8, "eval")
    (tmp_path / "r.yaml").write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=asked.name))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("doctor",), "versions"),
        (("list",), "engines"),
        (("runs",), "runs"),
        (("clean",), "artifacts"),
        (("env", "list"), "environments"),
        (("check", "r.yaml", "--no-forecast"), "variants"),
        (("check", "r.yaml"), "slower"),
        (("decide",), "chosen"),
        (("export-data", "--to", "t.csv"), "rows"),
        (("report",), "text"),
        (("report", "--only", "rules"), "html"),
        (("compare", "results/runs/20261128T000000-quick-1", "results/runs/20261128T000000-quick-1"), "values"),
        (("schema", "decision"), "title"),
        (("new", "n.yaml", "--like", "quick"), "next"),
        (("export", "k8s", "--to", "out", "--", "--upstream", "http://engine:8000"), "files"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_a_result_is_one_object_on_one_line(
    words: tuple[str, ...], key: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serves = words.index("--") if "--" in words else len(words)  # what stands behind it are words of `serve`
    assert command(*words[:serves], "--json", *words[serves:]) == 0
    assert key in said(capsys)


def test_what_a_gateway_prints_when_it_listens_does_not_mix_with_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("serve", "--upstream", "http://127.0.0.1:9", "--json", "--log", "-") == 2
    assert "--log" in said(capsys)["error"]["message"]


def test_a_comparison_is_written_and_printed_in_one_call(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = "results/runs/20261128T000000-quick-1"
    assert command("compare", run, run, "--json", "-o", "c.html") == 0
    assert said(capsys)["format"] and "<html" in (home / "c.html").read_text()
    assert command("compare", run, run, "--json", "--format", "html") == 2


def test_a_model_that_is_written_and_one_that_would_be_are_objects(
    home: Path, tiny_base: Path, tiny_lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = ("--base", tiny_base, "--adapter", tiny_lora, "--json")
    assert command("merge", *ends, "--dry-run") == 0
    assert said(capsys)["tensors"]
    assert command("merge", *ends, "--out", "merged", "--certify", "blocks") == 0
    assert said(capsys)["path"] == "merged"
    assert command("quantize", "--method", "int8", "--model", "merged", "--out", "int8", "--json") == 0
    assert said(capsys)["size_bytes"] > 0


def test_the_mistakes_of_a_recipe_are_in_the_error_with_their_lines(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (home / "r.yaml").read_text()
    (home / "r.yaml").write_text(
        text.replace("merged: [merge]", "merged: [marge]").replace("requests: 2", "requests: 0")
    )
    assert command("check", "r.yaml", "--json") == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error["exit_code"] == 2 and {problem["line"] for problem in error["problems"]} == {7, 10}
    assert any("merge" in problem["hint"] for problem in error["problems"])
    assert "marge" in printed.err, "people read it too"


def test_an_error_has_its_hint_and_without_json_stdout_is_empty(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("decide", "no-such-run", "--json") == 2
    error = said(capsys)["error"]
    assert "no-such-run" in error["message"] and error["hint"] and "problems" not in error
    assert command("decide", "no-such-run") == 2
    assert capsys.readouterr().out == ""


def test_a_bug_is_an_error_of_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from peftopt import environments

    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(environments, "known", broken)
    assert command("env", "list", "--json") == 5
    assert said(capsys)["error"]["exit_code"] == 5


# ---- colours -----------------------------------------------------------------------------------


def on_a_terminal(*arguments: str, **settings: str) -> str:
    """What a verb writes to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    environment = {**plain, "TERM": "xterm-256color", **settings}
    words = [sys.executable, "-m", "peftopt.cli", *arguments]
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        written = b"".join(iter(lambda: _read(ours), b""))
        process.wait(60)
    os.close(ours)
    return written.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed, which Linux says so
        return b""


def test_a_terminal_gets_colours_unless_no_color_is_set() -> None:
    coloured = on_a_terminal("decide", "no-such-run")
    assert COLOUR.search(coloured) and "no-such-run" in coloured
    for settings in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_a_terminal("decide", "no-such-run", **settings)
        assert not COLOUR.search(plain) and "no-such-run" in plain


ALL = """
import sys
from peftopt.cli import main
for words in sys.argv[1:]:
    try:
        main(words.split())
    except SystemExit as ended:
        print("ENDED", ended.code)
"""


def test_a_pipe_gets_no_colours_from_any_verb(home: Path) -> None:
    words = ["doctor", "list", "runs", "clean", "env list", "check r.yaml --no-forecast", "check none.yaml", "decide"]
    words += ["export-data --to t.csv", "report", "--help", "decide --help", "bench", "list --nothing", "schema"]
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    environment = {**plain, "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", ALL, *words], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.count("ENDED") == len(words), done.stderr
    assert "\x1b" not in done.stdout and "\x1b" not in done.stderr


# ---- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"_PEFTOPT_COMPLETE": "complete_bash", "COMP_WORDS": "peftopt mer", "COMP_CWORD": "1"}, {"merge"}),
        (
            {"_PEFTOPT_COMPLETE": "complete_bash", "COMP_WORDS": "peftopt schema d", "COMP_CWORD": "2"},
            {"decision", "diagnosis"},
        ),
        ({"_PEFTOPT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "peftopt mer"}, {"merge"}),
        (
            {
                "_PEFTOPT_COMPLETE": "complete_fish",
                "_TYPER_COMPLETE_ARGS": "peftopt mer",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
            {"merge"},
        ),
    ],
    ids=["bash", "bash, a value", "zsh", "fish"],
)
def test_a_shell_is_told_how_a_word_goes_on(settings: dict[str, str], expected: set[str]) -> None:
    script = Path(sys.executable).with_name("peftopt")
    done = subprocess.run([script], capture_output=True, text=True, env={**os.environ, **settings}, timeout=60)
    words = {*re.findall(r"[a-z]+", done.stdout)}
    assert expected <= words and "quantize" not in words, done


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_that_asks_for_completions(shell: str) -> None:
    script = Path(sys.executable).with_name("peftopt")
    environment = {**os.environ, "_PEFTOPT_COMPLETE": f"source_{shell}"}
    done = subprocess.run([script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and f"complete_{shell}" in done.stdout


@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("--help",), ("schema",), ("list", "nothing")])
def test_a_disk_that_takes_no_more_output_is_the_machines_and_said_once(arguments: tuple[str, ...]) -> None:
    command_line = [sys.executable, "-m", "peftopt.cli", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command_line, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, timeout=120)
        unheard = subprocess.run(command_line, stdout=full, stderr=full, env=buffered, timeout=120)
    wrong = "nothing" in arguments
    assert ended.returncode == unheard.returncode == (2 if wrong else 4)
    assert ended.stderr.count("error:") == 1 and "bug" not in ended.stderr and "Traceback" not in ended.stderr
    assert wrong or "No space left" in ended.stderr


@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("--help",), ("schema",)])
def test_who_stops_reading_gets_neither_a_verdict_nor_a_word(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command_line = [sys.executable, "-m", "peftopt.cli", *arguments]
    try:
        ended = subprocess.run(command_line, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writing)
    assert ended.returncode == CLOSED_PIPE and not ended.stderr
