"""Whether the tokenizer, the chat template and the end of an answer that an adapter brings still are its base's: read
from files, without a model. Weights that learned one id for a word do not know another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt.errors import BROKEN
from peftopt.models import template
from peftopt.models.rendering import Refused, Unrendered
from peftopt.records import Json

SHOWN = 60
"""Characters that are shown of two texts, from where they differ."""

BEFORE = 12
"""Characters that are shown of what comes before."""

PLAIN = {"role": "user", "content": "a question"}
ANSWERED = (PLAIN, {"role": "assistant", "content": "an answer"}, {"role": "user", "content": "another"})
"""Chats that are written by both templates."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens with their ids, and how it `joins` parts of words, in order."""

    ids: Mapping[str, int]
    joins: Sequence[Json]


def drifts(base: Path, home: Path) -> list[str]:
    """What in `home`, the folder of the tokenizer that an adapter is served with, contradicts its base's: a sentence
    each. Tokens that were added are no contradiction, nor is a template where the base has none."""
    if home.resolve() == base.resolve():
        return []
    return [*_words(base, home), *_end(base, home), *_template(base, home)]


def _words(base: Path, home: Path) -> Iterator[str]:
    theirs, ours = vocabulary(base), vocabulary(home)
    if not theirs or not ours:
        files = [folder / "tokenizer.model" for folder in (base, home)]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            yield "tokenizer.model of the adapter is not the base's"
        return
    moved = [token for token, id_ in theirs.ids.items() if ours.ids.get(token, id_) != id_]
    lost = [token for token in theirs.ids if token not in ours.ids]
    if moved:
        token = moved[0]
        differ = f"the id {ours.ids[token]} in the adapter's tokenizer and {theirs.ids[token]} in the base's"
        yield f"{token!r} has {differ}{_more(moved)}"
    if lost:
        yield f"the adapter's tokenizer lacks {lost[0]!r} of the base's{_more(lost)}"
    if theirs.joins and ours.joins and theirs.joins != ours.joins:
        yield "the adapter's tokenizer joins parts of words otherwise than the base's (merges)"


def another_tokenizer(home: Path, draft: Path) -> str:
    """What shows that the tokenizer in `draft` gives tokens other ids than the model's in `home`; "" where nothing
    does. A token that only one of them has counts too."""
    theirs, ours = vocabulary(home), vocabulary(draft)
    if not theirs or not ours:
        files = ("tokenizer.json", "tokenizer.model", "vocab.json")
        others = (name for name in files if _bytes(home / name) != _bytes(draft / name))
        return next((f"its {name} is not the model's" for name in others), "")
    differ = [token for token in {**theirs.ids, **ours.ids} if theirs.ids.get(token) != ours.ids.get(token)]
    if not differ:
        return ""
    has, wanted = (words.ids.get(differ[0], "none") for words in (ours, theirs))
    return f"{differ[0]!r} has the id {has} in the draft's and {wanted} in the model's{_more(differ)}"


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def vocabulary(folder: Path) -> Vocabulary | None:
    """Of tokenizer.json; None where it is not there, or not of a kind that lists its tokens. Raises BadInput for
    values of other types than a tokenizer's."""
    read = template.json_object(folder / "tokenizer.json")
    model = read.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(listed, list):  # a unigram model: each with its score, its place is its id
            listed = {piece[0]: number for number, piece in enumerate(listed)}
        if not isinstance(model, dict) or not isinstance(listed, dict):
            return None
        return Vocabulary({**listed, **template.added(folder)}, tuple(model.get("merges") or ()))
    except BROKEN as error:
        raise template.unreadable(folder, error) from error


def _end(base: Path, home: Path) -> Iterator[str]:
    theirs, ours = (template.read(folder).special.get("eos_token", "") for folder in (base, home))
    if not theirs or not ours or theirs == ours:
        return
    words = vocabulary(home)
    id_ = words.ids.get(ours) if words else None
    if id_ is None or id_ not in template.ends(base):
        yield f"the adapter ends an answer with {ours}{f' ({id_})' if id_ is not None else ''}, the base with {theirs}"


def _template(base: Path, home: Path) -> Iterator[str]:
    theirs, ours = template.read(base), template.read(home)
    if not theirs.text or not ours.text or theirs.text == ours.text:
        return
    for chat in ((PLAIN,), ANSWERED):
        try:
            wanted, written = theirs.render(chat), ours.render(chat)
        except (Refused, Unrendered):
            continue  # what only the tokenizer can render
        if wanted != written:
            same = (n for n, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b)
            at = max(0, next(same, min(len(wanted), len(written))) - BEFORE)
            pieces = f"{written[at : at + SHOWN]!r}, the base's {wanted[at : at + SHOWN]!r}"
            yield f"the adapter's chat template writes a chat otherwise: it has {pieces}"
            return


def _more(tokens: Sequence[str]) -> str:
    return f", and {len(tokens) - 1} more are so" if len(tokens) > 1 else ""


def described(adapter: Path, found: Sequence[str]) -> str:
    """A warning of drifts that were found; the hint is what to do."""
    hint = (
        "give the base it was trained on; if it was trained with these files, put them into a copy of the base's folder"
    )
    return f"adapter {adapter} drifted from its base: {'; '.join(found)}. {hint}"
