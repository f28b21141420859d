"""Tests of every engine of another environment: a file that imports them has the fixtures `engine` and `eager`."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.asked import ask, ids
from peftopt.engines import TOP_K


def test_a_batch_answers_as_one_by_one_and_exactly_as_long_as_asked(engine: Any) -> None:
    assert ask(engine, 24) == ask(engine, 24, batch=False)
    for answer in engine.generate(ids(engine), 24, False):
        assert len(answer.tokens) == len(answer.times) == 24
        assert answer.times == sorted(set(answer.times)) and not answer.stopped


def test_each_row_ends_at_its_own_end_of_sequence(engine: Any) -> None:
    free = engine.generate(ids(engine), 24, False)
    end, before = free[0].tokens[5], sorted(engine.eos)
    engine.pretend_eos([end])
    try:
        answers = engine.generate(ids(engine), 24, True)
    finally:
        engine.pretend_eos(before)
    for answer, whole in zip(answers, free, strict=True):
        count = whole.tokens.index(end) + 1 if end in whole.tokens else 24
        assert answer.tokens == whole.tokens[:count] and len(answer.times) == count
        assert answer.stopped == (end in whole.tokens)


def test_scores_are_those_of_transformers_whatever_the_batch(engine: Any, eager: Any) -> None:
    questions = ids(engine)
    answers = [a.tokens[:n] for a, n in zip(engine.generate(questions, 12, False), (12, 5, 1), strict=True)]
    answers[1][2] = 7  # one that is not the likeliest
    found, theirs = engine.score(questions, answers), eager.score(questions, answers)
    for mine, other, question, answer in zip(found, theirs, questions, answers, strict=True):
        assert mine.best == other.best and mine.finite
        assert mine.logprobs == pytest.approx(other.logprobs, abs=0.02)
        assert [len(row) for row in mine.top_ids] == [TOP_K] * len(answer)
        assert [row[0] for row in mine.top_ids] == mine.best
        assert all(row == sorted(row, reverse=True) for row in mine.top_logprobs)
        assert engine.score([question], [answer])[0].logprobs == pytest.approx(mine.logprobs, abs=1e-3)


def test_a_request_longer_than_the_room_makes_room(engine: Any) -> None:
    long = ids(engine)[2] * 20
    assert len(long) > 512
    (alone,) = engine.generate([long], 4, False)
    assert engine.generate([long, ids(engine)[0]], 4, False)[0].tokens == alone.tokens
