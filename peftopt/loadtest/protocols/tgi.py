"""Text Generation Inference's own /generate_stream; one token a message, with its id; LoRAX speaks it too.

It decodes greedily unless it is told to sample, and has no way to go on past the end of sequence: lengths are not
fixed. An adapter is named by `adapter_id`. Source: docs/openapi.json of huggingface/text-generation-inference.
"""

from __future__ import annotations

from peftopt.loadtest import protocols
from peftopt.loadtest.protocols import Event, Prompt, count, error_of
from peftopt.records import Json

PATH, STREAMS, FIXED_LENGTH, TAKES_IDS = "/generate_stream", True, False, False

_FINISH = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}


def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]:
    """The prompt as text; `model` is the adapter's name. `stop` has no effect, and there are no `extensions`."""
    parameters: dict[str, Json] = {"max_new_tokens": new_tokens, "do_sample": False, "details": True}
    if model:
        parameters["adapter_id"] = model
    text = prompt.text or "\n".join(m["content"] for m in prompt.messages)
    return {"inputs": text, "parameters": parameters}


def read(data: Json) -> Event:
    """A message's token; a special one has no text. The last one has the counts."""
    if error := error_of(data):
        return Event(error=error)
    said = protocols.mapping(data, "a message")
    token, details = said.get("token"), protocols.mapping(said.get("details"), "details")
    if token is None:
        return Event()
    token = protocols.mapping(token, "token")
    finish = _FINISH.get(protocols.text(details.get("finish_reason"), "finish_reason"), "")
    text = "" if token.get("special") else protocols.text(token["text"], "text")
    counts = count(details.get("input_length")), count(details.get("generated_tokens"))
    return Event(True, text, protocols.ids([token["id"]]), finish, *counts)
