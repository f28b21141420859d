"""Rows of prompts as other programs write them: read as they are meant, or refused with what the row lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import RECIPE, command

from peftopt import corpus, identity, jobs, store
from peftopt.errors import BadInput
from peftopt.loadtest import importers, runs
from peftopt.records import Measurement

ASKED = [{"role": "user", "content": "hello there"}]


def rows(tmp_path: Path, *values: Any, raw: bytes | None = None) -> list[corpus.Row]:
    path = tmp_path / "p.jsonl"
    path.write_bytes(raw if raw is not None else "".join(json.dumps(v) + "\n" for v in values).encode())
    return corpus.read(str(path))


def refused(tmp_path: Path, *values: Any, raw: bytes | None = None) -> str:
    with pytest.raises(BadInput) as error:
        rows(tmp_path, *values, raw=raw)
    assert error.value.hint
    return error.value.message


# ---- JSON lines --------------------------------------------------------------------------------

SEPARATORS = "a\u2028b\u2029c\u0085d\x0ce\x1ef"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_only_a_newline_ends_a_line_and_a_byte_order_mark_is_none(tmp_path: Path, encoding: str, end: str) -> None:
    texts = [SEPARATORS.replace("\x0c", "").replace("\x1e", ""), "second"]
    text = end.join(json.dumps({"id": t[:2], "prompt": t}, ensure_ascii=False) for t in texts) + end
    found = rows(tmp_path, raw=text.encode(encoding))
    assert [row.messages[0]["content"] for row in found] == texts


def test_traces_records_and_results_are_split_alike(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(
        '{"offset_s": 1, "id": "a\u2028b", "model": null}\r\n{"offset_s": 2, "id": 0}'.encode("utf-8-sig")
    )
    found = runs.read_trace(trace)
    assert [(t.id, t.model) for t in found] == [("a\u2028b", ""), ("0", "")]
    trace.write_text('{"offset_s": 1, "prompt_tokens": Infinity}')
    with pytest.raises(BadInput, match="line 1"):
        runs.read_trace(trace)

    kept = tmp_path / "m.jsonl"
    for text in ("a\u2028b\u0085c", "half \ud83d"):
        store.append(kept, Measurement("engine", "v", "", values={"why": text}))
    kept.write_bytes(b"\xef\xbb\xbf" + kept.read_bytes())
    assert [m.values.why for m in store.read(kept)] == ["a\u2028b\u0085c", "half \ud83d"]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(BadInput):
        store.read(tmp_path / "deep.jsonl")
    with pytest.raises(BadInput):
        importers.read(tmp_path / "deep.jsonl")
    with pytest.raises(BadInput):
        corpus.read(str(tmp_path / "deep.jsonl"))


# ---- what a row holds --------------------------------------------------------------------------


def test_rows_without_an_id_are_numbered_by_line(tmp_path: Path) -> None:
    found = rows(
        tmp_path, {"messages": ASKED}, {"id": None, "prompt": "b"}, {"id": 7, "prompt": "c"}, {"id": "", "prompt": "d"}
    )
    assert [row.id for row in found] == ["line-1", "line-2", "7", "line-4"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), ("", ""), ("yes", "yes"), ("null", "null"), (5, "5"), (False, "false"), ({"a": [1]}, '{"a":[1]}')],
)
def test_null_is_no_expected_answer_and_json_is_its_text(tmp_path: Path, value: Any, text: str) -> None:
    (row,) = rows(tmp_path, {"prompt": "a", "expected": value})
    assert row.expected == text
    (sent,) = jobs.from_line(jobs.as_line(jobs.AliveJob((row,)))).rows
    assert sent == row, "a worker reads what it is sent"


@pytest.mark.parametrize("value", [False, None, "false", "False", "no", "0", 0, 0.0, ""])
def test_what_means_no_is_not_critical(tmp_path: Path, value: Any) -> None:
    assert not rows(tmp_path, {"prompt": "a", "critical": value})[0].critical


@pytest.mark.parametrize("value", [True, "true", "TRUE", "yes", 1, 1.0, "1"])
def test_what_means_yes_is_critical(tmp_path: Path, value: Any) -> None:
    assert rows(tmp_path, {"prompt": "a", "critical": value})[0].critical


@pytest.mark.parametrize(
    ("value", "names"), [("long", ("long",)), (["a", 1], ("a", "1")), (None, ()), ("", ()), ([], ())]
)
def test_one_slice_is_a_name_not_its_letters(tmp_path: Path, value: Any, names: tuple[str, ...]) -> None:
    assert rows(tmp_path, {"prompt": "a", "slices": value})[0].slices == names


def test_content_in_parts_of_text_is_their_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    (row,) = rows(tmp_path, {"messages": [{"role": "user", "content": parts}], "tools": None})
    assert row.messages == tuple(ASKED)
    assert rows(tmp_path, {"prompt": ASKED})[0].messages == tuple(ASKED)


CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": ASKED, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": CALL}]}, "message 2 has tool_calls"),
        (
            {"messages": [*ASKED, {"role": "tool", "content": "sunny", "tool_call_id": "c"}]},
            "message 2 has tool_call_id",
        ),
        ({"messages": [*ASKED, {"role": "tool", "content": "sunny"}]}, "message 2 is a tool's"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content of message 1 is nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of message 1 is a list"),
        ({"conversations": [{"from": "tool", "value": "hi"}]}, "turn 1 is from 'tool'"),
        ({"conversations": "hi"}, "conversations are text"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "hi"}], "expected": "hi"}, "take one of them out"),
        ({"text": "hi"}, "plain text"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 has no role"),
        ({"instruction": ["say hi"]}, "instruction"),
        ({"instruction": "say hi", "history": ["hi"]}, "history"),
        ({"messages": "hi"}, "messages are text"),
        ({"messages": ["hi"]}, "message 1 is text"),
        ({"prompt": 5}, "prompt is a number"),
        ({"prompt": ["hi"]}, "prompt is a list"),
        ({"id": "1"}, "neither messages nor a prompt"),
        ({"id": ["1"], "prompt": "a"}, "id is a list"),
        ({"prompt": "a", "critical": "maybe"}, "critical: 'maybe'"),
        ({"prompt": "a", "critical": [1]}, "critical"),
        ({"prompt": "a", "slices": {"a": 1}}, "slices"),
        ({"prompt": "a", "slices": [None]}, "slices"),
        ([["a"]], "it is a list"),
        ("text", "it is text"),
        (None, "it is nothing"),
        ({"prompt": "a \ud83d"}, r"\\ud83d"),
        ({"prompt": "a", "expected": "\udc00"}, r"\\udc00"),
        ({"id": "\udc00", "prompt": "a"}, "lone surrogate"),
        ({"prompt": "a", "slices": ["\udc00"]}, "lone surrogate"),
    ],
)
def test_a_row_that_cannot_be_asked_as_it_is_says_what_it_lacks(tmp_path: Path, row: Any, says: str) -> None:
    message = refused(tmp_path, row)
    assert says.replace("\\\\", "\\") in message and "Error" not in message


@pytest.mark.fault(31, "the line or the row is named")
def test_the_line_or_the_row_of_an_array_is_named(tmp_path: Path) -> None:
    assert ":3 is not a prompt" in refused(tmp_path, raw=b'{"prompt": "a"}\n\n{"id": 1}\n')
    assert ":2 repeats the id 'a'" in refused(tmp_path, {"id": "a", "prompt": "1"}, {"id": "a", "prompt": "2"})
    assert ":2 is not a prompt" in refused(tmp_path, raw=b'[{"prompt": "a"},\n {"id": "b"}]')
    assert "is not JSON" in refused(tmp_path, raw=b'[{"prompt": "a"},\n {"prompt": "b"}\n')


# ---- other people's forms ----------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "hello there"}
FORMS = {
    "OpenAI chat": {"messages": [SYSTEM, USER, {"role": "assistant", "content": "hi"}]},
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "hello there"},
            {"from": "gpt", "value": "hi"},
        ]
    },
    "Alpaca": {"system": "Be short.", "instruction": "hello there", "input": "", "output": "hi"},
    "prompt and answer": {"prompt": [SYSTEM, USER], "completion": [{"role": "assistant", "content": "hi"}]},
    "peftopt's own": {"id": "1", "messages": [SYSTEM, USER], "expected": "hi"},
}


@pytest.mark.parametrize("layout", ["lines", "array"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_prompt_and_answer(tmp_path: Path, form: str, layout: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([FORMS[form]] if layout == "array" else FORMS[form]))
    read = corpus.opened(str(path))
    (row,) = read.rows
    assert row.messages == (SYSTEM, USER) and row.expected == "hi"
    assert form in read.form


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_gives_the_same_rows(tmp_path: Path, ending: str, separator: str) -> None:
    path = tmp_path / f"p.{ending}"
    cells = [["id", "question", "answer", "critical"], ["7", '"hello\nthere"', "hi", "yes"], ["8", "again", "", ""]]
    path.write_text("\r\n".join(separator.join(line) for line in cells))
    first, second = corpus.read(str(path))
    assert (first.id, first.messages[0]["content"], first.expected, first.critical) == ("7", "hello\nthere", "hi", True)
    assert (second.expected, second.critical) == ("", False)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("name,answer\na,b\n", "no column of prompts"),
        ("prompt\na,b\n", "more cells"),
        ('prompt\n"a\n', "not a table"),
        ("messages\nhi\n", "not a table"),
    ],
)
def test_a_table_that_is_none_says_so(tmp_path: Path, table: str, says: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(table)
    with pytest.raises(BadInput, match=says):
        corpus.read(str(path))


def test_turns_before_the_last_answer_are_part_of_the_prompt(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and?"}]
    last = {"role": "assistant", "content": "bye"}
    (row,) = rows(tmp_path, {"messages": [*turns, last]})
    assert row.messages == tuple(turns) and row.expected == "bye"
    (open_,) = rows(tmp_path, {"messages": turns})
    assert open_.messages == tuple(turns) and open_.expected == ""
    (alpaca,) = rows(tmp_path, {"instruction": "Sum up.", "input": "A long text.", "history": [["a", "b"]]})
    assert [m["content"] for m in alpaca.messages] == ["a", "b", "Sum up.\n\nA long text."]


@pytest.mark.parametrize("said", ["", " \n", [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_an_empty_turn_of_the_assistant_is_neither_prompt_nor_answer_and_is_counted(
    tmp_path: Path, form: str, said: Any
) -> None:
    def turn(role: str, content: Any) -> dict[str, Any]:
        if form == "messages":
            return {"role": role, "content": content}
        return {"from": {"user": "human", "assistant": "gpt"}[role], "value": content}

    user, nothing = turn("user", "hello there"), turn("assistant", said)
    chats = [
        [user, nothing],
        [user, nothing, user, turn("assistant", "hi")],
        [user, turn("assistant", "hi"), nothing],
        [nothing],
        [user],
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({form: chat}) for chat in chats))
    read = corpus.opened(str(path))
    assert [row.expected for row in read.rows] == ["", "hi", "hi", ""]
    assert [len(row.messages) for row in read.rows] == [1, 2, 1, 1]
    assert [row.id for row in read.rows] == ["line-1", "line-2", "line-3", "line-5"]
    assert read.empty == 4
    with pytest.raises(ValueError, match="empty turns"):
        corpus.row_from({form: [nothing]})


def test_a_hash_of_half_a_character_is_one() -> None:
    assert identity.of_value("\ud83d") != identity.of_value("\ud83e")


# ---- copies ------------------------------------------------------------------------------------


def test_copies_of_a_prompt_count_once(tmp_path: Path) -> None:
    found = rows(tmp_path, *({"id": f"{n}", "prompt": f"text {n % 3}", "expected": f"{n}"} for n in range(9)))
    assert corpus.distinct(found) == 3
    assert len({row.prompt_id for row in found}) == 3 and found[0].prompt_id == found[3].prompt_id
    (sent,) = jobs.from_line(jobs.as_line(jobs.AliveJob((found[0],)))).rows
    assert sent.prompt_id == found[0].prompt_id


def test_check_says_how_many_prompts_are_copies(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "eval.jsonl"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=tiny_base, adapter=tiny_lora, prompts=asked.name))

    def said(n: int) -> str:
        asked.write_text(
            "".join(
                json.dumps({"id": f"{i}", "prompt": f"text {i % n}", "slices": ["short"]}) + "\n" for i in range(12)
            )
        )
        assert command("check", recipe) == 0
        return " ".join(capsys.readouterr().err.split())

    assert "9 of 12 prompts" in said(3) and "copies" not in said(12)
