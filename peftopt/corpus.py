"""Read prompts and calibration texts, and check them row by row."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from peftopt import forms, identity
from peftopt.errors import BadInput
from peftopt.records import GENERIC, Json, Recipe, Workload


@dataclass(frozen=True)
class Row:
    """One prompt. `expected`: the exact right answer, "" if unknown. `critical`: its answer must never get worse."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    expected: str = ""
    critical: bool = False
    slices: tuple[str, ...] = ()

    @property
    def prompt_id(self) -> str:
        """A short hash of the messages. Copies of one prompt have the same hash."""
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
"""Prompts for users who give none: prose, code, numbers, other languages, structured text."""

NOT_SENT = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "documents", "images", "audio")
"""Fields that change an answer and that peftopt does not send: rows with them are refused, not changed."""

SHAPE = '{"id": "…", "messages": [{"role": "user", "content": "…"}], "expected": "…"}'


def row_from(values: Json, number: int = 0) -> Row:
    """A Row from JSON. A row without an id gets one from its `number`. Raises ValueError that says what the row
    lacks."""
    prompt = _prompt(values)
    if not prompt.messages:
        raise ValueError("it has nothing but empty turns of the assistant")
    return _row(values, prompt, number)


def _prompt(values: Json) -> forms.Prompt:
    if not isinstance(values, Mapping):
        raise ValueError(f"it is {forms.kind(values)}, not a mapping")
    _refuse_unsent(values)
    return forms.prompt(values)


def _row(values: Mapping[str, Json], prompt: forms.Prompt, number: int) -> Row:
    messages = tuple(_message(m, n) for n, m in enumerate(prompt.messages, 1))
    id_ = values.get("id")
    if isinstance(id_, bool | list | dict):
        raise ValueError(f"its id is {forms.kind(id_)}, not text or a number")
    row = Row(
        id=f"line-{number}" if id_ is None or id_ == "" else str(id_),
        messages=messages,
        expected=_expected(prompt.expected),
        critical=_yes(values.get("critical"), "critical"),
        slices=_names(values.get("slices"), "slices"),
    )
    for text in (row.id, row.expected, *row.slices, *(part for m in messages for part in m.values())):
        half = _HALF.search(text)
        if half:
            raise ValueError(f"it holds half a character (the lone surrogate \\u{ord(half[0]):04x})")
    return row


def _expected(value: Json) -> str:
    """The right answer as text: JSON values as JSON, and "" for null."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, separators=(",", ":"))


_HALF = re.compile("[\ud800-\udfff]")


def _message(message: Json, number: int) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {forms.kind(message)}, not a mapping")
    _refuse_unsent(message, f"message {number} ")
    role = message.get("role")
    content = message.get("content")
    if not isinstance(role, str) or not role:
        form = " (ShareGPT's form has from and value, in conversations)" if "from" in message else ""
        raise ValueError(f"message {number} has no role{form}")
    content = forms.text(content)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} is {forms.kind(content)}, not text")
    return {"role": role, "content": content}


def _refuse_unsent(values: Mapping[str, Json], where: str = "it ") -> None:
    unsent = [name for name in NOT_SENT if values.get(name)]
    if unsent:
        raise ValueError(f"{where}has {' and '.join(unsent)}, which peftopt does not send: take such rows out")
    if values.get("role") in ("tool", "function"):
        raise ValueError(f"{where}is a tool's, which peftopt does not send: take such rows out")


def _yes(value: Json, name: str) -> bool:
    """A truth value, from JSON or from a table's words."""
    if value is None or isinstance(value, bool):
        return bool(value)
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}
    if isinstance(value, str | int | float):
        text = f"{value}".strip().lower().removesuffix(".0")
        if text in words:
            return words[text]
    raise ValueError(f"{name}: {value!r} is neither true nor false")


def _names(value: Json, name: str) -> tuple[str, ...]:
    """A list of names, or a single name."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(v, str | int) and v != "" for v in value):
        raise ValueError(f"{name}: {value!r} is not a list of names")
    return tuple(map(str, value))


@dataclass(frozen=True)
class Corpus:
    """The rows of a file in order, and its format. `empty`: the number of empty assistant's turns that were left out; a
    row of only such turns is left out too."""

    rows: tuple[Row, ...]
    form: str
    empty: int = 0


def opened(path: str) -> Corpus:
    """Read a file of prompts: JSON lines, a JSON array, or a table (.csv, .tsv) whose first line names the columns.
    Raises BadInput, which names the row, for a broken row or a repeated id."""
    rows: list[Row] = []
    first: dict[str, str] = {}
    layout, records = _records(path)
    names = set()
    empty = 0
    for where, values, number in records:
        try:
            values = json.loads(values) if isinstance(values, str) else values
            prompt = _prompt(values)
            empty += prompt.empty
            if not prompt.messages:
                continue
            row = _row(values, prompt, number)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{where} is not a prompt: {error}", f"each row looks like {SHAPE}") from error
        if row.id in first:
            raise BadInput(f"{path}:{where} repeats the id {row.id!r} of {first[row.id]}", "make ids unique")
        first[row.id] = f"line {where}"
        names.add(prompt.form)
        rows.append(row)
    if not rows:
        raise BadInput(f"{path} holds no prompts", "add at least one row")
    return Corpus(tuple(rows), f"{' and '.join(sorted(names))}, {layout}", empty)


Record = tuple[int, Json, int]
"""A row's line in its file, its content (JSON text or values), and its number."""


def _records(path: str) -> tuple[str, Iterable[Record]]:
    """The layout of a file in words, and its rows."""
    try:
        text = text_of(Path(path).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read prompts {path}: {error}", "give a UTF-8 file of JSON lines, JSON or CSV"
        ) from error
    separator = TABLES.get(Path(path).suffix.lower())
    if separator:
        return "a table", _table(path, text, separator)
    if text.lstrip().startswith("["):
        try:
            array = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path} is not JSON: {error}", "write a JSON array, or a row a line") from error
        return "a JSON array", ((n, values, n) for n, values in enumerate(array, 1))
    return "JSON lines", ((n, line, n) for n, line in lines(text))


TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of tables, and their separators of columns."""
CONVERSATIONS = ("messages", "conversations", "conversation", "history")
"""Columns whose cells are JSON."""


def _table(path: str, text: str, separator: str) -> Iterator[Record]:
    """The rows of a table, without empty cells."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        if not {*forms.QUESTIONS, "instruction", *CONVERSATIONS} & {*columns}:
            hint = f"name a column {', '.join(forms.QUESTIONS)} or instruction, and one expected or completion"
            raise BadInput(f"{path} has no column of prompts: {', '.join(columns)}", hint)
        for number, cells in enumerate(reader, 1):
            if None in cells:
                raise ValueError(f"row {number} has more cells than there are columns")
            yield reader.line_num, {name: _cell(name, cell) for name, cell in cells.items() if cell}, number
    except (csv.Error, ValueError) as error:
        raise BadInput(f"{path} is not a table: {error}", "quote cells that hold a separator or a line end") from error


def _cell(column: str, cell: str) -> Json:
    """The value of a cell. A cell with a whole conversation is JSON."""
    return json.loads(cell) if column in CONVERSATIONS else cell


def read(path: str, only_slice: str = "") -> list[Row]:
    """The rows of a file in this slice, all for "". Raises BadInput as `opened` does, and for a slice without rows."""
    rows = [row for row in opened(path).rows if not only_slice or only_slice in row.slices]
    if not rows:
        raise BadInput(f"{path} holds no prompts in slice {only_slice!r}", "name a slice that rows are tagged with")
    return rows


def distinct(rows: Sequence[Row]) -> int:
    """The number of different prompts. Copies add no information."""
    return len({row.prompt_id for row in rows})


def calibration_file(named: str) -> Path:
    """The file of calibration rows: the user's own, or for "generic" the file that comes with peftopt."""
    return Path(__file__).parent / "transforms" / "generic.jsonl" if named == GENERIC else Path(named)


def calibration(named: str | None) -> tuple[Row, ...]:
    """The calibration rows of a file or of "generic"; () for None."""
    return tuple(read(str(calibration_file(named)))) if named else ()


def check_apart(evaluation: Sequence[Row], calibration: Sequence[Row], path: str) -> None:
    """Raises BadInput for a calibration row that is evaluated too: a quantizer must not see its test prompts."""
    exam = {row.prompt_id: row.id for row in evaluation}
    for row in calibration:
        same = exam.get(row.prompt_id)
        if same:
            message = f"calibration row {row.id!r} of {path} is also evaluation row {same!r}"
            raise BadInput(message, "take it out of one of the two files")


def asked_of(rows: Sequence[Row], most: int) -> list[Row]:
    """The rows to check answers on, at most `most` (0 = all): all critical rows, and an even choice of the others.
    Critical rows come first and long ones last, so that a variant that stops early has answered the decisive ones."""

    def length(row: Row) -> int:
        return sum(len(m["content"]) for m in row.messages)

    tagged = [row for row in rows if row.critical]
    others = [row for row in rows if not row.critical]
    room = max(0, (most or len(rows)) - len(tagged))
    if room < len(others):
        others = [others[n * len(others) // room] for n in range(room)]
    chosen = [*tagged, *others][: most or None]
    longest = 4 * sorted(map(length, chosen))[len(chosen) // 2]
    return sorted(chosen, key=lambda row: (not row.critical, length(row) > longest))


def draw(rows: Sequence[Row], workload: Workload, block: int, recipe: Recipe) -> tuple[tuple[Row, ...], ...]:
    """The block's requests: the same prompts for every variant, other prompts in the next block."""
    count = recipe.measure.warmup + recipe.timed_requests(workload.name)
    deck = list(rows)
    random.Random(f"{recipe.seed}/{workload.name}/prompts").shuffle(deck)
    start = block * count * workload.batch
    picks = [deck[(start + i) % len(deck)] for i in range(count * workload.batch)]
    return tuple(tuple(picks[i : i + workload.batch]) for i in range(0, len(picks), workload.batch))


# ---- JSON lines, as other programs write them --------------------------------------------------

TextOrBytes = TypeVar("TextOrBytes", str, bytes)


def text_of(raw: bytes) -> str:
    """A file's text: UTF-8, or the encoding of its byte order mark. Raises UnicodeDecodeError for other bytes."""
    return raw.decode(json.detect_encoding(raw))


def lines(text: TextOrBytes) -> Iterator[tuple[int, TextOrBytes]]:
    """(number, line) of each line that is not blank, counted from 1. Only a line feed ends a line: U+2028, U+0085 and
    the like may stand in a JSON string as they are (RFC 8259)."""
    end = "\n" if isinstance(text, str) else b"\n"
    return ((number, line) for number, line in enumerate(text.split(end), 1) if line.strip())
