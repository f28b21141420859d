"""Prompts and calibration texts: read once, checked line by line, named by their content."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from peftopt import identity
from peftopt.errors import BadInput
from peftopt.records import GENERIC, Json, Recipe, Workload


@dataclass(frozen=True)
class Row:
    """One prompt. `expected` is the exact right answer, "" when none is known; `critical` rows may never get worse."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    expected: str = ""
    critical: bool = False
    slices: tuple[str, ...] = ()

    @property
    def prompt_id(self) -> str:
        """A short hash of the messages: copies of one prompt have the same."""
        return identity.of_value(self.messages)[:16]


TEXTS = (
    "Summarise the following support ticket in one sentence: my order 48213 arrived broken and I want my money back.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "The capital of Australia is Canberra; its largest city is Sydney, with 5,450,496 people in 2023.",
    "Können Sie mir bitte sagen, wann mein Paket ankommt? Die Sendungsnummer lautet DE-2291-884.",
    '{"category": "billing", "priority": "high", "amount": 129.95, "currency": "EUR", "items": [1, 2, 3]}',
    "Pourriez-vous annuler ma commande d'hier soir et me rembourser sur la même carte ?",
    "A train leaves at 14:05 and arrives at 17:50. How long does the journey take? Explain step by step.",
    "Write a polite reply to a customer who has waited two weeks for a replacement of their headphones.",
)
"""Asked where the user gives no prompts: prose, code, numbers, other languages, structured text."""

NOT_SENT = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "documents", "images", "audio")
"""What changes an answer, and is sent neither to a server nor through a chat template here: refused, not dropped."""

SHAPE = '{"id": "…", "messages": [{"role": "user", "content": "…"}], "expected": "…"}'


def row_from(values: Json, number: int = 0) -> Row:
    """A Row from its JSON form; one without an id is called by its line's `number`. Raises ValueError that says what it
    lacks."""
    if not isinstance(values, Mapping):
        raise ValueError(f"it is {_kind(values)}, not a mapping")
    _refuse_unsent(values)
    messages = tuple(_message(m, n) for n, m in enumerate(_messages(values), 1))
    id_ = values.get("id")
    if isinstance(id_, bool | list | dict):
        raise ValueError(f"its id is {_kind(id_)}, not text or a number")
    row = Row(
        id=f"line-{number}" if id_ is None or id_ == "" else str(id_),
        messages=messages,
        expected=_expected(values.get("expected")),
        critical=_yes(values.get("critical"), "critical"),
        slices=_names(values.get("slices"), "slices"),
    )
    for text in (row.id, row.expected, *row.slices, *(part for m in messages for part in m.values())):
        half = _HALF.search(text)
        if half:
            raise ValueError(f"it holds half a character (the lone surrogate \\u{ord(half[0]):04x})")
    return row


def _expected(value: Json) -> str:
    """The right answer as text: JSON stands for itself, and null for none."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, separators=(",", ":"))


_HALF = re.compile("[\ud800-\udfff]")


def _messages(values: Mapping[str, Json]) -> Sequence[Json]:
    """The messages of a row, or its prompt as one."""
    messages = values.get("messages")
    if messages:
        if not isinstance(messages, list | tuple):
            raise ValueError(f"its messages are {_kind(messages)}, not a list")
        return messages
    prompt = values.get("prompt")
    if prompt is not None:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _chat(prompt)
    for name, others in (("conversations", "ShareGPT's"), ("instruction", "Alpaca's"), ("text", "plain text")):
        if name in values:
            raise ValueError(f"it has {name!r} ({others} form) and no messages: write them as role and content")
    raise ValueError("it has neither messages nor a prompt")


def _chat(prompt: Json) -> Sequence[Json]:
    """A prompt that is itself a list of messages, as preference data have it."""
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) for m in prompt):
        return prompt
    raise ValueError(f"its prompt is {_kind(prompt)}, not text")


def _message(message: Json, number: int) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {_kind(message)}, not a mapping")
    _refuse_unsent(message, f"message {number} ")
    role = message.get("role")
    content = message.get("content")
    if not isinstance(role, str) or not role:
        form = " (ShareGPT's form has from and value)" if "from" in message else ""
        raise ValueError(f"message {number} has no role{form}")
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} is {_kind(content)}, not text")
    return {"role": role, "content": content}


def _is_text(part: Json) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _refuse_unsent(values: Mapping[str, Json], where: str = "it ") -> None:
    unsent = [name for name in NOT_SENT if values.get(name)]
    if unsent:
        raise ValueError(f"{where}has {' and '.join(unsent)}, which peftopt does not send: take such rows out")
    if values.get("role") in ("tool", "function"):
        raise ValueError(f"{where}is a tool's, which peftopt does not send: take such rows out")


def _yes(value: Json, name: str) -> bool:
    """Yes or no, as JSON has it or as tables write it."""
    if value is None or isinstance(value, bool):
        return bool(value)
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}
    if isinstance(value, str | int | float):
        text = f"{value}".strip().lower().removesuffix(".0")
        if text in words:
            return words[text]
    raise ValueError(f"{name}: {value!r} is neither true nor false")


def _names(value: Json, name: str) -> tuple[str, ...]:
    """A list of names, or one."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(v, str | int) and v != "" for v in value):
        raise ValueError(f"{name}: {value!r} is not a list of names")
    return tuple(map(str, value))


def _kind(value: Json) -> str:
    """What a JSON value is, in words."""
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return words.get(type(value), "nothing")


def read(path: str, only_slice: str = "") -> list[Row]:
    """The rows of a JSON-lines file, in order. Raises BadInput naming the line that is broken or repeated."""
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        text = text_of(Path(path).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read prompts {path}: {error}", "give a UTF-8 JSON-lines file") from error
    if text.lstrip().startswith("["):
        hint = f"write each of its rows on a line of its own: jq -c '.[]' {path}"
        raise BadInput(f"{path} is a JSON array, not JSON lines", hint)
    for number, line in lines(text):
        try:
            row = row_from(json.loads(line), number)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{number} is not a prompt: {error}", f"each line looks like {SHAPE}") from error
        if row.id in seen:
            raise BadInput(f"{path}:{number} repeats the id {row.id!r} of line {seen[row.id]}", "make ids unique")
        seen[row.id] = number
        rows.append(row)
    rows = [row for row in rows if not only_slice or only_slice in row.slices]
    if not rows:
        which = f" in slice {only_slice!r}" if only_slice else ""
        raise BadInput(f"{path} holds no prompts{which}", "add at least one JSON line")
    return rows


def distinct(rows: Sequence[Row]) -> int:
    """How many different prompts there are: copies say nothing new."""
    return len({row.prompt_id for row in rows})


def calibration_file(named: str) -> Path:
    """The file of calibration rows that a user names: their own, or for "generic" the one that comes with peftopt."""
    return Path(__file__).parent / "transforms" / "generic.jsonl" if named == GENERIC else Path(named)


def calibration(named: str | None) -> tuple[Row, ...]:
    """The rows of such a file; () where none is named."""
    return tuple(read(str(calibration_file(named)))) if named else ()


def check_apart(evaluation: Sequence[Row], calibration: Sequence[Row], path: str) -> None:
    """Raises BadInput for a calibration row that is evaluated too: no quantizer may see the questions of its exam."""
    exam = {row.prompt_id: row.id for row in evaluation}
    for row in calibration:
        same = exam.get(row.prompt_id)
        if same:
            message = f"calibration row {row.id!r} of {path} is also evaluation row {same!r}"
            raise BadInput(message, "take it out of one of the two files")


def draw(rows: Sequence[Row], workload: Workload, block: int, recipe: Recipe) -> tuple[tuple[Row, ...], ...]:
    """The block's requests: the same prompts for every variant, others in the next block."""
    count = recipe.measure.warmup + recipe.timed_requests(workload.name)
    deck = list(rows)
    random.Random(f"{recipe.seed}/{workload.name}/prompts").shuffle(deck)
    start = block * count * workload.batch
    picks = [deck[(start + i) % len(deck)] for i in range(count * workload.batch)]
    return tuple(tuple(picks[i : i + workload.batch]) for i in range(0, len(picks), workload.batch))


# ---- JSON lines, as other programs write them --------------------------------------------------

TextOrBytes = TypeVar("TextOrBytes", str, bytes)


def text_of(raw: bytes) -> str:
    """A file's text: UTF-8, or what its byte order mark says. Raises UnicodeDecodeError for other bytes."""
    return raw.decode(json.detect_encoding(raw))


def lines(text: TextOrBytes) -> Iterator[tuple[int, TextOrBytes]]:
    """(number, line) of each line that is not blank, counted from 1. Only a line feed ends a line: U+2028, U+0085 and
    the like may stand in a JSON string as they are (RFC 8259)."""
    end = "\n" if isinstance(text, str) else b"\n"
    return ((number, line) for number, line in enumerate(text.split(end), 1) if line.strip())
