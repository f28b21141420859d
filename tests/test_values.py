"""Weights that no training leaves behind are found, wherever their hash is not known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers.command_line import command
from hypothesis import given
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.models.checkpoint import Checkpoint
from peftopt.models.values import LIMIT, damaged
from peftopt.probes.weights import scan
from peftopt.runner import preflight

HIGHEST = {"bfloat16": 14, "float32": 30, "float16": 14}
"""The highest bit of an exponent."""


def flipped(source: Path, out: Path, bit: int = 0) -> Path:
    """A copy of a safetensors file in which the highest bit of an exponent has flipped, in the middle of a matrix."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(source)
    name = max(weights, key=lambda name: weights[name].numel())
    dtype = str(weights[name].dtype).removeprefix("torch.")
    whole = {2: torch.int16, 4: torch.int32}[weights[name].itemsize]
    bits = weights[name].view(whole).view(-1)
    values = weights[name].view(-1)
    at = int(values.float().abs().argmax())  # in fp16 a small one stays below what any training leaves behind
    bits[at] ^= 1 << (bit or HIGHEST[dtype])
    save_file(weights, out, {"format": "pt"})
    return out


@pytest.mark.fault(19, "an adapter, or an artifact, with a value that no training leaves behind is refused")
def test_a_flipped_exponent_is_refused_by_name(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    lora = Path(shutil.copytree(tiny_lora, tmp_path / "lora"))
    flipped(tiny_lora / "adapter_model.safetensors", lora / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="no training leaves behind"):
        preflight.check_adapter(lora, tiny_base)
    assert command("merge", "--base", tiny_base, "--adapter", lora, "--out", tmp_path / "out") == 2
    assert "lora" in (said := capsys.readouterr().err) and "hint" in said and not (tmp_path / "out").exists()
    preflight.check_adapter(tiny_lora, tiny_base)

    assert scan(tiny_base) == []
    base = tmp_path / "base"
    base.mkdir()
    flipped(tiny_base / "model.safetensors", base / "model.safetensors")
    assert ["no training leaves behind" in line for line in scan(base)] == [True]


@given(
    values=st.lists(st.floats(-LIMIT, LIMIT, width=16), min_size=1, max_size=40),
    odd=st.sampled_from([math.nan, math.inf, -math.inf, 1.1 * LIMIT, -3e38]),
    at=st.integers(0, 39),
)
def test_one_odd_value_is_found_wherever_it_stands(
    values: list[float], odd: float, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In matrices of any form; what is finite in a vector may be as large as it likes."""
    import torch
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("values") / "w.safetensors"
    right = torch.tensor(values)
    wrong = right.clone()
    wrong[at % len(values)] = odd
    save_file({"right": right[None], "matrix": wrong[None], "vector": wrong.clone()}, file)
    with Checkpoint([file]) as weights:
        found = {line.split()[0] for line in damaged(weights)}
    assert found == {"matrix"} | ({"vector"} if not math.isfinite(odd) else set())
