"""Tasks of lm-evaluation-harness: its questions and scores, our engines' answers, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import RECIPE, command, prompts
from helpers.harness_tasks import CHOICE, SPEAK
from helpers.records import decide, of, plan_of, whole

from peftopt import plugins
from peftopt.errors import BadInput
from peftopt.probes import tasks
from peftopt.records import Measurement, Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks beside the rows that they ask."""
    pytest.importorskip("lm_eval")
    made = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"what jumps over dog {n}", "choices": ["fox", "star number", "lazy"], "label": n % 3, "said": "?"}
        for n in range(20)
    ]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "choice.yaml").write_text(CHOICE)
    (made / "speak.yaml").write_text(SPEAK)
    return made


@pytest.fixture(scope="module")
def engine(tiny_base_fp32: Path, tiny_lora: Path) -> Any:
    plugin = plugins.module("engine", "eager")
    return plugin.open(Model(str(tiny_base_fp32), (str(tiny_lora),)), plugin.Params())


def test_likelihoods_are_those_of_the_harness_s_own_engine(folder: Path, engine: Any) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = tasks.run(engine, str(folder / "choice.yaml"), 0)
    assert (found.task, found.metric, found.n) == ("choice", "acc", 20)
    with contextlib.chdir(folder):
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=engine._model, tokenizer=engine.tokenizer, device="cpu"),
            tasks=["choice"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            apply_chat_template=True,
            bootstrap_iters=0,
        )["samples"]["choice"]
    assert {row.id: row.value for row in found.samples} == {f"choice/{s['doc_id']}": s["acc"] for s in theirs}
    assert 0 < found.value < 1, "the tiny model must get some right and some wrong"


def test_answers_end_where_the_task_says_and_rows_are_limited(folder: Path, engine: Any) -> None:
    found = tasks.run(engine, str(folder / "speak.yaml"), 7)
    assert (found.metric, found.n, found.value) == ("exact_match", 7, 0.0)
    assert tasks._until("one\n\ntwo", ["\n\n", "x"]) == "one" and tasks._until("one", "") == "one"


def test_batches_answer_in_the_order_of_the_questions() -> None:
    asked = ["a" * (7 * n % 40) for n in range(40)]
    assert tasks._in_batches(asked, len, lambda batch: [len(text) for text in batch]) == [len(text) for text in asked]


def test_a_task_that_nobody_knows_is_refused(folder: Path, engine: Any) -> None:
    with pytest.raises(BadInput, match="cannot run"):
        tasks.run(engine, str(folder / "nowhere.yaml"), 0)


def scored(variant: str, wrong: set[int], n: int = 200) -> Measurement:
    samples = [{"id": f"support/{i}", "value": float(i not in wrong)} for i in range(n)]
    return Measurement("task", variant, values={"task": "support", "metric": "acc", "samples": samples})


def test_a_required_task_is_judged_row_by_row() -> None:
    plan = plan_of("merged", "int8", require=["task.support >= 0.97x", "task.support >= 50 %"])
    measured = whole(plan, {"merged": 0.5, "int8": 0.4})
    lost = {"adapter": set(range(40)), "merged": set(range(40)), "int8": set(range(60))}
    decision = decide(plan, [*measured, *(scored(name, wrong) for name, wrong in lost.items())], {})
    paired, absolute = (
        {v: next(x for x in of(decision, v).verdicts if x.rule.endswith(end)) for v in ("merged", "int8")}
        for end in ("0.97x", "50 %")
    )
    assert (paired["merged"].outcome, paired["int8"].outcome) == ("accepted", "rejected")
    assert paired["merged"].value is not None and 0.97 < paired["merged"].value.low < 1, "nothing is lost, of 200 rows"
    assert {v.outcome for v in absolute.values()} == {"accepted"}
    assert "task.support: 20 got worse and 0 better of 200" in " ".join(of(decision, "int8").remarks)


def test_a_task_that_was_not_asked_leaves_its_requirement_open() -> None:
    plan = plan_of("merged", require=["task.support >= 0.97x"])
    decision = decide(plan, whole(plan, {"merged": 0.5}), {})
    assert of(decision, "merged").verdicts[-1].outcome == "inconclusive"


@pytest.mark.parametrize("lacks", ["task", "samples"])
def test_imported_scores_without_a_name_or_rows_stand_in_no_one_s_way(lacks: str) -> None:
    plan = plan_of("merged", require=["task.support >= 0.97x"])
    imported = scored("merged", set())
    imported = replace(imported, values={k: v for k, v in imported.values.items() if k != lacks})
    decision = decide(plan, [*whole(plan, {"merged": 0.5}), imported], {})
    assert of(decision, "merged").verdicts[-1].outcome == "inconclusive"


def test_a_recipe_asks_its_tasks(
    folder: Path, tiny_base: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipe is named from here, so all its paths are too
    recipe = Path("tasks.yaml")
    for file in folder.iterdir():
        shutil.copy(file, tmp_path) if file.is_file() else None
    asked = prompts(tmp_path / "prompts.jsonl", 8, "chat")
    text = RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=asked)
    text = text.replace("batch: 4}", "batch: 4, tasks: [choice.yaml], task_rows: 12}")
    text = text.replace("  int8: [merge, int8]\n", "").replace("minimize:", "require: [task.choice >= 0.5x]\nminimize:")
    recipe.write_text(text)
    assert command("run", recipe, "--results", tmp_path / "results") in (0, 1, 3)
    (run,) = (tmp_path / "results" / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "measurements.jsonl").read_text().splitlines()]
    asked_of = {line["variant"]: line["values"] for line in lines if line["probe"] == "task"}
    assert asked_of.keys() == {"adapter", "merged"} and {v["n"] for v in asked_of.values()} == {12}
    assert "task.choice" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: (folder / "choice.yaml").rename(folder / "other.yaml"), "cannot read the task file"),
        (lambda folder: (folder / "choice.yaml").write_text(SPEAK), "names its task speak"),
    ],
)
def test_a_task_file_that_is_wrong_is_told_before_anything_starts(
    break_it: Any, says: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "choice.yaml").write_text(CHOICE)
    break_it(tmp_path)
    recipe = tmp_path / "tasks.yaml"
    text = RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=prompts(tmp_path / "p.jsonl", 8, "chat"))
    recipe.write_text(text.replace("batch: 4}", "batch: 4, tasks: [choice.yaml]}"))
    assert command("check", recipe, "--results", tmp_path / "results") == 2
    assert says in capsys.readouterr().err
