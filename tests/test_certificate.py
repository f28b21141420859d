"""What a certificate may claim: bounds that follow the arithmetic, and memory that does not follow the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import SIZES, saved

from peftopt import progress
from peftopt.errors import BadInput
from peftopt.merging import certificate
from peftopt.records import Json, Model
from peftopt.transforms import merge


def adapter(base: Path, folder: Path, config: Any, std: float = 0.05) -> Path:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    adapted.save_pretrained(folder)
    return folder


def merged(base: Path, trained: Path, out: Path, **params: Any) -> dict[str, Json]:
    given = merge.Params(**{"certify": "blocks", **params})
    merge.transform(Model(str(base), (str(trained),)), given, out, [], 0)
    found: dict[str, Json] = json.loads((out / "parity.json").read_text())
    return {**found, "checks": {check["name"]: check for check in found["checks"]}}


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
def test_sums_as_long_as_a_layer_is_wide_pass(dtype: str, tmp_path: Path) -> None:
    """RandLora's delta is of full rank: fp32's own errors in it are several units of an fp32 base."""
    import torch
    import transformers
    from peft import RandLoraConfig

    torch.manual_seed(0)
    wide = {**SIZES, "hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 512}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**wide, initializer_range=0.2))
    model.save_pretrained(tmp_path / "base")
    config = RandLoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    found = merged(tmp_path / "base", adapter(tmp_path / "base", tmp_path / "a", config), tmp_path / "out", dtype=dtype)
    assert found["passed"], found["checks"]["recomputed in fp64"]


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
def test_a_bias_that_is_zero_in_the_base_may_take_in_the_weight(dtype: str, tmp_path: Path) -> None:
    """GLoRA's bias is b + D b + E + W C: without anything in b or E, the terms of W C cancel each other."""
    import torch
    import transformers
    from peft import GloraConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 256, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.OPTConfig(**sizes, num_hidden_layers=1, init_std=0.2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    trained = GloraConfig(target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM", config_D_E="none")
    found = merged(
        tmp_path / "base", adapter(tmp_path / "base", tmp_path / "a", trained), tmp_path / "out", dtype=dtype
    )
    assert found["passed"], found["checks"]["recomputed in fp64"]


def test_a_type_that_peft_puts_on_no_layer_is_refused_as_empty(tmp_path: Path) -> None:
    """PEFT's OSF passes over GPT-2's Conv1D layers without a word, and saves nothing."""
    from peft import OSFConfig

    base = saved("gpt2", tmp_path / "base")
    trained = adapter(base, tmp_path / "a", OSFConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
    with pytest.raises(BadInput, match="no tensor"):
        merged(base, trained, tmp_path / "out")


def test_predictions_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    base = saved("llama", tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained = adapter(base, tmp_path / "a", config, std=0.3)
    held = merged(base, trained, tmp_path / "held", certify="full", dtype="bf16")["checks"]["predictions"]
    made: list[certificate.OnDisk] = []
    plain = certificate.OnDisk.__init__
    monkeypatch.setattr(certificate.OnDisk, "__init__", lambda this, at: (made.append(this), plain(this, at))[1])
    monkeypatch.setattr(certificate, "HELD", 20_000)
    monkeypatch.setattr(certificate, "ROWS", 5)
    kept = merged(base, trained, tmp_path / "kept", certify="full", dtype="bf16")["checks"]["predictions"]
    assert len(made) == 4 and all(len(one) for one in made)
    for name, value in held["values"].items():
        assert kept["values"][name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert {file.name for file in tmp_path.iterdir()} == {"base", "a", "held", "kept"}


def test_a_full_certificate_says_how_far_it_is(tmp_path: Path) -> None:
    from peft import LoraConfig

    base = saved("llama", tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained = adapter(base, tmp_path / "a", config, std=0.3)
    said: list[progress.Reached] = []
    with progress.heard(said.append):
        merged(base, trained, tmp_path / "out", certify="full")
    steps = [(at.done, at.total) for at in said if at.phase == "certifying"]
    assert [done for done, _ in steps] == list(range(len(steps)))
    assert {total for _, total in steps} == {len(steps)}
    phases = [*dict.fromkeys(at.what for at in said if at.phase == "certifying")]
    assert [phase for phase in phases if "loading" in phase] == [
        "loading the live adapter",
        "loading the merged model",
    ], "the output is in fp32, so the adapter's noise is its own"
    assert "comparing" in phases[-1]
