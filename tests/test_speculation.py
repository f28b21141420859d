"""Speculation: what is proposed, that the answer is plain greedy whatever is proposed, and what is counted of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.asked import ask, ids
from hypothesis import given
from hypothesis import strategies as st

from peftopt import plugins
from peftopt.corpus import Row
from peftopt.engines._speculation import Lookup, Speculation, agreed, decode, indexed
from peftopt.probes import quality, speed
from peftopt.records import Model

tokens = st.lists(st.integers(0, 3), max_size=30)
sizes = st.integers(1, 4)


def lookup(seen: Sequence[int], **params: Any) -> Lookup:
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


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"ngram": 0}, {"shortest": 0}, {"ngram": 2, "shortest": 3}])
def test_a_speculation_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
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


# ---- engines -----------------------------------------------------------------------------------


def opened(name: str, base: Path, lora: Path, speculation: Speculation | None = None, **params: Any) -> Any:
    plugin = plugins.module("engine", name)
    given_ = [speculation] if speculation else []
    return plugin.open(Model(str(base), (str(lora),)), plugin.Params(**params), *given_)


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_an_engine_that_speculates_answers_as_it_does_without(name: str, tiny_base_fp32: Path, tiny_lora: Path) -> None:
    plain = opened("eager", tiny_base_fp32, tiny_lora)
    engine = opened(name, tiny_base_fp32, tiny_lora, Speculation(tokens=3))
    assert engine.speculates and not plain.speculates
    expected = ask(plain, 40)
    for batch in (True, False):
        assert ask(engine, 40, batch=batch) == expected
    prompts = ids(engine)
    answers = engine.generate(prompts, 40, False)
    assert sum(answer.accepted for answer in answers) > 0, "a tiny model soon repeats itself"
    for answer in answers:
        assert len(answer.times) == 40 and answer.times == sorted(answer.times)
        assert 1 + answer.steps + answer.accepted in (40, 40 + 3), "transformers looks up in the prompt's own step too"
    given_ = [[7, 9, 11, 2, 5, 6], [8, 2], [30] * 5]
    for ours, theirs in zip(engine.score(prompts, given_), plain.score(prompts, given_), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.best == theirs.best
    for each in (engine, plain):
        each.close()


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_an_answer_that_ends_by_itself_ends_there(name: str, tiny_base_fp32: Path, tiny_lora: Path) -> None:
    engine = opened(name, tiny_base_fp32, tiny_lora, Speculation(tokens=4))
    prompts = ids(engine)
    free = engine.generate(prompts, 24, False)
    end = free[0].tokens[9]  # make a token that the first row says the end of sequence
    engine._stopping.eos_token_id, engine.eos = [end], frozenset([end])
    for answer, whole in zip(engine.generate(prompts, 24, True), free, strict=True):
        count = whole.tokens.index(end) + 1 if end in whole.tokens else 24
        assert answer.tokens == whole.tokens[:count] and len(answer.times) == count
        assert answer.stopped == (end in whole.tokens)
    engine.close()


def test_answers_that_were_told_save_steps_and_change_nothing(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    engine = opened("compiled", tiny_base_fp32, tiny_lora, Speculation(tokens=4, shortest=2))
    prompts = ids(engine)[:1]
    (before,) = engine.generate(prompts, 24, False)
    engine.remember([before.tokens])
    (after,) = engine.generate(prompts, 24, False)
    assert after.tokens == before.tokens and after.steps <= before.steps
    assert after.steps <= 8, "it is found once two tokens of it are said"
    assert engine.facts()["graphs"] == 3, "prompt, step, and several tokens at once"
    engine.close()


def test_probes_tell_the_steps_and_every_answer_is_decoded(tiny_base_fp32: Path, tiny_lora: Path) -> None:
    engine = opened("eager", tiny_base_fp32, tiny_lora, Speculation(tokens=3))
    row = Row("a", ({"role": "user", "content": "the quick fox"},))
    (request,) = speed.turn(engine, [[row]], 24, 0)
    assert request.steps and request.accepted is not None and request.new_tokens == 24
    right = engine.decode(engine.generate([engine.encode(row.messages)[0]], 8, True)[0].tokens)
    told: list[Any] = []
    quality.ask(engine, [Row("a", row.messages, expected=right)], None, 8, 1, tell=told.append)
    assert told[0].steps and told[0].accepted is not None, "a draft would prove it, and show nothing of the loop"
    plain = opened("eager", tiny_base_fp32, tiny_lora)
    (request,) = speed.turn(plain, [[row]], 24, 0)
    assert request.steps is request.proposed is request.accepted is None
    for each in (engine, plain):
        each.close()


# ---- servers -----------------------------------------------------------------------------------


def test_servers_are_started_with_their_own_options() -> None:
    from peftopt.engines import llamacpp_server, vllm

    speculation = Speculation(tokens=5, ngram=4, shortest=2)
    served, _ = vllm.command(
        Model("model"), vllm.speculating(vllm.Params(args="--dtype float32"), speculation), 8000, ()
    )
    config = json.loads(served[served.index("--speculative-config") + 1])
    assert served[-4:-2] == ["--dtype", "float32"], "the recipe's own stay"
    assert config == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    params = llamacpp_server.speculating(llamacpp_server.Params(), speculation)
    words = " ".join(llamacpp_server.command(Model("model"), params, 8000, "llama-server", 2, False))
    assert words.endswith("--spec-type ngram-simple --spec-ngram-simple-size-n 4 --spec-ngram-simple-size-m 5")


def test_what_servers_tell_of_proposals_is_read() -> None:
    from peftopt.loadtest import prometheus
    from peftopt.loadtest.protocols import llamacpp

    last: dict[str, Any] = {
        "stop": True,
        "stop_type": "limit",
        "tokens_predicted": 12,
        "timings": {"draft_n": 8, "draft_n_accepted": 5},
    }
    assert (llamacpp.read(last).proposed, llamacpp.read(last).accepted) == (8, 5)
    assert llamacpp.read({**last, "timings": {"predicted_n": 12}}).proposed == 0, "it is silent where there were none"
    assert llamacpp.read({"content": "a", "tokens": [3]}).proposed is None

    def counted(proposed: float, accepted: float) -> dict[str, float]:
        return {prometheus.PROPOSED: proposed, prometheus.ACCEPTED: accepted}

    account = prometheus.summary([], counted(100, 10), counted(140, 40))
    assert (account.proposed, account.accepted, account.acceptance) == (40, 30, 0.75)
    assert prometheus.summary([], {}, {}).acceptance is None
    assert prometheus.summary([], {}, counted(0, 0)).acceptance is None
