"""One answer against what it should be."""

from __future__ import annotations

import pytest

from peftopt.answers import judge, loops

SCHEMA = {
    "type": "object",
    "properties": {"category": {"enum": ["billing", "return"]}, "order": {"type": ["string", "null"]}},
    "required": ["category", "order"],
    "additionalProperties": False,
}
RIGHT = '{"category":"billing","order":"AB-12345"}'


def test_the_expected_object_is_right_however_it_is_spaced() -> None:
    judged = judge('{ "category": "billing", "order": "AB-12345" }', RIGHT, SCHEMA)
    assert (judged.score, judged.correct, judged.valid, judged.flags) == (1.0, True, True, ())


def test_one_wrong_field_of_two_scores_half_and_is_not_right() -> None:
    judged = judge('{"category":"return","order":"AB-12345"}', RIGHT, SCHEMA)
    assert (judged.score, judged.correct, judged.valid) == (0.5, False, True)


def test_extra_fields_cost_score() -> None:
    assert judge('{"category":"billing","order":"AB-12345","x":1}', RIGHT).score == pytest.approx(2 / 3)


@pytest.mark.parametrize("output", ["", '{"category":"billing"', '{"category":"refund","order":null}', "[]", "billing"])
def test_what_does_not_keep_the_schema_is_flagged(output: str) -> None:
    judged = judge(output, RIGHT, SCHEMA)
    assert not judged.valid and not judged.correct
    assert "invalid output" in judged.flags


def test_plain_text_is_compared_as_text() -> None:
    assert judge(" Paris ", "Paris").correct
    assert not judge("Lyon", "Paris").correct


@pytest.mark.parametrize(
    ("text", "tokens", "stopped", "flag"),
    [
        ("  ", [], True, "empty"),
        ("a\ufffdb", [1, 2], True, "invalid utf-8"),
        ("ab", [1, 99], True, "special token"),
        ("ab" * 40, [1, 2] * 40, False, "loop"),
    ],
)
def test_each_tier_1_error_is_seen(text: str, tokens: list[int], stopped: bool, flag: str) -> None:
    assert flag in judge(text, "x", None, tokens, stopped, frozenset({99})).flags


def test_an_answer_that_ended_by_itself_is_no_loop() -> None:
    assert "loop" not in judge("ab" * 40, "x", None, [1, 2] * 40, True).flags


def test_long_varied_text_does_not_loop() -> None:
    tokens = [(n * n) % 1009 for n in range(200)]
    assert not loops(tokens, " ".join(map(str, tokens)))


def test_a_short_repeat_at_the_end_is_not_enough_to_be_a_loop() -> None:
    assert not loops([*range(100), 7, 7, 7, 7], "varied text")
