"""Text to token ids and back, the same in every engine on a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftopt.engines import Engine, Generation
from peftopt.errors import BadInput
from peftopt.models import template
from peftopt.models.rendering import WRONG


class Text(Engine):
    """The part of an engine that only takes the model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._end = list(eos[:1])
        self.eos = frozenset(eos)

    @property
    def tokenizer(self) -> Any:
        """The model's own, as transformers opens it."""
        return self._tokenizer

    @property
    def special_tokens(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(self._tokenizer.all_special_ids) | {id_ for id_, token in added if token.special}

    def encode(self, messages: Sequence[Mapping[str, str]], answer: str | None = None) -> tuple[list[int], list[int]]:
        prompt = encoded(self._tokenizer, messages)
        if answer is None:
            return prompt, []
        # The answer is encoded apart, as it is generated: no token spans the end of the prompt.
        ids = self._tokenizer(answer, add_special_tokens=False).input_ids
        return prompt, [*ids, *self._end]

    def decode(self, tokens: Sequence[int]) -> str:
        return decoded(self._tokenizer, tokens)


def encoded(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a prompt: the chat template and the generation prompt applied, or without one the messages' lines.
    Raises BadInput for messages that the template refuses, and for a prompt of nothing."""
    if tokenizer.chat_template:
        prompt: list[int] = tokenizer(rendered(tokenizer, messages), add_special_tokens=False).input_ids
    else:
        prompt = tokenizer("\n".join(message["content"] for message in messages)).input_ids
    if not prompt:
        raise template.nothing("a prompt")
    return prompt


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of new tokens, special tokens kept out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], prompt: bool = True, what: str = "a prompt") -> str:
    """Messages as the tokenizer's chat template writes them. Raises BadInput for those that it refuses; `what` they
    are."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, *WRONG) as error:
        raise template.refused(error, what) from error


def ends(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the folder's configs, else the tokenizer's. Raises BadInput without any."""
    ids = template.ends(folder) or [id_ for id_ in [tokenizer.eos_token_id] if id_ is not None]
    if not ids:
        raise BadInput("the model has no end-of-sequence token", "set eos_token_id in its generation_config.json")
    return ids


def trimmed(tokens: list[int], times: list[int], eos: frozenset[int]) -> Generation:
    """A batch's row up to its own end of sequence. Tokens after it are padding while other rows continue."""
    end = next((i for i, token in enumerate(tokens) if token in eos), None)
    count = len(tokens) if end is None else end + 1
    return Generation(tokens[:count], times[:count], stopped=end is not None)
