"""Speculation: what is proposed, that the answer is plain greedy whatever is proposed, and what is counted of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.engines._speculation import Lookup, Speculation, agreed, decode, indexed

tokens = st.lists(st.integers(0, 3), max_size=30)
sizes = st.integers(1, 4)


def lookup(seen: Sequence[int], **params: int) -> Lookup:
    found = Lookup(Speculation(**params))
    found.extend(seen)
    return found


# ---- what is proposed --------------------------------------------------------------------------


def by_hand(seen: list[int], ngram: int, shortest: int, count: int) -> list[int]:
    """The longest n-gram, its last occurrence that something follows, and what followed it, looped."""
    for size in range(min(ngram, len(seen)), shortest - 1, -1):
        for start in range(len(seen) - size - 1, -1, -1):
            if seen[start : start + size] == seen[len(seen) - size :]:
                whole = list(seen)
                for n in range(count):
                    whole.append(whole[start + size + n])
                return whole[len(seen) :]
    return []


@given(tokens, sizes, sizes, st.integers(1, 9))
def test_the_last_occurrence_of_the_longest_ngram_is_proposed_from(
    seen: list[int], ngram: int, shortest: int, count: int
) -> None:
    ngram = max(ngram, shortest)
    assert lookup(seen, ngram=ngram, shortest=shortest).propose(count) == by_hand(seen, ngram, shortest, count)


@given(st.lists(tokens, max_size=5), st.integers(1, 5))
def test_what_came_piece_by_piece_is_looked_up_like_what_came_at_once(parts: list[list[int]], count: int) -> None:
    pieces = Lookup(Speculation())
    for part in parts:
        pieces.extend(part)
    assert pieces.propose(count) == lookup([token for part in parts for token in part]).propose(count)


def test_other_answers_are_looked_up_for_what_the_row_does_not_have() -> None:
    speculation = Speculation(ngram=2, shortest=2)
    answers = indexed([[1, 2, 3, 4], [1, 2, 5, 6], [8, 9, 10]], speculation)
    row = Lookup(speculation, answers)
    row.extend([1, 2])
    assert row.propose(2) == [5, 6], "the latest of the answers"
    row.extend([7, 1, 2])
    assert row.propose(2) == [7, 1], "what the row itself says goes first"
    row.extend([8, 9])
    assert row.propose(2) == [10], "which has no more to give"


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"ngram": 0}, {"shortest": 0}, {"ngram": 2, "shortest": 3}])
def test_a_speculation_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Speculation(**wrong)


# ---- the answer is plain greedy ----------------------------------------------------------------


def next_token(seen: Sequence[int]) -> int:
    """A model: its choice depends on all that came before, and repeats itself now and then."""
    return (sum((n + 1) * token for n, token in enumerate(seen[-5:])) + len(seen) // 7) % 5


def greedy(prompt: Sequence[int], new_tokens: int, eos: frozenset[int]) -> list[int]:
    seen = list(prompt)
    while len(seen) < len(prompt) + new_tokens and not (len(seen) > len(prompt) and seen[-1] in eos):
        seen.append(next_token(seen))
    return seen[len(prompt) :]


class Cache:
    """A batch in a cache whose rows take as many places each, with holes where a row kept less."""

    def __init__(self, prompts: Sequence[Sequence[int]], slots: int) -> None:
        self.slots = slots
        self.rows: list[list[int | None]] = [list(prompt) for prompt in prompts]
        self.room = max(map(len, prompts)) + slots
        self.widths: list[int] = []

    def choose(self, given: Sequence[Sequence[int]]) -> list[list[int]]:
        (width,) = {len(fed) for fed in given}
        self.widths.append(width)
        self.fed = given
        chosen = []
        for row, fed in zip(self.rows, given, strict=True):
            seen = [token for token in row if token is not None]
            chosen.append([next_token([*seen, *fed[: n + 1]]) for n in range(width)])
        return chosen

    def keep(self, counts: Sequence[int]) -> None:
        places = max(counts)
        for row, fed, count in zip(self.rows, self.fed, counts, strict=True):
            row += [*fed[:count], *[None] * (places - count)]
        self.slots -= places
        assert self.slots >= 0, "the cache is full"


class Told:
    """Proposes what it was told to, whatever the row says."""

    def __init__(self, proposals: Sequence[Sequence[int]]) -> None:
        self.proposals = list(proposals)

    def extend(self, tokens: Iterable[int]) -> None:
        pass

    def propose(self, count: int) -> list[int]:
        return list(self.proposals.pop() if self.proposals else [])[:count]


proposals = st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=12)
prompts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4)


@given(st.data(), prompts, st.integers(1, 25), st.integers(1, 6), st.booleans(), st.integers(0, 30))
def test_the_answer_is_plain_greedy_whatever_is_proposed(
    data: st.DataObject, asked: list[list[int]], new_tokens: int, count: int, stop: bool, spare: int
) -> None:
    eos = frozenset([3]) if stop else frozenset()
    told = [Told(data.draw(proposals)) for _ in asked]
    cache = Cache(asked, new_tokens + spare)
    answers = decode(cache, told, [next_token(prompt) for prompt in asked], new_tokens, eos, count)
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.tokens == greedy(prompt, new_tokens, eos)
        assert len(answer.times) == len(answer.tokens) and answer.times == sorted(answer.times)
        assert answer.stopped is (answer.tokens[-1] in eos)
        assert len(answer.tokens) == 1 + answer.steps + answer.accepted, "each step gives one token, and the accepted"
        assert answer.accepted <= answer.proposed
    assert set(cache.widths) <= {1, 1 + count}


@given(prompts, st.integers(2, 25), st.integers(1, 6))
def test_a_lookup_proposes_what_it_may_and_the_answer_stays(
    asked: list[list[int]], new_tokens: int, count: int
) -> None:
    rows = [lookup(prompt) for prompt in asked]
    cache = Cache(asked, 2 * new_tokens)
    answers = decode(cache, rows, [next_token(prompt) for prompt in asked], new_tokens, frozenset(), count)
    for prompt, answer, row in zip(asked, answers, rows, strict=True):
        assert answer.tokens == greedy(prompt, new_tokens, frozenset())
        assert row.tokens == [*prompt, *answer.tokens]


def test_a_row_that_is_proposed_right_takes_few_steps() -> None:
    prompt = [1, 2]
    answer = greedy(prompt, 20, frozenset())
    right = Told([answer[5 * n + 1 :] for n in range(4)][::-1])
    (found,) = decode(Cache([prompt], 20), [right], answer[:1], 20, frozenset(), 4)
    assert found.tokens == answer and found.steps == 4 and found.accepted == 15
    assert found.proposed == 4 + 4 + 4 + 3, "no more than may still come, beside the model's own"


def test_nothing_is_fed_for_proposals_where_there_are_none() -> None:
    cache = Cache([[1], [2]], 9)
    decode(cache, [Told([]), Told([])], [next_token([1]), next_token([2])], 9, frozenset(), 4)
    assert cache.widths == [1] * 8


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_what_agrees_is_the_longest_start_that_the_model_would_have_chosen(
    proposed: list[int], chosen: list[int]
) -> None:
    n = agreed(proposed, chosen)
    assert proposed[:n] == chosen[:n]
    assert n == len(proposed) or proposed[n] != chosen[n]
