"""A recipe is read whole or refused whole, with every mistake at its line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt import plugins
from peftopt.errors import BadInput, BadRecipe
from peftopt.machine import can_multiply
from peftopt.recipe import starter
from peftopt.recipe.document import MAX_CHARACTERS
from peftopt.recipe.parse import parse
from peftopt.records import (
    Invariants,
    Measure,
    Metric,
    Plugin,
    Quality,
    Recipe,
    Rule,
    Step,
    Variant,
    Workload,
    task_name,
)
from peftopt.runner import preflight

ROOT = Path(__file__).parent.parent
TRADEOFFS = (ROOT / "recipes/tradeoffs.yaml").read_text()
SHIPPED = [p for p in sorted((ROOT / "recipes").glob("*.yaml")) if p.stem != "tradeoffs"]


@dataclass(frozen=True)
class Nothing:
    pass


@dataclass(frozen=True)
class Bits:
    bits: int = 4
    group_size: int = 128
    damp: float = 0.01
    symmetric: bool = True
    scheme: Literal["w4a16", "w8a8"] = "w4a16"
    ignore: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, not {self.bits}")


@dataclass(frozen=True)
class Mode:
    mode: str = "default"


@dataclass(frozen=True)
class Most:
    most: int = 5


@dataclass(frozen=True)
class Needy:
    target: str


CATALOGUE = {
    p.name: p
    for p in (
        Plugin("merge", "transform", "", "merge", Nothing),
        Plugin("int8", "transform", "", "quantize", Nothing),
        Plugin("gptq", "transform", "", "quantize", Bits, calibrates=True),
        Plugin("awq", "transform", "", "quantize", Bits, calibrates=True),
        Plugin("needy", "transform", "", "", Needy),
        Plugin("cap", "policy", "", "shorten", Most),
        Plugin("eager", "engine", "", "", Nothing),
        Plugin("compiled", "engine", "", "compile", Mode),
        Plugin("vllm", "engine", "", "", Nothing, serves=True),
    )
}

GOOD = """\
model: {base: ../models/base, adapter: /srv/adapter}
calibration: data/calibration.jsonl
workloads:
  chat: {prompts: data/eval.jsonl, new_tokens: 16, batch: 8}
variants:
  adapter:  []
  merged:   [merge]
  gptq4:    [merge, {gptq: {bits: 8, damp: 1e-3}}]
  compiled: [merge, {engine: compiled}]
  tuned:    [merge, {engine: {compiled: {mode: fast}}}]
require:
  - latency.p95@chat <= 400 ms
minimize: latency.p50@chat
"""


def read(text: str, **more: object) -> Recipe:
    return parse(text, "/work/recipes/chat.yaml", CATALOGUE, TRADEOFFS, **more)  # type: ignore[arg-type]


def problems(text: str, **more: object) -> list[tuple[int, str, str]]:
    with pytest.raises(BadRecipe) as caught:
        read(text, **more)
    return list(caught.value.problems)


def problem(text: str, **more: object) -> tuple[int, str, str]:
    (only,) = problems(text, **more)
    return only


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def limits(recipe: Recipe) -> dict[str, float | None]:
    return {f"{rule.technique}.{rule.name}": rule.limit for rule in recipe.rules}


# ---- what a good recipe becomes ----------------------------------------------------------------


def test_a_recipe_has_its_paths_resolved_and_its_defaults_filled_in() -> None:
    recipe = read(GOOD)
    assert (recipe.name, recipe.base, recipe.adapter) == ("chat", "/work/models/base", "/srv/adapter")
    assert recipe.calibration == "/work/recipes/data/calibration.jsonl"
    assert recipe.workloads == {"chat": Workload("chat", "/work/recipes/data/eval.jsonl", 16, 8)}
    assert (recipe.seed, recipe.quality, recipe.measure, recipe.baseline) == (0, None, Measure(), "adapter")
    assert recipe.minimize == Metric("latency.p50", "chat")
    assert [threshold.text for threshold in recipe.require] == ["latency.p95@chat <= 400 ms"]


def test_a_variant_is_a_chain_of_steps_that_ends_in_an_engine() -> None:
    variants = read(GOOD).variants
    merge, eager = Step("merge", "transform", "merge"), Step("eager", "engine", "")
    params = {
        "bits": 8,
        "group_size": 128,
        "damp": 0.001,
        "symmetric": True,
        "scheme": "w4a16",
        "ignore": None,
    }
    gptq = Step("gptq", "transform", "quantize", params, calibrates=True)
    assert list(variants) == ["adapter", "merged", "gptq4", "compiled", "tuned"]
    assert variants["adapter"] == Variant("adapter", (), eager)
    assert variants["gptq4"] == Variant("gptq4", (merge, gptq), eager)
    assert variants["compiled"].engine == Step("compiled", "engine", "compile", {"mode": "default"})
    assert variants["tuned"].engine.params == {"mode": "fast"}


def test_measure_and_quality_are_read_into_their_records() -> None:
    recipe = read(
        GOOD
        + "measure: {requests: 2, warmup: 0, relaunch: 8, max_blocks: 24, clock: cpu, "
        + "threads: 2, deadline: 10 min}\n"
        + "quality: {prompts: q.jsonl, schema: s.json, new_tokens: 80, batch: 4, slice: short}\nseed: 7\n"
    )
    assert recipe.measure == Measure(2, 0, 8, 24, "cpu", 2, 600.0)
    assert recipe.quality == Quality("/work/recipes/q.jsonl", "/work/recipes/s.json", 80, 4, slice="short")
    assert recipe.seed == 7


def test_a_workload_may_keep_one_slice_of_its_prompts() -> None:
    assert read(changed("batch: 8", "slice: lang:de")).workloads["chat"].slice == "lang:de"


@pytest.mark.parametrize(("written", "seconds"), [("600", 600), ("600 s", 600), ("1.5 min", 90), ("90s", 90)])
def test_a_deadline_has_a_unit_or_is_in_seconds(written: str, seconds: float) -> None:
    assert read(GOOD + f"measure: {{deadline: {written}}}\n").measure.deadline_s == pytest.approx(seconds)


def test_a_workload_may_be_a_load_on_servers() -> None:
    served = "variants:\n  adapter: [{engine: vllm}]\n  merged: [merge, {engine: vllm}]\n"
    text = GOOD.split("variants:")[0] + served + "minimize: ttft.p50@chat\n"
    recipe = read(text.replace("batch: 8", "rate: 2.5, requests: 40"))
    chat = recipe.workloads["chat"]
    assert chat.loaded and (chat.rate, chat.users, recipe.timed_requests("chat")) == (2.5, 0, 40)
    assert read(text.replace("batch: 8", "users: 4")).timed_requests("chat") == 32
    assert read(text).timed_requests("chat") == 3 and not read(text).workloads["chat"].loaded
    both = problem(text.replace("batch: 8", "users: 4, rate: 1"))
    assert all("users" in words and "rate" in words for words in both[1:])
    batched = problem(text.replace("batch: 8", "batch: 8, users: 4"))
    assert "batch" in batched[1] and "users: 8" in batched[2]


def test_a_quantizer_may_leave_the_adapter_apart() -> None:
    assert [s.plugin for s in read(changed("[merge]", "[int8]")).variants["merged"].steps] == ["int8"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_parses_and_says_when_to_use_it(path: Path) -> None:
    recipe = parse(path.read_text(), str(path), plugins.catalogue(), TRADEOFFS)
    assert recipe.name == path.stem and not recipe.variants[recipe.baseline].steps
    assert "Use it" in path.read_text().split("model:")[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_can_decide_all_that_it_asks(path: Path) -> None:
    """Those that check no answers are there to compare: they switch off the rules of answers, or say so."""
    recipe = parse(path.read_text(), str(path), plugins.catalogue(), TRADEOFFS)
    open_ = preflight.foreseen(recipe)
    assert open_ == [] or (not recipe.quality and all("no answers are checked" in line for line in open_))


# ---- the trade-off table -----------------------------------------------------------------------


def test_the_default_table_is_expanded_for_every_quantizer() -> None:
    quantizer = {"critical_errors": 0.01, "not_slower": 0.02, "smaller": None}  # `gain` only turns these two
    assert limits(read(GOOD)) == {
        "merge.gain": 0.15,
        "merge.parity": 0.01,
        "merge.lost": 0.05,
        "variant.critical_errors": 0.05,
        "merge.critical_errors": 0.05,
        "bake.gain": 0.0,
        "bake.parity": 0.01,
        "bake.lost": 0.05,
        "bake.critical_errors": 0.05,
        "compile.critical_errors": 0.05,
        **{f"{name}.{half}": limit for name in ("awq", "gptq", "int8") for half, limit in quantizer.items()},
        "compile.gain": 0.0,
        "compile.parity": 0.01,
        "speculate.gain": 0.05,
        "speculate.parity": 0.01,
        "speculate.critical_errors": 0.05,
        "prefix.gain": 0.05,
        "prefix.parity": 0.01,
        "prefix.critical_errors": 0.05,
        "pack.gain": 0.05,
        "truncate.over": 2048,
        "truncate.gain": 0.0,
        "truncate.lost": 0.2,
        "shorten.by": 1.0,
        "shorten.gain": 0.0,
        "shorten.cut": 0.02,
    }


def test_a_recipe_overrides_single_rules_and_a_quantizers_own_row_wins() -> None:
    own = "{merge: {gain: 0.1}, int8: {not_slower: off}, quantize: {not_slower: 5 %, smaller: 25%}}"
    found = limits(read(GOOD + f"tradeoffs: {own}\n"))
    assert (found["merge.gain"], found["merge.parity"]) == (0.1, 0.01)
    assert (found["int8.not_slower"], found["gptq.not_slower"]) == (None, 0.05)
    assert (found["int8.smaller"], found["gptq.smaller"]) == (0.25, 0.25)


def test_a_memory_win_may_be_slower_and_must_be_smaller() -> None:
    found = limits(read(GOOD + "tradeoffs: {int8: {gain: memory}, quantize: {smaller: 25 %, gain: speed}}\n"))
    assert (found["int8.not_slower"], found["int8.smaller"]) == (None, 0.25)
    assert (found["gptq.not_slower"], found["gptq.smaller"]) == (0.02, 0.25)
    found = limits(read(GOOD + "tradeoffs: {quantize: {gain: memory}}\n"))
    assert (found["int8.not_slower"], found["int8.smaller"]) == (None, 0.0)
    assert not any(name.endswith("8.gain") for name in found)


def test_policies_stand_anywhere_in_a_chain_and_are_no_steps_of_the_model() -> None:
    variant = read(changed("[merge, {engine: compiled}]", "[{cap: {most: 9}}, merge, {engine: compiled}]")).variants
    found = variant["compiled"]
    assert [s.plugin for s in found.steps] == ["merge"] and found.engine.plugin == "compiled"
    assert found.policies == (Step("cap", "policy", "shorten", {"most": 9}),)
    assert [s.technique for s in found.techniques] == ["merge", "compile", "shorten"]
    assert "caps its answers twice" in problem(changed("[merge, {engine: compiled}]", "[merge, cap, cap]"))[1]
    assert "has transforms" in problem(changed("adapter:  []", "adapter: [cap]"))[1]


def test_tradeoffs_may_be_default_or_a_file_beside_the_recipe() -> None:
    files = {"/work/recipes/mine.yaml": "merge: {gain: 5 %}\n"}
    assert read(GOOD + "tradeoffs: default\n").rules == read(GOOD).rules
    assert Rule("merge", "gain", 0.05) in read(GOOD + "tradeoffs: mine.yaml\n", read=files.__getitem__).rules


def test_a_mistake_in_a_tradeoffs_file_is_reported_with_the_line_in_that_file() -> None:
    line, message, hint = problem(GOOD + "tradeoffs: mine.yaml\n", read=lambda _: "\nmerge: {gian: 5 %}\n")
    assert line == 14 and "/work/recipes/mine.yaml:2" in message and hint == "did you mean 'gain'?"


def test_a_tradeoffs_file_that_cannot_be_read_is_a_mistake() -> None:
    def missing(path: str) -> str:
        raise FileNotFoundError(2, "No such file", path)

    assert "cannot read /work/recipes/mine.yaml" in problem(GOOD + "tradeoffs: mine.yaml\n", read=missing)[1]


@pytest.mark.parametrize(
    "limit", [".nan", "nan", "-1 %", "-0.1", ".inf", "inf", "15", "101 %", "1e999", "1 ms", "[1]", ""]
)
def test_a_limit_is_a_share(limit: str) -> None:
    line, message, _ = problem(GOOD + f"tradeoffs:\n  merge:\n    gain: {limit}\n")
    assert line == 16 and message.startswith("tradeoffs.merge.gain: must be a share")


@pytest.mark.parametrize("row", ["merge: {gain: 100 %}", "int8: {critical_errors: 0}", "int8: {smaller: 1}"])
@pytest.mark.fault(30, "a threshold that is none is refused")
def test_a_limit_that_nothing_can_meet_is_refused(row: str) -> None:
    assert "must be a share from" in problem(GOOD + f"tradeoffs: {{{row}}}\n")[1]


@pytest.mark.parametrize(
    ("table", "hint"),
    [
        ("{quantise: {smaller: off}}", "did you mean 'quantize'?"),
        ("{int4: {smaller: off}}", "did you mean 'int8'?"),
        ("{quantize: {smaler: off}}", "did you mean 'smaller'?"),
        ("{merge: {not_slower: off}}", "known: critical_errors, gain, lost, parity"),
    ],
)
def test_an_unknown_rule_is_refused_with_the_nearest(table: str, hint: str) -> None:
    assert problem(GOOD + f"tradeoffs: {table}\n")[::2] == (14, hint)


def test_the_default_table_must_be_whole() -> None:
    with pytest.raises(BadRecipe) as caught:
        parse(GOOD, "chat.yaml", CATALOGUE, "merge: {gain: 15 %}")
    assert "tradeoffs: merge.parity has no limit" in [message for _, message, _ in caught.value.problems]


# ---- mistakes ----------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once_in_order_of_their_lines() -> None:
    found = problems("""\
model: {base: ../models/base}
seeds: 1
workloads:
  chat: {prompts: data/eval.jsonl, new_token: 16, batch: 0}
variants:
  adapter: []
  gptq4:
    - merge
    - gtpq: {bits: 4}
  int8: [merge, {gptq: {bit: 4}}]
baseline: adaptor
require:
  - latency.p95@chats <= 400 ms
minimize: latency.p50@chta
""")
    assert [(line, message.partition(":")[0], hint) for line, message, hint in found] == [
        (1, "model", "add adapter: …"),
        (2, "unknown key 'seeds'", "did you mean 'seed'?"),
        (4, "workloads.chat", "did you mean 'new_tokens'?"),
        (4, "workloads.chat.batch", ""),
        (9, "variants.gptq4[2]", "did you mean 'gptq'?"),
        (10, "variants.int8[2].gptq", "did you mean 'bits'?"),
        (11, "baseline", "did you mean 'adapter'?"),
        (13, "require[1]", "did you mean 'chat'?"),
        (14, "minimize", "did you mean 'chat'?"),
    ]
    assert "no transform named 'gtpq'" in found[4][1]


def test_missing_sections_are_named() -> None:
    assert [message for _, message, _ in problems("seed: 0\n")] == [
        "'model' is missing",
        "'workloads' is missing",
        "'variants' is missing",
        "'minimize' is missing",
    ]


@pytest.mark.parametrize("method", ["merge", "bake", ""])
@pytest.mark.parametrize("answers", [[], [16, 40]])
@pytest.mark.parametrize("distinct", [4, 120, 5000])
@pytest.mark.parametrize("widen", [False, True])
def test_a_first_recipe_says_what_its_lines_mean_and_no_value(
    method: str, answers: list[int], distinct: int, widen: bool
) -> None:
    """A comment with a value is wrong as soon as somebody edits the value."""
    why = "it cannot be merged"
    facts = starter.Facts("base", "lora", "p.jsonl", method, why, distinct, answers, 10**10, 10**9, "", widen)
    lines = starter.recipe(facts).splitlines()
    comments = [line.partition("#")[2].partition("such as")[0] for line in lines if "#" in line]
    assert len(comments) > 6 and not [comment for comment in comments if re.search("[0-9]", comment)]
    assert max(map(len, lines)) <= 120
    written = yaml.safe_load("\n".join(lines))
    chains = [step for chain in written["variants"].values() for step in chain]
    names = {"variant", *(name for step in chains for name in ([step] if isinstance(step, str) else step))}
    techniques = {{"int8": "quantize", "engine": "compile"}.get(name, name) for name in names}
    assert written.get("tradeoffs", {}).keys() <= techniques, "limits of what the recipe has, and of nothing else"
    wide = [name for name, chain in written["variants"].items() if "fp32" in str(chain)]
    assert bool(wide) == (widen and method == "merge")


@pytest.mark.parametrize(
    ("old", "new", "line", "message", "hint"),
    [
        ("merged:   [merge]", "merged: [int8, merge]", 7, "already quantized", "put merge before"),
        ("merged:   [merge]", "merged: [merge, int8, int8]", 7, "quantizes twice", "one quantizer"),
        ("merged:   [merge]", "merged: [merge, merge]", 7, "merges the adapter twice", "remove"),
        ("merged:   [merge]", "merged: [{engine: compiled}, merge]", 7, "after its engine", "after the transforms"),
        ("merged:   [merge]", "merged: [merge, compiled]", 7, "not a transform", "{engine: compiled}"),
        ("merged:   [merge]", "merged: [merge, {engine: int8}]", 7, "not an engine", "int8"),
        ("merged:   [merge]", "merged: [merge, {engine: eagr}]", 7, "no engine named 'eagr'", "'eager'"),
        ("merged:   [merge]", "merged: merge", 7, "must be a list", "brackets"),
        ("merged:   [merge]", "merged: [merge, {engine}]", 7, "found nothing", ""),
        ("merged:   [merge]", "merged: [merge, {int8: {}, gptq: {}}]", 7, "one name", "{gptq: {bits: 4}}"),
        ("merged:   [merge]", "merged: [needy]", 7, "'target' is missing", "add target"),
        ("merged:   [merge]", "merged: [merge, {merge: 3}]", 7, "must be a mapping", ""),
        ("merged:   [merge]", "merged: []", 7, "is the same chain as adapter", "remove one"),
        ("merged:   [merge]", "merged: [merge]\n  b: [merge, {engine: eager}]", 8, "same chain as", ""),
        ("{bits: 8, damp: 1e-3}", "{bits: 3}", 8, "bits must be 2, 4 or 8", ""),
        ("{bits: 8, damp: 1e-3}", "{bits: four}", 8, "gptq.bits: must be a whole number", ""),
        ("{bits: 8, damp: 1e-3}", "{bits: 4.5}", 8, "gptq.bits: must be a whole number", ""),
        ("{bits: 8, damp: 1e-3}", "{bits: '4'}", 8, "gptq.bits: must be a whole number", ""),
        ("{bits: 8, damp: 1e-3}", "{damp: .nan}", 8, "gptq.damp: must be a number", ""),
        ("{bits: 8, damp: 1e-3}", "{symmetric: 1}", 8, "gptq.symmetric: must be one of true, false", ""),
        ("{bits: 8, damp: 1e-3}", "{scheme: w2}", 8, "gptq.scheme: must be one of w4a16, w8a8", ""),
        ("{bits: 8, damp: 1e-3}", "{ignore: null}", 8, "gptq.ignore: must be text, found nothing", ""),
        ("calibration: data/calibration.jsonl\n", "", 7, "gptq needs calibration texts", "add calibration"),
        ("adapter:  []", "adapter: [int8]", 5, "adapter has transforms", "[]"),
        ("adapter:  []", "served:  []", 5, "no variant named 'adapter' as baseline", "known:"),
        ("batch: 8", "batch: 0", 4, "workloads.chat.batch: must be a whole number from 1", ""),
        ("new_tokens: 16", "new_tokens: -1", 4, "workloads.chat.new_tokens: must be", ""),
        ("prompts: data/eval.jsonl, ", "", 4, "'prompts' is missing", ""),
        ("base: ../models/base", "base: 5", 1, "model.base: must be text, found '5'", "quotes"),
        ("base: ../models/base", "base: ''", 1, "model.base: must be text that can be printed", ""),
        ("base: ../models/base", 'base: "a\\0b"', 1, "model.base: must be text that can be printed", ""),
        ("base: ../models/base", "base: [x]", 1, "model.base: must be text, found a list", ""),
        ("adapter:  []", "adapter: []\n  ../x: [int8]", 7, "'../x' cannot be a name", "letters"),
        ("adapter:  []", "adapter: []\n  .x: [int8]", 7, "'.x' cannot be a name", "no '.' in front"),
        ("adapter:  []", "adapter: []\n  /abs: [int8]", 7, "'/abs' cannot be a name", ""),
        ("adapter:  []", f"adapter: []\n  ? {'x' * 4096}\n  : [int8]", 7, "cannot be a name", ""),
        ("adapter:  []", 'adapter: []\n  "a\\0": [int8]', 7, "cannot be a name", ""),
        ("adapter:  []", "adapter: []\n  8: [int8]", 7, "keys must be text, found '8'", "quotes"),
        ("adapter:  []", "adapter: []\n  ~: [int8]", 7, "keys must be text, found nothing", ""),
        ("adapter:  []", "adapter: []\n  [a]: [int8]", 7, "keys must be text, found a list", ""),
        ("adapter:  []", "adapter: []\n  adapter: [int8]", 7, "written twice, first on line 6", ""),
        ("minimize:", "seed: 1\nseed: 2\nminimize:", 14, "'seed' is written twice, first on line 13", ""),
        ("minimize:", "seed: -1\nminimize:", 13, "seed: must be a whole number", ""),
        ("minimize:", "measure: {max_blocks: 20}\nminimize:", 13, "must be one of 10, 16, 24, 40, 60", ""),
        ("minimize:", "measure: {min_blocks: 24, max_blocks: 16}\nminimize:", 13, "more than max_blocks", "never run"),
        ("minimize:", "measure: {clock: sun}\nminimize:", 13, "must be one of wall, cpu, auto", ""),
        ("batch: 8", "batch: 8, lengths: odd", 4, "must be one of fixed, natural", ""),
        ("batch: 8", "requests: 40", 4, "workloads.chat: requests", "add users or rate"),
        ("batch: 8", "users: 4", 4, "adapter, merged, gptq4", "(vllm)"),
        ("batch: 8", "rate: 0", 4, "workloads.chat.rate: must be requests a second", ""),
        ("minimize:", "quality: {prompts: q, invariants: {regex: '('}}\nminimize:", 13, "regular expression", "re"),
        ("minimize:", "quality: {prompts: q, invariants: {numbers: 1}}\nminimize:", 13, "must be one of kept", ""),
        ("minimize:", "quality: {prompts: q, invariants: {language: deu}}\nminimize:", 13, "two letters", "de"),
        ("minimize:", "measure: {deadline: 5 h}\nminimize:", 13, "must be 1 s to a day", "" ),
        ("minimize:", "measure: {deadline_s: 5}\nminimize:", 13, "unknown key", "did you mean 'deadline'?"),
        ("minimize:", "quality: {prompts: q, tasks: [a b]}\nminimize:", 13, "cannot be named 'a b'", "letters"),
        ("minimize:", "quality: {prompts: q, tasks: [1]}\nminimize:", 13, "quality.tasks[1]: must be text", "quotes"),
        ("  - latency.p95@chat <= 400 ms", "  - task.arc >= 90 %", 12, "checked answers", "add quality"),
        ("minimize:", "quality: {}\nminimize:", 13, "quality: 'prompts' is missing", ""),
        ("minimize:", "tradeoffs: mine.yaml\nminimize:", 13, "must be default or a mapping", ""),
        ("  - latency.p95@chat <= 400 ms", "  perplexity: 1", 11, "require: must be a list", ""),
        ("  - latency.p95@chat <= 400 ms", "  - 5", 12, "require[1]: must be text", ""),
        ("  - latency.p95@chat <= 400 ms", "  - latency.p95 <= 1 s", 12, "needs a workload", "latency.p95@"),
        ("  - latency.p95@chat <= 400 ms", "  - perplexity <= 1.1x", 12, "checked answers", "add quality"),
        ("latency.p50@chat", "throughput@chat", 13, "minimize: throughput", "latency.p50@"),
        ("latency.p50@chat", "size", 13, "minimize: size", "latency.p50@"),
        ("latency.p50@chat", "latency.p05@chat", 13, "no metric named 'latency.p05'", "did you mean"),
    ],
)  # fmt: skip
@pytest.mark.fault(27, "a name is letters, digits and few signs, and no longer than 64")
@pytest.mark.fault(30, "the line, the key and the nearest known one, exit 2")
def test_each_mistake_has_its_line_and_says_what_to_do(old: str, new: str, line: int, message: str, hint: str) -> None:
    found = problem(changed(old, new))
    assert found[0] == line and message in found[1] and hint in found[2], found


# ---- text that is no recipe --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the file is empty"),
        ("# nothing\n", 1, "the file is empty"),
        ("- a\n- b\n", 1, "found a list"),
        ("just words", 1, "found 'just words'"),
        ("model:\n\tbase: x\n", 2, "indented with a tab"),
        ("model:\n  base: x\n\tadapter: y\n", 3, "indented with a tab"),
        ("model: {base: x\n", 2, "that begins in line 1"),
        ("a: 1\n---\nb: 2\n", 2, "not YAML"),
        ("model: !!python/object/apply:os.system [id]\n", 1, "a YAML tag"),
        ("a: &x 1\nb: *x\n", 1, "an anchor or an alias"),
        ("a: 1\nb: *x\n", 2, "an anchor or an alias"),
        ("a: " + "[" * 5000, 1, "nested more than 20"),
        ("- " * 5000, 1, "nested more than 20"),
        ("[" + "a," * 50_000 + "]", 1, "more than 2000 values"),
        ("a: " + "x" * MAX_CHARACTERS, 0, "more than 1,048,576 characters"),
        ("a: 1\nb: \x00\n", 2, "a character that cannot be printed"),
        ("a: 1\nb: \ud800\n", 2, "a character that cannot be printed"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', 2, "not YAML"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1\n", 1, "not YAML"),
    ],
)  # fmt: skip
@pytest.mark.fault(29, "refused with the line")
def test_hostile_or_broken_text_is_one_clear_mistake(text: str, line: int, message: str) -> None:
    found = problems(text)[0]
    assert found[0] == line and message in found[1], found


@pytest.mark.fault(29, "an alias bomb is refused at its first anchor")
def test_an_alias_bomb_is_refused_at_its_first_anchor() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert problem(bomb)[0] == 1


def test_the_name_of_a_recipe_is_safe_as_a_file_name() -> None:
    assert parse(GOOD, "a b/.my chat!.yaml", CATALOGUE, TRADEOFFS).name == "my-chat-"


def test_many_steps_and_many_variants_are_read_in_no_time() -> None:
    many = ", ".join(["merge"] * 1900)
    assert problem(changed("merged:   [merge]", f"merged: [{many}]"))[1].endswith("merges the adapter twice")
    same = "".join(f"  v{n}: [int8]\n" for n in range(600))
    assert len(problems(changed("variants:\n", f"variants:\n{same}"))) == 599


def holds(text: str) -> None:
    """Either a Recipe or an error for people that can be printed: never a traceback."""
    try:
        assert isinstance(parse(text, "chat.yaml", CATALOGUE, TRADEOFFS), Recipe)
    except BadInput as error:
        assert isinstance(error, BadRecipe) and error.problems
        for line, message, hint in error.problems:
            assert 0 <= line <= text.count("\n") + text.count("\r") + len(text.splitlines()) + 1
            f"{message}{hint}".encode()
            assert message.isprintable() and len(message) < 400


WORDS = st.sampled_from(
    [*GOOD.split(), "\n", "\n  ", " ", "\t", "[", "]", "{", "}", ":", ": ", "- ", "&a ", "*a", "!!x ", "? ",
     "#", "|\n", "'", '"', "\\x", "%", "@", "~", "null", "1e999", ".nan", "<<: ", "=", "1:30", "---\n"]
)  # fmt: skip


@settings(deadline=None)
@given(st.text())
def test_any_text_is_a_recipe_or_an_error_for_people(text: str) -> None:
    holds(text)


@settings(deadline=None)
@given(st.lists(WORDS).map("".join))
def test_any_yaml_like_text_is_a_recipe_or_an_error_for_people(text: str) -> None:
    holds(text)


@settings(deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 12), WORDS | st.text(max_size=5))
def test_a_good_recipe_with_one_edit_is_a_recipe_or_an_error_for_people(at: int, cut: int, put: str) -> None:
    holds(GOOD[:at] + put + GOOD[at + cut :])


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
    st.sampled_from(sorted(yaml.safe_load(GOOD))),
)
def test_any_value_under_any_key_is_a_recipe_or_an_error_for_people(value: object, key: str) -> None:
    holds(json.dumps(yaml.safe_load(GOOD) | {key: value}))


def test_the_page_on_recipes_shows_one_that_parses() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    blocks = (block.split("```")[0] for block in page.split("```yaml\n")[1:])
    recipe, served, load, quality, tasks, table, race = blocks
    text = "model: {base: b, adapter: a}\nworkloads: {chat: {prompts: p.jsonl}}\nvariants:\n  adapter: []\n"
    text += served + "minimize: latency.p50@chat\n"
    assert parse(text, "r.yaml", plugins.catalogue(), TRADEOFFS).variants["served"].engine.plugin == "endpoint"
    text = "model: {base: b, adapter: a}\nvariants:\n  adapter: [{engine: vllm}]\n" + load + "minimize: ttft.p50@day\n"
    found = parse(text, "r.yaml", plugins.catalogue(), TRADEOFFS).workloads
    assert (found["peak"].users, found["day"].rate) == (8, 2.5) and all(w.loaded for w in found.values())
    assert limits(read(recipe))["merge.gain"] == 0.15
    asked = read(GOOD + quality).quality
    assert asked and asked.invariants == Invariants(r"[A-Z]{2}-\d+", ("spam", "ham"), "kept", "kept", "kept")
    assert (examined := read(GOOD + tasks).quality) and examined.task_rows == 200
    assert [task_name(task) for task in examined.tasks] == ["support"]
    assert limits(read(GOOD + table))["gptq.smaller"] == 0.25
    assert read(re.sub("^measure:.*\n", "", GOOD, flags=re.MULTILINE) + race).measure.race == "winner"


def test_a_task_that_is_required_has_to_be_asked() -> None:
    text = GOOD.replace("minimize:", "quality: {prompts: q.jsonl, tasks: [arc_easy, t/support.yaml]}\nminimize:")
    for name in ("arc_easy", "support"):
        good = read(text.replace("  - latency.p95@chat <= 400 ms", f"  - task.{name} >= 0.98x"))
        assert good.require[0].metric == Metric(f"task.{name}") and good.require[0].relative
        assert good.quality and good.quality.tasks == ("arc_easy", "/work/recipes/t/support.yaml")
    with pytest.raises(BadRecipe) as refused:
        read(text.replace("  - latency.p95@chat <= 400 ms", "  - task.suport >= 0.98x"))
    ((line, message, hint),) = refused.value.problems
    assert (line, "no task named 'suport'" in message, "support" in hint) == (12, True, True)


def test_a_variant_on_a_server_needs_its_url_and_the_wall_clock(tmp_path: Path) -> None:
    text = (
        "model: {base: b, adapter: a}\nworkloads: {chat: {prompts: p.jsonl}}\nmeasure: {clock: cpu}\n"
        "variants:\n  adapter: []\n  served: [{engine: {endpoint: {model: supportURL}}}]\n"
        "minimize: latency.p50@chat\n"
    )
    for url, says in (("", "names no server"), (", url: 'http://localhost:8000'", "CPU time is not known")):
        found = parse(text.replace("URL", url), str(tmp_path / "r.yaml"), plugins.catalogue(), TRADEOFFS)
        assert found.variants["served"].engine.params["model"] == "support"
        with pytest.raises(BadInput, match=says):
            preflight.check(found)


def test_generic_calibration_is_a_word_and_no_path() -> None:
    texts = [read(GOOD.replace("data/calibration.jsonl", name)).calibration for name in ("generic", "./generic")]
    assert texts == ["generic", "/work/recipes/generic"]


@pytest.mark.parametrize(
    ("cpuinfo", "dtype", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "BF16", True),
        ("flags\t\t: fpu avx2 avx512f amx_bf16\n", "BF16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "F16", False),
        ("flags\t\t: fpu avx2 f16c\nflags\t\t: fpu avx2 f16c\n", "BF16", False),
        ("Features\t: fp asimd fphp bf16\n", "BF16", True),
        ("Features\t: fp asimd fphp\n", "BF16", False),
        ("Features\t: fp asimd fphp\n", "F16", True),
        ("flags\t\t: fpu avx2\n", "F32", True),
        ("flags\t\t: fpu avx2\n", "I8", True),
        ("vendor: somebody's\n", "BF16", True),
        ("", "BF16", True),
    ],
)
def test_which_dtypes_a_processor_multiplies_is_read_from_its_instructions(cpuinfo: str, dtype: str, has: bool) -> None:
    assert can_multiply(dtype, cpuinfo) == has
