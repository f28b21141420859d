"""The text of a request and of its answer, for the log with `--log-text`: without secrets, and of limited length.

Pure. A prompt may have a key that its user has pasted; text that looks like one is not logged.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator

from peftopt.gateway.frames import parsed
from peftopt.records import Json

MOST_CHARACTERS = 8192
"""The most that is kept of a prompt, and of an answer."""

MOST_BYTES = 8 * MOST_CHARACTERS
"""The most of an answer that is read for its text: each token of a stream comes in a message of its own."""

OF_KEYS = f"{string.ascii_letters}{string.digits}_+/=.-"
HIDDEN = "[redacted]"

SECRETS = re.compile(
    r"(?i:bearer\s+)[^\s\"']{8,}"  # an Authorization header
    r"|\b(?:sk|pk|rk)[-_][\w-]{8,}"  # OpenAI, Anthropic, Stripe
    r"|\bhf_\w{8,}"  # Hugging Face
    r"|\bgh[opsur]_\w{8,}|\bgithub_pat_\w{8,}"  # GitHub
    r"|\bxox[a-z]-[\w-]{8,}"  # Slack
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{12,}"  # AWS
    r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]+)?"  # a JSON web token
    r"|-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|\Z)"  # PEM
    r"|(?<![\w+/-])(?=[\w+/-]*\d)(?=[\w+/-]*[A-Za-z])[\w+/-]{32,}={0,2}",  # base64 and hexadecimal
    re.DOTALL,
)
"""What looks like a key or a token."""


def redacted(text: str) -> str:
    """The text without anything that looks like a key, at most MOST_CHARACTERS long."""
    cut = text[: 2 * MOST_CHARACTERS]
    if len(cut) < len(text):  # a word that was cut may be a part of a key
        cut = cut.rstrip(OF_KEYS)
    return SECRETS.sub(HIDDEN, cut)[:MOST_CHARACTERS]


def prompt(asked: Json) -> str:
    """A request's text: the messages of a chat, a line each, or a prompt."""
    if not isinstance(asked, dict):
        return ""
    given = asked.get("messages")
    if not isinstance(given, list):
        return _text(asked.get("prompt"))
    said = [message for message in given if isinstance(message, dict)]
    return "\n".join(f"{message.get('role')}: {_text(message.get('content'))}" for message in said)


def answer(body: bytes, streams: bool) -> str:
    """The text of an answer, or of the part of it that came."""
    if streams:
        return "".join(_said(message, "delta") for message in parsed(body))
    try:
        return _said(json.loads(body), "message")
    except (ValueError, RecursionError):
        return ""


def _said(message: Json, where: str) -> str:
    return "".join(_pieces(message, where))


def _pieces(message: Json, where: str) -> Iterator[str]:
    choices = message.get("choices") if isinstance(message, dict) else None
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            of_chat = choice.get(where)
            yield _text(of_chat.get("content") if isinstance(of_chat, dict) else choice.get("text"))


def _text(value: Json) -> str:
    """The text of a content: a string, or parts with text; ids of tokens and images have none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return " ".join(part for part in parts if isinstance(part, str))
    return ""
