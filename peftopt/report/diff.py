"""Compare two texts token by token: tokens of both, only of the first, only of the second. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

Kind = Literal["same", "gone", "new", "left out"]

MOST_TOKENS = 1500
"""Most tokens of each text to compare: the time grows with the product of their numbers."""
AROUND = 60
"""Characters that stay on either side of a change, in a long stretch that both texts share."""

_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A stretch of text: in both ("same"), only in the first ("gone"), only in the second ("new"); or a part of what
    both share that is not shown ("left out"), whose text says how much."""

    kind: Kind
    text: str


def pieces(before: str, after: str) -> tuple[Piece, ...]:
    """The changes from one text to the other. Long stretches that both share are shortened."""
    old = _TOKEN.findall(before)
    new = _TOKEN.findall(after)
    if len(old) > MOST_TOKENS or len(new) > MOST_TOKENS:
        return (Piece("gone", before), Piece("new", after))
    found: list[Piece] = []
    for tag, old_start, old_end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            found.append(Piece("same", "".join(old[old_start:old_end])))
            continue
        changed = (
            Piece("gone", "".join(old[old_start:old_end])),
            Piece("new", "".join(new[new_start:new_end])),
        )
        found += [piece for piece in changed if piece.text]
    return tuple(_shortened(found))


def _shortened(found: list[Piece]) -> list[Piece]:
    shown: list[Piece] = []
    for place, piece in enumerate(found):
        if piece.kind != "same" or len(piece.text) <= 3 * AROUND:
            shown.append(piece)
            continue
        head = piece.text[:AROUND] if place > 0 else ""
        tail = piece.text[-AROUND:] if place < len(found) - 1 else ""
        left_out = len(piece.text) - len(head) - len(tail)
        parts = (Piece("same", head), Piece("left out", f"… {left_out} characters …"), Piece("same", tail))
        shown += [part for part in parts if part.text]
    return shown
