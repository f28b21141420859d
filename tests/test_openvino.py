"""The `openvino_ir` transform and the `openvino` engine keep their contracts, in their own environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.asked import ask, ids
from helpers.command_line import command, prompts
from helpers.engine_contract import (  # noqa: F401
    test_a_batch_answers_as_one_by_one_and_exactly_as_long_as_asked,
    test_a_request_longer_than_the_room_makes_room,
    test_each_row_ends_at_its_own_end_of_sequence,
    test_scores_are_those_of_transformers_whatever_the_batch,
)
from helpers.remote_engine import Remote

from peftopt import environments, plugins
from peftopt.errors import BadInput
from peftopt.jobs import TransformJob
from peftopt.probes import bandwidth
from peftopt.records import Model
from peftopt.runner import single

LACKING, HOW = environments.lacking(plugins.catalogue()["openvino"])
pytestmark = [pytest.mark.engines, pytest.mark.skipif(bool(LACKING), reason=HOW or "installed")]


def convert(model: Model, out: Path, params: dict[str, str]) -> None:
    single.transform(TransformJob(plugin="openvino_ir", params=params, model=model, out=str(out)))


@pytest.fixture(scope="module")
def model(tiny_base_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The base in OpenVINO's format in fp32: greedy answers are then transformers'."""
    out = tmp_path_factory.mktemp("openvino") / "f32"
    convert(Model(str(tiny_base_fp32)), out, {"type": "f32"})
    return Model(str(out))


@pytest.fixture(scope="module")
def engine(model: Model) -> Any:
    remote = Remote("openvino", model, precision="f32")
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def eager(tiny_base_fp32: Path) -> Any:
    plugin = plugins.module("engine", "eager")
    return plugin.open(Model(str(tiny_base_fp32)), plugin.Params())


def test_the_floor_counts_its_weights(model: Model) -> None:
    reads = bandwidth.reads(model)
    assert reads["weight_bytes"] == (Path(model.path) / "openvino_model.bin").stat().st_size > 0


def test_words_and_answers_are_those_of_transformers(engine: Any, eager: Any) -> None:
    assert ids(engine) == ids(eager)
    assert (engine.eos, engine.special_tokens) == (eager.eos, eager.special_tokens)
    assert ask(engine, 16) == ask(eager, 16)
    assert engine.adapter_switch_time is None and engine.threads >= 1 and engine.device == "cpu"


def test_what_cannot_be_done_is_refused(
    model: Model, tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="already quantized"):
        convert(Model(model.path), tmp_path / "twice", {})
    with pytest.raises(BadInput, match="cannot apply an adapter"):
        convert(Model(str(tiny_base), (str(tiny_lora),)), tmp_path / "on", {})
    with pytest.raises(BadInput, match="no type 'int3'"):
        convert(Model(str(tiny_base)), tmp_path / "no", {"type": "int3"})
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    assert command("bench", "--model", model.path, "--prompts", questions) == 2
    assert "use --engine openvino" in capsys.readouterr().err


def test_a_weight_that_is_not_finite_is_found(tiny_base_fp32: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base_fp32, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    next(w for name, w in weights.items() if name.endswith("down_proj.weight"))[1, 2] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="NaN or infinity"):
        convert(Model(str(tmp_path / "nan")), tmp_path / "out", {"type": "bf16"})


def test_four_bits_by_hand_beside_eight(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    for kind in ("int8", "int4"):
        arguments = ("--method", "openvino_ir", "--type", kind, "--model", tiny_base, "--out", kind)
        assert command("quantize", *arguments) == 0
        said = json.loads((tmp_path / kind / "quantization.json").read_text())
        assert said["libraries"].keys() == {"openvino", "nncf", "optimum-intel"} and "answered" in said["verified"]
        assert (said["params"]["group_size"] in (32, 64)) == (kind == "int4")
    capsys.readouterr()
    models = ("--model", "int8", "--model", "int4", "--engine", "openvino")
    assert command("bench", *models, "--prompts", questions, "--new-tokens", 3, "--blocks", 2, "--json") == 0
    _, second = json.loads(capsys.readouterr().out)["models"]
    assert second["ratio"]["n"] == 2
