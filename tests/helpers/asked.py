"""Prompts of a tiny model, and what an engine answers."""

from __future__ import annotations

from typing import Any

PROMPTS = ("the quick fox", "counts", "a lazy dog jumps over 49 stars and then over the brown fox number 7")


def ask(engine: Any, new_tokens: int, batch: bool = True, stop: bool = False) -> list[list[int]]:
    """The new tokens for PROMPTS, as one batch or one by one."""
    prompts = [engine.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    groups = [prompts] if batch else [[prompt] for prompt in prompts]
    return [answer.tokens for group in groups for answer in engine.generate(group, new_tokens, stop)]


def ids(engine: Any) -> list[list[int]]:
    return [engine.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
