"""Two answers token by token: nothing is lost, nothing is invented, and what both share is shortened."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peftopt.report.diff import MOST_TOKENS, pieces

texts = st.text(alphabet='ab1 ,:"\n', max_size=60)


@given(texts, texts)
def test_a_diff_holds_both_texts(before: str, after: str) -> None:
    found = pieces(before, after)
    assert "".join(piece.text for piece in found if piece.kind in ("same", "gone")) == before
    assert "".join(piece.text for piece in found if piece.kind in ("same", "new")) == after
    assert all(piece.text for piece in found)


def test_a_changed_token_is_marked_whole() -> None:
    found = pieces('{"priority": "urgent", "n": 12}', '{"priority": "normal", "n": 12}')
    assert [(piece.kind, piece.text) for piece in found if piece.kind != "same"] == [
        ("gone", "urgent"),
        ("new", "normal"),
    ]


def test_long_stretches_that_both_share_are_left_out_and_say_how_much() -> None:
    shared = "word " * 300
    found = pieces(f"{shared}yes", f"{shared}no")
    assert [piece.kind for piece in found] == ["left out", "same", "gone", "new"]
    kept = sum(len(piece.text) for piece in found if piece.kind == "same")
    assert f"{len(shared) - kept} characters" in found[0].text


def test_texts_too_long_to_compare_are_shown_one_after_the_other() -> None:
    before, after = "a " * MOST_TOKENS, "b " * MOST_TOKENS
    assert [(piece.kind, piece.text) for piece in pieces(before, after)] == [("gone", before), ("new", after)]
