"""Greedy speculation: propose the tokens that followed the same n-gram before. The model keeps those it agrees with."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from peftopt.engines import Generation
from peftopt.records import NO_FOLDER, Folder


@dataclass(frozen=True)
class Speculation:
    """`tokens`: the most that are proposed at a time. `ngram`: how many of the last tokens are looked up at most, and
    `shortest` at least: what followed them where they stood last is proposed. `answers`: look them up in the right
    answers of the recipe's `calibration` rows too, not in the prompt and its answer alone. `draft`: the folder of a
    smaller model with the same tokenizer, which proposes the tokens instead; nothing is looked up then."""

    tokens: int = 4
    ngram: int = 3
    shortest: int = 1
    answers: bool = False
    draft: Folder = NO_FOLDER

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be 1 or more, not {self.tokens}")
        if self.draft and (self.ngram, self.shortest, self.answers) != (3, 1, False):
            raise ValueError("a draft model looks nothing up: leave ngram, shortest and answers out, or draft")
        if not 1 <= self.shortest <= self.ngram:
            raise ValueError(f"shortest must be 1 or more, and ngram no less: {self.shortest}, {self.ngram}")


class Proposer(Protocol):
    """Proposes a row's next tokens."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the row."""

    def propose(self, count: int) -> list[int]:
        """At most `count` proposed tokens; none without a matching n-gram."""


class Lookup:
    """Tokens, and the last position after each of their n-grams."""

    def __init__(self, speculation: Speculation, beside: Lookup | None = None) -> None:
        """`beside` is looked up for n-grams that these tokens do not have."""
        self.tokens: list[int] = []
        self._sizes = range(speculation.ngram, speculation.shortest - 1, -1)
        self._beside = beside
        self.after: dict[tuple[int, ...], int] = {}
        """N-gram -> the position after its last occurrence with a following token."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            for gram in self._last():
                self.after[gram] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """What followed the longest n-gram that ends the tokens, where it stood last. Where that is near the end, it
        goes on as what is proposed does: a loop is proposed as a loop."""
        for gram in self._last():
            for lookup in (self, self._beside):
                if lookup is not None and gram in lookup.after:
                    return _copied(lookup.tokens, lookup.after[gram], count)
        return []

    def _last(self) -> Iterable[tuple[int, ...]]:
        """The n-grams that end the tokens, the longest first."""
        return (tuple(self.tokens[-size:]) for size in self._sizes if size <= len(self.tokens))


def _copied(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on, which go on after the last token with those that were copied."""
    copied: list[int] = []
    for at in range(start, start + count):
        copied.append(tokens[at] if at < len(tokens) else copied[at - len(tokens)])
    return copied


def indexed(answers: Iterable[Sequence[int]], speculation: Speculation) -> Lookup:
    """An index of the answers to look up in."""
    lookup = Lookup(speculation)
    lookup.extend(chain.from_iterable(answers))
    return lookup


def agreed(proposed: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the proposed tokens the model would have chosen itself. `chosen[n]` is its choice after the first n
    of them."""
    pairs = enumerate(zip(proposed, chosen, strict=False))
    return next((n for n, (given, own) in pairs if given != own), len(proposed))


class Batch(Protocol):
    """Rows that are decoded together, and the cache of an engine that holds them."""

    @property
    def slots(self) -> int:
        """Places for tokens that the cache has after the prompts. All rows take as many of them as the longest does."""

    def choose(self, given: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Feed tokens of each row, all rows as many; the model's choice after each token."""

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens that were fed last, keep the first so many of each row."""


class _Row:
    """An answer so far."""

    def __init__(self, proposer: Proposer, new_tokens: int, eos: frozenset[int]) -> None:
        self._proposer, self._most, self._eos = proposer, new_tokens, eos
        self.tokens: list[int] = []
        self.times: list[int] = []
        self.steps = self.proposed = self.accepted = 0

    @property
    def stopped(self) -> bool:
        return self.tokens[-1] in self._eos

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return 0 if self.stopped else self._most - len(self.tokens)

    def propose(self, count: int) -> list[int]:
        """One less than may still come, since every step gives a token of the model's own."""
        return self._proposer.propose(min(count, self.left - 1)) if self.left > 1 else []

    def take(self, tokens: Sequence[int], moment: int) -> int:
        """Go on with as many of the tokens as may come; how many those are."""
        end = next((n for n, token in enumerate(tokens, 1) if token in self._eos), len(tokens))
        taken = tokens[: min(end, self._most - len(self.tokens))]
        self.tokens += taken
        self.times += [moment] * len(taken)
        self._proposer.extend(taken)
        return len(taken)

    def step(self, tokens: Sequence[int], proposed: int, moment: int) -> int:
        """`take` a step's tokens, and count them."""
        taken = self.take(tokens, moment)
        self.steps += 1
        self.proposed += proposed
        self.accepted += taken - 1
        return taken

    def generation(self) -> Generation:
        return Generation(self.tokens, self.times, self.stopped, self.steps, self.proposed, self.accepted)


def decode(
    batch: Batch,
    proposers: Sequence[Proposer],
    first: Sequence[int],
    new_tokens: int,
    eos: frozenset[int],
    count: int,
) -> list[Generation]:
    """Greedy answers of a batch whose prompts gave the `first` tokens: those of a step for each token, whatever is
    proposed. A step takes `count` proposed tokens of each row, or none where nothing is proposed for any row."""
    rows = [_Row(proposer, new_tokens, eos) for proposer in proposers]
    moment = time.perf_counter_ns()
    for row, token in zip(rows, first, strict=True):
        row.take([token], moment)
    free = batch.slots
    while any(row.left for row in rows):
        proposed = [row.propose(count) for row in rows]
        width = 1 + count if any(proposed) else 1
        given = [[row.tokens[-1], *tokens] for row, tokens in zip(rows, proposed, strict=True)]
        chosen = batch.choose([[*tokens, *[tokens[-1]] * (width - len(tokens))] for tokens in given])
        moment = time.perf_counter_ns()
        gained = [[*tokens[: (n := agreed(tokens, own))], own[n]] for tokens, own in zip(proposed, chosen, strict=True)]
        most = _most([(len(tokens), row.left) for row, tokens in zip(rows, gained, strict=True) if row.left], free)
        counts = [
            row.step(tokens[:most], len(asked), moment) if row.left else 0
            for row, tokens, asked in zip(rows, gained, proposed, strict=True)
        ]
        free -= max(counts)
        batch.keep(counts)
    return [row.generation() for row in rows]


def _most(rows: Sequence[tuple[int, int]], free: int) -> int:
    """How many places a step may take of those that are `free`, so that enough are left for a step for each token that
    is still to come. `rows` are tokens gained, and tokens that may come."""
    for places in range(max(gained for gained, _ in rows), 1, -1):
        if places + max(left - min(gained, places) for gained, left in rows) <= free:
            return places
    return 1
