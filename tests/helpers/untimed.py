"""A run of a tiny model of which nothing is decided by times: a merge that is accepted for its size."""

from __future__ import annotations

from pathlib import Path

from helpers.command_line import prompts

RECIPE = """model: {{base: {base}, adapter: {adapter}}}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 2, batch: 1}}}}
quality: {{prompts: {prompts}, new_tokens: 2, batch: 4}}
measure: {{requests: 1, warmup: 1, relaunch: 10, max_blocks: 10, threads: 1}}
tradeoffs: {{merge: {{gain: off, parity: off, lost: off, critical_errors: off}}, variant: {{critical_errors: off}}}}
require: [size <= 1.5x]
variants: {{adapter: [], merged: [merge]}}
minimize: latency.p50@chat
"""


def write_recipe(folder: Path, base: Path, adapter: Path, name: str = "tiny.yaml") -> Path:
    """Write the recipe and its six prompts into a folder."""
    questions = prompts(folder / "eval.jsonl", 6, "eval")
    file = folder / name
    file.write_text(RECIPE.format(base=base, adapter=adapter, prompts=questions))
    return file
