"""Chat templates, empty prompts and the tokens that end an answer: known before a model is loaded."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command
from helpers.command_line import prompts as written
from helpers.records import evidence_of, plan_of, quality

from peftopt.corpus import Row
from peftopt.decision.decide import unstopped
from peftopt.engines import eager
from peftopt.errors import BadInput
from peftopt.models import hf, rendering, template
from peftopt.models.rendering import Unrendered
from peftopt.records import Model
from peftopt.runner import process

REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if loop.index0 % 2 == 0 and m.role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base with another template ("" for none), or other ids."""

    def make(text: str | None = None, **ids: Any) -> Path:
        folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
        if text is not None:
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings.pop("chat_template", None)
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            if text:
                (folder / "chat_template.jinja").write_text(text)
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((folder / name).read_text()) | ids
            (folder / name).write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started: what is refused is refused before."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(process.WorkerProcess, "__enter__", never)


def lines(path: Path, *chats: list[dict[str, str]]) -> Path:
    rows = [{"id": f"row-{n}", "messages": messages} for n, messages in enumerate(chats)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- prompts that the template refuses -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([SYSTEM, USER], "System role not supported"),
        ([USER, ANSWER, ANSWER, USER], "roles must alternate"),
    ],
)
@pytest.mark.parametrize("verb", ["bench", "compile", "quantize"])
@pytest.mark.usefixtures("unstarted")
def test_a_row_that_the_template_refuses_is_named_before_anything_starts(
    verb: str,
    chat: list[dict[str, str]],
    says: str,
    base: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, model = lines(tmp_path / "p.jsonl", [USER], chat), base(REFUSES)
    options: dict[str, list[object]] = {
        "bench": ["--prompts", asked],
        "compile": ["--prompts", asked],
        "quantize": ["--method", "gptq", "--calibration", asked, "--out", tmp_path / "out", "--samples", 1],
    }
    assert command(verb, "--model", model, *options[verb]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "row-1" in said and says in said and "Traceback" not in said and "hint:" in said


@pytest.mark.usefixtures("unstarted")
def test_check_names_the_row_too(
    base: Callable[..., Path], tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {base(REFUSES)}, adapter: {tiny_lora}}}\n"
        f"workloads:\n  chat: {{prompts: {lines(tmp_path / 'p.jsonl', [USER], [SYSTEM, USER])}, new_tokens: 4}}\n"
        "variants:\n  adapter: []\n  merged: [merge]\nminimize: latency.p50@chat\n"
    )
    assert command("check", recipe) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "row-1" in said and "System role not supported" in said


def test_a_template_that_only_the_tokenizer_understands_is_left_to_it(base: Callable[..., Path]) -> None:
    template.check(base("{{ nobody.knows.this }}"), [Row("1", (USER,))])


def test_an_engine_says_the_same_of_what_reaches_it(base: Callable[..., Path]) -> None:
    engine = eager.open(Model(str(base(REFUSES))), eager.Params(device="cpu"))
    with pytest.raises(BadInput, match="System role not supported"):
        engine.encode([SYSTEM, USER])


def test_the_template_renders_as_the_tokenizer_does(tiny_base: Path) -> None:
    own = hf.tokenizer(str(tiny_base))
    for chat in ([USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "a"}, USER]):
        assert template.read(tiny_base).render(chat) == own.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )


# ---- prompts of nothing --------------------------------------------------------------------------------


@pytest.mark.usefixtures("unstarted")
def test_an_empty_prompt_without_a_template_is_named(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = lines(tmp_path / "p.jsonl", [USER], [{"role": "user", "content": ""}])
    assert command("bench", "--model", base(""), "--prompts", asked) == 2
    assert "row-1" in (said := capsys.readouterr().err) and "empty" in said


def test_an_empty_prompt_is_one_where_a_template_or_a_tokenizer_puts_something(base: Callable[..., Path]) -> None:
    nothing = [Row("1", ({"role": "user", "content": ""},))]
    model = base("")
    with pytest.raises(BadInput):
        template.check(model, nothing)
    with pytest.raises(BadInput, match="empty"):
        eager.open(Model(str(model)), eager.Params(device="cpu")).encode(nothing[0].messages)
    file = model / "tokenizer.json"
    settings = json.loads(file.read_text())
    piece = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    file.write_text(json.dumps(settings))
    template.check(model, nothing)
    (model / "chat_template.jinja").write_text("x{{ messages[0].content }}")
    template.check(model, nothing)


# ---- ids that mean nothing -----------------------------------------------------------------------------


def test_a_padding_of_minus_one_is_none(base: Callable[..., Path]) -> None:
    plain, odd = base(), {"pad_token_id": -1, "eos_token_id": [2, -1]}
    prompts = [[5, 6, 7, 8], [9]]
    expected = eager.open(Model(str(plain)), eager.Params(device="cpu")).generate(prompts, 6, stop=False)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((plain / name).read_text()) | odd
        (plain / name).write_text(json.dumps(settings))
    engine = eager.open(Model(str(plain)), eager.Params(device="cpu"))
    assert engine.eos == {2}
    assert [g.tokens for g in engine.generate(prompts, 6, stop=False)] == [g.tokens for g in expected]
    assert len(engine.score(prompts, [[4, 5], [6, 7]])) == 2


# ---- answers that cannot end ---------------------------------------------------------------------------


def test_the_token_that_ends_a_turn_is_looked_for_among_those_that_end_an_answer(base: Callable[..., Path]) -> None:
    """Gemma 3: the base ends a text with <eos>, its template a turn with <end_of_turn>."""
    model = base(eos_token_id=0)
    assert template.closes(model) == ("<|im_end|>", 2)
    said = template.endless(model, model)
    assert "<|im_end|> (2)" in said and "eos_token_id" in said
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert template.endless(model, model) == ""


def test_nothing_is_said_where_nothing_is_known(base: Callable[..., Path]) -> None:
    model = base("{{ messages[0].content }}", eos_token_id=0)
    assert template.closes(model) is None and template.endless(model, model) == ""
    (model / "chat_template.jinja").write_text(REFUSES + "no token")
    assert template.endless(model, model) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<end>\n", ("<end>", 7)),
        (" \n<end><eos>", ("<end>", 7)),
        ("<end_of_turn>", ("<end_of_turn>", 8)),
        ("and so on<end>", None),
        ("", None),
    ],
)
def test_the_first_token_after_an_answer_ends_it(text: str, found: tuple[str, int] | None) -> None:
    assert template.first_token(text, {"<end>": 7, "<end_of_turn>": 8, "<eos>": 1}) == found


@pytest.mark.parametrize("verb", ["check", "bench"])
def test_a_user_is_told_and_the_token_proposed(
    verb: str, base: Callable[..., Path], tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, model, recipe = written(tmp_path / "p.jsonl", 4, "x"), base(eos_token_id=0), tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {model}, adapter: {tiny_lora}}}\nworkloads:\n  chat: {{prompts: {asked}, new_tokens: 4}}\n"
        "variants:\n  adapter: []\n  merged: [merge]\nminimize: latency.p50@chat\n"
    )
    bench = ["--model", model, "--prompts", asked, "--blocks", 1, "--new-tokens", 2]
    assert command(verb, *([recipe] if verb == "check" else bench)) == 0
    assert "<|im_end|> (2)" in " ".join(capsys.readouterr().err.split())


def test_answers_of_which_none_stopped_are_said() -> None:
    (answer, *_) = evidence_of(plan_of(), quality("adapter", 1)).rows("adapter").values()
    long = [replace(answer, stopped=False, new_tokens=48)] * 24
    assert "0 of 24 answers" in unstopped(long) and "48 tokens" in unstopped(long)
    assert unstopped([*long, answer]) == ""
    assert unstopped(long[:2]) == unstopped([]) == ""


@pytest.mark.parametrize(
    "reach", ["''.__class__.__mro__[1].__subclasses__()", "messages.append.__globals__['os'].environ"]
)
def test_a_template_does_not_reach_python(reach: str) -> None:
    with pytest.raises(Unrendered, match="unsafe"):
        template.Template("{{ " + reach + " }}", {}).render([{"role": "user", "content": "hello"}])


@pytest.mark.fault(26, "a chat template that loops for ever, or takes all memory, is ended and named, exit 2")
@pytest.mark.parametrize(
    ("greedy", "takes"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ 'x' * 9999999999 }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory"),
    ],
    ids=["time", "memory", "memory-of-a-format"],
)
def test_a_template_without_an_end_is_refused_and_the_next_is_rendered(
    greedy: str, takes: str, base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "LIMIT_S", 1.0)
    with pytest.raises(BadInput, match=takes):
        template.check(base(greedy), [Row("1", (USER,))])
    assert template.Template("{{ messages[0].content }}", {}).render([USER]) == "hello"


@pytest.mark.fault(26, "so is the base's, where the adapter brings a tokenizer without a chat template")
@pytest.mark.usefixtures("unstarted")
def test_the_template_of_the_base_is_tried_where_the_adapters_tokenizer_has_none(
    base: Callable[..., Path],
    tiny_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rendering, "LIMIT_S", 1.0)
    below = base("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    lora = Path(shutil.copytree(tiny_lora, tmp_path / "lora"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(below / name, lora / name)
    questions = lines(tmp_path / "p.jsonl", [USER])
    assert command("bench", "--model", below, "--adapter", lora, "--prompts", questions) == 2
    assert "one chat takes the chat template more than 1 s" in " ".join(capsys.readouterr().err.split())


def test_the_process_that_renders_ends_when_nobody_asks_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left while a run is timed."""
    monkeypatch.setattr(rendering, "_process", functools.cache(rendering._Process))
    monkeypatch.setattr(rendering, "IDLE_S", 0.1)
    plain = template.Template("{{ messages[0].content }}", {})
    assert plain.render([USER]) == "hello"
    child = rendering._process()._child
    assert child is not None and child.wait(30) != 0
    assert plain.render([USER]) == "hello"


@pytest.mark.fresh_workers
def test_nothing_of_the_current_folder_is_run_where_a_template_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stands in a downloaded model's folder does not run its `transformers.py`."""
    (tmp_path / "transformers.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rendering, "_process", functools.cache(rendering._Process))
    assert template.Template("{{ messages[0].content }}", {}).render([USER]) == "hello"
    assert not (tmp_path / "ran").exists()


def test_a_template_too_deep_for_python_is_left_to_the_tokenizer() -> None:
    deep = "{% for a in messages %}" * 25 + "x" + "{% endfor %}" * 25
    with pytest.raises(Unrendered, match="nested"):
        template.Template(deep, {}).render([USER])


INTERRUPTED = """
import os, signal
from peftopt.models import rendering
from peftopt.models.template import Template

hello, plain = [{"role": "user", "content": "hello"}], Template("{{ messages[0].content }}", {})
plain.render(hello)
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.killpg(0, signal.SIGINT)
print(plain.render(hello), rendering._process()._child.poll())
"""
"""Renders, gets the Ctrl-C of a terminal, which reaches the whole group, and renders again."""


def test_ctrl_c_is_not_for_the_process_that_renders() -> None:
    """Its traceback would stand among what peftopt says."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["hello", "None"], "")
