"""The command line in this process, and what it is given: a tiny recipe and its prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftopt.cli import main


def command(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return " ".join(err.split())


def prompts(path: Path, n: int, name: str) -> Path:
    """`n` prompts whose right answer nobody gives: a random model has none."""
    rows = [
        {
            "id": f"{name}-{i}",
            "messages": [{"role": "user", "content": f"{name} question {i} about the lazy dog"}],
            "expected": f"the dog {i}",
            "critical": i < 4,
            "slices": ["short" if i % 2 else "odd"],
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RECIPE = """# A tiny run.
model: {{base: {base}, adapter: {adapter}}}
workloads:
  chat: {{prompts: {prompts}, new_tokens: 4, batch: 1}}
  bulk: {{prompts: {prompts}, new_tokens: 4, batch: 2, slice: short}}
quality: {{prompts: {prompts}, new_tokens: 8, batch: 4}}
measure: {{requests: 2, warmup: 1, relaunch: 4, max_blocks: 10, threads: 1}}
variants:
  adapter: []
  merged: [merge]
  int8: [merge, int8]
minimize: latency.p50@chat
"""
