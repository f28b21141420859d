"""Cut inputs that are longer than so many tokens, inside the messages, so that the chat template stays whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from peftopt import plugins
from peftopt.policies import Messages, Request


@dataclass(frozen=True)
class Params:
    """`over`: tokens, chat template included, up to which a prompt stays as it is and to which a longer one is cut;
    `keep`: "tail" or "head" of the message that is cut."""

    over: int = 2048
    keep: str = "tail"

    def __post_init__(self) -> None:
        if self.keep not in ("tail", "head"):
            raise ValueError(f"keep must be tail or head, not {self.keep!r}")
        if self.over < 1:
            raise ValueError(f"over must be 1 token or more, not {self.over}")


PLUGIN = plugins.policy(Params, technique="truncate")


def apply(request: Request, params: Params, count: Callable[[Messages], int]) -> Request:
    """The request with at most `over` prompt tokens, if cutting its messages can do that.

    The longest message is cut first, and system messages last: they say what is to be done. No message is dropped.
    """
    messages = list(request.messages)
    if not messages or count(messages) <= params.over:
        return request
    system_last = sorted(
        range(len(messages)), key=lambda n: (messages[n]["role"] == "system", -len(messages[n]["content"]))
    )
    for at in system_last:
        messages, fits = _cut(messages, at, params, count)
        if fits:
            break
    return replace(request, messages=messages)


def _cut(
    messages: list[Mapping[str, str]], at: int, params: Params, count: Callable[[Messages], int]
) -> tuple[list[Mapping[str, str]], bool]:
    """The messages with as much taken off one of them as is needed, all of it at most; and whether that was enough.

    Each round takes off what the text's own characters per token say, so that two or three rounds do.
    """
    content = messages[at]["content"]
    kept = len(content)

    def shortened() -> list[Mapping[str, str]]:
        text = content[len(content) - kept :] if params.keep == "tail" else content[:kept]
        return [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]]

    whole, cut = count(messages), messages
    empty = count([*messages[:at], {**messages[at], "content": ""}, *messages[at + 1 :]])
    each = len(content) / max(whole - empty, 1)
    tokens = whole
    while kept and tokens > params.over:
        kept = max(0, kept - max(1, math.ceil((tokens - params.over) * each)))
        cut = shortened()
        tokens = count(cut)
    return cut, tokens <= params.over
