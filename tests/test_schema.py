"""The JSON Schemas take what peftopt reads and writes, and refuse what is plainly wrong."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import command
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator

from peftopt import measurements, plugins, schema
from peftopt.cli.around import starters
from peftopt.diagnose import keeping
from peftopt.diagnose.records import Diagnosis, Row
from peftopt.errors import BadRecipe
from peftopt.recipe.parse import parse
from peftopt.records import Interval

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "results" / "example"
LIMITS = ROOT / "recipes" / "tradeoffs.yaml"
RECIPES = [*starters().values(), *sorted(EXAMPLES.rglob("recipe.yaml"))]
RUNS = [*sorted(EXAMPLES.rglob("decision.json")), ROOT / "tests" / "data" / "first-run" / "decision.json"]
LINES = [*sorted(EXAMPLES.rglob("measurements.jsonl")), ROOT / "tests" / "data" / "first-run" / "measurements.jsonl"]


def of(name: str) -> Any:
    written = json.loads(schema.file(name).read_text())
    kind = Draft7Validator if name == "recipe" else Draft202012Validator
    kind.check_schema(written)
    return kind(written)


RECIPE, DECISION, MEASUREMENT, DIAGNOSIS = map(of, ("recipe", "decision", "measurement", "diagnosis"))

GOOD = yaml.safe_load("""
model: {base: ../models/base, adapter: /srv/adapter}
calibration: data/calibration.jsonl
workloads: {chat: {prompts: data/eval.jsonl, new_tokens: 16, batch: 8}}
quality: {prompts: data/eval.jsonl, rows: 100, invariants: {labels: [spam, 1], language: de}, tasks: [arc_easy]}
measure: {max_blocks: 24, deadline: 10 min}
variants:
  adapter:  []
  gptq4:    [merge, {gptq: {bits: 4, mixed: 0.2}}, {cap: {max_new_tokens: 48}}]
  compiled: [merge, {engine: {compiled: {regions: true}}}]
tradeoffs: {gptq: {critical_errors: 5 %, smaller: 'off'}, truncate: {over: 2048 tokens}}
require: [latency.p95@chat <= 400 ms, task.arc_easy >= 0.98x]
minimize: latency.p50@chat
""")


def accepted(recipe: object) -> bool:
    """Whether the tool reads it."""
    try:
        parse(json.dumps(recipe), "r.yaml", plugins.catalogue(), LIMITS.read_text())
    except BadRecipe:
        return False
    return True


def put(recipe: Any, path: str, value: object) -> Any:
    """A copy of a recipe with another value at a path; with ... the key goes."""
    changed = copy.deepcopy(recipe)
    *outer, last = [int(word) if word.isdigit() else word for word in path.split("/")]
    inner = changed
    for word in outer:
        inner = inner[word]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return changed


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_shipped_recipe_has_the_form_that_the_schema_says(file: Path) -> None:
    RECIPE.validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("file", starters().values(), ids=lambda file: file.stem)
def test_a_shipped_recipe_names_its_schema(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    where = (ROOT / "recipes" / first.partition("$schema=")[2]).resolve()
    assert (
        first + "\n" == schema.mode_line("../schemas/recipe.schema.json") and where == schema.file("recipe").resolve()
    )


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.parent.name)
def test_a_decision_has_the_form_that_its_schema_says(file: Path) -> None:
    DECISION.validate(json.loads(file.read_text()))


@pytest.mark.parametrize("file", LINES, ids=lambda file: file.parent.name)
def test_each_measurement_has_the_form_that_its_schema_says(file: Path) -> None:
    probes = set()
    for line in map(json.loads, file.read_text().splitlines()):
        MEASUREMENT.validate(line)
        probes.add(line["probe"])
    assert probes >= {"build", "speed", "quality"}


def test_a_diagnosis_has_the_form_that_its_schema_says() -> None:
    unknown = Interval(1.2, -math.inf, math.inf, 3)
    row = Row(bottleneck="unfused", part="lora", phase="decode", batch=1, finding="costs", sentence="s", ratio=unknown)
    whole = Diagnosis(
        rows=(row,), engine="ours", base="b", adapters=("a",), threads=2, seconds=3.0, usual_request_ms=unknown
    )
    written = json.loads(keeping.text(whole))
    DIAGNOSIS.validate(written)
    assert not DIAGNOSIS.is_valid(put(written, "rows/0/finding", "nothing"))


WRONG = [
    ("minimize", ...),
    ("minimize", "accuracy"),
    ("minimize", "latency.p50"),
    ("seed", "one"),
    ("sead", 1),
    ("model/adapter", ...),
    ("model", "folder"),
    ("workloads", {}),
    ("workloads/chat/new_tokens", 0),
    ("workloads/chat/new_token", 8),
    ("workloads/chat/lengths", "long"),
    ("workloads/.hidden", {"prompts": "p.jsonl"}),
    ("quality/rows", "all"),
    ("quality/invariants/language", "german"),
    ("measure/max_blocks", 17),
    ("measure/deadline", "10 hours"),
    ("measure/clock", "sun"),
    ("variants/compiled", "merge"),
    ("variants/compiled/0", "marge"),
    ("variants/compiled/1", {"engine": "gptq"}),
    ("variants/compiled/1/engine/compiled/regions", "yes"),
    ("variants/gptq4/1/gptq/bit", 4),
    ("variants/gptq4/1/awq", {}),
    ("tradeoffs/gptq/critical_errors", "5 percent"),
    ("tradeoffs/gptq/parity", "1 %"),
    ("tradeoffs/quantise", {}),
    ("require/0", "latency.p95@chat"),
    ("require/0", "latency.p96@chat <= 400 ms"),
    ("require", "accuracy >= 0.9x"),
]


def test_a_good_recipe_is_accepted_by_both() -> None:
    assert accepted(GOOD) and RECIPE.is_valid(GOOD)


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda each: str(each))
def test_a_wrong_recipe_is_refused_by_the_schema_and_by_the_tool(path: str, value: object) -> None:
    wrong = put(GOOD, path, value)
    assert not accepted(wrong) and not RECIPE.is_valid(wrong)


def paths(value: Any, at: str = "") -> list[str]:
    """Every place in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [path for key, each in inner for path in paths(each, f"{at}/{key}" if at else str(key))]
    return [*([at] if at else []), *below]


@settings(deadline=None)
@given(
    st.sampled_from(paths(GOOD)),
    st.integers(-2, 200)
    | st.floats(0, 2).map(lambda x: round(x, 3))  # JSON writes 1e-05, which YAML reads as text
    | st.booleans()
    | st.sampled_from(["off", "default", "merge", "int8", "15 %", "3 s", "kept", "natural", "speed", "a", [], {}, None])
    | st.sampled_from([["merge"], [{"engine": "eager"}], {"gptq": {}}, {"bits": 4}, {"gain": "off"}, ["a"]]),
)
def test_what_the_tool_accepts_the_schema_accepts(path: str, value: object) -> None:
    changed = put(GOOD, path, value)
    assert RECIPE.is_valid(changed) or not accepted(changed)


@pytest.mark.parametrize("values", [{"block": 1}, {"block": "one", "requests": []}, {"block": 1, "requests": [{}]}])
def test_a_measurement_without_its_probes_values_is_refused(values: dict[str, object]) -> None:
    line = {"format": 1, "probe": "speed", "variant": "a", "values": {"block": 1, "requests": []}}
    assert MEASUREMENT.is_valid(line) and not MEASUREMENT.is_valid({**line, "values": values})
    assert not MEASUREMENT.is_valid({**line, "format": 2}) and not MEASUREMENT.is_valid({**line, "probe": "sped"})


def test_each_probe_has_a_schema_and_each_field_of_a_recipe_says_what_it_means() -> None:
    assert {*MEASUREMENT.schema["$defs"]} >= {record.__name__ for record in measurements.PROBES.values()}
    sections = RECIPE.schema["properties"]
    for name in ("model", "quality", "measure"):
        assert all(each.get("description") for each in sections[name]["properties"].values()), name
    assert all(each.get("description") for each in sections.values())


@pytest.mark.parametrize("name", schema.FILES)
def test_the_verb_prints_a_schema(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("schema", name) == 0
    assert json.loads(capsys.readouterr().out)["title"] == json.loads(schema.file(name).read_text())["title"]


def test_the_schema_of_a_recipe_knows_plug_ins_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**plugins.catalogue(), "ours": replace(plugins.catalogue()["int8"], name="ours")}
    monkeypatch.setattr(plugins, "catalogue", lambda: known)
    printed = Draft7Validator(json.loads(schema.text("recipe")))
    recipe = put(GOOD, "variants/compiled/0", "ours")
    assert printed.is_valid(recipe) and not RECIPE.is_valid(recipe)


def test_an_unknown_schema_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("schema", "recipes") == 2
    assert "recipe" in capsys.readouterr().err


def test_a_new_recipe_names_a_schema_that_is_there(tmp_path: Path) -> None:
    assert command("new", tmp_path / "r.yaml", "--like", "quick") == 0
    text = (tmp_path / "r.yaml").read_text()
    assert text.count("$schema=") == 1 and Path(text.splitlines()[0].partition("$schema=file://")[2]).is_file()
