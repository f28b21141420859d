"""The examples of the page on Python run, in the order of the page, on a tiny model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import RECIPE, prompts
from helpers.servers import served

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_example_of_the_page_runs_and_says_what_its_comments_say(
    tiny_base: Path,
    tiny_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "models/base")
    shutil.copytree(tiny_lora, "adapters/support")
    asked = prompts(tmp_path / "prompts.jsonl", 8, "eval")
    recipe = RECIPE.format(base="models/base", adapter="adapters/support", prompts=asked.name)
    Path("chat.yaml").write_text(recipe.replace("  int8: [merge, int8]\n", ""))

    known: dict[str, Any] = {}
    printed = []
    with served() as server:
        for example in EXAMPLES:
            exec(compile(example.replace("http://localhost:8000", server.url), str(PAGE), "exec"), known)
            printed.append(capsys.readouterr().out)
    assert len(EXAMPLES) == 5
    assert known["seen"].figures.answered == 40 and known["seen"].figures.ttft_p50_ms.estimate > 0
    assert known["merged"].certificate["passed"] and known["int8"].seconds > 0
    assert known["run"].decision.outcome in ("accepted", "rejected", "inconclusive")
    assert known["run"].decision.chosen in (None, *known["run"].variants)
    assert " of " in printed[3] and "no-such-folder" in printed[4]
