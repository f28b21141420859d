"""Secrets come in by many ways and land nowhere: not on the terminal, in no report, record, log or command line."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import RECIPE, command, errors, prompts
from helpers.gateways import serving
from helpers.paced import paced
from helpers.raw_server import SSE, Write, answering, at_once, http
from helpers.scripted import LAST, TOKEN, WHOLE, event, piece
from helpers.waiting import wait_until
from rich.console import Console as Rich
from rich.text import Text

from peftopt import redaction
from peftopt.cli import console
from peftopt.engines import llamacpp_server, vllm
from peftopt.errors import BadInput
from peftopt.gateway import backends
from peftopt.loadtest.http import Http
from peftopt.records import Model
from peftopt.watch.sources import fetching

CANARY = "canary-7f3a9e51c0"
LEAKED = "7f3a9e51c0"
TWO = ("--model", "a", "--model", "b")


def holds(folder: Path) -> list[str]:
    """The files below a folder that hold the canary."""
    return [str(f) for f in folder.rglob("*") if f.is_file() and LEAKED.encode() in f.read_bytes()]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": f"count to {n}"}) + "\n" for n in range(5)))
    return path


# ---- what is hidden ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        (f"the key is {CANARY}.", {"MY_API_KEY": CANARY}),
        (f"the key is {CANARY}.", {"hf_token": f"{CANARY}\r\n"}),
        (f"the key is {CANARY}.", {"SOME_SECRET": f"first line\n{CANARY}"}),
        (json.dumps(f'a"{CANARY}\\'), {"DB_PASSWORD": f'a"{CANARY}\\'}),
        (f"http://me:{CANARY}@host/path", {}),
        (f'{{"Authorization": "Bearer {CANARY}"}}', {}),
        (f"authorization: basic {CANARY}", {}),
        (f"--api-key {CANARY} --port 80", {}),
        (f"--hf-token={CANARY}", {}),
    ],
)
def test_a_secret_is_hidden(text: str, environ: dict[str, str]) -> None:
    hidden = redaction.redacted(text, environ)
    assert LEAKED not in hidden and redaction.HIDDEN in hidden


@pytest.mark.parametrize(
    "text",
    [
        "--max-num-batched-tokens 2048 --per-key 5 --key-env NAME --admin-key-env MY_KEY --keys keys.txt",
        "false 100000000 a short word",
        "http://host:8000/v1 and user@host.org, mailto:me@host.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    environ = {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "100000000", "KEY_KIND": "short", "PLAIN": text}
    assert redaction.redacted(text, environ) == text


def test_a_log_is_cleaned_and_one_without_a_secret_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", CANARY)
    log, other = tmp_path / "log", tmp_path / "other"
    log.write_bytes(b"one\r\n\xff two " + CANARY.encode() + b"\nthree")
    other.write_bytes(b"one\r\n\xff two")
    before = other.stat().st_ino
    redaction.scrub(log)
    redaction.scrub(other)
    redaction.scrub(tmp_path / "none")
    assert log.read_bytes() == b"one\r\n\xff two [redacted]\nthree" and other.stat().st_ino == before


# ---- keys --------------------------------------------------------------------------------------


def test_the_line_end_of_an_env_file_of_windows_is_no_part_of_a_key(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THE_KEY", f"{CANARY}\r")
    seen: list[Mapping[str, str]] = []
    built = Http.__init__

    def watched(self: Http, url: str, headers: Mapping[str, str], *rest: Any) -> None:
        seen.append(headers)
        built(self, url, headers, *rest)

    monkeypatch.setattr(Http, "__init__", watched)
    flags = ["--prompts", questions, "--requests", 1, "--concurrency", 1, "--new-tokens", 4, "--api-key-env", "THE_KEY"]
    with answering(lambda number: at_once(SSE + WHOLE)) as url:
        assert command("load", url, *flags) == 0
    assert seen[0]["Authorization"] == f"Bearer {CANARY}"
    assert LEAKED not in "".join(capsys.readouterr())


@pytest.mark.parametrize("key", [f"{CANARY}\rX", f"{CANARY}\nX", f"{CANARY}é"])
@pytest.mark.parametrize(
    "verb",
    [
        ["load", "http://127.0.0.1:1", "--prompts", "{prompts}", "--api-key-env", "THE_KEY"],
        ["canary", "http://127.0.0.1:1", "--prompts", "{prompts}", *TWO, "--api-key-env", "THE_KEY"],
        ["adapters", "list", "--admin", "127.0.0.1:1", "--key-env", "THE_KEY"],
        ["serve", "--upstream", "http://127.0.0.1:1", "--admin-key-env", "THE_KEY"],
    ],
    ids=lambda words: words[0],
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    key: str, verb: list[str], questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(questions.parent)
    monkeypatch.setenv("THE_KEY", key)
    assert command(*(word.format(prompts=questions) for word in verb)) == 2
    said = "".join(capsys.readouterr())
    assert "THE_KEY is not an API key" in " ".join(said.split()) and LEAKED not in said


@pytest.mark.parametrize("url", [f"http://me:{CANARY}@127.0.0.1:1", f"http://{CANARY}@127.0.0.1:1"])
def test_a_url_with_a_password_is_refused_and_not_shown(
    url: str, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(questions.parent)
    assert command("load", url, "--prompts", questions) == 2
    assert command("serve", "--upstream", url) == 2
    assert LEAKED not in "".join(capsys.readouterr())
    with pytest.raises(BadInput) as caught:
        fetching.get(url, "/metrics", "", "")
    assert LEAKED not in f"{caught.value.message} {caught.value.hint}"


def test_a_key_in_an_engines_args_is_refused_with_what_to_do_instead(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (f"--api-key {CANARY}", f"--hf-token={CANARY}", f"--x http://me:{CANARY}@host"):
        asked = [
            lambda args=args: vllm.command(Model("x"), vllm.Params(args=args), 1, ()),
            lambda args=args: llamacpp_server.command(Model("x"), llamacpp_server.Params(args=args), 1, "", 1, False),
            lambda args=args: backends.start(backends.Wanted("eager", Model("x"), args=args)),
        ]
        for ask in asked:
            with pytest.raises(BadInput, match="holds a secret") as caught:
                ask()
            assert LEAKED not in f"{caught.value.message} {caught.value.hint}" and "environment" in caught.value.hint
    recipe = tmp_path / "tiny.yaml"
    text = RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=prompts(tmp_path / "eval.jsonl", 12, "eval"))
    engine = f'{{engine: {{vllm: {{args: "--api-key {CANARY}"}}}}}}'
    recipe.write_text(text.replace("[merge, int8]", f"[merge, {engine}]"))
    for verb in ("check", "run"):
        assert command(verb, recipe, "--results", tmp_path / "results") == 2
        said = errors(capsys)
        assert "variant int8: args of vllm holds a secret (--api-key)" in said and LEAKED not in said
    assert holds(tmp_path) == [str(recipe)]


def test_servers_that_are_started_here_get_a_random_key_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(redaction.ENGINE_KEY, raising=False)
    ours = backends.start(backends.Wanted("eager", Model("x")))
    key = ours.variables[redaction.SERVER_KEY]
    assert len(key) > 30 and key == os.environ[redaction.ENGINE_KEY]
    assert vllm.own(loads=False)["VLLM_API_KEY"] == llamacpp_server.variables()["LLAMA_API_KEY"] == key
    words, variables = vllm.command(Model("x"), vllm.Params(), 1, ())
    assert not any(key in word for word in (*ours.command, *words)), "a list of processes shows command lines"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables | vllm.own(loads=False)
    assert vllm.own(loads=True)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert redaction.redacted(f"it is {key}") == "it is [redacted]"


# ---- a canary by each way in -------------------------------------------------------------------


def echoing(number: int) -> Write:
    """What a careless server answers: the key in an error, in a stream, and in an answer's text."""
    return (
        at_once(SSE + WHOLE),
        at_once(http(json.dumps({"error": {"message": f"bad key {CANARY}"}}).encode(), "401 Unauthorized")),
        at_once(SSE + TOKEN + event({"error": f"Authorization: Bearer {CANARY}"})),
        at_once(SSE + event(piece(f"your key is {CANARY}")) * 4 + LAST),
        at_once(http(f"proxy http://me:{CANARY}@host failed".encode(), "502 Bad Gateway", "text/plain")),
        at_once(SSE + TOKEN + event({"error": f"bad key {CANARY}"})),
    )[number % 6]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_load_leaves_no_key_anywhere(
    as_json: list[str],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("THE_CREDENTIALS", CANARY)
    monkeypatch.setenv("HTTP_PROXY", f"http://me:{CANARY}@127.0.0.1:1")
    out = tmp_path / "out"
    out.mkdir()
    flags = ["--prompts", questions, "--requests", 9, "--concurrency", 1, "--new-tokens", 4]
    with answering(echoing) as url:
        code = command("load", url, *flags, "--api-key-env", "THE_CREDENTIALS", "--out", out / "m.jsonl", *as_json)
    assert code == 0 and (out / "m.jsonl").exists()
    said = "".join(capfd.readouterr())
    assert LEAKED not in said and not holds(out)
    assert CANARY.partition("7")[0] not in said, "nor a part of it, where errors that differ in numbers are one kind"
    assert redaction.HIDDEN in (out / "m.jsonl").read_text(), "the server did say it"
    monkeypatch.setenv("NO_PROXY", "")
    assert command("load", "http://192.0.2.1:1", *flags, "--timeout", 2) == 4
    assert LEAKED not in "".join(capfd.readouterr())


def test_serve_leaves_no_key_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPERATORS_KEY", CANARY)
    with paced() as engine:
        engine.says, engine.status = {"error": {"message": f"bad key {CANARY}"}}, 500
        with serving(tmp_path, "--upstream", engine.url, "--admin-key-env", "OPERATORS_KEY", "--log-text") as gateway:
            assert gateway.ask(f"is it {CANARY}?").status_code == 500
            assert gateway.ask("hello", headers={"Authorization": f"Bearer {CANARY}"}).status_code == 500
            wait_until(lambda: len(gateway.lines()) == 2)
            code, said = gateway.operate("list", "--key-env", "OPERATORS_KEY")
            assert code == 0 and LEAKED not in said
    assert not holds(tmp_path)


def test_a_bugs_traceback_shows_no_key(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def known() -> None:
        raise KeyError(os.environ["MY_TOKEN"])

    monkeypatch.setenv("MY_TOKEN", CANARY)
    monkeypatch.setattr("peftopt.environments.known", known)
    for as_json in ([], ["--json"]):
        assert command("env", "list", *as_json) == 5
    said = capfd.readouterr()
    assert "KeyError" in said.err and "KeyError" in said.out and LEAKED not in said.err + said.out


# ---- the terminal ------------------------------------------------------------------------------

STEERING = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\r\x08\u202eright to left"


def test_what_would_steer_a_terminal_is_written_out() -> None:
    seen = console.visible(f"one\n\ttwo {STEERING} \ud800")
    assert seen.startswith("one\n\ttwo \\x1b]0;owned\\x07\\x1b[2J")
    steers = {*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0xD800, 0xE000)}
    assert not steers & {ord(sign) for sign in seen}
    assert "\u202e" not in seen and console.visible("Gänsefüßchen “日本” 🎉") == "Gänsefüßchen “日本” 🎉"


def test_everything_that_the_console_prints_is_visible(capfd: pytest.CaptureFixture[str]) -> None:
    out = console.Console()
    out.done(STEERING, STEERING, 1.0, STEERING)
    out.tell(STEERING)
    out.warn(STEERING)
    out.table([STEERING], [[STEERING]])
    out.say(STEERING)
    out.pairs(STEERING, {STEERING: STEERING})
    out.error(BadInput(STEERING, STEERING))
    with out.progress(STEERING, 2, "steps") as show:
        show(1, STEERING)
    with out.working(STEERING) as hear:
        hear(STEERING)
    console.print_text(STEERING)
    console.print_json({"a": STEERING})
    drawn = io.StringIO()
    Rich(file=drawn, force_terminal=True).print(console.Visible(Text.assemble(("name ", "red"), STEERING)))
    said = "".join(capfd.readouterr())
    for text in (said, drawn.getvalue().replace("\x1b[31m", "").replace("\x1b[0m", "")):
        assert "\x1b" not in text and "\x07" not in text and "\r" not in text and "\u202e" not in text
        assert "owned" in text


def test_a_servers_names_and_words_do_not_steer_the_terminal(
    questions: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = {"object": "list", "data": [{"id": f"a{STEERING}"}, {"id": "b"}]}
    listed = at_once(http(json.dumps(models).encode()))
    refused = at_once(http(json.dumps({"error": {"message": STEERING}}).encode(), "500 Oh"))
    flags = ["--prompts", questions, "--requests", 2, "--concurrency", 1]
    with answering(lambda number: refused, models=listed) as url:
        assert command("load", url, *flags) == 2
        assert command("load", url, *flags, "--model", "b") == 4
        assert command("load", url, *flags, "--model", STEERING) == 2
    said = "".join(capfd.readouterr())
    assert "owned" in said and not any(sign in said for sign in "\x1b\x07\x9b\u202e")


def test_an_unknown_option_does_not_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert command("load", f"--{STEERING}") == 2
    assert command("check", f"{STEERING}.yaml") == 2
    assert "\x1b" not in "".join(capfd.readouterr())
