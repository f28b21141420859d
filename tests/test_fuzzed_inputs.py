"""Files that somebody has broken by chance: a verdict or an error with a hint, never a traceback. Here a few of each
kind; `python benchmarks/fuzz.py` goes on for as long as it is told, and looks at time and memory too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import fuzzed

CHANGES = int(os.environ.get("FUZZ_CHANGES", "25"))


@pytest.fixture(scope="module")
def good(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fuzzed.place(tiny_base, tiny_lora, tmp_path_factory.mktemp("good"))
    code, said = fuzzed.checked(folder / "tiny.yaml")
    assert code == 0, said
    return folder


@pytest.mark.fault(18, "bytes and headers changed by chance are refused or read, exit 2 or 0")
@pytest.mark.fault(22, "configs changed by chance are refused or read, exit 2 or 0")
@pytest.mark.fault(30, "recipes and thresholds changed by chance are refused or read, exit 2 or 0")
@pytest.mark.fault(31, "prompts changed by chance are refused or read, exit 2 or 0")
@pytest.mark.parametrize("kind", fuzzed.KINDS)
def test_a_file_that_was_broken_by_chance_is_refused_in_words_or_works(good: Path, kind: str, tmp_path: Path) -> None:
    found = [fuzzed.tried(good, kind, seed, tmp_path) for seed in range(CHANGES)]
    assert not [f"{each.what}: {each.wrong}" for each in found if each.wrong]
