"""A first recipe for a user's own model, adapter, prompts and machine: pure, from facts to commented YAML.

A comment says what a line means, never its value: who edits the value leaves no comment behind that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from peftopt import stats
from peftopt.stats import needed_n

RATES = (0.01, 0.02, 0.03, 0.05, 0.10)
"""Limits on critical errors that a recipe proposes: the strictest that the prompts can show."""

USUAL = {
    "merge": {"merge": 0.05, "quantize": 0.01, "compile": 0.05, "variant": 0.05},
    "bake": {"bake": 0.05, "compile": 0.05, "variant": 0.05},
    "": {"quantize": 0.01, "variant": 0.05},
}
"""What the table of trade-offs allows the techniques that a recipe has, by the adapter's method."""

SHORTEST, LONGEST = 8, 256
"""Bounds of the tokens that a timed answer is given."""

MOST_ROWS = 500
"""Prompts whose answers are checked, at most: on a CPU each takes about a second a variant."""


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on. Paths as the recipe shall name them.

    `method`: "merge" where the adapter can be merged, "bake" for a prompt method, "" for one that stays as it is, and
    `why`. `distinct` prompts there are; `answer_tokens` of each that has a right answer. `base_bytes` and
    `memory_bytes` of the model and the machine.
    """

    base: str
    adapter: str
    prompts: str
    method: str
    why: str
    distinct: int
    answer_tokens: Sequence[int]
    base_bytes: int
    memory_bytes: int
    gpu: str


def recipe(facts: Facts) -> str:
    """The recipe's text, which `check` accepts as it is."""
    variants = _variants(facts)
    answer = _timed_tokens(facts.answer_tokens)
    longest = -(-round(1.5 * max(facts.answer_tokens, default=170)) // 16) * 16
    rows = min(facts.distinct, MOST_ROWS)
    lines = [
        "# A first decision: which of these variants to ship in place of the adapter as it is served today.",
        "# `peftopt new` chose the numbers for this machine, model and prompts. Change what you know better.",
        f"model: {{base: {_word(facts.base)}, adapter: {_word(facts.adapter)}}}",
        "",
        "# What is timed: `batch` prompts together, of which every answer gets exactly `new_tokens`. The median length",
        "# of your right answers is a good number.",
        "workloads:",
        f"  chat: {{prompts: {_word(facts.prompts)}, new_tokens: {answer}, batch: 1}}",
        "  # Where you answer many at a time, add such as bulk: {prompts: …, new_tokens: 16, batch: 8}",
        "",
        "# Whose answers are checked: of so many `rows`, each of `new_tokens` at most. In the file of prompts, mark as",
        "# critical what may never get worse.",
        f"quality: {{prompts: {_word(facts.prompts)}, new_tokens: {longest}, batch: 8, rows: {rows}}}",
        "# After how many blocks a variant gets a fresh process, and after how many the run ends at the latest.",
        "measure: {relaunch: 3, max_blocks: 16}",
        "",
        "# Each is built, measured against the baseline, and judged.",
        *_memory(facts, len(variants)),
        "variants:",
        *variants,
        "baseline: adapter",
        *_tradeoffs(facts, rows, len(variants) - 1),
        *_require(facts),
        "minimize: latency.p50@chat",
    ]
    return "\n".join(lines) + "\n"


def _timed_tokens(answers: Sequence[int]) -> int:
    """Tokens of a timed answer: the median of the right ones, in steps of 8."""
    usual = stats.median(answers) if answers else 64
    return int(min(LONGEST, max(SHORTEST, -(-usual // 8) * 8)))


def _variants(facts: Facts) -> list[str]:
    lines = ["  adapter: []                      # as you serve it: [] is transformers here, [{engine: vllm}] is vLLM"]
    compiled = "{engine: {compiled: {regions: true, prompt_buckets: none}}}"
    if facts.method == "merge":
        merge = "{merge: {certify: blocks}}"
        lines += [
            "  # `certify: blocks` checks every weight that is written. `full` compares predictions too: that",
            "  # takes time and memory, and a run compares answers anyway.",
            f"  merged: [{merge}]",
            f"  compiled: [{merge}, {compiled}]",
            f"  int8_compiled: [{merge}, int8, {compiled}]",
        ]
    elif facts.method == "bake":
        lines += [
            "  baked: [bake]                    # keys and values of the virtual tokens, computed once",
            f"  baked_compiled: [bake, {compiled}]",
        ]
    else:
        lines += [
            f"  # {facts.why}",
            "  int8: [int8]                     # the adapter stays apart, on a quantized base",
        ]
    return lines


def _memory(facts: Facts, variants: int) -> list[str]:
    """A warning where variants, which stay loaded side by side, may not fit."""
    if facts.gpu or variants * facts.base_bytes < facts.memory_bytes / 2:
        return []
    return ["# All stay loaded side by side, which may be more than this machine's memory holds. Take some out then."]


def _tradeoffs(facts: Facts, rows: int, judged: int) -> list[str]:
    """The limits on critical errors that so many prompts can show of so many variants."""
    shown = next((rate for rate in RATES if needed_n(rate, judged) <= rows), None)
    if shown is None:
        return [
            "# Too few prompts cannot show that critical errors are rare: variants stay undecided.",
            "# `peftopt check` says how many it takes.",
        ]
    weaker = {name: shown for name, limit in USUAL[facts.method].items() if shown > limit}
    if not weaker:
        return []
    return [
        "tradeoffs:                         # the strictest limits that the prompts can show; more prompts show more",
        *(f"  {name}: {{critical_errors: {rate:.0%}}}".replace("%", " %") for name, rate in weaker.items()),
    ]


def _require(facts: Facts) -> list[str]:
    lines = ["require:                           # your SLA, such as: - latency.p95@chat <= 400 ms"]
    if facts.answer_tokens:
        return [*lines, "  - accuracy >= 0.9x               # right answers, against how many the adapter has"]
    return [*lines, "  - perplexity <= 1.05x            # for prompts without right answers; else ask for accuracy"]


def _word(text: str) -> str:
    """Text as a word of YAML's flow style."""
    plain = text and not set(text) & set("{}[],&*#?|<>=!%@:`'\" ")
    return text if plain else json.dumps(text, ensure_ascii=False)
