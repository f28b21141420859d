"""Greedy answers by draft verification, and the divergence between two models' predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.corpus import Row
from peftopt.engines import Engine, Generation, Scores
from peftopt.measurements import Answer
from peftopt.probes import quality

EOS = 0
EOSES = frozenset({EOS})


class Script(Engine):
    """An engine whose greedy continuation of a prompt is a fixed text: its first token names which."""

    tokenizer = None
    special_tokens = frozenset({EOS})
    eos = EOSES

    def __init__(self, texts: dict[int, list[int]], scores: bool = True) -> None:
        self.texts, self.scores, self.generated = texts, scores, 0

    def encode(self, messages: Sequence[dict[str, str]], answer: str | None = None) -> tuple[list[int], list[int]]:
        return [int(messages[0]["content"])], [*map(int, answer.split()), EOS] if answer else []

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def close(self) -> None:
        pass

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        found = []
        for prompt in prompts:
            self.generated += 1
            rest = [*self.texts[prompt[0]], EOS][len(prompt) - 1 :][:new_tokens]
            found.append(Generation(rest, [0] * len(rest), EOS in rest))
        return found

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            text = [*self.texts[prompt[0]], EOS]
            # a model that was led astray says 77: only the agreed prefix tells what it would have said by itself
            best = [text[n] if answer[:n] == text[:n] else 77 for n in range(len(answer))]
            ids = [[b, *(t for t in range(8) if t != b)][:8] for b in best]
            found.append(Scores([-0.1] * len(best), best, ids, [[-0.1] + [-5.0] * 7] * len(best), True))
        return found


tokens = st.lists(st.integers(1, 5), min_size=1, max_size=12)


@given(tokens, tokens, st.booleans(), st.integers(1, 14))
def test_a_verified_answer_is_the_greedy_one_whatever_the_draft(
    text: list[int], draft: list[int], critical: bool, new_tokens: int
) -> None:
    row = Row("r", ({"role": "user", "content": "9"},), " ".join(map(str, draft)), critical)
    answers: list[Answer] = []
    quality.ask(Script({9: text}), [row], None, new_tokens, 4, tell=answers.append)  # type: ignore[arg-type]
    assert answers[0].tokens == tuple(text[:new_tokens])
    assert answers[0].stopped == (len(text) < new_tokens)


def test_an_answer_names_its_prompt_so_that_copies_can_be_told() -> None:
    rows = [Row(f"{n}", ({"role": "user", "content": content},)) for n, content in enumerate(("8", "9", "8"))]
    answers: list[Answer] = []
    quality.ask(Script({8: [1], 9: [1]}), rows, None, 4, 4, tell=answers.append)  # type: ignore[arg-type]
    prompts = {a.row: a.prompt for a in answers}
    assert prompts["0"] == prompts["2"] != prompts["1"]


def test_a_right_draft_costs_no_decoding_unless_the_row_is_critical() -> None:
    for critical in (False, True):
        engine = Script({9: [1, 2, 3]})
        row = Row("r", ({"role": "user", "content": "9"},), "1 2 3", critical)
        quality.ask(engine, [row], None, 8, 4)  # type: ignore[arg-type]
        assert engine.generated == critical


def test_no_more_critical_rows_are_decoded_than_a_sample() -> None:
    engine = Script({9: [1, 2, 3]})
    rows = [Row(str(n), ({"role": "user", "content": "9"},), "1 2 3", True) for n in range(quality.DECODED + 5)]
    quality.ask(engine, rows, None, 8, 4)  # type: ignore[arg-type]
    assert engine.generated == quality.DECODED


def test_an_engine_that_cannot_score_decodes_everything() -> None:
    engine, answers = Script({9: [1, 2]}, scores=False), []
    row = Row("r", ({"role": "user", "content": "9"},), "1 2")
    quality.ask(engine, [row], None, 8, 4, tell=answers.append)  # type: ignore[arg-type]
    assert engine.generated == 1 and answers[0].tokens == (1, 2) and answers[0].kl is None


def test_the_reference_file_gives_a_variant_its_kl_and_agreement(tmp_path: object) -> None:
    path = f"{tmp_path}/reference.npz"
    rows = [Row(f"r{n}", ({"role": "user", "content": str(n)},), "1 2 3") for n in (8, 9)]
    quality.ask(Script({8: [1, 2, 3], 9: [1, 2, 3]}), rows, None, 8, 4, write_reference=path)  # type: ignore[arg-type]
    answers: list[Answer] = []
    other = Script({8: [1, 2, 3], 9: [1, 5, 3]})
    quality.ask(other, rows, None, 8, 4, reference=path, tell=answers.append)  # type: ignore[arg-type]
    found = {a.row: a for a in answers}
    assert found["r8"].agree == 4 and found["r8"].kl == pytest.approx(0, abs=1e-6)
    assert found["r9"].agree == 1 and found["r9"].kl > 1
    for answer in found.values():
        assert len(answer.kl_tokens) == answer.scored_tokens
        assert sum(answer.kl_tokens) == pytest.approx(answer.kl, rel=0.01, abs=1e-6)


@pytest.mark.fault(
    1, "a run that is killed between the reference's answers and their file asks again for what the file lacks"
)
def test_a_reference_that_goes_on_keeps_what_it_has(tmp_path: Path) -> None:
    path, texts = tmp_path / "reference.npz", {7: [1], 8: [1, 2, 3], 9: [1, 2, 3]}
    rows = [Row(f"r{n}", ({"role": "user", "content": str(n)},), "1 2 3") for n in texts]
    assert quality.Reference.lacks(path, rows) == rows
    quality.ask(Script(texts), rows[:2], None, 8, 4, write_reference=str(path))  # type: ignore[arg-type]
    assert quality.Reference.lacks(path, rows) == rows[2:]
    quality.ask(Script(texts), rows[2:], None, 8, 4, write_reference=str(path))  # type: ignore[arg-type]
    assert quality.Reference.lacks(path, rows) == []
    answers: list[Answer] = []
    quality.ask(Script(texts), rows, None, 8, 4, reference=str(path), tell=answers.append)  # type: ignore[arg-type]
    assert [answer.kl == pytest.approx(0, abs=1e-6) for answer in answers] == [True] * 3


def test_a_reference_that_cannot_score_lacks_nothing(tmp_path: Path) -> None:
    path, row = tmp_path / "reference.npz", Row("r", ({"role": "user", "content": "9"},), "1 2")
    quality.ask(Script({9: [1, 2]}, scores=False), [row], None, 8, 4, write_reference=str(path))  # type: ignore[arg-type]
    assert quality.Reference.lacks(path, [row]) == []


class Shifted(Script):
    """A script whose likelihoods lie `added` above those of its base."""

    def __init__(self, texts: dict[int, list[int]], added: float) -> None:
        super().__init__(texts)
        self.added = added

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        added, self.added = self.added, 0.0
        yield
        self.added = added

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        found = super().score(prompts, answers)
        return [replace(s, logprobs=[-2.0 + self.added * (-1) ** n for n in range(len(s.logprobs))]) for s in found]


@pytest.mark.parametrize(("added", "kept"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_what_is_left_of_the_adapters_shift_is_told_though_likelihoods_rise_as_much_as_they_fall(
    tmp_path: object, added: float, kept: float
) -> None:
    path, answers = f"{tmp_path}/reference.npz", []
    rows = [Row(f"r{n}", ({"role": "user", "content": "9"},), "1 2 3") for n in range(quality.BASE_ROWS + 2)]
    quality.ask(Shifted({9: [1, 2, 3]}, 1.0), rows, None, 8, 4, write_reference=path)  # type: ignore[arg-type]
    quality.ask(Shifted({9: [1, 2, 3]}, added), rows, None, 8, 4, path, tell=answers.append)  # type: ignore[arg-type]
    asked = [a for a in answers if a.shift is not None]
    assert len(asked) == quality.BASE_ROWS and asked[0].shift == pytest.approx(4)
    assert sum(a.kept for a in asked) / sum(a.shift for a in asked) == pytest.approx(kept)


def test_an_answer_that_ran_on_is_scored_as_it_is(tmp_path: object) -> None:
    """Without an expected answer the reference's own is the draft, and one that was cut off has no end of sequence."""
    path, row = f"{tmp_path}/reference.npz", Row("r", ({"role": "user", "content": "9"},))
    for new_tokens, scored in ((2, 2), (8, 4)):
        answers: list[Answer] = []
        quality.ask(Script({9: [1, 2, 3]}), [row], None, new_tokens, 4, write_reference=path)  # type: ignore[arg-type]
        other = Script({9: [1, 2, 3]})
        quality.ask(other, [row], None, new_tokens, 4, path, tell=answers.append)  # type: ignore[arg-type]
        assert answers[0].scored_tokens == answers[0].agree == scored


def logits(seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(5, 40)) * 2
    return drawn - np.log(np.exp(drawn).sum(axis=1, keepdims=True))


def top(log: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-log, axis=1)[:, :k]
    return ids, np.take_along_axis(log, ids, axis=1)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_kl_over_all_tokens_is_exact_and_over_few_a_lower_bound(one: int, two: int) -> None:
    p, q = logits(one), logits(two)
    exact = (np.exp(p) * (p - q)).sum(axis=1)
    assert quality.kl_divergence(*top(p, 40), *top(q, 40)) == pytest.approx(exact, abs=1e-6)
    few = quality.kl_divergence(*top(p, 8), *top(q, 8))
    assert (few >= 0).all() and (few <= exact + 1e-6).all()


def test_a_long_row_travels_alone() -> None:
    def asked(n: int) -> quality.Asked:
        return quality.Asked(Row(str(n), ()), [1] * n, [])

    groups = list(quality.batches([asked(n) for n in (10, 10, 10, 3000, 5000)], 2))
    assert [[len(a.prompt) for a in group] for group in groups] == [[10, 10], [10], [3000], [5000]]
