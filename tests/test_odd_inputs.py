"""Configs, templates and requests that are out of the ordinary: answered where they can be, else refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import command, errors

from peftopt.corpus import Row
from peftopt.engines import _traced, eager
from peftopt.engines._text import rendered
from peftopt.errors import BadInput
from peftopt.models import hf, template
from peftopt.records import Model
from peftopt.transforms import _layers

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]


def opened(folder: Path) -> eager.Transformers:
    return eager.open(Model(str(folder)), eager.Params(device="cpu"))


def settings(folder: Path, **values: Any) -> None:
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **values}))


def gpt2(folder: Path, tokenizer: Path) -> Path:
    """A model whose embeddings do not know of padding, with the tokenizer of another."""
    import transformers

    config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, vocab_size=400, eos_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [-1, None])
def test_padding_that_is_no_token_changes_no_answer(padding: int | None, tiny_base_fp32: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base_fp32, tmp_path / "base")
    settings(folder, pad_token_id=padding)
    engine, usual = opened(folder), opened(tiny_base_fp32)
    for stop in (False, True):
        answers, wanted = (e.generate(PROMPTS, 8, stop=stop) for e in (engine, usual))
        assert [a.tokens for a in answers] == [w.tokens for w in wanted]
    scores, wanted_scores = (e.score(PROMPTS, [[5, 6], [7]]) for e in (engine, usual))
    assert [s.logprobs for s in scores] == [w.logprobs for w in wanted_scores]


def test_padding_beyond_the_vocabulary_is_no_token_either(tiny_base: Path, tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "model", tiny_base)
    settings(folder, pad_token_id=10**6)
    assert all(len(answer.tokens) == 4 for answer in opened(folder).generate(PROMPTS, 4, stop=False))


def test_a_config_that_no_model_can_be_made_of_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    settings(folder, pad_token_id=10**6)
    for build in (lambda: opened(folder), lambda: _layers.find(hf.config(str(folder)))):
        with pytest.raises(BadInput, match="cannot build the model"):
            build()


# ---- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ a.b.c }}", "{% if %}"])
def test_a_template_that_fails_is_refused_whatever_it_raises(broken: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(broken)
    rows = [Row("1", ({"role": "user", "content": "hello"},))]
    template.check(folder, rows)  # it may be for want of what only the tokenizer hands it
    assert template.endless(folder, folder) == ""
    with pytest.raises(BadInput, match="the chat template refuses"):
        rendered(hf.tokenizer(str(folder)), rows[0].messages)


def test_without_an_end_in_the_configs_the_tokenizers_own_is_looked_at(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    settings(folder, eos_token_id=None)
    assert template.endless(folder, folder) == ""
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    assert "<|endoftext|>" in template.endless(folder, folder)


def test_an_adapter_that_is_not_there_is_refused(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "eval.jsonl"
    rows.write_text(json.dumps({"id": "1", "prompt": "hello"}) + "\n")
    asked = ("bench", "--model", tiny_base, "--adapter", tmp_path / "none", "--prompts", rows, "--blocks", 1)
    assert command(*asked) == 2
    assert "none" in errors(capsys)


# ---- weights -------------------------------------------------------------------------------------


def test_int8_weights_are_where_the_kernel_can_read_them() -> None:
    """Out of a safetensors file they lie at a multiple of 8 bytes, and the kernel reads 16 or more at a time."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False).bfloat16())
    quantize_(model, Int8WeightOnlyConfig())
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    (linear,) = model
    wanted = linear(x)
    buffer = torch.empty(64 * 64 + 64, dtype=torch.int8)
    at = next(n for n in range(64) if buffer[n:].data_ptr() % 16 == 8)
    linear.weight.qdata = buffer[at : at + 64 * 64].view(64, 64).copy_(linear.weight.qdata)
    _traced.bind_linears(model)
    assert linear.int8[0].data_ptr() % 16 == 0, "it would die by SIGSEGV"
    assert linear.weight.qdata is linear.int8[0], "not held twice"
    torch.testing.assert_close(linear(x), wanted, rtol=0.02, atol=0.02)
