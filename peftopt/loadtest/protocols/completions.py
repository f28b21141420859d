"""OpenAI's /v1/completions, as vLLM, SGLang, llama.cpp's server and TensorRT-LLM speak it; a prompt may be token ids.

Source: platform.openai.com/docs/api-reference/completions; the extensions are vLLM's
(vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

from peftopt.loadtest import protocols
from peftopt.loadtest.protocols import Event, Prompt, choice_of, count, error_of
from peftopt.records import Json

PATH, STREAMS, FIXED_LENGTH, TAKES_IDS = "/v1/completions", True, True, True


def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]:
    """Token ids where there are some, else the text, else the messages' contents, one a line."""
    given = list(prompt.ids) or prompt.text or "\n".join(m["content"] for m in prompt.messages)
    return {"prompt": given, **shared(model, new_tokens, stop, extensions)}


def shared(model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]:
    """The fields that both of OpenAI's forms have."""
    fixed = {} if stop else {"ignore_eos": True, "min_tokens": new_tokens}
    return {
        "model": model,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({**fixed, "return_token_ids": True} if extensions else {}),
    }


def read(data: Json) -> Event:
    """A chunk's text, ids and counts; the last one has the reason why the answer ended."""
    if error := error_of(data):
        return Event(error=error)
    choice = choice_of(data)
    text, ids = protocols.text(choice.get("text"), "text"), protocols.ids(choice.get("token_ids"))
    finish = protocols.text(choice.get("finish_reason"), "finish_reason")
    # A special token has no text, and yet it is one: only the last message, which just says why, brings none.
    is_token = bool(text or ids or (choice and not finish))
    return Event(is_token, text, ids, finish, *counts(data), reused=reused(data))


def counts(data: Json) -> tuple[int | None, int | None]:
    """(prompt tokens, new tokens) as the server counted them."""
    usage = protocols.mapping(data.get("usage"), "usage")
    return count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))


def reused(data: Json) -> int | None:
    """Prompt tokens that the server took from its prefix cache; None where it does not tell. vLLM tells with
    --enable-prompt-tokens-details, SGLang with --enable-cache-report."""
    usage = protocols.mapping(data.get("usage"), "usage")
    details = protocols.mapping(usage.get("prompt_tokens_details"), "prompt_tokens_details")
    return count(details.get("cached_tokens"))
