"""The verbs as functions, and a run's folder as data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from helpers.command_line import RECIPE, command, errors, prompts

import peftopt
from peftopt import stats, store
from peftopt.api.columns import tables
from peftopt.api.opened import TABLES
from peftopt.errors import BadInput, BadRecipe
from peftopt.records import Measurement

QUICK = Path(__file__).parents[1] / "results" / "example" / "quick"


def test_a_runs_tables_hold_what_its_decision_says() -> None:
    run = peftopt.open_run(QUICK)
    assert run.decision.chosen in run.variants and run.machine["cpu"]
    figures = run.figures().set_index(["variant", "metric"])
    answers = run.answers()
    first = answers[~answers.second_run].groupby("variant").correct.mean()
    blocks = run.blocks()
    for variant in run.variants:
        assert figures.loc[(variant, "accuracy"), "estimate"] == pytest.approx(first[variant])
    paired = blocks.pivot(index="block", columns="variant", values="latency_ms").dropna()
    ratio = stats.median(list(paired[run.decision.chosen] / paired["adapter"]))
    low, high = figures.loc[(run.decision.chosen, "latency.ratio@chat"), ["low", "high"]]
    assert low <= ratio <= high
    assert set(blocks.launch) > {1} and len(run.verdicts()) >= 10
    timed = run.requests()
    assert (timed.request_duration_ms >= timed.ttft_ms).all() and timed.new_tokens.min() > 0


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_the_same_in_a_file(
    table: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"t.{ending}"
    assert command("export-data", QUICK, "--to", file, "--table", table) == 0
    read = pandas.read_csv(file) if ending == "csv" else pandas.read_parquet(file)
    known = peftopt.open_run(QUICK).table(table)
    assert list(read.columns) == list(known.columns) and len(read) == len(known) > 0
    assert str(len(known)) in capsys.readouterr().out


@pytest.mark.parametrize("table", TABLES)
def test_every_column_says_what_it_is_and_no_run_has_others(table: str, tmp_path: Path) -> None:
    described = tables()[table]
    assert described.row and all(each.meaning for each in described.columns)
    assert all(each.unit == "ms" for each in described.columns if each.name.endswith("_ms"))
    (tmp_path / "plan.json").write_bytes((QUICK / "plan.json").read_bytes())
    (tmp_path / "decision.json").write_bytes((QUICK / "decision.json").read_bytes())
    for folder in (QUICK, tmp_path):
        frame = peftopt.open_run(folder).table(table)
        assert list(frame.columns) == [each.name for each in described.columns]
        assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
            each.name: each.dtype for each in described.columns
        }


def test_what_a_server_and_a_load_said_is_in_the_tables(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((QUICK / "plan.json").read_bytes())
    request = {"request_duration_ms": 9.0, "new_tokens": 3, "warmup": False}
    sent = {**request, "scheduled": 0.5, "done": 2.0, "gaps_ms": [1.0, 2.0], "kind": "oom"}
    turn = {"block": 7, "requests": [request], "engine": {"running": {"mean": 1.5}, "slots": 8}}
    store.append(
        tmp_path / "measurements.jsonl",
        Measurement("speed", "adapter", "chat", values=turn),
        Measurement("load", "adapter", "chat", values={"source": "peftopt load", "requests": [sent]}),
    )
    run = peftopt.open_run(tmp_path)
    raced, loaded = run.requests().to_dict("records")
    assert (raced["source"], raced["block"]) == ("race", 7) and pandas.isna(raced["scheduled"])
    assert (loaded["source"], loaded["scheduled"], loaded["kind"]) == ("peftopt load", 0.5, "oom")
    assert pandas.isna(loaded["block"]) and loaded["gaps_ms"] == [1.0, 2.0]
    (block,) = run.blocks().to_dict("records")
    assert (block["engine_running_mean"], block["engine_slots"]) == (1.5, 8) and pandas.isna(block["engine_busy"])


def test_what_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export-data", QUICK, "--to", tmp_path / "t.xlsx") == 2
    assert command("export-data", QUICK, "--to", tmp_path / "t.csv", "--table", "nothing") == 2
    assert command("export-data", QUICK, "--to", tmp_path / "no" / "t.csv") == 2
    assert command("export-data", tmp_path, "--to", tmp_path / "t.csv") == 2
    assert "requests" in errors(capsys) and not list(tmp_path.iterdir())


def test_a_recipe_runs_and_is_judged_from_python(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    asked = prompts(tmp_path / "p.jsonl", 8, "eval")
    recipe = tmp_path / "r.yaml"
    text = RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=asked.name)
    recipe.write_text(text.replace("  int8: [merge, int8]\n", ""))
    run = peftopt.run(recipe, tmp_path / "results")
    assert (run.folder / "report.html").exists()
    assert peftopt.decide(run).outcome == run.decision.outcome
    with pytest.raises(BadRecipe):
        recipe.write_text("model: 1")
        peftopt.run(recipe, tmp_path / "results")


def test_a_merge_and_a_quantizer_from_python(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    merged = peftopt.merge(tiny_base, tiny_lora, tmp_path / "merged", certify="blocks")
    assert merged.certificate and merged.certificate["passed"] and merged.model.path == str(tmp_path / "merged")
    assert peftopt.quantize(tmp_path / "merged", "int8", tmp_path / "int8").quantization
    with pytest.raises(BadInput):
        peftopt.merge(tiny_base, tmp_path, tmp_path / "other")


def test_the_package_is_cheap_to_import_and_names_its_functions() -> None:
    code = "import sys, peftopt; print(sorted({'numpy', 'pandas', 'torch'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert all(callable(getattr(peftopt, name)) for name in peftopt.__all__)
    with pytest.raises(AttributeError):
        _ = peftopt.nothing
