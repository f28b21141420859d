"""What a request asks for, read from its body and checked; and what is said of one that cannot be answered. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftopt.loadtest import protocols
from peftopt.records import Json

TOP = 20
"""The most log-probabilities of a position that can be asked for."""

COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat goes on to the end of the context."""

UNSUPPORTED: Mapping[str, Sequence[Json]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_k": (0, -1),
    "min_p": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "prompt_logprobs": (),
}
"""Fields that would change the answer, which this server does not know, and the values that change nothing."""


class Problem(Exception):
    """An answer in OpenAI's form of an error: HTTP `status`, what is wrong, `code`, a word for programs, and the field
    `param` that it is about."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = protocols.error(status, message, code, param)


def wrong(param: str, message: str) -> Problem:
    """What to answer for a field that is wrong."""
    return Problem(400, message, "invalid_value", param)


@dataclass(frozen=True)
class Asked:
    """A request. `prompt` is a text, token ids, or a chat's messages; `new_tokens` 0 = as many as fit; `temperature` 0
    takes the most likely token; `logprobs` how many of the most likely tokens to tell at each position, None = not
    even the chosen one's; `repetition_penalty` 0 = what the model's generation config says."""

    model: str
    prompt: str | tuple[int, ...] | list[dict[str, str]]
    chat: bool
    new_tokens: int = 0
    least_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    stream: bool = False
    usage: bool = False
    ids: bool = False


def read(body: Json, chat: bool) -> Asked:
    """Raises Problem for a body that is not OpenAI's, or asks for what this server does not do."""
    if not isinstance(body, dict):
        raise Problem(400, "the body is not a JSON object", "invalid_json")
    for name, neutral in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and value not in neutral and not (name == "tools" and body.get("tool_choice") == "none"):
            raise Problem(400, f"this server does not support {name}: {value!r:.80}", "unsupported_value", name)
    options = _object(body, "stream_options")
    stream = _flag(body, "stream")
    if options and not stream:
        raise wrong("stream_options", "stream_options is only for stream: true")
    cap = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return Asked(
        model=_text(body, "model"),
        prompt=_messages(body) if chat else _prompt(body),
        chat=chat,
        new_tokens=_whole(body, cap, 1, 0 if chat else COMPLETION_TOKENS),
        least_tokens=_whole(body, "min_tokens", 0, 0),
        temperature=_number(body, "temperature", 0.0, 0.0, 100.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        seed=_whole(body, "seed", -(2**63), 0) if body.get("seed") is not None else None,
        repetition_penalty=_number(body, "repetition_penalty", 0.0, 1e-6, 100.0),
        stop=_stop(body),
        ignore_eos=_flag(body, "ignore_eos"),
        logprobs=_chat_logprobs(body) if chat else _logprobs(body, "logprobs"),
        stream=stream,
        usage=_flag(options, "include_usage"),
        ids=_flag(body, "return_token_ids"),
    )


# ---- fields ------------------------------------------------------------------------------------


def _text(body: Mapping[str, Json], name: str) -> str:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, f"{name} must be a string, not {value!r:.80}")
    return value or ""


def _flag(body: Mapping[str, Json], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, f"{name} must be true or false, not {value!r:.80}")
    return bool(value)


def _object(body: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise wrong(name, f"{name} must be an object, not {value!r:.80}")
    return value or {}


def _whole(body: Mapping[str, Json], name: str, least: int, default: int, most: int = 2**63 - 1) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        upper = f" to {most}" if most < 2**63 - 1 else " or more"
        raise wrong(name, f"{name} must be a whole number, {least}{upper}, not {value!r:.80}")
    return value


def _number(body: Mapping[str, Json], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise wrong(name, f"{name} must be a number from {least:g} to {most:g}, not {value!r:.80}")
    return float(value)


def _stop(body: Mapping[str, Json]) -> tuple[str, ...]:
    value = body.get("stop")
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise wrong("stop", f"stop must be a text or a list of texts, none of them empty, not {value!r:.80}")
    return tuple(texts)


def _logprobs(body: Mapping[str, Json], name: str) -> int | None:
    return _whole(body, name, 0, 0, TOP) if body.get(name) is not None else None


def _chat_logprobs(body: Mapping[str, Json]) -> int | None:
    wanted, top = _flag(body, "logprobs"), _logprobs(body, "top_logprobs")
    if top and not wanted:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
    return (top or 0) if wanted else None


def _messages(body: Mapping[str, Json]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "messages must be a list of one message or more")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong("messages", f"a message must have a role and a content, not be {message!r:.80}")
    return [{"role": message["role"], "content": _content(message.get("content"))} for message in messages]


def _content(content: Json) -> str:
    """A message's text, of a string or of OpenAI's list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise wrong("messages", f"a content must be a text, or a list of texts, not {content!r:.80}")
    return "".join(map(str, texts))


def _prompt(body: Mapping[str, Json]) -> str | tuple[int, ...]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return tuple(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(each, (str, list)) for each in prompt):
        raise Problem(400, "this server takes one prompt a request", "unsupported_value", "prompt")
    raise wrong("prompt", "prompt must be a text or a list of token ids, and not empty")
