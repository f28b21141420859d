"""Answers and their likelihoods: what a variant says, and how far its predictions are from the reference's.

Greedy answers are found by verifying a draft (the expected answer): one forward pass tells where the model first
disagrees with it, and only from there is anything decoded. That is greedy speculative decoding (Leviathan et al.
2023), so the answer is the model's own; it costs a prefill instead of a decode for every prompt that is right.
Some rows tagged critical are decoded token by token as well as scored, as a server would do it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from peftopt import identity, policies
from peftopt.corpus import Row
from peftopt.engines import Engine, Generation, Scores
from peftopt.measurements import Answer
from peftopt.probes import _answers as answers
from peftopt.records import NO_INVARIANTS, Invariants, Json

if TYPE_CHECKING:
    import numpy as np

BATCH_TOKENS = 4096
"""At most this many padded prompt tokens in one forward pass: a long row travels alone, which needs no mask, and
attention without a mask is much the faster."""

DECODED = 16
"""Critical rows whose answer is decoded from its first token although a draft could prove it."""


BASE_ROWS = 64
"""Prompts on which the base alone is scored, to know what the adapter's shift is: they cost a forward pass each."""


@dataclass(frozen=True)
class Asked:
    """A row with its prompt's token ids and the answer to score (ids, end of sequence included)."""

    row: Row
    prompt: list[int]
    draft: list[int]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)


@dataclass(frozen=True)
class Waiting:
    """A row whose answer is proven up to `start` (token ids) and has to be decoded from there."""

    asked: Asked
    start: list[int]
    scores: Scores | None

    @property
    def length(self) -> int:
        """Tokens of the prompt, and of the answer as far as it is proven."""
        return self.asked.length + len(self.start)


class Reference:
    """The reference's answers and its most likely tokens per position, kept in one .npz file."""

    @staticmethod
    def lacks(path: Path, rows: Iterable[Row]) -> list[Row]:
        """Those of the rows that the file does not hold, though it holds others: a run was killed between their answers
        and the file. A reference that cannot score leaves a file without rows, which lacks none."""
        if not path.exists():
            return [*rows]
        with zipfile.ZipFile(path) as file:
            held = {name.partition(".")[0] for name in file.namelist()}
        return [row for row in rows if _key(row) not in held] if held else []

    def __init__(self, path: str) -> None:
        import numpy as np

        self.arrays = np.load(path)

    def draft(self, row: Row, eos: int) -> list[int]:
        """The reference's own answer, closed by an end of sequence if it was."""
        tokens = [int(t) for t in self.arrays[_key(row) + ".tokens"]]
        return [*tokens, *[eos] * (len(self.arrays[_key(row) + ".ids"]) - len(tokens))]

    def divergence(self, row: Row, scores: Scores) -> tuple[np.ndarray, int]:
        """KL(reference || variant) in nats at each token [n], and at how many the most likely token is the same."""
        import numpy as np

        ids, logprobs = self.arrays[_key(row) + ".ids"], self.arrays[_key(row) + ".logprobs"]
        kl = kl_divergence(ids, logprobs, np.array(scores.top_ids), np.array(scores.top_logprobs))
        return kl, int((ids[:, 0] == np.array(scores.best)).sum())

    def parting(self, row: Row, scores: Scores) -> tuple[int, float] | None:
        """(the first position at which the most likely token is not the reference's, by how many nats the reference
        prefers its own there); None where they agree throughout."""
        import numpy as np

        ids, logprobs = self.arrays[_key(row) + ".ids"], self.arrays[_key(row) + ".logprobs"]
        apart = np.flatnonzero(ids[:, 0] != np.array(scores.best))
        if not len(apart):
            return None
        at = int(apart[0])
        return at, float(logprobs[at, 0] - _logprob(ids[at], logprobs[at], scores.best[at]))

    def noise(self, row: Row, scores: Scores) -> list[float]:
        """By how many nats the reference's preference for its first token over its second changes in these scores, at
        each position: of its own second run, the noise in its choice."""
        ids, logprobs = self.arrays[_key(row) + ".ids"], self.arrays[_key(row) + ".logprobs"]
        changes = []
        for at, (first, second) in enumerate(ids[:, :2]):
            again = (scores.top_ids[at], scores.top_logprobs[at])
            gap = _logprob(*again, first) - _logprob(*again, second)
            changes.append(round(abs(float(gap - (logprobs[at, 0] - logprobs[at, 1]))), 5))
        return changes

    def survival(self, row: Row, scores: Scores) -> tuple[float, float] | None:
        """sum(a v) and sum(a^2) over the answer's tokens: a, v the log-probability that the adapter, and the variant,
        added to what the base gives the token. None for a row that the base was not asked."""
        import numpy as np

        if (key := _key(row)) + ".base" not in self.arrays:
            return None
        base, adapter = self.arrays[key + ".base"], self.arrays[key + ".given"]
        shift = adapter - base
        return float(shift @ (np.array(scores.logprobs) - base)), float(shift @ shift)

    @staticmethod
    def write(path: str, found: Mapping[str, tuple[list[int], Scores]], base: Mapping[str, Scores]) -> None:
        """Add to the file. `found` maps a row's key to its answer tokens and the scores of its draft, `base` to those
        the base gives."""
        import numpy as np

        arrays: dict[str, Any] = dict(np.load(path)) if Path(path).exists() else {}
        for key, (tokens, scores) in found.items():
            arrays[key + ".tokens"] = np.array(tokens, dtype=np.int32)
            arrays[key + ".ids"] = np.array(scores.top_ids, dtype=np.int32)
            arrays[key + ".logprobs"] = np.array(scores.top_logprobs, dtype=np.float32)
            if key in base:
                arrays[key + ".given"] = np.array(scores.logprobs)
                arrays[key + ".base"] = np.array(base[key].logprobs)
        temporary = Path(path).with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        temporary.replace(path)


def _logprob(ids: Sequence[int], logprobs: Sequence[float], token: int) -> float:
    """The token's log-probability among the most likely ones; for one that is not among them, that of the last."""
    return next((float(p) for i, p in zip(ids, logprobs, strict=True) if i == token), float(logprobs[-1]))


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
    tell: Callable[[Answer], None] = lambda _: None,
    invariants: Invariants = NO_INVARIANTS,
) -> None:
    """Answer every row and tell one record each: output, judgement, likelihood of the expected answer.

    `reference` is the file of the reference's answers, `write_reference` where to leave one's own.
    """
    known = Reference(reference) if reference else None
    found: dict[str, tuple[list[int], Scores]] = {}
    base: dict[str, Scores] = {}
    asked_base = frozenset(row.id for row in rows[:BASE_ROWS]) if write_reference else frozenset()

    def finish(a: Asked, answer: Generation, scores: Scores | None) -> None:
        tell(_record(engine, a, answer, scores, schema, known, invariants))
        if scores is not None and write_reference:
            found[_key(a.row)] = (answer.tokens, scores)

    waiting: list[Waiting] = []
    critical = [row.id for row in rows if row.critical]
    decoded = set(critical[:DECODED])
    for group in batches(_by_length(_asked(engine, row, known) for row in rows), batch):
        drafted = _drafted(engine, group, new_tokens)
        base |= _without_adapters(engine, [a for a in drafted if a.row.id in asked_base])
        for a, scores in zip(drafted, _scores(engine, drafted), strict=True):
            if scores is None or engine.speculates or engine.reuses or a.row.id in decoded:
                waiting.append(Waiting(a, [], scores))
                continue
            tokens, complete, stopped = verified(a.draft, scores.best, engine.eos, new_tokens)
            if complete:
                finish(a, Generation(tokens, [], stopped), scores)
            else:
                waiting.append(Waiting(a, tokens, scores))
    # What is left to decode travels in full batches, not a row or two behind each group that was scored.
    for left in batches(waiting, batch):
        rest = _decode(engine, [w.asked.prompt + w.start for w in left], new_tokens)
        for w, answer in zip(left, rest, strict=True):
            whole = w.start + answer.tokens
            stopped = answer.stopped and len(whole) < new_tokens
            finish(w.asked, replace(answer, tokens=whole[:new_tokens], stopped=stopped), w.scores)
    if write_reference:
        Reference.write(write_reference, found, base)


class HasLength(Protocol):
    """What is asked in batches: `length` in tokens."""

    @property
    def length(self) -> int:
        """How many tokens it takes in a batch."""


Sized = TypeVar("Sized", bound=HasLength)


def batches(asked: Iterable[Sized], batch: int) -> Iterator[list[Sized]]:
    """Groups of at most `batch` rows and BATCH_TOKENS padded tokens; a row that is longer travels alone."""
    group: list[Sized] = []
    for a in asked:
        longest = max(a.length, *(x.length for x in group), 0)
        if group and (len(group) == batch or longest * (len(group) + 1) > BATCH_TOKENS):
            yield group
            group = []
        group.append(a)
    if group:
        yield group


def _by_length(asked: Iterable[Asked]) -> list[Asked]:
    """Rows of like length side by side, so that little is padding."""
    return sorted(asked, key=lambda a: a.length)


def _drafted(engine: Engine, group: list[Asked], new_tokens: int) -> list[Asked]:
    """The group with a draft for each row: where nothing is expected, the model's own answer is what is scored."""
    bare = [a for a in group if not a.draft] if engine.scores else []
    own = zip(bare, _decode(engine, [a.prompt for a in bare], new_tokens), strict=True)
    drafts = {a.row.id: [*answer.tokens, *([min(engine.eos)] if answer.stopped else [])] for a, answer in own}
    return [replace(a, draft=drafts.get(a.row.id, a.draft)) for a in group]


def _scores(engine: Engine, group: list[Asked]) -> Sequence[Scores | None]:
    if not engine.scores:
        return [None] * len(group)
    return engine.score([a.prompt for a in group], [a.draft for a in group])


def _without_adapters(engine: Engine, group: list[Asked]) -> dict[str, Scores]:
    """What the base alone makes of the drafts, by row, where the engine can leave its adapters out."""
    left_out = engine.without_adapters() if engine.scores and group else None
    if left_out is None:
        return {}
    with left_out:
        scores = engine.score([a.prompt for a in group], [a.draft for a in group])
    return {_key(a.row): found for a, found in zip(group, scores, strict=True)}


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


def _decode(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[Generation]:
    """The answers, their tokens without the closing end of sequence."""
    if not prompts:
        return []
    generations = engine.generate(prompts, new_tokens, stop=True)
    return [replace(g, tokens=[t for t in g.tokens if t not in engine.eos]) for g in generations]


def _asked(engine: Engine, row: Row, known: Reference | None) -> Asked:
    prompt, draft = engine.encode(row.messages, row.expected or None)
    if not row.expected:
        draft = known.draft(row, min(engine.eos)) if known else []
    return Asked(row, prompt, draft)


def _record(
    engine: Engine,
    a: Asked,
    answer: Generation,
    scores: Scores | None,
    schema: Mapping[str, Json] | None,
    known: Reference | None,
    invariants: Invariants,
) -> Answer:
    row, tokens, stopped, output = a.row, answer.tokens, answer.stopped, engine.decode(answer.tokens)
    judged = answers.judge(
        output,
        row.expected,
        schema,
        tokens,
        stopped,
        engine.special_tokens - engine.eos,
        invariants,
        prompt=" ".join(message["content"] for message in row.messages if message["role"] == "user"),
        slices=row.slices,
    )
    found = Answer(
        row=row.id,
        prompt=row.prompt_id,
        critical=row.critical,
        slices=row.slices,
        expected=row.expected,
        output=output,
        tokens=tuple(tokens),
        new_tokens=len(tokens) + stopped,
        stopped=stopped,
        score=judged.score,
        correct=judged.correct,
        valid=judged.valid,
        flags=judged.flags,
        uncut_tokens=policies.uncut(engine, row.messages) or None,
        steps=answer.steps or None,
        proposed=answer.proposed if answer.steps else None,
        accepted=answer.accepted if answer.steps else None,
    )
    return found if scores is None else _scored(found, row, scores, known)


def _scored(answer: Answer, row: Row, scores: Scores, known: Reference | None) -> Answer:
    """The answer with the likelihood of the expected one, and with what sets that apart from the reference's."""
    flags = answer.flags if scores.finite else (*answer.flags, "non-finite logits")
    answer = replace(answer, flags=flags, nll=-sum(scores.logprobs), scored_tokens=len(scores.logprobs))
    if known is None:
        return answer
    kl, agree = known.divergence(row, scores)
    kept, shift = known.survival(row, scores) or (None, None)
    return replace(
        answer,
        kl=float(kl.sum()),
        kl_worst=float(kl.max(initial=0.0)),
        kl_tokens=tuple(float(f"{each:.3g}") for each in kl),
        agree=agree,
        parting=known.parting(row, scores),
        noise=tuple(known.noise(row, scores)),
        kept=kept,
        shift=shift,
    )


def _key(row: Row) -> str:
    return identity.of_value(row.id)[:16]
