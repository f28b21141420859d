"""Recipes of one variant on trial, for tests of what its chain may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftopt import plugins
from peftopt.errors import BadRecipe
from peftopt.recipe import parse
from peftopt.records import Recipe

TRADEOFFS = (Path(__file__).parents[2] / "recipes/tradeoffs.yaml").read_text(encoding="utf-8")


def recipe(chain: str, batch: int = 1, more: str = "", others: str = "") -> Recipe:
    """One with the variant `tried` of that chain, and `others` beside it; `more` sections at its end."""
    text = f"""
model: {{base: base, adapter: adapter}}
workloads: {{chat: {{prompts: p.jsonl, batch: {batch}}}}}
variants: {{adapter: [], {others}tried: {chain}}}
minimize: latency.p50@chat
{more}"""
    return parse.parse(text, "test.yaml", plugins.catalogue(), TRADEOFFS)


def check_refused(why: str, hint: str, chain: str, batch: int = 1) -> None:
    """The chain is refused with these words, and this in its hint."""
    with pytest.raises(BadRecipe) as refused:
        recipe(chain, batch)
    problems = [(message, its_hint) for _, message, its_hint in refused.value.problems]
    assert any(why in message and hint in its_hint for message, its_hint in problems), problems
