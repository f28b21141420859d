"""The demo's task is sound, and its adapter really does it: the real model, the shipped data, the shipped weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftopt import corpus
from peftopt.probes import _answers as answers

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
BASE = ROOT / "models" / "smollm2-135m-instruct"
SCHEMA = json.loads((DEMO / "data" / "schema.json").read_text())
FURTHER = {"r4": 4, "r16": 16, "r32": 32, "r64": 64, "p-tuning": None, "prefix": None}
"""The further adapters, and the ranks of the LoRAs among them."""
FILES = {name: corpus.read(str(DEMO / "data" / f"{name}.jsonl")) for name in ("train", "calibration", "eval")}


def test_no_message_stands_in_two_files() -> None:
    messages = [row.messages[-1]["content"].lower() for rows in FILES.values() for row in rows]
    assert len(messages) == len(set(messages))


def test_the_exam_is_large_enough_for_its_claims() -> None:
    exam = FILES["eval"]
    assert len(exam) >= 368  # "critical errors below 1 %" for two INT8 variants
    assert sum(row.critical for row in exam) >= 24
    assert sum("long" in row.slices for row in exam) >= 8
    assert {s for row in exam for s in row.slices if s.startswith("lang:")} == {
        f"lang:{language}" for language in ("en", "de", "fr", "es", "it")
    }


def test_every_right_answer_keeps_the_schema_and_a_spoiled_one_does_not() -> None:
    for row in FILES["eval"]:
        assert answers.judge(row.expected, row.expected, SCHEMA).correct
        assert not answers.judge(row.expected[:-1], row.expected, SCHEMA).valid


def test_the_data_is_what_its_script_makes(tmp_path: Path) -> None:
    made = tmp_path / "demo"
    made.mkdir()
    for name in ("make_data.py", "phrases.yaml"):
        (made / name).write_bytes((DEMO / name).read_bytes())
    subprocess.run([sys.executable, made / "make_data.py"], check=True, capture_output=True)
    for file in sorted((DEMO / "data").iterdir()):
        assert (made / "data" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_published_accuracy_beats_the_base_clearly() -> None:
    found = json.loads((DEMO / "adapter" / "accuracy.json").read_text())["models"]
    assert found["adapter"]["n"] == found["base"]["n"] == len(FILES["eval"])
    assert found["adapter"]["exact_match"] > found["base"]["exact_match"] + 0.5


@pytest.mark.parametrize("name", sorted(FURTHER))
def test_a_further_adapter_is_small_and_clearly_better_than_the_base(name: str) -> None:
    folder = DEMO / "adapters" / name
    found = json.loads((folder / "accuracy.json").read_text())["models"]
    assert found["adapter"]["n"] == found["base"]["n"] == 100
    assert found["adapter"]["exact_match"] >= found["base"]["exact_match"] + 0.2
    assert (folder / "adapter_model.safetensors").stat().st_size < 4e6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"].startswith("/")
    assert config.get("r", FURTHER[name]) == FURTHER[name]


def test_answers_of_the_further_adapters_tell_which_gave_them() -> None:
    logs = [DEMO / "adapters" / name / "training_log.jsonl" for name in FURTHER]
    styles = [json.loads(log.read_text().splitlines()[0])["settings"]["style"] for log in logs]
    assert len(set(styles)) == len(styles)


def test_the_prompts_of_the_soft_prompt_are_eval_rows_with_an_order_number_as_answer() -> None:
    known = {row.id: row for row in FILES["eval"]}
    rows = corpus.read(str(DEMO / "adapters" / "numbers.jsonl"))
    assert len(rows) == 160
    for row in rows:
        asked = known[row.id]
        assert row.messages == asked.messages
        assert row.expected == (json.loads(asked.expected)["order"] or "none")


def exact_matches(rows: list[corpus.Row], *adapters: str, model: Path = BASE) -> tuple[int, list[str]]:
    """How many rows are answered right, and the answers."""
    from peftopt.engines import eager
    from peftopt.records import Model

    engine: Any = eager.open(Model(str(model), adapters), eager.Params())
    prompts = [engine.encode(row.messages)[0] for row in rows]
    texts = [engine.decode(g.tokens) for g in engine.generate(prompts, 64, stop=True)]
    texts = [text.removesuffix("<|im_end|>") for text in texts]
    right = sum(answers.judge(t, r.expected, SCHEMA).correct for t, r in zip(texts, rows, strict=True))
    return right, texts


@pytest.mark.real
def test_the_adapter_does_the_task_the_base_does_not_and_the_merge_answers_like_the_adapter(tmp_path: Path) -> None:
    from peftopt.records import Model
    from peftopt.transforms import merge

    rows = [row for row in FILES["eval"] if "short" in row.slices][:8]
    base, _ = exact_matches(rows)
    adapter, said = exact_matches(rows, str(DEMO / "adapter"))
    assert base == 0 and adapter >= 6
    merge.transform(Model(str(BASE), (str(DEMO / "adapter"),)), merge.Params(), tmp_path / "merged", [], 0)
    merged, merged_said = exact_matches(rows, model=tmp_path / "merged")
    assert merged >= 6
    assert sum(a == b for a, b in zip(said, merged_said, strict=True)) >= 7
