"""A whole run that lacks a plug-in's package and holds a secret: the rest is decided, and the secret lands nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import RECIPE, command, errors, prompts

from peftopt import environments
from peftopt.records import Plugin

CANARY = "canary-7f3a9e51c0"
LEAKED = b"7f3a9e51c0"


def lacks(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these plug-ins' packages were not installed."""

    def lacking(plugin: Plugin) -> tuple[list[str], str]:
        return (["torchao"], "pip install 'peftopt[quantize]'") if plugin.name in names else ([], "")

    monkeypatch.setattr(environments, "lacking", lacking)


@pytest.fixture
def recipe(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> Path:
    """Its prompts hold the canary, as where somebody pasted a key into one."""
    path = tmp_path / "tiny.yaml"
    asked = prompts(tmp_path / "eval.jsonl", 12, "eval")
    asked.write_text(asked.read_text().replace("the lazy dog", CANARY).replace("the dog 3", f"it is {CANARY}"))
    path.write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=asked))
    return path


@pytest.mark.fault(38, "its variants are skipped, with what to install; the others are decided")
def test_what_is_not_installed_is_skipped_and_the_rest_is_decided_without_a_secret(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lacks(monkeypatch, "int8")
    monkeypatch.setenv("SOME_API_TOKEN", CANARY)
    results = tmp_path / "results"
    assert command("run", recipe, "--results", results) in (0, 1, 3), "decided among the rest"
    (folder,) = (results / "runs").iterdir()
    decision = json.loads((folder / "decision.json").read_text())
    outcomes = {v["name"]: (v["outcome"], v["decided_by"]) for v in decision["variants"]}
    assert outcomes["int8"] == ("not judged", "artifact.runs") and outcomes["merged"][0] != "not judged"
    assert "int8 skipped, not measured" in decision["sentence"]
    needs = "skipped: int8 needs torchao; install with: pip install 'peftopt[quantize]'"
    assert f"int8: {needs}" in decision["warnings"]
    said = "".join(capfd.readouterr())
    assert f"int8 is {needs}" in " ".join(said.split())
    report = (folder / "report.md").read_text()
    assert "int8 needs torchao" in report and "skipped" in report
    assert '<skipped message="not judged: skipped: int8 needs torchao' in (folder / "junit.xml").read_text()
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    assert {m["variant"] for m in lines if m["probe"] == "speed"} == {"adapter", "adapter~aa", "merged"}

    assert command("report", folder) == command("decide", folder, "--json") - command("decide", folder) == 0
    said += "".join(capfd.readouterr())
    held = [str(f) for f in results.rglob("*") if f.is_file() and LEAKED in f.read_bytes()]
    assert not held and LEAKED.decode() not in said


def test_check_says_ahead_what_will_be_skipped(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks(monkeypatch, "int8")
    assert command("check", recipe, "--results", tmp_path / "results", "--no-forecast") == 0
    assert "int8 will be skipped: int8 needs torchao; install with: pip install" in errors(capsys)
    assert command("check", recipe, "--results", tmp_path / "results", "--no-forecast", "--json") == 0
    assert "int8 needs torchao" in json.loads(capsys.readouterr().out)["skipped"]["int8"]


@pytest.mark.parametrize("lacking", [("eager",), ("merge", "int8")], ids=["the baseline", "all others"])
@pytest.mark.parametrize("verb", ["check", "run"])
def test_where_nothing_could_be_compared_nothing_starts(
    verb: str,
    lacking: tuple[str, ...],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacks(monkeypatch, *lacking)
    assert command(verb, recipe, "--results", tmp_path / "results") == 4
    said = errors(capsys)
    assert f"{lacking[0]} needs torchao" in said and "pip install 'peftopt[quantize]'" in said
    assert not list(tmp_path.glob("results/runs/*"))
