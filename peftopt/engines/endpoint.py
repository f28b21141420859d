"""A server that you already run: any OpenAI-compatible URL, TGI's own protocol, or DeepSpeed-MII's REST form.

The variant's Model is what the server is said to serve, `[]` the adapter on its base: its tokenizer and chat template
make the prompts here, so that every variant is asked the same tokens. Its weights are the server's own business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peftopt import plugins
from peftopt.engines import Generation, Scores
from peftopt.engines._text import Text
from peftopt.errors import BadInput, WorkerFailed
from peftopt.loadtest.client import Client, Reply
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.loadtest.sender import Planned, Played, whole
from peftopt.models import hf
from peftopt.records import Model


@dataclass(frozen=True)
class Params:
    """`url` of the server, without /v1; `model`: the served name, "" where there is only one; `protocol`:
    "completions" (prompts as token ids where the server takes them), "chat" (the server's own chat template),
    "llamacpp" (llama.cpp's own, token ids both ways), "tgi" or "mii"; `api_key_env`: the environment variable that
    holds the key; `timeout_s` for one whole request."""

    url: str = ""
    model: str = ""
    protocol: str = "completions"
    api_key_env: str = ""
    timeout_s: float = 120.0


PLUGIN = plugins.engine(Params, needs=("aiohttp", "transformers"), serves=True)


def prepare(model: Model) -> None:
    """Import the HTTP client and the tokenizers."""
    import aiohttp  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401


def open(model: Model, params: Params) -> Served:
    """Connect, and ask for a token. Raises BadInput for a wrong model name, MissingEnvironment without a server."""
    return Served(model, params)


class Served(Text):
    """A server that answers; see `peftopt.engines.Engine` for what each method promises. It only generates."""

    scores = False
    adapter_switch_time: float | None = None
    device, threads = "server", 0
    slots = 0
    """Requests that the server works on at once; 0 = not known."""
    remote = True
    """Time, memory and CPU of the model are another process's: only what a client sees can be measured here."""

    def __init__(self, model: Model, params: Params) -> None:
        target = Target(params.url, params.protocol, params.model, params.api_key_env, params.timeout_s)
        tokenizer = hf.tokenizer(hf.tokenizer_home(model), model.path)
        if tokenizer.eos_token_id is None:
            raise BadInput("the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json")
        super().__init__(tokenizer, [int(tokenizer.eos_token_id)])
        self._client = Client(target)
        self._loop = asyncio.Runner()
        self._messages: dict[tuple[int, ...], Sequence[Mapping[str, str]]] = {}
        self._takes_ids = self._client.protocol.TAKES_IDS
        try:
            (self._model,) = self._loop.run(self._client.served([params.model] if params.model else []))
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        """The first request finds out whether prompts may be token ids, and whether anything is answered at all."""
        prompt = self.encode([{"role": "user", "content": "Hello"}])[0]
        (reply,) = self._ask([prompt], 1, stop=True)
        if self._takes_ids and reply.status in (400, 422):
            self._takes_ids = False
            (reply,) = self._ask([prompt], 1, stop=True)
        if reply.error:
            raise BadInput(
                f"{self._client.target.url} does not answer: {reply.error}", "check the protocol and the name"
            )

    def encode(self, messages: Sequence[Mapping[str, str]], answer: str | None = None) -> tuple[list[int], list[int]]:
        """It also keeps the messages, for a protocol that sends them in place of token ids."""
        prompt, ids = super().encode(messages, answer)
        self._messages[tuple(prompt)] = messages  # a protocol of chats wants them back
        return prompt, ids

    @property
    def target(self) -> Target:
        """Where the model is served: what a client of one's own takes."""
        return replace(self._client.target, model=self._model)

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """An encoded prompt in the forms that the server takes."""
        text = "" if self._takes_ids else self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return Prompt(self._messages.get(tuple(ids), ()), text, tuple(ids) if self._takes_ids else ())

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """One request for each prompt, all at once: how they are batched is the server's business.

        Raises BadInput where a fixed length is asked for and the protocol or the server has none, WorkerFailed when a
        request fails.
        """
        if not stop and not self._client.protocol.FIXED_LENGTH:
            raise BadInput(
                f"{self._client.target.protocol} cannot generate a fixed number of tokens",
                "a speed comparison needs equal lengths: use the server's OpenAI form, or load (natural lengths)",
            )
        return [self._generation(reply, new_tokens, stop) for reply in self._ask(prompts, new_tokens, stop)]

    def load(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool, at: Sequence[float], users: int
    ) -> Played:
        """Send prompts under load, each at its time in `at` (seconds from the start), or by so many `users`, each
        asking when answered. Raises WorkerFailed when one fails, BadInput for an answer that is not `new_tokens` long.
        """
        planned = [
            Planned(when, str(n), self._model, self.prompt(prompt), new_tokens)
            for n, (when, prompt) in enumerate(zip(at, prompts, strict=True))
        ]
        played = self._loop.run(whole(self._client, planned, not stop, users))
        if failed := [r.error for r in played.requests if r.error]:
            why = f"{len(failed)} of {len(planned)} under load: {failed[0]}"
            raise WorkerFailed("request failed", why, f"the server at {self._client.target.url}")
        if not stop:
            for request in played.requests:
                self._check_length(request.new_tokens, new_tokens)
        played.requests = [replace(request, reused=self._told(request.reused)) for request in played.requests]
        return played

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """Raises NotImplementedError: no protocol here tells the likelihood of a given answer."""
        raise NotImplementedError("a served model only generates")

    def close(self) -> None:
        """Close the connections and the event loop."""
        self._loop.run(self._client.__aexit__())
        self._loop.close()

    def _ask(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Reply]:
        async def together() -> list[Reply]:
            return await asyncio.gather(
                *(self._client.ask(self.prompt(p), self._model, new_tokens, stop) for p in prompts)
            )

        return self._loop.run(together())

    def _generation(self, reply: Reply, new_tokens: int, stop: bool) -> Generation:
        """The answer as tokens: the server's ids, or where it tells none, its text encoded here.

        Tokens that came in one message were at hand at one time; which message brought a token that was not told of
        singly is not known, so such ones count with the last: the first and the last token's times are right.
        """
        if reply.error:
            raise WorkerFailed("request failed", reply.error, f"the server at {self._client.target.url}")
        if not stop:
            self._check_length(reply.new_tokens, new_tokens)
        stopped = stop and reply.finish == "stop"
        whole = reply.ids and len(reply.ids) >= reply.new_tokens
        tokens = list(reply.ids) if whole else self._tokenizer(reply.text, add_special_tokens=False).input_ids
        if not stop:
            tokens = (tokens + self._end * new_tokens)[:new_tokens]
        elif stopped and tokens[-1:] != self._end:
            tokens += self._end
        times = _spread(reply.times or [reply.done], len(tokens))
        answer = Generation(tokens, times, stopped, reused=self._told(reply.reused))
        if not self.speculates or reply.proposed is None or reply.accepted is None:
            return answer
        steps = max(1, len(tokens) - 1 - reply.accepted)
        return replace(answer, steps=steps, proposed=reply.proposed, accepted=reply.accepted)

    def _told(self, reused: int | None) -> int | None:
        """What the server says that it reused of a prompt; None for a server of ours that was told to reuse nothing."""
        return reused if self.remote or self.reuses else None

    def _check_length(self, given: int, asked: int) -> None:
        if given != asked:
            refused = self._client.refused
            why = f"it refuses ignore_eos ({refused})" if refused else "it knows no ignore_eos"
            raise BadInput(
                f"{self._client.target.url} gave {given} tokens, not {asked}: {why}",
                "a speed comparison needs equal lengths, which vLLM, SGLang and llama.cpp's server can give",
            )


def _spread(times: list[int], n: int) -> list[int]:
    """`n` times, the first and the last as they were."""
    return [*times[: max(0, n - 1)], *times[-1:] * max(1, n - len(times))][: max(n, 1)]
