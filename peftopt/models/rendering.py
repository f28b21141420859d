"""Chats as a chat template writes them. A template is a stranger's program: Jinja's sandbox keeps it from Python, but
not from looping for ever or taking all memory. So it runs in a process of its own, which ends itself at a limit.

Rendered by transformers' own function, which knows neither torch nor the tokenizer's class.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftopt.errors import BadInput
from peftopt.records import Json

LIMIT_S = 10.0
"""Seconds that one chat may take; usual ones take less than a millisecond."""

LIMIT_BYTES = 2**30
"""Memory that one chat may take, beside what the process needs to start."""

IDLE_S = 20.0
"""Seconds after which the process ends that nobody gives a chat: nothing of it is left while a run is timed."""

WRONG = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template's own expressions raise, besides jinja2's errors."""


class Refused(Exception):
    """The template itself refuses the messages, in its own words."""


class Unrendered(Exception):
    """The template uses what only the model's own tokenizer has, or has a mistake: who opens that will say so."""


def rendered(text: str, messages: Sequence[Mapping[str, str]], prompt: bool, special: Mapping[str, str]) -> str:
    """Messages as the template `text` writes them, with the beginning of an answer for a `prompt`; `special` are the
    special tokens by the names under which the template uses them.

    Raises Refused, Unrendered, and BadInput for a template beyond the limits.
    """
    chats = [dict(message) for message in messages]
    chat = {"chat_template": text, "conversations": [chats], "add_generation_prompt": prompt, **special}
    said = _process().ask({"limit_s": LIMIT_S, "idle_s": IDLE_S, "chat": chat})
    if "refused" in said:
        raise Refused(said["refused"])
    if "unrendered" in said:
        raise Unrendered(said["unrendered"])
    if "beyond" in said:
        raise _beyond(said["beyond"])
    return str(said["text"])


def _beyond(what: str) -> BadInput:
    return BadInput(
        f"one chat takes the chat template {what}",
        "no template needs that: read it before you serve this model, or take the one of the base model",
    )


class _Process:
    """Renders one chat after the other; started at the first, and again when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def ask(self, asked: Mapping[str, Json]) -> dict[str, Json]:
        """What became of a chat."""
        with self._lock:
            for _ in range(2):
                began = time.monotonic()
                child = self._running()
                if line := _answer(child, json.dumps(asked)):
                    return dict(json.loads(line))
                if child.wait() != -signal.SIGALRM:
                    return {"beyond": "more memory than it may have"}
                if time.monotonic() - began >= LIMIT_S:  # else it was just ending, idle for too long
                    break
        return {"beyond": f"more than {LIMIT_S:g} s"}

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", __name__]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._child


def _answer(child: subprocess.Popen[str], asked: str) -> str:
    """The line with which it answers; "" where it ends before."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(asked + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except BrokenPipeError:
        return ""
    return line if line.endswith("\n") else ""


@functools.cache
def _process() -> _Process:
    return _Process()


# ---- the process itself --------------------------------------------------------------------------------


def main() -> None:
    """A chat on each line of stdin, and on each of stdout what became of it; until stdin ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin:
        asked = json.loads(line)
        # nobody handles its signal, which ends the process, whatever that is doing
        signal.setitimer(signal.ITIMER_REAL, asked["limit_s"])
        said = _said(render_jinja_template, asked["chat"])
        signal.setitimer(signal.ITIMER_REAL, asked["idle_s"])
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def _said(render: Callable[..., Any], chat: Mapping[str, Json]) -> dict[str, Json]:
    from jinja2 import TemplateError

    try:
        texts, _ = render(**chat)
    except MemoryError:
        return {"beyond": f"more than {LIMIT_BYTES / 2**30:g} GiB of memory"}
    except (TemplateError, *WRONG) as error:
        # jinja2's own errors are subclasses: a mistake, or what transformers gives a template only with a tokenizer
        return {"refused" if type(error) is TemplateError else "unrendered": str(error)}
    return {"text": str(texts[0])}


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        import psutil

        taken = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (taken + LIMIT_BYTES,) * 2)


if __name__ == "__main__":
    main()
