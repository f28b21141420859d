"""DeepSpeed-MII's REST form: POST /mii/NAME; the whole answer at once, so there is no time to first token.

`url` names the deployment (http://host:28080/mii/my-deployment). The gateway hands the body to MII's
`client.generate` as keyword arguments, and answers a JSON list that is itself a JSON string.
Source: mii/grpc_related/restful_gateway.py, mii/batching/data_classes.py of microsoft/DeepSpeed-MII.
"""

from __future__ import annotations

import json

from peftopt.loadtest import protocols
from peftopt.loadtest.protocols import Event, Prompt, count, error_of
from peftopt.records import Json

PATH, STREAMS, FIXED_LENGTH, TAKES_IDS = "", False, True, False


def body(prompt: Prompt, model: str, new_tokens: int, stop: bool, extensions: bool) -> dict[str, Json]:
    """The prompt as text. The URL names the model, and there are no `extensions`."""
    text = prompt.text or "\n".join(m["content"] for m in prompt.messages)
    fixed = {} if stop else {"ignore_eos": True}
    return {"prompts": [text], "max_new_tokens": new_tokens, "do_sample": False, **fixed}


def read(data: Json) -> Event:
    """The whole answer, with the server's counts."""
    answers = json.loads(data) if isinstance(data, str) else data
    if error := error_of(answers):
        return Event(error=error)
    if not isinstance(answers, list):
        raise TypeError(f"the answers are {protocols.shown(answers)}, not a list")
    answer = protocols.mapping(answers[0], "an answer")
    return Event(
        True,
        protocols.text(answer["generated_text"], "generated_text"),
        finish=str(answer["finish_reason"]),
        prompt_tokens=count(answer["prompt_length"]),
        new_tokens=count(answer["generated_length"]),
    )
