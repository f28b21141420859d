"""An adapter whose tokenizer, chat template or end of an answer is not its base's is found by what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import RECIPE, command, errors, prompts

from peftopt.errors import BadInput
from peftopt.models.drift import drifts
from peftopt.models.template import ends

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def adapter(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> Path:
    """One that brings its base's own tokenizer."""
    folder = Path(shutil.copytree(tiny_lora, tmp_path / "lora"))
    for name in TOKENIZER:
        shutil.copyfile(tiny_base / name, folder / name)
    return folder


def edited(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def words(folder: Path) -> dict[str, int]:
    return dict(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])


def test_the_bases_own_files_and_added_tokens_are_no_drift(tiny_base: Path, adapter: Path) -> None:
    assert drifts(tiny_base, tiny_base) == drifts(tiny_base, adapter) == []
    new = {"id": 100_000, "content": "<<own>>", "special": True}
    edited(adapter / "tokenizer.json", lambda read: read["added_tokens"].append(new))
    assert drifts(tiny_base, adapter) == []


def test_a_template_that_writes_the_same_is_no_drift(tiny_base: Path, adapter: Path) -> None:
    """As trainers mark the part of an answer that is learned."""
    file = adapter / "chat_template.jinja"
    file.write_text("{#- marked for training #}" + file.read_text())
    assert drifts(tiny_base, adapter) == []


def swapped(read: Any) -> None:
    vocabulary = read["model"]["vocab"]
    one, other = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def without(read: Any) -> None:
    vocabulary = read["model"]["vocab"]
    del vocabulary[next(token for token in vocabulary if token.isalpha())]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("tokenizer.json", swapped, "in the adapter's tokenizer and"),
        ("tokenizer.json", without, "the adapter's tokenizer lacks"),
        ("tokenizer.json", lambda read: read["model"]["merges"].reverse(), "joins parts of words otherwise"),
        (
            "tokenizer_config.json",
            lambda read: read.update(eos_token="<|endoftext|>"),
            "the adapter ends an answer with <|endoftext|>",
        ),
    ],
)
def test_what_differs_is_named(
    file: str, change: Callable[[Any], object], says: str, tiny_base: Path, adapter: Path
) -> None:
    edited(adapter / file, change)
    (found,) = drifts(tiny_base, adapter)
    assert says in found


def test_another_end_that_the_base_ends_at_too_is_no_drift(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    edited(adapter / "tokenizer_config.json", lambda read: read.update(eos_token="<|endoftext|>"))
    id_ = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    other = next(token["id"] for token in id_ if token["content"] == "<|endoftext|>")
    edited(base / "generation_config.json", lambda read: read.update(eos_token_id=[*ends(base), other]))
    assert drifts(base, adapter) == []


def test_a_template_that_writes_another_chat_is_named_from_where_it_differs(tiny_base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text(TURN.replace("<|im_end|>", "<|endoftext|>") + PROMPT)
    (found,) = drifts(tiny_base, adapter)
    assert "chat template" in found and "<|endoftext|>" in found and "<|im_end|>" in found


def test_files_that_are_broken_are_somebody_elses_to_name(tiny_base: Path, adapter: Path) -> None:
    for text in ("{", "[]", '{"model": 5}', '{"model": {"vocab": 7}}'):
        (adapter / "tokenizer.json").write_text(text)
        assert drifts(tiny_base, adapter) == []


def test_a_merge_of_a_drifted_adapter_is_rejected_unless_it_is_wanted(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(adapter / "tokenizer.json", swapped)
    asked = ["merge", "--base", tiny_base, "--adapter", adapter, "--out", tmp_path / "out"]
    assert command(*asked) == 1
    assert "in the adapter's tokenizer and" in errors(capsys) and not (tmp_path / "out").exists()
    assert command(*asked, "--allow-base-mismatch") == 0


def test_a_run_rejects_what_holds_a_drifted_adapter_and_check_says_it_ahead(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(adapter / "tokenizer.json", swapped)
    recipe, results = tmp_path / "tiny.yaml", tmp_path / "results"
    text = RECIPE.format(base=tiny_base, adapter=adapter, prompts=prompts(tmp_path / "eval.jsonl", 12, "eval"))
    recipe.write_text(text.replace("  int8: [merge, int8]\n", ""))
    assert command("check", recipe, "--results", results, "--no-forecast") == 0
    said = errors(capsys)
    assert "drifted from its base" in said and "in the adapter's tokenizer and" in said
    assert command("run", recipe, "--results", results, "--quiet") == 1
    (folder,) = (results / "runs").iterdir()
    merged = next(v for v in json.loads((folder / "decision.json").read_text())["variants"] if v["name"] == "merged")
    intact = next(v for v in merged["verdicts"] if v["rule"] == "artifact.intact")
    assert merged["outcome"] == intact["outcome"] == "rejected" and "tokenizer" in intact["reason"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_alpha", -16), ("r", -8), ("lora_alpha", float("nan")), ("lora_alpha", float("inf"))],
)
def test_a_scale_or_rank_below_0_is_refused_by_its_field(
    field: str, value: float, tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(adapter / "adapter_config.json", lambda read: read.update({field: value}))
    assert command("merge", "--base", tiny_base, "--adapter", adapter, "--out", tmp_path / "out") == 2
    assert f"adapter_config.json: {field} is {json.dumps(value)}" in errors(capsys)


def test_a_pattern_of_scales_below_0_is_refused_too(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(adapter / "adapter_config.json", lambda read: read.update(alpha_pattern={"q_proj": -1}))
    assert command("merge", "--base", tiny_base, "--adapter", adapter, "--out", tmp_path / "out") == 2
    assert "alpha_pattern of q_proj is -1" in errors(capsys)


@pytest.mark.parametrize(
    "change",
    [{"vocab": [1, 2]}, {"vocab": [["a", 1], [["x"], 2]]}, {"merges": 7}],
    ids=["numbers", "a list for a token", "a number for merges"],
)
def test_a_tokenizer_of_other_types_is_named(change: dict[str, Any], tiny_base: Path, adapter: Path) -> None:
    edited(adapter / "tokenizer.json", lambda read: read["model"].update(change))
    with pytest.raises(BadInput, match="cannot be read"):
        drifts(tiny_base, adapter)
