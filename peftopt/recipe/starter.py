"""Write a first recipe for a user's own model, adapter, prompts and machine: from facts to commented YAML. Pure.

A comment explains a line and never repeats its value, so that it stays right when the user edits the value.
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
"""The default limits on critical errors of a recipe's techniques, by the adapter's method."""

SHORTEST, LONGEST = 8, 256
"""The least and the greatest number of tokens of a timed answer."""

MOST_ROWS = 500
"""Most prompts whose answers are checked: on a CPU, each takes about a second per variant."""


@dataclass(frozen=True)
class Facts:
    """The facts that a recipe depends on. Paths are as the recipe will name them.

    `method`: "merge" for an adapter that can be merged, "bake" for a prompt method, "" for an adapter that stays as it
    is; `why` says why. `distinct`: the number of different prompts. `answer_tokens`: the tokens of each right answer.
    `base_bytes` and `memory_bytes`: the size of the model and the machine's memory. `widen`: whether this machine has
    no instructions for the base's dtype, and may compute faster in fp32.
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
    widen: bool = False


def recipe(facts: Facts) -> str:
    """The recipe's text, which `check` accepts as it is."""
    variants = _variants(facts)
    answer = _timed_tokens(facts.answer_tokens)
    longest = -(-round(1.5 * max(facts.answer_tokens, default=170)) // 16) * 16
    rows = min(facts.distinct, MOST_ROWS)
    lines = [
        "# A first decision: which of these variants to ship instead of the adapter as it is served today.",
        "# `peftopt new` chose the numbers for this machine, model and prompts. Change them as you like.",
        f"model: {{base: {_word(facts.base)}, adapter: {_word(facts.adapter)}}}",
        "",
        "# What is timed: requests of `batch` prompts; every answer has exactly `new_tokens` tokens. The median length",
        "# of your right answers is a good number.",
        "workloads:",
        f"  chat: {{prompts: {_word(facts.prompts)}, new_tokens: {answer}, batch: 1}}",
        "  # If you answer many at a time, add a workload such as bulk: {prompts: …, new_tokens: 16, batch: 8}",
        "",
        "# Which answers are checked: those to `rows` prompts, with at most `new_tokens` tokens. In the file of",
        "# prompts, mark a row as critical if its answer must never get worse.",
        f"quality: {{prompts: {_word(facts.prompts)}, new_tokens: {longest}, batch: 8, rows: {rows}}}",
        "# A variant gets a fresh process every `relaunch` blocks. The run ends after `max_blocks` at the latest.",
        "measure: {relaunch: 3, max_blocks: 16}",
        "",
        "# Each variant is built, measured against the baseline, and judged.",
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
            "  # `certify: blocks` checks every written weight. `full` also compares predictions. That",
            "  # takes time and memory, and a run compares answers anyway.",
            f"  merged: [{merge}]",
            *_widened(facts, compiled),
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
            "  int8: [int8]                     # the adapter stays unmerged, on a quantized base",
        ]
    return lines


def _widened(facts: Facts, compiled: str) -> list[str]:
    """Variants in fp32 for a processor that has to convert the base's numbers before it multiplies them."""
    if not facts.widen:
        return []
    merge = "{merge: {certify: blocks, dtype: fp32}}"
    return [
        "  # This processor has no instructions for the dtype of the base. In a wider one, prompts take less time",
        "  # and the tokens of an answer may take more. It takes twice the memory.",
        f"  fp32: [{merge}]",
        f"  fp32_compiled: [{merge}, {compiled}]",
    ]


def _memory(facts: Facts, variants: int) -> list[str]:
    """A comment if the variants, which stay loaded side by side, may not fit into memory."""
    if facts.gpu or variants * facts.base_bytes < facts.memory_bytes / 2:
        return []
    return ["# All stay loaded side by side. If this machine's memory is too small for that, remove some."]


def _tradeoffs(facts: Facts, rows: int, judged: int) -> list[str]:
    """The limits on critical errors that this number of prompts can show for this number of variants."""
    shown = next((rate for rate in RATES if needed_n(rate, judged) <= rows), None)
    if shown is None:
        return [
            "# The prompts are too few to show that critical errors are rare: variants stay undecided.",
            "# `peftopt check` says how many are needed.",
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
        return [*lines, "  - accuracy >= 0.9x               # right answers, relative to the adapter's"]
    return [*lines, "  - perplexity <= 1.05x            # for prompts without right answers; else require accuracy"]


def _word(text: str) -> str:
    """Text as a word of YAML's flow style."""
    plain = text and not set(text) & set("{}[],&*#?|<>=!%@:`'\" ")
    return text if plain else json.dumps(text, ensure_ascii=False)
