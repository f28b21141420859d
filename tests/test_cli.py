"""What a user gets wrong is one clear error with its exit code, before anything slow starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import RECIPE, command, errors, prompts
from helpers.tiny_models import make_lora
from safetensors.torch import load_file, save_file

from peftopt import environments, machine, plugins, store
from peftopt.cli import console
from peftopt.engines import _graphs
from peftopt.runner.process import WorkerProcess


@pytest.fixture
def recipe(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> Path:
    """A good recipe, on copies that a test may break."""
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(tiny_lora, tmp_path / "lora")
    questions = prompts(tmp_path / "eval.jsonl", 6, "eval")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(base="base", adapter="lora", prompts=questions.name))
    return path


def test_a_good_recipe_checks_out_and_says_what_it_would_do(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", recipe) == 0
    out = capsys.readouterr().out
    assert "merge -> int8, on eager" in out and "2 artifacts" in out and "(baseline)" in out
    assert "a second copy of adapter" in out
    recipe.write_text(
        recipe.read_text().replace(
            "[merge, int8]", "[{merge: {certify: blocks, combination: cat}}, {engine: continuous}]"
        )
    )
    assert command("check", recipe) == 0
    out = capsys.readouterr().out
    assert "merge (certify blocks), on continuous" in out  # what it chooses, not what is the default anyway


def test_check_says_what_so_few_prompts_cannot_decide(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", recipe) == 0
    assert "int8.critical_errors: its limit of" in errors(capsys)


def test_all_mistakes_of_a_recipe_come_at_once_with_lines_and_hints(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text().replace("[merge, int8]", "[merge, int9]").replace("minimize:", "minimise:")
    recipe.write_text(text)
    assert command("run", recipe) == 2
    err = errors(capsys)
    lines = text.splitlines()
    for wrong, hint in (("int9", "int8"), ("minimise", "minimize")):
        number = next(n for n, line in enumerate(lines, 1) if wrong in line)
        assert f"recipe.yaml:{number})" in err and f"did you mean '{hint}'?" in err


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def wider(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = tensors[name].new_zeros(4, 96)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def settings(**changed: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))

    return change


@pytest.mark.parametrize(
    ("which", "damage", "says"),
    [
        ("base", shutil.rmtree, "no model folder"),
        ("base", drop("config.json"), "has no config.json"),
        ("base", drop("model.safetensors"), "no safetensors weights"),
        ("base", truncated, "not a whole safetensors file"),
        ("base", quantized, "already quantized (gptq)"),
        ("base", own_code, "its own code"),
        ("lora", shutil.rmtree, "no adapter folder"),
        ("lora", drop("adapter_config.json"), "has no adapter_config.json"),
        ("lora", pickled, "never opened"),
        ("lora", wider, "does not fit"),
        ("lora", settings(peft_type="P_TUNING"), "cannot be merged"),
        ("lora", settings(target_modules=["q_proj"]), "which target_modules does not name"),
        ("lora", settings(rank_pattern={"q_proj": 77}), "has rank"),
        ("lora", settings(auto_mapping={"base_model_class": "MistralForCausalLM"}), "was trained on a Mistral"),
    ],
)
@pytest.mark.fault(18, "refused before anything starts, exit 2")
@pytest.mark.fault(22, "ranks and modules that are not those of the weights are refused before anything starts")
@pytest.mark.fault(25, "refused before anything starts")
@pytest.mark.fault(26, "refused")
@pytest.mark.fault(32, "refused with the name of the method")
@pytest.mark.fault(33, "refused before anything starts")
def test_files_that_cannot_work_are_refused_before_anything_starts(
    recipe: Path, which: str, damage, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(recipe.parent / which)
    assert command("run", recipe, "--results", recipe.parent / "results") == 2
    err = errors(capsys)
    assert says in err and "hint:" in err
    assert not (recipe.parent / "results").exists()


@pytest.mark.fault(23, "refused before anything starts, with the base that it wants")
def test_an_adapter_for_another_base_is_refused_and_names_the_base_it_wants(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(recipe.parent / "lora" / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}
    save_file(renamed, recipe.parent / "lora" / "adapter_model.safetensors", {"format": "pt"})
    assert command("check", recipe) == 2
    err = errors(capsys)
    assert "the base has no model.layers.7" in err and "trained on" in err


@pytest.mark.fault(23, "a base that cannot be told from the one that the adapter names is a note of `check`")
def test_a_base_that_may_be_another_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", recipe) == 0
    assert "make sure" not in capsys.readouterr().out, "the folder that it names is here, and holds the same weights"
    settings(base_model_name_or_path="some-lab/Base-7B")(recipe.parent / "lora")
    assert command("check", recipe) == 0
    assert "some-lab/Base-7B" in capsys.readouterr().out
    (recipe.parent / "base").rename(recipe.parent / "base_7b")
    recipe.write_text(recipe.read_text().replace("base: base", "base: base_7b"))
    assert command("check", recipe) == 0
    assert "make sure" not in capsys.readouterr().out, "the base has the name"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no prompts"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "eval.jsonl:2 repeats the id"),
        ('{"id": 1, "prompt": "a"}\n{"id": 2, "prom\n', "eval.jsonl:2 is not a prompt"),
    ],
)
@pytest.mark.fault(31, "refused with the line, exit 2")
def test_broken_prompts_are_named_by_line(
    recipe: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "eval.jsonl").write_text(text)
    assert command("check", recipe) == 2
    assert says in errors(capsys)


def test_a_quantized_base_is_measured_where_no_variant_transforms_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe.parent / "base" / "config.json"
    settings = {"quantization_config": {"quant_method": "torchao"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if "[merge" not in line) + "\ncalibration: generic\n")
    assert command("check", recipe) == 0
    assert "base + adapter" in capsys.readouterr().out


def test_calibration_rows_may_not_be_evaluated(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text() + "calibration: eval.jsonl\n")
    assert command("check", recipe) == 2
    assert "is also evaluation row" in errors(capsys)


@pytest.mark.fault(5, "the folder is named, exit 4")
def test_results_that_cannot_be_written_are_an_environment_error(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "taken").write_text("a file")
    assert command("run", recipe, "--results", recipe.parent / "taken") == 4
    assert "cannot write" in errors(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "missing.yaml"),
        ("decide", "missing-run"),
        ("report", "missing-run"),
        ("decide", "--results", "nowhere"),
        ("quantize", "--method", "gtpq", "--model", "m", "--out", "o"),
        ("quantize", "--method", "gptq", "--model", "m", "--out", "o"),
        ("quantize", "--method", "int8", "--group-size", "64", "--model", "m", "--out", "o"),
        ("merge", "--base", "missing", "--adapter", "missing", "--out", "o"),
        ("bench", "--model", "missing", "--prompts", "missing.jsonl"),
        ("compile", "--model", "missing"),
        ("compile", "--model", "missing", "--set", "regions=perhaps"),
        ("new", "x.yaml", "--like", "nothing"),
        ("no-such-verb",),
        ("run",),
    ],
)
def test_bad_usage_is_exit_2_and_no_traceback(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert errors(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("[merge, {gptq: {group_size: 128}}]", "variant odd: gptq: group_size: 128 does not divide the input width"),
        ("[merge, {awq: {group_size: 128, keep: o_proj}}]", "variant odd: awq: group_size: 128 does not divide"),
        ("[merge, {gptq: {samples: 2}}]", "variant odd: gptq: the calibration text is too short"),
        ("[merge, {w8a8: {max_tokens: 8}}]", "tokens in 32 rows, and it takes 512"),
        ("[merge, fp8, {engine: vllm}]", "variant odd: vllm: vLLM has no kernels for FP8 on a CPU"),
        ("[merge, nf4, {engine: vllm}]", "vLLM has no kernels for bitsandbytes on a CPU"),
    ],
)
def test_what_cannot_be_built_or_run_is_said_before_anything_is(
    steps: str, says: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environments, "lacking", lambda _: ([], ""))
    monkeypatch.setattr(machine, "gpus", list)
    texts = prompts(recipe.parent / "calibration.jsonl", 40, "calibration").name
    text = recipe.read_text().replace("int8: [merge, int8]", f"odd: {steps}") + f"calibration: {texts}\n"
    recipe.write_text(text)
    results = recipe.parent / "results"
    for verb in ("check", "run"):
        assert command(verb, recipe, "--results", results) == 2
        assert says in errors(capsys)
    assert not list(results.glob("artifacts/*"))


def test_calibration_text_is_counted_without_torch(recipe: Path) -> None:
    texts = prompts(recipe.parent / "calibration.jsonl", 4, "calibration").name
    recipe.write_text(recipe.read_text().replace("int8]", "w8a8]") + f"calibration: {texts}\n")
    code = "import sys; from peftopt.cli import main; main()"
    run = [sys.executable, "-X", "importtime", "-c", code, "check", recipe]
    said = subprocess.run(run, stderr=subprocess.PIPE, text=True, check=False).stderr
    assert "the calibration text is too short" in " ".join(said.split()) and "| torch" not in said


def test_new_writes_a_recipe_that_check_accepts(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    own = ("--base", "base", "--adapter", "lora", "--prompts", "eval.jsonl")
    (recipe.parent / "deep").mkdir()
    assert command("new", "mine.yaml", *own) == command("new", "deep/mine.yaml", *own) == 0
    assert command("new", "mine.yaml", *own) == 2, "nothing is written over"
    assert command("check", "mine.yaml") == command("check", "deep/mine.yaml") == 0
    assert "merged" in capsys.readouterr().out
    assert command("new", "other.yaml", "--base", "base") == 2
    assert command("new", "other.yaml", "--like", "quick", *own) == 0
    text = (recipe.parent / "other.yaml").read_text()
    assert "base: base" in text and "slice:" not in text and "schema:" not in text


def test_off_a_terminal_progress_is_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 2.0, 10.0, 600.0, 650.0, 700.0, 720.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with console.Console().progress("race", 20, "blocks") as show:
        for done in (0, 1, 5, 6, 6, 10, 20):
            show(done, "merged")
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "race 0/20 blocks merged",
        "race 5/20 blocks, 30 s left merged",
        "race 6/20 blocks, 23 min left merged",
        "race 10/20 blocks, 12 min left merged",
        "race 20/20 blocks merged",
    ]


def test_doctor_names_every_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"].keys() == plugins.catalogue().keys()
    assert found["cores"] >= 1 and "torch" in found["versions"]
    assert command("doctor") == 0
    assert "merge" in capsys.readouterr().out


def driver(folder: Path, *cards: str) -> Path:
    """A folder with an `nvidia-smi` that tells of these cards."""
    tool = folder / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *name*) printf '%s\\n' " + " ".join(f"'{card}'" for card in cards) + ";; esac\n"
    )
    tool.chmod(0o755)
    return folder


def test_what_needs_a_gpu_is_not_ready_without_one_whatever_is_installed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch_tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert command("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"]["tensorrt"] == found["others"]["deepspeed-mii"] == ["an NVIDIA GPU"]
    assert found["others"]["exllama"] == ["an NVIDIA GPU"] and "aotinductor" not in found["others"]
    assert command("doctor") == 0
    said = capsys.readouterr().out
    assert re.search(r"tensorrt +engine +needs an NVIDIA GPU", said)
    assert "torch-tensorrt" not in said.partition("install what is missing")[2], "no package helps"
    assert re.search(r"aotinductor +compiler +not offered", said) and "protocol: mii" in said
    assert "--linear-backend exllama" in " ".join(said.split())
    text = recipe.read_text().replace("int8: [merge, int8]", "int8: [merge, {engine: tensorrt}]")
    recipe.with_name("trt.yaml").write_text(text)
    assert command("check", recipe.with_name("trt.yaml"), "--results", tmp_path / "results", "--no-forecast") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "int8 will be skipped: tensorrt needs an NVIDIA GPU" in said and "pip install" not in said


def test_with_a_gpu_what_is_left_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(driver(tmp_path, "NVIDIA H100, 81559 MiB")), prepend=":")
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path / "none"))
    assert command("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"] == ["NVIDIA H100, 81559 MiB"]
    assert found["missing"]["tensorrt"] == ["torch_tensorrt"] and found["others"]["deepspeed-mii"] == []
    assert found["others"]["exllama"] == ["environment vllm"]


def test_merge_then_quantize_then_bench_by_hand(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert command("merge", "--base", "base", "--adapter", "lora", "--out", "merged", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tier0"] == [] and (recipe.parent / "merged" / "model.safetensors").exists()
    assert command("merge", "--base", "base", "--adapter", "lora", "--out", "merged") == 2
    assert command("quantize", "--method", "int8", "--model", "merged", "--out", "int8") == 0
    capsys.readouterr()
    models = ("--model", "base", "--model", "merged", "--model", "int8")
    arguments = ("--adapter", "lora", "--prompts", "eval.jsonl", "--new-tokens", 3, "--blocks", 2, "--json")
    assert command("bench", *models, *arguments) == 0
    first, *others = json.loads(capsys.readouterr().out)["models"]
    assert first["ratio"] is None and "adapter" in first["name"]
    assert all(o["ratio"]["n"] == 2 for o in others)
    assert [f for f in recipe.parent.iterdir() if f.name.startswith(".")] == []


def test_an_adapter_that_is_not_there_is_told_before_a_worker_starts(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(WorkerProcess, "__init__", lambda *_: pytest.fail("a worker was started"))
    assert command("bench", "--model", "base", "--adapter", "missing", "--prompts", "eval.jsonl") == 2
    assert "no adapter folder" in errors(capsys)


@pytest.mark.fresh_workers
def test_compile_keeps_its_cache_beside_the_model_and_leaves_the_model_alone(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    before = {f.name: f.read_bytes() for f in (recipe.parent / "base").iterdir()}
    make_lora(recipe.parent / "base", recipe.parent / "other", std=0.2)
    arguments = ("--model", "base", "--prompts", "eval.jsonl", "--new-tokens", 3, "--threads", 1)
    arguments += ("--adapter", "lora", "--adapter", "other", "--set", "prompt_buckets=40, 80", "--set", "cache_len=96")
    cache = recipe.parent / "base.compiled"
    older = _graphs.graphs_of(store.claim(cache)) / "for-an-adapter.step", cache / "steps" / "old" / "x.step"
    for file in older:
        file.parent.mkdir(parents=True)
        file.touch()
    assert command("compile", *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert Path(found["cache"]) == recipe.parent / "base.compiled" and found["cache_bytes"] > 0
    for start in ("eager", "cold", "warm"):
        parts = [found[start][part] for part in ("imports", "load", "graphs", "answers")]
        assert found[start]["total"] == pytest.approx(sum(parts)) and min(parts[0], parts[1], parts[3]) > 0
    cold, warm = found["cold"]["facts"], found["warm"]["facts"]
    assert (cold["graphs"], cold["graph_breaks"], cold["recompiles"]) == (2, 0, 0)
    assert "warm_start" not in cold and "compile_time" not in warm, "the second process compiled nothing"
    shapes = ("batch 1, cache 96", "batch 1, cache 96, prompts up to 40")
    assert warm["log"] == [f"{shape}: started from the compile cache" for shape in shapes]
    assert [file.exists() for file in older] == [True, False], "what is valid for others stays"
    assert found["kl"] < 0.01 and found["greedy_match"] > 0.5 and found["prompts"] == 6
    (switch,) = found["switches"]
    assert (switch["adapter"], switch["recompiles"]) == ("other", 0) and switch["adapter_switch_time"] > 0
    (one,) = found["traffic"]
    assert one["tpot_ms"] > 0 and one["eager_tpot_ms"] > 0
    assert {f.name: f.read_bytes() for f in (recipe.parent / "base").iterdir()} == before


def test_a_merge_is_certified_or_kept_aside(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def merge(adapter: str, out: str, *more: str) -> int:
        return command("merge", "--base", tiny_base, "--adapter", adapter, "--out", tmp_path / out, *more)

    assert merge(f"{tiny_lora}=0.5", "half") == 0
    shown = capsys.readouterr().out
    assert "passed (full, 6 checks)" in shown and "KL" in shown
    assert merge(str(tiny_lora), "whole", "--certify", "blocks", "--json") == 0
    assert json.loads(capsys.readouterr().out)["certificate"]["depth"] == "blocks"
    assert merge(f"{tiny_lora}=0.003", "weak") == 1
    err = errors(capsys)
    assert "did not pass its certificate" in err and "the delta is lost" in err
    assert not (tmp_path / "weak").exists()
    assert not json.loads((tmp_path / "weak.failed" / "parity.json").read_text())["passed"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["half", "weak.failed", "whole"]


def test_a_dry_run_shows_every_delta_and_calls_out_none(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry(adapter: Path) -> str:
        assert command("merge", "--base", tiny_base, "--adapter", adapter, "--dry-run") == 0
        shown = capsys.readouterr()
        return shown.out + shown.err

    shown = dry(tiny_lora)
    assert "model.layers.1.mlp.up_proj.weight" in shown and "14 tensors" in shown and "nothing was written" in shown
    make_lora(tiny_base, tmp_path / "zero", std=0)
    assert "no delta at all in 14 of 14" in dry(tmp_path / "zero")
    assert command("merge", "--base", tiny_base, "--adapter", tiny_lora) == 2
    assert "needs --out" in errors(capsys)
    assert command("merge", "--base", tiny_base, "--adapter", f"{tiny_lora}=much", "--dry-run") == 2
    says = errors(capsys)
    assert "--adapter" in says and "'much' is not a number" in says


@pytest.mark.fault(10, "the next merge to the same folder removes it")
def test_what_a_killed_merge_left_is_removed_by_the_next(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    for owner, survives in ((2**22 + 1, False), (os.getpid(), True)):  # no process, and one that lives
        left = tmp_path / f".out.{owner}.abc"
        (left / "model").mkdir(parents=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        out = tmp_path / "out"
        assert command("merge", "--base", tiny_base, "--adapter", tiny_lora, "--out", out, "--certify", "blocks") == 0
        assert left.exists() is survives
