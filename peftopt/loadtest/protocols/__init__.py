"""Wire formats of servers, one file each: what a request's body is, and what each message of its answer says. Pure.

A protocol file has a one-line docstring, `PATH` (below the server's URL), `STREAMS` (whether the answer comes as
server-sent events), `FIXED_LENGTH` (whether it has a way to say "exactly so many tokens"), `TAKES_IDS` (whether a
prompt may be token ids), and

    def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]
    def read(data: Json) -> Event        raises what errors.BROKEN names for what is not a message of this protocol

`extensions` are fields beyond the published schema of the first such server, which others may refuse.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from peftopt.records import Json

NAMES = ("completions", "chat", "llamacpp", "tgi", "mii")
"""Every protocol that a recipe or a command line can name."""


@dataclass(frozen=True)
class Target:
    """Where to send requests, and in which form. `model` is a served name, "" = the only one; `key_env` names the
    environment variable that holds the API key; a request takes at most `timeout_s`, whole."""

    url: str
    protocol: str = "chat"
    model: str = ""
    key_env: str = ""
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Prompt:
    """One prompt in the forms that a server may take it in; a protocol uses the first that it can."""

    messages: Sequence[Mapping[str, str]] = ()
    text: str = ""
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Event:
    """What one message of a stream says. `is_token`: it brings new text, so that its arrival is a token's time.

    `ids` are the new tokens' ids where the server tells; `finish` why the answer ended ("stop", "length");
    `prompt_tokens` and `new_tokens` the server's own counts, at the end; of the former those that it `reused` from
    earlier requests, and of the latter those that were `proposed` beforehand, and those that were `accepted`; `error`
    its own words.
    """

    is_token: bool = False
    text: str = ""
    ids: tuple[int, ...] = ()
    finish: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    error: str = ""
    proposed: int | None = None
    accepted: int | None = None
    reused: int | None = None


def module(name: str) -> ModuleType:
    """The protocol's module."""
    return importlib.import_module(f"{__name__}.{name}")


ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
"""OpenAI's word for an error, by its HTTP status; "server_error" for any other."""


def error(status: int, message: str, code: str, param: str | None = None) -> dict[str, Json]:
    """An error as OpenAI's API answers it: `code` is a word for programs, `param` the field that it is about. Source:
    platform.openai.com/docs/api-reference, the error object."""
    kind = ERROR_TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param or None, "code": code}}


def error_of(data: Json) -> str:
    """What a server says went wrong: OpenAI's {"error": {"message"}}, TGI's {"error"}, FastAPI's {"detail"}; "" = all
    is well."""
    if not isinstance(data, Mapping):
        return ""
    fault = data.get("error") or (data.get("message") if data.get("object") == "error" else "") or data.get("detail")
    if isinstance(fault, Mapping):
        fault = fault.get("message") or fault
    return str(fault)[:300] if fault else ""


def choice_of(data: Json) -> Mapping[str, Json]:
    """The first choice in a message of OpenAI's; {} in one that brings none, such as the last with only the counts.
    Raises TypeError for what is no message."""
    choices = mapping(data, "a message").get("choices")
    if choices is not None and not isinstance(choices, list):
        raise TypeError(f"choices is {shown(choices)}, not a list")
    return mapping(choices[0] if choices else None, "a choice")


MOST_TOKENS = 10**9
"""No server answers with as many: a count above is not one."""
MOST_ID = 2**31
"""No vocabulary has as many tokens."""
SHOWN = 40
"""Characters of an odd value that are shown."""


def count(value: Json) -> int | None:
    """A server's own count of tokens; None where it tells none. Raises ValueError for what is not a count."""
    if value is None:
        return None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"a count of tokens is {shown(value)}")
    return int(value)


def mapping(value: Json, what: str) -> Mapping[str, Json]:
    """A mapping of a server's; {} for none. Raises TypeError, naming `what` it should be, for another value."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is {shown(value)}, not a mapping")
    return value


def text(value: Json, what: str) -> str:
    """A text of a server's; "" for none. Raises TypeError, naming `what` it should be, for another value."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{what} is {shown(value)}, not a text")
    return value


def ids(value: Json) -> tuple[int, ...]:
    """Ids of tokens; () for none. Raises TypeError for another value than a list, ValueError for what is not an id."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TypeError(f"ids of tokens are {shown(value)}, not a list")
    for each in value:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < MOST_ID:
            raise ValueError(f"the id of a token is {shown(each)}")
    return tuple(value)


def shown(value: Json) -> str:
    """The beginning of a server's odd value, as JSON."""
    written = json.dumps(value)
    return written if len(written) <= SHOWN else f"{written[:SHOWN]}…"
