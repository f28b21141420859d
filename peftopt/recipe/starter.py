"""A first recipe for a user's own model, adapter, prompts and machine: pure, from facts to commented YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from peftopt import stats
from peftopt.stats import needed_n

RATES = (0.01, 0.02, 0.03, 0.05, 0.10)
"""Limits on critical errors that a recipe proposes: the strictest that the prompts can show."""

SHORTEST, LONGEST = 8, 256
"""Bounds of the tokens that a timed answer is given."""

MOST_ROWS = 500
"""Prompts whose answers are checked, at most: on a CPU each takes about a second a variant."""


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on. Paths as the recipe shall name them.

    `method`: "merge" where the adapter can be merged, "bake" for a prompt method, "" for one that stays as it is, and
    `why`. `prompt_tokens` and `answer_tokens` of each prompt, the latter of those with a right answer. `base_bytes`
    and `memory_bytes` of the model and the machine.
    """

    base: str
    adapter: str
    prompts: str
    method: str
    why: str
    distinct: int
    prompt_tokens: Sequence[int]
    answer_tokens: Sequence[int]
    slices: Sequence[str]
    base_bytes: int
    memory_bytes: int
    cores: int
    gpu: str


def recipe(facts: Facts) -> str:
    """The recipe's text, which `check` accepts as it is."""
    variants = _variants(facts)
    answer = _timed_tokens(facts.answer_tokens)
    longest = -(-round(1.5 * max(facts.answer_tokens, default=170)) // 16) * 16
    rows = min(facts.distinct, MOST_ROWS)
    longest_prompt = max(facts.prompt_tokens)
    timed = f"{stats.median(facts.answer_tokens):.0f}, the median of yours" if facts.answer_tokens else "64"
    lines = [
        "# A first decision: which of these variants to ship in place of the adapter as it is served today.",
        f"# Written for {facts.cores} CPU cores, {facts.gpu or 'no GPU'}, and {facts.distinct} different prompts of "
        f"{min(facts.prompt_tokens)} to {longest_prompt} tokens.",
        f"model: {{base: {_word(facts.base)}, adapter: {_word(facts.adapter)}}}",
        "",
        "# What is timed: one prompt at a time (chat) and eight together (bulk). Every timed answer gets exactly",
        f"# so many new_tokens ({timed}).",
        "workloads:",
        f"  chat: {{prompts: {_word(facts.prompts)}, new_tokens: {answer}, batch: 1}}",
        f"  bulk: {{prompts: {_word(facts.prompts)}, new_tokens: {answer}, batch: 8}}",
        "",
        "# Whose answers are checked, and how long an answer may get. Mark rows that may never get worse as critical.",
        f"quality: {{prompts: {_word(facts.prompts)}, new_tokens: {longest}, batch: 8, rows: {rows}}}",
        "measure: {relaunch: 3, max_blocks: 16}",
        "",
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
    lines = [
        "  adapter: []                      # base + adapter as it is: transformers here; on vLLM: [{engine: vllm}]"
    ]
    compiled = "{engine: {compiled: {regions: true, prompt_buckets: none}}}"
    if facts.method == "merge":
        merge = "{merge: {certify: blocks}}"
        lines += [
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
            "  int8: [int8]                     # the adapter apart, on an INT8 base",
        ]
    return lines


def _memory(facts: Facts, variants: int) -> list[str]:
    """A warning where variants, which stay loaded side by side, may not fit."""
    if facts.gpu or variants * facts.base_bytes < facts.memory_bytes / 2:
        return []
    return [
        f"# All variants stay loaded side by side: {variants} of {facts.base_bytes / 1e9:.1f} GB each, and "
        f"{facts.memory_bytes / 1e9:.0f} GB of memory is free. Take some out if it does not suffice."
    ]


def _tradeoffs(facts: Facts, rows: int, judged: int) -> list[str]:
    """The limits on critical errors that so many prompts can show of so many variants."""
    shown = next((rate for rate in RATES if needed_n(rate, judged) <= rows), None)
    if shown is None:
        return [
            f"# {rows} prompts cannot show that critical errors are rare: of {judged} variants 10 % takes "
            f"{needed_n(0.10, judged)}. Until you have them, what needs them stays undecided.",
        ]
    rules = {"merge": 0.05, "quantize": 0.01, "compile": 0.05, "variant": 0.05}
    weaker = {name: shown for name, limit in rules.items() if shown > limit}
    if not weaker:
        return []
    return [
        f"tradeoffs:                         # what {rows} prompts can show of {judged} variants; more show more",
        *(f"  {name}: {{critical_errors: {rate:.0%}}}".replace("%", " %") for name, rate in weaker.items()),
    ]


def _require(facts: Facts) -> list[str]:
    lines = ["require:                           # your SLA, such as: - latency.p95@chat <= 400 ms"]
    if facts.answer_tokens:
        return [*lines, "  - accuracy >= 0.9x"]
    return [*lines, "  - perplexity <= 1.05x            # your prompts have no right answers, so accuracy is not known"]


def _word(text: str) -> str:
    """Text as a word of YAML's flow style."""
    plain = text and not set(text) & set("{}[],&*#?|<>=!%@:`'\" ")
    return text if plain else json.dumps(text, ensure_ascii=False)
