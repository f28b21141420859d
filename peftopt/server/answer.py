"""One answer in the making: which token comes next, what text it makes, when it is over, and how long it took."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftopt.engines._text import decoded, encoded
from peftopt.records import Json
from peftopt.server.asked import Asked

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for a part of a character."""


class Voice:
    """A tokenizer and its chat template: words to token ids, and back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokenizer("")  # it sets itself up at its first call, and later calls come from two threads

    def prompt(self, asked: Asked) -> list[int]:
        """The token ids of what is asked. Raises BadInput for messages that the chat template refuses."""
        if isinstance(asked.prompt, str):
            return list(self._tokenizer(asked.prompt).input_ids)
        if isinstance(asked.prompt, tuple):
            return list(asked.prompt)
        return encoded(self._tokenizer, asked.prompt)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return decoded(self._tokenizer, tokens)

    def word(self, token: int) -> str:
        """A token by itself, special ones too."""
        return str(self._tokenizer.decode([token]))


@dataclass(frozen=True)
class Piece:
    """A token, and the text that it completes: "" for half a character, and for what may begin a stop string.
    `finish` is why the answer ends with it. `logprob` and `top` (by id, most likely first) as asked."""

    token: int
    text: str
    finish: str = ""
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()


class Answer:
    """`new_tokens` at most; `eos` ends it. Times are perf_counter_ns, 0 = not yet."""

    def __init__(self, asked: Asked, prompt: Sequence[int], new_tokens: int, voice: Voice, eos: frozenset[int]) -> None:
        self.asked, self.prompt = asked, list(prompt)
        self.new_tokens, self.eos = new_tokens, eos
        self.tokens: list[int] = []
        self._text = _Text(voice, asked.stop)
        self._dice: Any = None
        self.queued, self.scheduled, self.first, self.last = time.perf_counter_ns(), 0, 0, 0

    def add(self, logits: Any, best: int, now: int) -> Piece:
        """Its next token, out of logits [vocabulary] of which `best` is the arg-max, which were at hand by `now`."""
        token = best if self._plain else self._chosen(logits)
        self.tokens.append(token)
        self.first, self.last = self.first or now, now
        text, stopped = self._text.add(token)
        if stopped or (token in self.eos and not self.asked.ignore_eos):
            finish = "stop"
        else:
            finish = "length" if len(self.tokens) >= self.new_tokens else ""
        if finish and not stopped:
            text += self._text.rest()
        return Piece(token, text, finish, *self._logprobs(logits, token))

    def metrics(self) -> dict[str, Json]:
        """The request's times as vLLM's --enable-per-request-metrics tells them: to the first token from when it was
        scheduled; generation from the first token to the last; tokens a second from scheduled to the last."""
        decoding = (self.last - self.first) / 1e6
        computing = (self.last - self.scheduled) / 1e6
        count = len(self.tokens)
        return {
            "time_to_first_token_ms": (self.first - self.scheduled) / 1e6,
            "generation_time_ms": decoding,
            "queue_time_ms": (self.scheduled - self.queued) / 1e6,
            "mean_itl_ms": decoding / (count - 1) if count > 1 else None,
            "tokens_per_second": 1e3 * count / computing if computing else None,
        }

    @property
    def _plain(self) -> bool:
        """Whether the next token is simply the most likely one."""
        asked = self.asked
        return not asked.temperature and asked.repetition_penalty == 1 and len(self.tokens) >= asked.least_tokens

    def _chosen(self, logits: Any) -> int:
        import torch

        asked = self.asked
        scores = logits.float().clone()
        if asked.repetition_penalty != 1:  # as transformers and vLLM have it
            before = torch.tensor(sorted({*self.prompt, *self.tokens}), device=scores.device)
            given = scores[before]
            scores[before] = torch.where(given < 0, given * asked.repetition_penalty, given / asked.repetition_penalty)
        if len(self.tokens) < asked.least_tokens and not asked.ignore_eos:
            scores[sorted(self.eos)] = -torch.inf
        if not asked.temperature:
            return int(scores.argmax())
        ordered, ids = (scores / asked.temperature).softmax(-1).sort(descending=True)
        likely = ordered.cumsum(-1) - ordered < asked.top_p  # the first is always among them
        pick = torch.multinomial(ordered * likely, 1, generator=self._generator(scores.device))
        return int(ids[pick])

    def _generator(self, device: Any) -> Any:
        import torch

        if self._dice is None:
            seed = random.getrandbits(63) if self.asked.seed is None else self.asked.seed
            self._dice = torch.Generator(device).manual_seed(seed)
        return self._dice

    def _logprobs(self, logits: Any, token: int) -> tuple[float, Sequence[tuple[int, float]]]:
        """The model's own, whatever was done to choose."""
        if self.asked.logprobs is None:
            return 0.0, ()
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self.asked.logprobs, len(logprobs)))
        return float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


class _Text:
    """Tokens to text as they come: whole characters only, and nothing that may yet become a stop string."""

    def __init__(self, voice: Voice, stop: Sequence[str]) -> None:
        self._voice, self._stop = voice, stop
        self._window: list[int] = []
        self._told = 0
        """How many of the window's tokens are in text that was given out. They stay, since a tokenizer writes a token
        otherwise at the start of a text than after others."""
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """(what can be given out, whether a stop string has ended the answer)."""
        self._window.append(token)
        text = self._voice.text(self._window)
        if text.endswith(HALF):
            return "", False
        held = self._held + text[len(self._voice.text(self._window[: self._told])) :]
        self._window = self._window[self._told :]
        self._told = len(self._window)
        ends = [at for at in map(held.find, self._stop) if at >= 0]
        if ends:
            return held[: min(ends)], True
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def rest(self) -> str:
        """What was held back, at the end of an answer."""
        text = self._voice.text(self._window)[len(self._voice.text(self._window[: self._told])) :]
        return self._held + text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
