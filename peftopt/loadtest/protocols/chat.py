"""OpenAI's /v1/chat/completions, as every OpenAI-compatible server and TGI's Messages API speak it.

The server applies its own chat template. Source: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from peftopt.loadtest import protocols
from peftopt.loadtest.protocols import Event, Prompt, choice_of, error_of
from peftopt.loadtest.protocols.completions import counts, reused, shared
from peftopt.records import Json

PATH, STREAMS, FIXED_LENGTH, TAKES_IDS = "/v1/chat/completions", True, True, False


def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]:
    """The messages, or a bare text as the user's one message."""
    messages = [dict(m) for m in prompt.messages] or [{"role": "user", "content": prompt.text}]
    return {"messages": messages, **shared(model, new_tokens, stop, extensions)}


def read(data: Json) -> Event:
    """A chunk's delta. A thought, a tool call or a refusal counts as a token; the role alone does not."""
    if error := error_of(data):
        return Event(error=error)
    choice = choice_of(data)
    delta = protocols.mapping(choice.get("delta"), "delta")
    thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
    ids = protocols.ids(choice.get("token_ids"))
    text, more = _content(delta.get("content"))
    # The first message only says whose turn it is; it is no token.
    is_token = bool(text or ids or thought or more or delta.get("tool_calls") or delta.get("refusal"))
    finish = protocols.text(choice.get("finish_reason"), "finish_reason")
    return Event(is_token, text, ids, finish, *counts(data), reused=reused(data))


def _content(content: Json) -> tuple[str, bool]:
    """(the text, whether anything came), of a string or of Mistral's list of parts, some of which may be thoughts."""
    if not isinstance(content, list):
        return protocols.text(content, "content"), bool(content)
    parts = [protocols.mapping(part, "a part of content") for part in content]
    texts = [protocols.text(part.get("text"), "text") for part in parts if part.get("type") == "text"]
    return "".join(texts), any(part.get("text") or part.get("thinking") for part in parts)
