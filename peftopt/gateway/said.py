"""One whole answer of the engine, read and judged as an offline run judges answers. Pure.

If the engine gives no token ids, words stand for them: a loop is noticed, a leaked special token is not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peftopt.canary.fingerprint import Print
from peftopt.corpus import Row
from peftopt.errors import BROKEN
from peftopt.loadtest import protocols
from peftopt.measurements import Answer
from peftopt.probes import _answers as answers
from peftopt.records import Json

FAILED = "no answer"
"""The critical error of a request that was not answered."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model's `special` tokens, and those that `end` an answer."""

    special: frozenset[int] = frozenset()
    end: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Said:
    """An answer after `ms`. `tokens` without the one that ended it; `stopped`: it ended by itself; `calls`: it calls a
    tool, so its text may be empty; `print` if there are log-probabilities; `error`: why there is no answer."""

    ms: float
    text: str = ""
    tokens: tuple[int, ...] = ()
    ids: bool = False
    stopped: bool = False
    calls: bool = False
    print: Print = ()
    error: str = ""


def read(status: int, body: bytes, ms: float, end: frozenset[int] = frozenset()) -> Said:
    """Read an answer of OpenAI's form; `end`: the ids that end one."""
    if status != 200:
        return Said(ms, error=f"HTTP {status}")
    try:
        choice = protocols.choice_of(json.loads(body))
        message = choice.get("message") or {}
        text = str(choice.get("text") or message.get("content") or "")
        ids = choice.get("token_ids")
        tokens = [int(token) for token in ids] if ids else [zlib.crc32(word.encode()) for word in text.split()]
        while ids and tokens and tokens[-1] in end:
            tokens.pop()
        return Said(
            ms,
            text,
            tuple(tokens),
            bool(ids),
            stopped=choice.get("finish_reason") != "length",
            calls=bool(message.get("tool_calls")),
            print=_print(choice),
        )
    except BROKEN as error:
        return Said(ms, error=f"garbage in the answer: {type(error).__name__}")


def _print(choice: Mapping[str, Json]) -> Print:
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, Mapping) else None
    return [(c["token"], {t["token"]: float(t["logprob"]) for t in c.get("top_logprobs") or ()}) for c in content or ()]


def flags(said: Said, schema: Mapping[str, Json] | None, vocabulary: Vocabulary) -> frozenset[str]:
    """The critical errors in an answer to a user's prompt, whose right answer is unknown. A tool call is not judged."""
    if said.error:
        return frozenset({FAILED})
    if said.calls:
        return frozenset()
    special = vocabulary.special if said.ids else frozenset()
    judged = answers.judge(said.text, "", schema, said.tokens, said.stopped, special)
    return frozenset(judged.flags)


def answer(row: Row, said: Said, schema: Mapping[str, Json] | None, vocabulary: Vocabulary) -> Answer:
    """The answer to a labelled prompt, as a record of the probe "quality"."""
    special = vocabulary.special if said.ids else frozenset()
    asked = " ".join(message["content"] for message in row.messages if message["role"] == "user")
    judged = answers.judge(
        said.text, row.expected, schema, said.tokens, said.stopped, special, prompt=asked, slices=row.slices
    )
    return Answer(
        row=row.id,
        prompt=row.prompt_id,
        critical=row.critical,
        slices=row.slices,
        expected=row.expected,
        output=said.text,
        tokens=said.tokens,
        new_tokens=len(said.tokens) + said.stopped,
        stopped=said.stopped,
        score=0.0 if said.error else judged.score,
        correct=judged.correct and not said.error,
        valid=judged.valid and not said.error,
        flags=(FAILED,) if said.error else judged.flags,
    )


def kindest(runs: Sequence[Answer]) -> Answer:
    """One answer for several runs: right where any is, with the errors that all of them make."""
    made = set(runs[0].flags).intersection(*(run.flags for run in runs))
    best = max(runs, key=lambda run: run.score)
    return replace(best, correct=any(run.correct for run in runs), flags=tuple(sorted(made)))


def harshest(runs: Sequence[Answer]) -> Answer:
    """One answer for several runs: right where all are, with every error that one of them makes."""
    made = set().union(*(run.flags for run in runs))
    worst = min(runs, key=lambda run: run.score)
    return replace(worst, correct=all(run.correct for run in runs), flags=tuple(sorted(made)))
