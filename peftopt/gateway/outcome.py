"""The result of an operator's request: an exit code, and the reason."""

from __future__ import annotations

from dataclasses import dataclass

from peftopt.records import Verdict


@dataclass(frozen=True)
class Outcome:
    """`exit_code` as on the command line, and the reason; `rules`: of a trial, the verdict of each."""

    exit_code: int
    said: str
    version: str = ""
    rules: tuple[Verdict, ...] = ()
