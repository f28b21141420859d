"""Quantizing: what is chosen, what is written beside the weights, and that what does not work is never left behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command
from helpers.tiny_models import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftopt import corpus, plugins
from peftopt.engines import Engine, Generation, Scores
from peftopt.errors import BadInput, WorkerFailed
from peftopt.models import provenance
from peftopt.models.hf import tokenizer_home
from peftopt.probes import alive
from peftopt.records import GENERIC, Model
from peftopt.runner import build
from peftopt.transforms import _compressor, _layers, _sensitivity
from peftopt.worker import _rendered

LAYERS = {
    f"model.layers.{n}.{name}": (64, 128 if name == "mlp.down_proj" else 64)
    for n in range(12)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
}


# ---- what is chosen ----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40).map(lambda n: 32 * n), min_size=1), st.sampled_from([0, *_layers.GROUP_SIZES]))
def test_the_group_size_divides_every_layer_and_auto_is_the_largest_that_does(widths: list[int], wanted: int) -> None:
    layers = {f"layer{n}": (8, width) for n, width in enumerate(widths)}
    fitting = [s for s in _layers.GROUP_SIZES if all(width % s == 0 for width in widths)]
    if wanted and wanted not in fitting:
        with pytest.raises(BadInput, match=f"group_size: {wanted} does not divide") as refused:
            _layers.group_size(layers, wanted)
        assert all(str(size) in refused.value.hint for size in fitting)
        return
    size, notices = _layers.group_size(layers, wanted)
    assert size == (wanted or max(fitting))
    assert bool(notices) is (not wanted and size != _layers.GROUP_SIZES[-1])


def test_a_width_that_no_group_divides_is_refused_with_another_method() -> None:
    with pytest.raises(BadInput, match=r"no group size divides the input width of odd \(100\)") as refused:
        _layers.group_size({"even": (8, 128), "odd": (8, 100)}, 0)
    assert "int8" in refused.value.hint
    assert _layers.group_size({"smollm": (8, 576)}, 0) == (64, ["576 is not a multiple of 128: group size 64"])


@pytest.mark.parametrize(
    ("keep", "count"),
    [
        ("", 0),
        ("down_proj", 12),
        ("model.layers.1", 7),  # and not those of layers 10 and 11
        ("model.layers.*.mlp.down_proj, model.layers.1", 18),
        ("model.layers.3.self_attn.q_proj", 3),  # vLLM runs q, k and v as one
        ("mlp.up_proj", 24),
    ],
)
def test_layers_are_kept_by_name_end_beginning_or_pattern(keep: str, count: int) -> None:
    found, notices = _layers.kept(LAYERS, keep)
    assert len(found) == count and set(found) <= LAYERS.keys()
    assert any("runs them as one" in n for n in notices) is keep.endswith(("q_proj", "up_proj"))


def test_keeping_what_is_not_there_or_everything_is_refused() -> None:
    with pytest.raises(BadInput, match="no layer is named dwn_proj") as refused:
        _layers.kept(LAYERS, "q_proj, dwn_proj")
    assert "down_proj" in refused.value.hint
    with pytest.raises(BadInput, match="keeps every layer"):
        _layers.kept(LAYERS, "*")


def test_fused_layers_are_one_unit() -> None:
    units = _layers.units(LAYERS)
    assert sorted(name for unit in units for name in unit) == sorted(LAYERS)
    assert {len(unit) for unit in units} == {1, 2, 3} and len(units) == 4 * 12


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=30),
    st.floats(0, 0.99),
)
def test_the_spared_layers_fit_the_budget_and_are_the_worst(units: list[tuple[float, int]], share: float) -> None:
    damage, weights = [d for d, _ in units], [w for _, w in units]
    chosen = _sensitivity.worst(damage, weights, share)
    assert sum(weights[n] for n in chosen) <= share * sum(weights) + 1e-9
    assert all(damage[n] > 0 for n in chosen) and chosen == sorted(set(chosen))
    left = share * sum(weights) - sum(weights[n] for n in chosen)
    for n in set(range(len(units))) - set(chosen):  # whoever is left out is too big, or does no harm
        better = [c for c in chosen if damage[c] / weights[c] >= damage[n] / weights[n]]
        assert damage[n] == 0 or weights[n] > left or len(better) == len(chosen)


# ---- the verb ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "calibration.jsonl"
    path.write_text(
        "".join(json.dumps({"id": n, "prompt": text, "expected": text}) + "\n" for n, text in enumerate(TEXTS))
    )
    return path


@pytest.fixture(scope="module")
def mixed(tiny_base: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ model with some layers at 8 bits, one kept as it is, through the command line."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    options = (
        "--mixed",
        "0.3",
        "--keep",
        "model.layers.0.self_attn.o_proj",
        "--samples",
        "12",
        "--set",
        "dampening=0.02",
    )
    assert (
        command("quantize", "--method", "gptq", "--model", tiny_base, "--calibration", task, "--out", out, *options)
        == 0
    )
    return out


def test_a_quantized_folder_says_what_made_it(mixed: Path) -> None:
    made = provenance.read(mixed)
    assert made is not None
    assert made["method"] == "gptq" and {"llmcompressor", "compressed-tensors"} <= made["libraries"].keys()
    assert made["params"]["group_size"] == 64 and made["params"]["dampening"] == 0.02 and made["seed"] == 0
    used = made["calibration"]
    assert used["source"] == "task" and used["rows"] == 12 and used["tokens"] > 512 and len(used["texts"]) == 64
    assert made["notices"][0] == "64 is not a multiple of 128: group size 64"
    assert made["verified"] == "answered 2 prompts in a fresh process (eager)"
    chosen = made["mixed"]
    assert 0 < chosen["share"] <= 0.3 and chosen["kl_spared"] <= chosen["kl_all"]
    assert "group_size 64" in provenance.summary(made) and "task" in provenance.summary(made)


def test_a_mixed_model_has_two_schemes_by_name_and_fused_layers_share_one(mixed: Path) -> None:
    """Older vLLMs match a fused layer's class before its parts' names: a class as target would hide one scheme."""
    settings = json.loads((mixed / "config.json").read_text())["quantization_config"]
    groups = {g["weights"]["num_bits"]: set(g["targets"]) for g in settings["config_groups"].values()}
    made = provenance.read(mixed)
    assert made and groups.keys() == {4, 8}
    assert groups[8] == {name for unit in made["mixed"]["spared"] for name in unit["layers"]}
    kept = {"model.layers.0.self_attn.o_proj", "lm_head"}
    assert set(settings["ignore"]) == kept and not kept & (groups[4] | groups[8])
    names = {name: (1, 1) for name in groups[4] | groups[8]}
    assert all(set(unit) <= groups[4] or set(unit) <= groups[8] for unit in _layers.units(names))
    stored = load_file(mixed / "model.safetensors")
    assert {n.removesuffix(".weight_packed") for n in stored if n.endswith("_packed")} == groups[4] | groups[8]


def test_quantize_tells_what_a_user_must_know(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = command(
        *("quantize", "--method", "gptq", "--model", tiny_base, "--adapter", tiny_lora, "--calibration", GENERIC),
        *("--bits", "8", "--group-size", "32", "--samples", "4", "--max-tokens", "200", "--out", out),
    )
    assert found == 0
    said = capsys.readouterr()
    assert "tokens of 4 rows (generic)" in said.out and "fresh process" in said.out and "kept apart" in said.out
    assert "calibrating" in said.err and "layer 2 of 2" in said.err
    made = provenance.read(out)
    assert made and made["params"]["bits"] == 8 and made["calibration"]["source"] == GENERIC


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "gtpq"), "did you mean 'gptq'?"),
        (("--method", "int8", "--bits", "4"), "int8 has no parameter bits"),
        (("--method", "gptq", "--bits", "four"), "'four' is not a whole number"),
        (("--method", "gptq", "--bits", "5"), "bits must be 4 or 8"),
        (("--method", "awq", "--bits", "8"), "bits must be 4 for awq"),
        (("--method", "gptq", "--group-size", "48"), "group_size must be 0"),
        (("--method", "gptq", "--mixed", "20"), "mixed must be a share"),
        (("--method", "nf4", "--set", "double_quant=yes"), "'yes' is not true or false"),
        (("--method", "nf4", "--set", "double_qant=true"), "did you mean 'double_quant'?"),
        (("--method", "nf4", "--set", "double_quant"), "write NAME=VALUE"),
        (("--method", "gptq"), "gptq needs calibration texts"),
        (("--method", "fp8", "--calibration", "generic"), "fp8 needs no calibration texts"),
    ],
)
def test_what_quantize_cannot_do_is_said_at_once(
    options: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("quantize", *options, "--model", "m", "--out", tmp_path / "out") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert says in err and "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.fault(38, "named before anything starts, with what to install")
def test_a_library_that_is_not_installed_is_named_before_anything_starts(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugins, "missing", lambda plugin: ["bitsandbytes"] if plugin.name == "nf4" else [])
    assert command("quantize", "--method", "nf4", "--model", tiny_base, "--out", tmp_path / "out") == 4
    err = capsys.readouterr().err
    assert "bitsandbytes" in err and "pip install" in err and not list(tmp_path.iterdir())


def test_the_generic_texts_are_of_many_kinds_and_long_enough() -> None:
    path = corpus.calibration_file(GENERIC)
    rows = corpus.read(str(path))
    assert path.stat().st_size < 100_000 and sum(len(r.expected.split()) for r in rows) > 2000
    first = {r.slices[0] for r in rows[:16]}
    assert first == {"prose", "explanation", "code", "maths", "language", "dialogue"}, "the first rows are what is used"


def test_calibration_goes_through_the_tokenizer_that_the_adapter_was_trained_with(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    lora = shutil.copytree(tiny_lora, tmp_path / "lora")
    own = AutoTokenizer.from_pretrained(tiny_base)
    own.add_tokens(["<<own>>"])  # for which the base has no embedding
    own.chat_template = "{% for m in messages %}<<own>>{{ m.content }}{% endfor %}"
    own.save_pretrained(lora)
    model = Model(str(tiny_base), (str(lora),))
    (text,) = _rendered(
        [corpus.Row("1", ({"role": "user", "content": "the fox " * 600},), "runs")], tokenizer_home(model)
    )
    assert text.startswith("<<own>>the fox") and text.endswith("<<own>>runs")
    settings = {"samples": 1, "max_tokens": 2000}
    (row,), used, _ = _compressor._encoded(model, [text], settings, 64)
    assert own.decode(row["input_ids"][0]) == text.replace("<<own>>", "")
    assert used["tokens"] == row["input_ids"].numel() == row["attention_mask"].numel()


# ---- what was written has to work ---------------------------------------------------------------


class Fixed(Engine):
    """An engine whose answers are given."""

    scores, eos = True, frozenset([2])
    tokenizer, special_tokens = None, frozenset()

    def __init__(self, *answers: list[int], finite: bool = True) -> None:
        self.answers, self.finite = answers, finite

    def encode(self, messages: Any, answer: str | None = None) -> tuple[list[int], list[int]]:
        return [1], []

    def decode(self, tokens: Any) -> str:
        return str(tokens)

    def close(self) -> None:
        pass

    def generate(self, prompts: Any, new_tokens: int, stop: bool) -> list[Generation]:
        return [Generation(a, list(range(len(a))), False) for a in self.answers]

    def score(self, prompts: Any, answers: Any) -> list[Scores]:
        return [Scores([0.0], [1], [[1]], [[0.0]], self.finite) for _ in answers]


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        (Fixed([5, 6, 7], [5, 5, 5]), ""),
        (Fixed([5, 6, 7], [2, 2, 2]), ""),
        (Fixed([2, 2, 2], [2, 2, 2]), "nothing but end-of-text"),
        (Fixed([5, 5, 5], [7, 7, 7]), "one token over and over"),
        (Fixed([5, 6, 7], [5, 6, 7], finite=False), "not finite"),
    ],
)
def test_an_answer_that_is_none_is_called_so(engine: Any, says: str) -> None:
    found = alive.problem(engine, [corpus.Row("1", ()), corpus.Row("2", ())])
    assert says in found and bool(found) is bool(says)


def test_a_model_that_does_not_work_in_a_fresh_process_is_refused(mixed: Path, tiny_base: Path, tmp_path: Path) -> None:
    def check(folder: Path) -> str:
        gptq, (made, parent) = plugins.catalogue()["gptq"], (Model(str(folder)), Model(str(tiny_base)))
        with build._opener(gptq, made, tmp_path / "log", 1, 120) as opener:
            return build._verified(opener, gptq, made, parent, (), tmp_path / "log", 1, 120)

    dead = shutil.copytree(mixed, tmp_path / "dead")
    tensors = load_file(dead / "model.safetensors")
    zero = {n: t * 0 if n.endswith("norm.weight") else t for n, t in tensors.items()}
    save_file(zero, dead / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkerFailed, match="unusable: the model that gptq wrote answers with") as failed:
        check(dead)
    assert failed.value.hint
    (dead / "model.safetensors").write_bytes(b"")
    with pytest.raises(WorkerFailed, match="unusable: the model that gptq wrote does not work"):
        check(dead)


def test_a_model_whose_reader_is_not_installed_is_written_and_said_to_be_unverified(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path / "none"))
    elsewhere, model = replace(plugins.catalogue()["gptq"], reader="llamacpp"), Model(str(tiny_base))
    with build._opener(elsewhere, model, tmp_path / "log", 1, 120) as opener:
        said = build._verified(opener, elsewhere, model, model, (), tmp_path / "log", 1, 120)
    assert said.startswith("not verified: its reader llamacpp needs llamacpp is not at")


def test_nothing_is_left_where_a_quantized_model_did_not_work(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unusable(*_: Any) -> str:
        raise WorkerFailed("unusable", "the model that int8 wrote answers with nothing but end-of-text")

    monkeypatch.setattr(build, "_verified", unusable)
    assert command("quantize", "--method", "int8", "--model", tiny_base, "--out", tmp_path / "out") == 1
    assert "nothing but end-of-text" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints of other tools -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reader"), [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")]
)
def test_weights_whose_reader_is_not_installed_are_refused_with_what_to_install(
    method: str, reader: str, tiny_base: Path, task: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    import importlib.util

    folder = shutil.copytree(tiny_base, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == reader else find(name, *a))
    assert command("bench", "--model", folder, "--prompts", task) == 4
    err = " ".join(capsys.readouterr().err.split())
    assert f"{method} weights" in err and "pip install" in err and reader in err
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path / "none"))
    serve = ("serve", "--engine-only", "--base", folder)
    for verb in (serve, ("bench", "--model", folder, "--engine", "vllm", "--prompts", task)):
        assert command(*verb) == 4
        err = " ".join(capsys.readouterr().err.split())
        assert "peftopt env install vllm" in err and reader not in err, "vLLM reads such weights itself"
