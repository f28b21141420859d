"""A grid's text to its cells: what is refused and where, and which recipe each cell is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.errors import BadRecipe
from peftopt.recipe.grid import MOST, Cell, Grid, builds, cells, parse
from peftopt.records import Recipe
from peftopt.runner.judged import recipe_of

RECIPE = """# The template.
model: {base: ../models/own, adapter: ../adapters/own}
calibration: data/calibration.jsonl
workloads: {chat: {prompts: data/eval.jsonl, new_tokens: 16}}
quality: {prompts: data/eval.jsonl, schema: /srv/schema.json}
measure: {max_blocks: 24}
variants:
  today:  []
  merged: [merge]
  int8:   [merge, int8]
  gptq4:  [merge, {gptq: {bits: 4}}]
baseline: today
tradeoffs: {int8: {not_slower: off}, merge: {gain: 10 %}}
require: [latency.p95@chat <= 400 ms]
minimize: latency.p50@chat
price_per_hour: 1.50 EUR
"""

GRID = """recipe: chat.yaml
models:
  llama: {base: llama, adapters: {support: a/support, sales: a/sales}}
  qwen: {base: qwen, adapters: {support: a/qwen}}
variants:
  merging: [merged]
  quantizing: [int8, gptq4]
machines:
  l4: {gpus: 1, memory: 24 GB, price_per_hour: 0.80 USD}
  cpu: {variants: [merging]}
"""


def template(path: str) -> tuple[Recipe, str]:
    return recipe_of(RECIPE, path), RECIPE


def grid(text: str = GRID) -> Grid:
    return parse(text, "/srv/grids/all.yaml", template)


def mistakes(text: str) -> dict[int, str]:
    """Each mistake with its hint, by line."""
    with pytest.raises(BadRecipe) as caught:
        parse(text, "/srv/grids/all.yaml", template)
    return {line: f"{message}; {hint}" for line, message, hint in caught.value.problems}


def named(listed: list[Cell]) -> dict[tuple[str, str, str, str], Cell]:
    return {(cell.model, cell.adapter, cell.group, cell.machine.name): cell for cell in listed}


@pytest.mark.parametrize(
    ("written", "instead", "line", "told"),
    [
        ("machines:", "machine:", 8, "did you mean 'machines'"),
        ("adapters: {support: a/qwen}", "adapter: {support: a/qwen}", 4, "did you mean 'adapters'"),
        ("[int8, gptq4]", "[int8, gptq]", 7, "did you mean 'gptq4'"),
        ("[merging]", "[merge]", 10, "did you mean 'merging'"),
        ("24 GB", "24 Gb", 9, "24 GB"),
        ("0.80 USD", "free", 9, "2.10 USD"),
        ("gpus: 1", "gpus: -1", 9, "whole number"),
        ("gpus: 1", "gpu: 1", 9, "did you mean 'gpus'"),
        ("recipe: chat.yaml\n", "", 1, "'recipe' is missing"),
    ],
)
def test_a_mistake_is_named_by_line_with_the_nearest_word(written: str, instead: str, line: int, told: str) -> None:
    said = mistakes(GRID.replace(written, instead, 1))
    assert told in said[line], said


def test_folders_that_are_not_there_are_all_named() -> None:
    with pytest.raises(BadRecipe) as caught:
        parse(GRID, "/srv/grids/all.yaml", template, lambda folder: folder == "/srv/grids/qwen")
    missing = {(line, message.rpartition(" ")[2]) for line, message, _ in caught.value.problems}
    assert missing == {
        *((3, f"/srv/grids/{folder}") for folder in ("llama", "a/support", "a/sales")),
        (4, "/srv/grids/a/qwen"),
    }


def test_the_mistakes_of_the_recipe_are_told_where_the_grid_names_it() -> None:
    def broken(path: str) -> tuple[Recipe, str]:
        return recipe_of(RECIPE.replace("int8]", "int9]"), path), RECIPE

    with pytest.raises(BadRecipe) as caught:
        parse(GRID, "/srv/grids/all.yaml", broken)
    ((line, message, _),) = caught.value.problems
    assert line == 1 and "chat.yaml:10" in message and "int9" in message


def test_a_cell_is_the_recipe_with_its_own_model_variants_and_price() -> None:
    listed = named(cells(grid()))
    assert set(listed) == {
        (model, adapter, group, machine)
        for model, adapter in (("llama", "support"), ("llama", "sales"), ("qwen", "support"))
        for group, machine in (("merging", "l4"), ("merging", "cpu"), ("quantizing", "l4"))
    }
    cell = listed["llama", "sales", "quantizing", "l4"]
    read = recipe_of(cell.recipe, "/elsewhere/cell.yaml")
    whole = template("/srv/grids/chat.yaml")[0]
    assert [*read.variants] == ["today", "int8", "gptq4"] and read.baseline == "today"
    own = {
        "name": read.name,
        "path": read.path,
        "base": "/srv/grids/llama",
        "adapter": "/srv/grids/a/sales",
        "variants": read.variants,
        "price_per_hour": "0.80 USD",
    }
    assert read == replace(whole, **own), "everything else is the template's, its paths too"
    assert recipe_of(listed["qwen", "support", "merging", "cpu"].recipe, "/c.yaml").price_per_hour == "1.50 EUR"
    assert cell.machine.gpus == 1 and cell.machine.memory == 24e9


def test_without_groups_and_machines_a_cell_is_a_model_with_an_adapter() -> None:
    text = GRID[: GRID.index("variants:")]
    listed = cells(grid(text))
    assert len(listed) == 3
    assert all([*recipe_of(cell.recipe, "/c.yaml").variants] == ["today", "merged", "int8", "gptq4"] for cell in listed)


def test_a_name_changes_with_what_is_measured_and_with_nothing_else() -> None:
    before = [cell.name for cell in cells(grid())]
    assert len({*before}) == len(before)
    commented = RECIPE.replace("# The template.", "# Another comment.").replace("1.50 EUR", "9.50 EUR")

    def again(text: str, written: str = GRID) -> list[str]:
        return [c.name for c in cells(parse(written, "/srv/grids/all.yaml", lambda p: (recipe_of(text, p), text)))]

    assert again(commented) == before
    assert again(RECIPE, GRID.replace("0.80 USD", "0.90 USD").replace("24 GB", "48 GB")) == before
    assert {*again(RECIPE.replace("new_tokens: 16", "new_tokens: 17"))}.isdisjoint(before)
    moved = again(RECIPE, GRID.replace("base: qwen,", "base: qwen2,"))
    assert [a == b for a, b in zip(before, moved, strict=True)] == [True] * 6 + [False] * 3


def test_artifacts_of_shared_steps_are_counted_once() -> None:
    assert builds(grid()) == {"llama": 6, "qwen": 3}, "merged, int8 of it, gptq4 of it, for each adapter"


NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9_.-]{0,70}", fullmatch=True).filter(lambda n: len(n) <= 64), unique=True)


@settings(max_examples=20)
@given(models=NAMES.filter(bool), adapters=NAMES.filter(bool), machines=NAMES)
def test_every_combination_is_one_cell_whatever_the_names_are(
    models: list[str], adapters: list[str], machines: list[str]
) -> None:
    named_adapters = ", ".join(f"'{name}': 'a/{name}'" for name in adapters)
    text = "recipe: chat.yaml\nmodels:\n"
    text += "".join(f"  '{name}': {{base: 'b/{name}', adapters: {{{named_adapters}}}}}\n" for name in models)
    text += "machines:\n" + "".join(f"  '{name}': {{}}\n" for name in machines) if machines else ""
    listed = cells(grid(text))
    assert len(listed) == len({cell.name for cell in listed})
    assert len(listed) == len(models) * len(adapters) * max(len(machines), 1)
    for cell in listed[:: max(len(listed) // 3, 1)]:
        path = f"/results/{cell.name}.yaml"
        assert recipe_of(cell.recipe, path).name == cell.name == Path(path).stem, "runs are found by it"


def test_a_thousand_cells_are_planned_each_with_its_own_model_and_adapter() -> None:
    adapters = ", ".join(f"a{n}: a/{n}" for n in range(25))
    models = "".join(f"  m{n}: {{base: m/{n}, adapters: {{{adapters}}}}}\n" for n in range(10))
    listed = cells(grid(f"recipe: chat.yaml\nmodels:\n{models}{GRID[GRID.index('variants:') :]}  h100: {{}}\n"))
    assert len(listed) == 10 * 25 * (2 + 1 + 2)
    assert len({cell.name for cell in listed}) == len(listed)
    cell = named(listed)["m7", "a13", "quantizing", "h100"]
    read = recipe_of(cell.recipe, "/c.yaml")
    assert (read.base, read.adapter) == ("/srv/grids/m/7", "/srv/grids/a/13")


def test_a_grid_may_list_thousands_of_adapters_and_not_any_number() -> None:
    def of(number: int) -> str:
        adapters = ", ".join(f"a{n}: a/{n}" for n in range(number))
        return f"recipe: chat.yaml\nmodels: {{llama: {{base: llama, adapters: {{{adapters}}}}}}}\n"

    assert len(grid(of(2_500)).models["llama"].adapters) == 2_500
    assert f"more than {MOST} values" in mistakes(of(MOST // 2))[2]
