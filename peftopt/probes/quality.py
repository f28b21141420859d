"""Answers and their likelihoods: what a variant says, and how far its predictions are from the reference's.

Greedy answers are found by verifying a draft (the expected answer): one forward pass tells where the model first
disagrees with it, and only from there is anything decoded. That is greedy speculative decoding (Leviathan et al.
2023), so the answer is the model's own; it costs a prefill instead of a decode for every prompt that is right.
Rows tagged critical are always decoded token by token as well as scored, as a server would do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import answers, identity
from peftopt.corpus import Row
from peftopt.engines import Engine, Scores
from peftopt.records import Json

if TYPE_CHECKING:
    import numpy as np

BATCH_TOKENS = 8192
"""At most this many padded prompt tokens in one forward pass: long rows travel in small batches."""


@dataclass(frozen=True)
class Asked:
    """A row with its prompt's token ids and the answer to score (ids, end of sequence included)."""

    row: Row
    prompt: list[int]
    draft: list[int]


class Reference:
    """The reference's answers and its most likely tokens per position, kept in one .npz file."""

    def __init__(self, path: str) -> None:
        import numpy as np

        self.arrays = np.load(path)

    def tokens(self, row: Row) -> list[int]:
        return [int(t) for t in self.arrays[_key(row) + ".tokens"]]

    def divergence(self, row: Row, scores: Scores) -> tuple[float, int]:
        """Summed KL(reference || variant) in nats and the count of positions with the same most likely token."""
        import numpy as np

        ids, logprobs = self.arrays[_key(row) + ".ids"], self.arrays[_key(row) + ".logprobs"]
        kl = kl_divergence(ids, logprobs, np.array(scores.top_ids), np.array(scores.top_logprobs))
        return float(kl.sum()), int((ids[:, 0] == np.array(scores.best)).sum())

    @staticmethod
    def write(path: str, found: Mapping[str, tuple[list[int], Scores]]) -> None:
        """`found` maps a row's key to its answer tokens and the scores of its draft."""
        import numpy as np

        arrays: dict[str, Any] = {}
        for key, (tokens, scores) in found.items():
            arrays[key + ".tokens"] = np.array(tokens, dtype=np.int32)
            arrays[key + ".ids"] = np.array(scores.top_ids, dtype=np.int32)
            arrays[key + ".logprobs"] = np.array(scores.top_logprobs, dtype=np.float32)
        temporary = Path(path).with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        temporary.replace(path)


def kl_divergence(p_ids: np.ndarray, p_log: np.ndarray, q_ids: np.ndarray, q_log: np.ndarray) -> np.ndarray:
    """KL(P || Q) per position in nats over the tokens both lists hold and one bucket for the rest.

    Shapes [n, k] each, [n] out. Merging outcomes can only lower a divergence, so this is a lower bound; with the
    64 most likely tokens the rest holds almost nothing.
    """
    import numpy as np

    match = p_ids[:, :, None] == q_ids[:, None, :]
    both = match.any(axis=2)
    p = np.exp(p_log.astype(np.float64)) * both
    q_log_at_p = np.where(match, q_log[:, None, :], 0.0).sum(axis=2)
    shared = (p * np.where(both, p_log - q_log_at_p, 0.0)).sum(axis=1)
    rest_p = np.clip(1 - p.sum(axis=1), 1e-9, 1)
    rest_q = np.clip(1 - (np.exp(q_log_at_p) * both).sum(axis=1), 1e-9, 1)
    kl: np.ndarray = np.maximum(shared + rest_p * np.log(rest_p / rest_q), 0.0)
    return kl


def ask(
    engine: Engine,
    rows: Sequence[Row],
    schema: Mapping[str, Json] | None,
    new_tokens: int,
    batch: int,
    reference: str | None = None,
    write_reference: str | None = None,
    tell: Callable[[dict[str, Json]], None] = lambda _: None,
) -> None:
    """Answer every row and tell one record each: output, judgement, likelihood of the expected answer.

    `reference` is the file of the reference's answers, `write_reference` where to leave one's own.
    """
    known = Reference(reference) if reference else None
    found: dict[str, tuple[list[int], Scores]] = {}
    asked = [_asked(engine, row, known) for row in rows]
    for group in batches(sorted(asked, key=lambda a: len(a.prompt)), batch):
        group, outputs, scores = _answer(engine, group, new_tokens)
        for a, (tokens, stopped), score in zip(group, outputs, scores, strict=True):
            tell(_record(engine, a, tokens, stopped, score, schema, known))
            if score is not None:
                found[_key(a.row)] = (tokens, score)
    if write_reference:
        Reference.write(write_reference, found)


def batches(asked: Sequence[Asked], batch: int) -> Iterator[list[Asked]]:
    """Groups of at most `batch` rows and BATCH_TOKENS padded tokens; a row that is longer travels alone."""
    group: list[Asked] = []
    for a in asked:
        longest = max((len(x.prompt) for x in [*group, a]), default=0)
        if group and (len(group) == batch or longest * (len(group) + 1) > BATCH_TOKENS):
            yield group
            group = []
        group.append(a)
    if group:
        yield group


def _answer(
    engine: Engine, group: list[Asked], new_tokens: int
) -> tuple[list[Asked], list[tuple[list[int], bool]], list[Scores | None]]:
    """Greedy answers (tokens without the closing EOS, and whether one closed it) and scores of the drafts."""
    if not engine.scores:
        return group, _decode(engine, [a.prompt for a in group], new_tokens), [None] * len(group)
    if undrafted := [n for n, a in enumerate(group) if not a.draft]:
        own = _decode(engine, [group[n].prompt for n in undrafted], new_tokens)
        for n, (tokens, stopped) in zip(undrafted, own, strict=True):
            ending = [min(engine.eos)] if stopped else []
            group[n] = Asked(group[n].row, group[n].prompt, [*tokens, *ending])
    scores = engine.score([a.prompt for a in group], [a.draft for a in group])
    outputs = [verified(a.draft, s.best, engine.eos, new_tokens) for a, s in zip(group, scores, strict=True)]
    unfinished = {n for n, (_, finished, _) in enumerate(outputs) if not finished}
    fresh = {n for n, a in enumerate(group) if a.row.critical}
    starts = {n: [] if n in fresh else outputs[n][0] for n in sorted(unfinished | fresh)}
    rest = _decode(engine, [group[n].prompt + start for n, start in starts.items()], new_tokens)
    answered = [(tokens, stopped) for tokens, _, stopped in outputs]
    for (n, start), (tokens, stopped) in zip(starts.items(), rest, strict=True):
        answered[n] = ((start + tokens)[:new_tokens], stopped and len(start) + len(tokens) < new_tokens)
    return group, answered, list(scores)


def verified(
    draft: Sequence[int], best: Sequence[int], eos: frozenset[int], new_tokens: int
) -> tuple[list[int], bool, bool]:
    """The greedy tokens that a scored draft proves: (tokens without EOS, nothing left to decode, ended by EOS)."""
    tokens: list[int] = []
    for given, greedy in zip(draft, best, strict=True):
        if greedy in eos:
            return tokens, True, True
        tokens.append(greedy)
        if len(tokens) == new_tokens:
            return tokens, True, False
        if greedy != given:
            return tokens, False, False
    return tokens, False, False


def _decode(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[tuple[list[int], bool]]:
    if not prompts:
        return []
    generations = engine.generate(prompts, new_tokens, stop=True)
    return [([t for t in g.tokens if t not in engine.eos], g.stopped) for g in generations]


def _asked(engine: Engine, row: Row, known: Reference | None) -> Asked:
    prompt, draft = engine.encode(row.messages, row.expected or None)
    if not row.expected:
        draft = [*known.tokens(row), min(engine.eos)] if known else []
    return Asked(row, prompt, draft)


def _record(
    engine: Engine,
    a: Asked,
    tokens: list[int],
    stopped: bool,
    scores: Scores | None,
    schema: Mapping[str, Json] | None,
    known: Reference | None,
) -> dict[str, Json]:
    row, output = a.row, engine.decode(tokens)
    judged = answers.judge(output, row.expected, schema, tokens, stopped, engine.special_tokens - engine.eos)
    record: dict[str, Json] = {
        "row": row.id,
        "critical": row.critical,
        "slices": list(row.slices),
        "expected": row.expected,
        "output": output,
        "tokens": tokens,
        "new_tokens": len(tokens) + stopped,
        "stopped": stopped,
        "score": judged.score,
        "correct": judged.correct,
        "valid": judged.valid,
        "flags": list(judged.flags),
    }
    if scores is not None:
        record |= {"nll": -sum(scores.logprobs), "scored_tokens": len(scores.logprobs)}
        if not scores.finite:
            record["flags"].append("non-finite logits")
        if known is not None:
            record["kl"], record["agree"] = known.divergence(row, scores)
    return record


def _key(row: Row) -> str:
    return identity.of_value(row.id)[:16]
