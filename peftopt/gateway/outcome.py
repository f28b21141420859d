"""What came of an operation of the operators': an exit code, and why."""

from __future__ import annotations

from dataclasses import dataclass

from peftopt.records import Verdict


@dataclass(frozen=True)
class Outcome:
    """`exit_code` as the command line has it, and why; `rules`: of a trial, the verdict of each."""

    exit_code: int
    said: str
    version: str = ""
    rules: tuple[Verdict, ...] = ()
