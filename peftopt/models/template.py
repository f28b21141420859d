"""A model's chat template and the tokens that end an answer, read from files: what can be known before any model is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftopt.corpus import Row
from peftopt.errors import BROKEN, BadInput
from peftopt.models.rendering import Refused, Unrendered, rendered
from peftopt.records import Json

MARK = "an answer that no template knows"
"""What is rendered as an answer, to see what comes after one."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

REFUSED = "write the prompts as the template wants them: a system message may have to go into the first user message"


@dataclass(frozen=True)
class Template:
    """A folder's chat template, "" for none, and the special tokens by the names under which it uses them."""

    text: str
    special: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]], prompt: bool = True) -> str:
        """The text of a chat, with the beginning of an answer for a `prompt`. Raises as rendering.rendered does."""
        return rendered(self.text, messages, prompt, self.special)


def read(folder: Path, below: Path | None = None) -> Template:
    """The template that transformers would use: chat_template.jinja, else what tokenizer_config.json says, else that of
    the folder of the model `below`. Raises BadInput for files whose values are of other types than a tokenizer's."""
    config = json_object(folder / "tokenizer_config.json")
    named = json_object(folder / "special_tokens_map.json") | config
    file = folder / "chat_template.jinja"
    try:
        special = {name: _content(named[name]) for name in SPECIAL if named.get(name)}
        text = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template") or ""
        if isinstance(text, list):
            text = next((each["template"] for each in text if each["name"] == "default"), "")
    except BROKEN as error:
        raise unreadable(folder, error) from error
    if not text and below:
        text = read(below).text
    return Template(str(text), special)


def check(folder: Path, rows: Sequence[Row], answers: bool = False, below: Path | None = None) -> None:
    """Raises BadInput, naming the row, for prompts that the template of `read` refuses, and for prompts of nothing.
    `answers`: with what is expected after them."""
    template = read(folder, below)
    for row in rows:
        last = [{"role": "assistant", "content": row.expected}] if answers and row.expected else []
        if not template.text:
            if not last and not any(m["content"] for m in row.messages) and not _begins(folder):
                raise nothing(f"row {row.id!r}")
            continue
        try:
            template.render([*row.messages, *last], prompt=not answers)
        except Refused as error:
            raise refused(error, f"row {row.id!r}") from error
        except Unrendered:
            pass


def refused(error: Exception, what: str) -> BadInput:
    """The mistake of prompts that a template does not take, in its words."""
    return BadInput(f"the chat template refuses {what}: {error}", REFUSED)


def unreadable(folder: Path, error: Exception) -> BadInput:
    """The mistake of tokenizer's files whose values are of other types than a tokenizer's."""
    return BadInput(f"{folder}: its tokenizer's files cannot be read: {error!r}", "restore them")


def nothing(what: str) -> BadInput:
    """The mistake of a prompt that is not even one token."""
    return BadInput(f"{what} is empty: not one token to answer", "give it a text, or the tokenizer a chat template")


def _begins(folder: Path) -> bool:
    """Whether the tokenizer puts a token before an empty text; True where only transformers could say."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return True
    from tokenizers import Tokenizer

    return bool(Tokenizer.from_file(str(file)).encode("").ids)


# ---- the end of an answer ------------------------------------------------------------------------------


def ends(folder: Path) -> list[int]:
    """The ids that end an answer, where transformers looks for them: in the generation config (without one, in the
    model's); none where they name none."""
    file = next((f for name in ("generation_config.json", "config.json") if (f := folder / name).is_file()), None)
    ids = json_object(file).get("eos_token_id") if file else None
    return [id_ for id_ in (ids if isinstance(ids, list) else [ids]) if isinstance(id_, int) and id_ >= 0]


def endless(folder: Path, home: Path) -> str:
    """Why answers of the model in `folder`, with the tokenizer and template in `home`, would not end by themselves, and
    what to do; "" where nothing speaks for it.

    A chat model ends its turn as its template does. Where that token is not one that ends an answer, it goes on to
    write the user's next question.
    """
    closing, stops = closes(home), ends(folder) or _own_end(home)
    if closing is None or not stops or closing[1] in stops:
        return ""
    token, id_ = closing
    known = ", ".join(map(str, stops))
    return (
        f"answers may never end: the chat template ends a turn with {token} ({id_}), and {folder.name} ends an answer "
        f"only at {known}; add {id_} to eos_token_id in its generation_config.json"
    )


def closes(home: Path) -> tuple[str, int] | None:
    """The token, and its id, with which the template ends an assistant's turn; None where it does so with none."""
    template = read(home)
    if not template.text:
        return None
    turn = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": MARK}]
    try:
        text = template.render(turn, prompt=False)
    except (Refused, Unrendered):
        return None
    return first_token(text.rpartition(MARK)[2], added(home)) if MARK in text else None


def _own_end(home: Path) -> list[int]:
    """The id of the tokenizer's own end of sequence, which counts where the configs name none."""
    text = read(home).special.get("eos_token", "")
    return [id_ for token, id_ in added(home).items() if token == text]


def first_token(text: str, added: Mapping[str, int]) -> tuple[str, int] | None:
    """The added token with which a text begins, blanks aside; None for a text that begins otherwise. Pure."""
    rest = text.lstrip()
    tokens = [token for token in added if token and rest.startswith(token)]
    return (longest := max(tokens, key=len), added[longest]) if tokens else None


def added(home: Path) -> dict[str, int]:
    """Tokens that were added to the vocabulary, with their ids: special ones are among them. Raises BadInput for files
    whose values are of other types than a tokenizer's."""
    listed = json_object(home / "tokenizer.json").get("added_tokens") or []
    decoder = json_object(home / "tokenizer_config.json").get("added_tokens_decoder") or {}
    try:
        tokens = {str(token["content"]): int(token["id"]) for token in listed}
        return tokens | {str(token["content"]): int(id_) for id_, token in decoder.items()}
    except BROKEN as error:
        raise unreadable(home, error) from error


def _content(token: Json) -> str:
    """A special token is written as its text, or as an object that holds it."""
    return str(token["content"] if isinstance(token, dict) else token)


def json_object(file: Path) -> dict[str, Json]:
    """A JSON object; empty for a file that is not there, or is none: whoever needs it says so."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
