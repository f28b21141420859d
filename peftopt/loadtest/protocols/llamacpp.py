"""llama.cpp's own /completion; one token a message, with its id, which its OpenAI forms do not tell.

A character that takes several tokens comes in one message, and only the last of their ids is told: where the count
says more tokens than there are ids, the text has to be taken. Source: tools/server/README.md of ggml-org/llama.cpp.
"""

from __future__ import annotations

from peftopt.loadtest import protocols
from peftopt.loadtest.protocols import Event, Prompt, count, error_of
from peftopt.records import Json

PATH, STREAMS, FIXED_LENGTH, TAKES_IDS = "/completion", True, True, True

_FINISH = {"eos": "stop", "word": "stop", "limit": "length"}


def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]:
    """Ids, text or messages as for `completions`; greedy. There are no `extensions`: all of it is the server's own."""
    given = list(prompt.ids) or prompt.text or "\n".join(m["content"] for m in prompt.messages)
    fixed = {} if stop else {"ignore_eos": True}
    # the likeliest token needs no other samplers
    greedy = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
    named = {"model": model} if model else {}
    return {"prompt": given, "n_predict": new_tokens, "stream": True, "return_tokens": True, **greedy, **fixed, **named}


def read(data: Json) -> Event:
    """A message's token and text; the last one has the counts and the reason why the answer ended."""
    if error := error_of(data):
        return Event(error=error)
    said = protocols.mapping(data, "a message")
    ids, text = protocols.ids(said.get("tokens")), protocols.text(said.get("content"), "content")
    if not said.get("stop"):
        return Event(bool(ids or text), text, ids)
    finish = _FINISH.get(protocols.text(said.get("stop_type"), "stop_type"), "stop")
    timings = protocols.mapping(said.get("timings") or {}, "timings")  # silent of proposals where there were none
    return Event(
        bool(ids or text),
        text,
        ids,
        finish,
        count(said.get("tokens_evaluated")),
        count(said.get("tokens_predicted")),
        proposed=count(timings.get("draft_n", 0)),
        accepted=count(timings.get("draft_n_accepted", 0)),
        reused=count(timings.get("cache_n")),
    )
