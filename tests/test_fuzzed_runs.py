"""Files of a run folder that somebody has changed: a clear error or a verdict, never a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from helpers.command_line import command
from helpers.finished_runs import finished_run
from helpers.mutations import mutated

CHANGES = int(os.environ.get("FUZZ_CHANGES", "40"))


@pytest.fixture(scope="module")
def run(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = finished_run(tmp_path_factory.mktemp("fuzzed"), tiny_base, tiny_lora, built=False)
    (folder / "machine.json").write_text('{"cpu": "x", "cores": 2, "gpu": []}')
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    some = [line for number, line in enumerate(lines) if number % 20 == 0 or '"probe": "quality"' not in line]
    (folder / "measurements.jsonl").write_text("\n".join(some) + "\n")
    assert command("decide", folder) in (0, 1, 3)
    return folder


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("plan.json", "decide"),
        ("machine.json", "decide"),
        ("measurements.jsonl", "decide"),
        ("decision.json", "report"),
        ("plan.json", "report"),
    ],
)
def test_a_changed_file_is_an_error_with_a_hint_or_a_verdict(
    run: Path, name: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(f"{name} {verb}")
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    text = (run / name).read_text()
    lines = text.splitlines() if name.endswith("l") else [text]
    bad = []
    for _ in range(CHANGES):
        at = chance.randrange(len(lines))
        value, what = mutated(json.loads(lines[at]), chance)
        (folder / name).write_text("\n".join([*lines[:at], json.dumps(value), *lines[at + 1 :]]) + "\n")
        code = command(verb, folder)
        said = capsys.readouterr().err
        if code not in (0, 1, 2, 3, 4) or "Traceback" in said or (code in (2, 4) and "error:" not in said):
            bad.append(f"line {at + 1}, {what}: exit {code}, {said.strip().splitlines()[-2:]}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", ["plan.json", "measurements.jsonl", "decision.json"])
@pytest.mark.parametrize("verb", ["decide", "report"])
def test_a_pipe_in_a_runs_folder_is_named_and_not_waited_for(
    run: Path, name: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "results" / "runs" / "run"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    code = command(verb, folder)
    said = capsys.readouterr().err
    wanted = (verb, name) not in {("decide", "decision.json"), ("report", "measurements.jsonl")}
    assert (code == 2 and "pipe" in said and name in said) if wanted else code in (0, 1, 2, 3), (code, said)
    assert command("runs", "--results", tmp_path / "results") == 0, "one bad run does not hide the others"


def test_an_artifact_that_is_a_path_leads_nowhere(run: Path, tmp_path: Path) -> None:
    """A plan of a stranger names artifacts: none is moved aside that lies elsewhere."""
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(run, folder)
    victim.mkdir()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["builds"], "else nothing is shown"
    text = (run / "plan.json").read_text().replace(plan["builds"][0]["id"], str(victim))
    (folder / "plan.json").write_text(text)
    for arguments in (["decide", folder], ["bench", "--more", folder], ["export", folder, "--to", tmp_path / "out"]):
        assert command(*arguments) == 2, arguments
    assert victim.is_dir()
