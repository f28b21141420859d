"""What is never written down: API keys, tokens and passwords. Reports, records, logs and the terminal go through here.

A secret is the value of an environment variable whose name says so, a password in a URL, an Authorization header, and
the value of an option such as --api-key. Keys reach peftopt by the names of their variables alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftopt.errors import BadInput

HIDDEN = "[redacted]"

ENGINE_KEY = "PEFTOPT_ENGINE_KEY"
"""Holds the API key of the servers that this process and its workers start."""

SERVER_KEY = "PEFTOPT_SERVER_KEY"
"""Holds the API key that our own server asks for; without it, anybody may ask."""

_NAMES = re.compile("KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
SHORTEST = 8
"""A shorter value, such as `false` of TOKENIZERS_PARALLELISM, may be a word of any text: it is not hidden."""

_PATTERNS = (
    re.compile(r"(://)[^\s/@:\"'\\]{0,256}:[^\s/@\"'\\]{1,256}(?=@)"),
    re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic)\s+)[^\s\"',\\]{4,}"),
)
"""A name and a password in a URL; the header of a request."""

_OPTION = re.compile(r"(?i)(--[\w-]*(?:key|token|secret|password|passwd)(?:\s+|=))(?!-|\d+\b)[^\s\"'\\]+")
"""An option and its value, which is no number. What ends in `tokens` is a number of them, in `-env` or `-file` a
name."""

_told: set[str] = set()
"""Variables that were named as those of a key, whatever they are called."""


def api_key(variable: str) -> str:
    """The key that an environment variable holds, without the blanks and line ends around it, such as an .env file of
    Windows leaves. Raises BadInput, which does not show it, for one that is not there or cannot be sent."""
    if variable == ENGINE_KEY:
        return engine_key()
    _told.add(variable)
    key = os.environ.get(variable, "").strip()
    if not key:
        raise BadInput(f"the environment variable {variable} is not set", f"export {variable}=…, then run this again")
    if not (key.isascii() and key.isprintable()):
        raise BadInput(f"the value of {variable} is not an API key", "export the key alone, in one line")
    return key


def engine_key() -> str:
    """The API key of servers that are started here: random, and the same in worker processes, which inherit it."""
    return os.environ.setdefault(ENGINE_KEY, secrets.token_urlsafe(32))


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text without secrets."""
    for secret in _secrets(environ):
        if secret in text:
            text = text.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _OPTION.sub(rf"\1{HIDDEN}", text) if "--" in text else text


def scrub(file: Path) -> None:
    """Take secrets out of a log that another program has written and closed, such as an engine's."""
    kept = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with contextlib.suppress(OSError):
        with file.open(**kept) as lines:  # type: ignore[call-overload]
            if all(redacted(line) == line for line in lines):
                return
        clean = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        with file.open(**kept) as lines, clean.open("w", **kept) as out:  # type: ignore[call-overload]
            out.writelines(map(redacted, lines))
        clean.replace(file)


def check(text: str, what: str) -> None:
    """Raises BadInput, which does not show it, for a text of the user's that holds a secret: `what` it is would be
    seen in a list of processes, and kept in records."""
    option = _OPTION.search(text)
    if option or redacted(text) != text:
        held = f"a secret ({option[1].strip(' =')})" if option else "a secret"
        raise BadInput(
            f"{what} holds {held}",
            "put it into the environment, which the server inherits (vLLM: VLLM_API_KEY, HF_TOKEN; llama.cpp: "
            "LLAMA_API_KEY); a server that peftopt starts gets a key of its own",
        )


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """The secrets of an environment in the forms in which a text may hold them, the longest first."""
    return sorted(set(_forms(environ)), key=len, reverse=True)


def _forms(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        if not (_NAMES.search(name) or name in _told):
            continue
        for line in (value.strip(), *(each.strip() for each in value.splitlines())):
            if len(line) >= SHORTEST and not line.isdigit():
                yield line
                yield json.dumps(line)[1:-1]
                yield json.dumps(line, ensure_ascii=False)[1:-1]
