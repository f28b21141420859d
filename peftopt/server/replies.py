"""OpenAI's forms of an answer, whole and in pieces. Pure.

Source: platform.openai.com/docs/api-reference; `token_ids` and `metrics` are vLLM's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from peftopt.records import Json
from peftopt.server.answer import Answer, Piece, Voice
from peftopt.server.asked import Asked


class Reply:
    """How the pieces of one answer are told."""

    def __init__(self, answer: Answer, voice: Voice) -> None:
        self._answer, self._voice = answer, voice
        self._asked: Asked = answer.asked
        self._offset = 0
        kind = ("chatcmpl", "chat.completion") if self._asked.chat else ("cmpl", "text_completion")
        self._head = {
            "id": f"{kind[0]}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._asked.model,
        }
        self._object = kind[1]

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Json]:
        """The answer in one."""
        text = "".join(piece.text for piece in pieces)
        said = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
        choice = self._choice(said, pieces)
        totals = {"usage": self._usage(), "metrics": self._answer.metrics()}
        return {**self._head, "object": self._object, "choices": [choice], **totals}

    def opening(self) -> list[dict[str, Json]]:
        """What a stream begins with: whose turn it is."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(said, ())])] if self._asked.chat else []

    def piece(self, piece: Piece) -> list[dict[str, Json]]:
        """The messages of a stream for one token, and with the last one the totals."""
        said = {"delta": {"content": piece.text}} if self._asked.chat else {"text": piece.text}
        messages = [self._chunk([self._choice(said, [piece])])]
        if piece.finish:
            messages += [self._chunk([])] if self._asked.usage else []
            messages[-1] |= {"usage": self._usage()} if self._asked.usage else {}
            messages[-1] |= {"metrics": self._answer.metrics()}
        return messages

    def _chunk(self, choices: list[Json]) -> dict[str, Json]:
        return {
            **self._head,
            "object": f"{self._object}.chunk" if self._asked.chat else self._object,
            "choices": choices,
        }

    def _choice(self, said: dict[str, Json], pieces: Sequence[Piece]) -> dict[str, Json]:
        finish = pieces[-1].finish if pieces else ""
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish or None}
        if self._asked.logprobs is not None and pieces:
            choice["logprobs"] = self._chat_logprobs(pieces) if self._asked.chat else self._logprobs(pieces)
        if self._asked.ids:
            choice["token_ids"] = [piece.token for piece in pieces]
        return choice

    def _usage(self) -> dict[str, int]:
        prompt, new = len(self._answer.prompt), len(self._answer.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _chat_logprobs(self, pieces: Sequence[Piece]) -> dict[str, Json]:
        def told(token: int, logprob: float) -> dict[str, Json]:
            word = self._voice.word(token)
            return {"token": word, "logprob": logprob, "bytes": list(word.encode("utf-8", "replace"))}

        content = [
            {**told(piece.token, piece.logprob), "top_logprobs": [told(*likely) for likely in piece.top]}
            for piece in pieces
        ]
        return {"content": content}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Json]:
        words, offsets = [self._voice.word(piece.token) for piece in pieces], []
        for piece in pieces:
            offsets.append(self._offset)
            self._offset += len(piece.text)
        chosen = [(piece.token, piece.logprob) for piece in pieces]
        tops = [
            {self._voice.word(t): p for t, p in [*piece.top, own]} for piece, own in zip(pieces, chosen, strict=True)
        ]
        return {
            "tokens": words,
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": tops if self._asked.logprobs else None,
            "text_offset": offsets,
        }
