"""Weights that no training leaves behind are found, wherever their hash is not known."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import RECIPE, command, errors, prompts
from hypothesis import given
from hypothesis import strategies as st

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.models.checkpoint import Checkpoint, Entry
from peftopt.models.values import LIMIT, VECTOR_LIMIT, damaged, wrong
from peftopt.probes.weights import scan
from peftopt.runner import preflight

HIGHEST = {"bfloat16": 14, "float32": 30, "float16": 14}
"""The highest bit of an exponent."""


def flipped(source: Path, out: Path, tensor: str = "") -> Path:
    """A copy of a safetensors file in which the highest bit of an exponent has flipped, in the largest tensor of such a
    name."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(source)
    name = max((name for name in weights if tensor in name), key=lambda name: weights[name].numel())
    dtype = str(weights[name].dtype).removeprefix("torch.")
    whole = {2: torch.int16, 4: torch.int32}[weights[name].itemsize]
    bits = weights[name].view(whole).view(-1)
    values = weights[name].view(-1)
    at = int(values.float().abs().argmax())  # in fp16 a small one stays below what any training leaves behind
    bits[at] ^= 1 << HIGHEST[dtype]
    save_file(weights, out, {"format": "pt"})
    return out


@pytest.mark.fault(19, "an adapter, or an artifact, with a value that no training leaves behind is refused")
def test_a_flipped_exponent_is_refused_by_name(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.mark.parametrize("tensor", ["embed_tokens", "q_proj", "norm"])
@pytest.mark.fault(19, "a base with a value that no training leaves behind is refused by what reads it, with its name")
def test_a_flipped_exponent_in_a_base_is_refused_by_name(
    tensor: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    flipped(tiny_base / "model.safetensors", base / "model.safetensors", tensor)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    questions = prompts(tmp_path / "eval.jsonl", 20, "eval")
    recipe.write_text(RECIPE.format(base=base, adapter=tiny_lora, prompts=questions))
    for words in (
        ("merge", "--base", base, "--adapter", tiny_lora, "--out", out),
        ("quantize", "--model", base, "--method", "int8", "--out", out),
        ("compile", "--model", base),
        ("run", recipe, "--results", tmp_path / "results"),
    ):
        assert command(*words) == 2
        assert tensor in (said := errors(capsys)) and "download it again" in said
    assert not out.exists() and not (tmp_path / "base.compiled").exists()


def test_norms_and_single_numbers_may_be_larger_than_weights() -> None:
    """Large norms and biases, masks of -1e9, and 8-bit numbers that are scaled to their range are found in models."""
    assert not wrong(Entry("norm", "BF16", (64,)), 3e4) and wrong(Entry("norm", "BF16", (64,)), 1e38)
    assert not wrong(Entry("masked_bias", "F32", ()), 3.4e38)
    assert not wrong(Entry("scaled", "F8_E5M2", (64, 64)), 57344.0)
    assert wrong(Entry("proj", "BF16", (64, 64)), 3e4)


def in_hubs_cache(model: Path, home: Path) -> Path:
    """A snapshot of the hub's cache, in which large files are named by their SHA-256, and small ones otherwise."""
    snapshot = home / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        name = identity.of_file(file) if file.suffix == ".safetensors" else f"{number:040x}"
        shutil.copyfile(file, snapshot.parents[1] / "blobs" / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def downloaded(model: Path, home: Path) -> Path:
    """A folder that the hub's client has downloaded a model to, with its notes."""
    folder = Path(shutil.copytree(model, home / "model"))
    notes = folder / identity.NOTES
    notes.mkdir(parents=True)
    file = folder / "model.safetensors"
    moment = file.stat().st_mtime
    (notes / f"{file.name}.metadata").write_text(f"{'c' * 40}\n{identity.of_file(file)}\n{moment}\n")
    return folder


@pytest.mark.parametrize("layout", [in_hubs_cache, downloaded])
@pytest.mark.fault(19, "a run on a file that is not what the hub's client downloaded is refused, whichever bit it is")
def test_any_flipped_bit_in_a_download_is_refused_where_the_base_is_hashed(
    layout: Callable[[Path, Path], Path],
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = layout(tiny_base, tmp_path)
    identity.of_folder(base)
    file = base / "model.safetensors"
    data, before = bytearray(file.read_bytes()), file.stat()
    data[-2] ^= 1  # the lowest bit of a mantissa
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk that flips a bit
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, adapter=tiny_lora, prompts=prompts(tmp_path / "p.jsonl", 20, "eval")))
    for verb in ("run", "check"):
        assert command(verb, recipe, "--results", tmp_path / "results") == 2
        assert "model.safetensors is not what was downloaded" in (said := errors(capsys))
        assert "download it again" in said


def test_a_download_that_was_written_to_since_is_the_users_own(tiny_base: Path, tmp_path: Path) -> None:
    folder = downloaded(tiny_base, tmp_path)
    file = folder / "model.safetensors"
    moment = file.stat().st_mtime
    flipped(file, file)
    os.utime(file, (moment + 60, moment + 60))
    assert identity.of_folder(folder) != identity.of_folder(tiny_base)


@given(
    values=st.lists(st.floats(-LIMIT, LIMIT, width=16), min_size=1, max_size=40),
    odd=st.sampled_from([math.nan, math.inf, -math.inf, 1.1 * LIMIT, -1.1 * VECTOR_LIMIT, -3e38]),
    at=st.integers(0, 39),
)
def test_one_odd_value_is_found_wherever_it_stands(
    values: list[float], odd: float, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In matrices of any form; a vector of several numbers may be larger, a single one as large as it likes."""
    import torch
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("values") / "w.safetensors"
    right = torch.tensor(values)
    wrong = right.clone()
    wrong[at % len(values)] = odd
    save_file({"right": right[None], "matrix": wrong[None], "vector": wrong.clone()}, file)
    with Checkpoint([file]) as weights:
        found = {line.split()[0] for line in damaged(weights)}
    finite, several = math.isfinite(odd), len(values) > 1
    assert ("matrix" in found) == (several or not finite)
    assert ("vector" in found) == ((several and abs(odd) > VECTOR_LIMIT) or not finite)
    assert "right" not in found
