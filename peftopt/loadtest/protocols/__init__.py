"""Wire formats of servers, one file each: what a request's body is, and what each message of its answer says. Pure.

A protocol file has a one-line docstring, `PATH` (below the server's URL), `STREAMS` (whether the answer comes as
server-sent events), `FIXED_LENGTH` (whether it has a way to say "exactly so many tokens"), `TAKES_IDS` (whether a
prompt may be token ids), and

    def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]
    def read(data: Json) -> Event

`extensions` are fields beyond the published schema of the first such server, which others may refuse.
"""

from __future__ import annotations

import importlib
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
    `prompt_tokens` and `new_tokens` the server's own counts, at the end, and of the latter those that were `proposed`
    beforehand, and those that were `accepted`; `error` its own words.
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
    if not isinstance(data, Mapping):
        raise TypeError(f"a message is {type(data).__name__}, not a mapping")
    return (data.get("choices") or [{}])[0] or {}


def count(value: Json) -> int | None:
    """A server's own count of tokens; None where it tells none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
