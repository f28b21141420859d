"""A checkpoint that lacks a weight is refused by the weight's name: transformers would make it up and only warn."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.checkpoints import MODELS, saved, without

from peftopt.errors import BadInput
from peftopt.models import hf
from peftopt.models.checkpoint import open_model


def check(folder: Path) -> None:
    with open_model(folder) as base:
        hf.check_whole(str(folder), {name: entry.shape for name, entry in base.entries.items()})


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_checkpoint_is_no_reason_to_refuse(name: str, tmp_path: Path) -> None:
    check(saved(name, tmp_path))
    hf.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "model.layers.1.mlp.down_proj.weight", "layers.1.mlp.down_proj"),
        ("tied", "model.embed_tokens.weight", "embed_tokens.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w3.weight", "layers.0.mlp.experts"),
        ("gpt2", "transformer.wpe.weight", "wpe.weight"),
        ("gpt2", "transformer.ln_f.bias", "ln_f.bias"),
    ],
)
def test_a_missing_weight_is_named_before_and_while_the_model_is_loaded(
    name: str, key: str, said: str, tmp_path: Path
) -> None:
    without(saved(name, tmp_path), key)
    for refuse in (check, lambda folder: hf.load(str(folder))):
        with pytest.raises(BadInput, match=said):
            refuse(tmp_path)


def test_a_weight_of_another_shape_than_the_config_says_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    for refuse in (check, lambda folder: hf.load(str(folder))):
        with pytest.raises(BadInput, match=r"proj\.weight"):
            refuse(tmp_path)
