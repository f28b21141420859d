"""Whether a model that was just written answers at all: some loaders read a checkpoint wrongly without an error."""

from __future__ import annotations

from collections.abc import Sequence

from peftopt.corpus import Row
from peftopt.engines import Engine

NEW_TOKENS = 12
"""Enough to tell an answer from one token over and over."""


def problem(engine: Engine, rows: Sequence[Row]) -> str:
    """What is wrong with the answers to some rows, "" for nothing: one answer that is one is enough."""
    places = engine.positions  # long texts may calibrate and still be no prompts
    most = max(1, places - NEW_TOKENS) if places else None
    prompts = [engine.encode(row.messages)[0][:most] for row in rows]
    answers = [answer.tokens for answer in engine.generate(prompts, NEW_TOKENS, stop=False)]
    if engine.scores and not all(scores.finite for scores in engine.score(prompts, answers)):
        return "gives logits that are not finite"
    if all(set(answer) <= engine.eos for answer in answers):
        return "answers with nothing but end-of-text"
    if all(len(set(answer)) == 1 for answer in answers):
        return f"answers with one token over and over ({engine.decode(answers[0][:1])!r})"
    return ""
