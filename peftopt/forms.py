"""The formats of prompt files: read a row's messages and its right answer.

OpenAI's chat rows, ShareGPT, Alpaca, prompt and completion (TRL's names too), question and answer. A conversation that
ends with an assistant's turn is a prompt and its expected answer. An empty assistant's turn is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftopt.records import Json

OWN, CHAT, SHAREGPT, ALPACA, PAIRS, PLAIN = (
    "peftopt's own",
    "OpenAI chat",
    "ShareGPT",
    "Alpaca",
    "prompt and answer",
    "prompts alone",
)
"""The names of the formats in messages."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
"""ShareGPT's `from`, as roles of a chat template."""

QUESTIONS = ("prompt", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")


@dataclass(frozen=True)
class Prompt:
    """A row's prompt. `messages`: as in the row, not checked yet; without a message, there is no prompt. `expected`:
    the right answer, None for none. `form`: the format's name. `empty`: the number of empty assistant's turns that
    were left out."""

    messages: Sequence[Json]
    expected: Json
    form: str
    empty: int = 0


def prompt(values: Mapping[str, Json]) -> Prompt:
    """The prompt in a row. Raises ValueError that says what the row lacks."""
    expected = values.get("expected")
    if values.get("messages"):
        messages = _messages(values["messages"], "messages")
        return _ended(messages, expected, OWN if "id" in values or "expected" in values else CHAT)
    for name in ("conversations", "conversation"):
        if values.get(name):
            return _ended(_sharegpt(values, _messages(values[name], name)), expected, SHAREGPT)
    if values.get("instruction") is not None:
        return Prompt(_alpaca(values), _first(values, ("expected", *ANSWERS)), ALPACA)
    question = next((name for name in QUESTIONS if values.get(name) is not None), "")
    if question:
        return _pair(values, question)
    if "text" in values:
        raise ValueError(
            "it has 'text' (plain text), which does not tell the prompt from the answer: write prompt and completion"
        )
    raise ValueError("it has neither messages nor a prompt")


def _messages(value: Json, name: str) -> list[Json]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"its {name} are {kind(value)}, not a list")
    return list(value)


def _ended(messages: Sequence[Json], expected: Json, form: str) -> Prompt:
    """The prompt in a conversation. The assistant's last turn is the expected answer."""
    kept = [message for message in messages if not _is_empty(message)]
    empty = len(messages) - len(kept)
    last = kept[-1] if kept else None
    if len(kept) < 2 or not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("tool_calls"):
        return Prompt(kept, expected, form, empty)
    if expected is not None:
        raise ValueError(
            "its messages end with an assistant's turn, which is the expected answer, and it has `expected` too: "
            "take one of them out"
        )
    return Prompt(kept[:-1], text(last.get("content")), form, empty)


def _is_empty(message: Json) -> bool:
    """Whether a message is an assistant's turn without text and without a call."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return False
    content = text(message.get("content"))
    calls = message.get("tool_calls") or message.get("function_call")
    return isinstance(content, str) and not content.strip() and not calls


def _sharegpt(values: Mapping[str, Json], turns: Sequence[Json]) -> list[Json]:
    messages: list[Json] = []
    if isinstance(values.get("system"), str) and values["system"]:
        messages.append({"role": "system", "content": values["system"]})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is {kind(turn)}, not a mapping")
        if "from" not in turn:
            messages.append(turn)
            continue
        speaker = turn["from"]
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"turn {number} is from {speaker!r}: known are {', '.join(SPEAKERS)}")
        messages.append({"role": role, "content": turn.get("value")})
    return messages


def _alpaca(values: Mapping[str, Json]) -> list[Json]:
    """The instruction and its input, an empty line between them, after the turns of a `history` (LLaMA-Factory)."""
    messages: list[Json] = []
    if values.get("system"):
        messages.append({"role": "system", "content": values["system"]})
    for pair in values.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("its history is not a list of pairs, question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [values["instruction"], values.get("input")]
    for part in parts:
        if part is not None and not isinstance(part, str):
            raise ValueError(f"its instruction or input is {kind(part)}, not text")
    messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part)})
    return messages


def _pair(values: Mapping[str, Json], name: str) -> Prompt:
    question = values[name]
    expected = _first(values, ("expected", *ANSWERS))
    form = PLAIN if expected is None else OWN if "expected" in values else PAIRS
    if isinstance(question, str):
        before = [{"role": "system", "content": values["system"]}] if values.get("system") else []
        return Prompt([*before, {"role": "user", "content": question}], expected, form)
    if isinstance(question, list) and question and all(isinstance(m, Mapping) for m in question):
        return _ended(question, expected, form)
    raise ValueError(f"its {name} is {kind(question)}, not text")


def _first(values: Mapping[str, Json], names: Sequence[str]) -> Json:
    """The row's first value under these names. A list of one message is read as the message's text."""
    value = next((values[name] for name in names if values.get(name) is not None), None)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and "content" in value[0]:
        return text(value[0]["content"])
    return value


def text(content: Json) -> Json:
    """A message's content, with text parts joined."""
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _is_text(part: Json) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def kind(value: Json) -> str:
    """The kind of a JSON value in words."""
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return words.get(type(value), "nothing")
