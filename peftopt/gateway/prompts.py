"""The operator's own prompts of a trial, and the answers to them, on disk: a restart asks only what is left.

STATE/trials/<version>/prompts.jsonl    the prompts
STATE/trials/<version>/answers.jsonl    the answers, in the form of a run's measurements
"""

from __future__ import annotations

import asyncio
import glob
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peftopt import corpus
from peftopt.corpus import Row
from peftopt.errors import BROKEN, BadInput, unwritable
from peftopt.gateway.asking import CHAT, Asker, Full, labelled_body
from peftopt.gateway.labelled import LIVE, NEW, RUNS, Labelled, Run, doubtful
from peftopt.gateway.said import Said, answer, harshest, kindest
from peftopt.measurements import Answer, structured
from peftopt.records import Json

TRIES = 3
"""A prompt that is not answered is asked again: an engine may be starting anew."""
TIMES = 3
"""Times that both versions are asked again where the new one makes a critical error: one run may have been chance."""


class Prompts:
    """The prompts of one trial in random order, and their answers so far."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self._answers, self._rows = folder / "answers.jsonl", {row.id: row for row in rows}
        self.labelled = Labelled(len(rows))

    @staticmethod
    def write(root: Path, version: str, rows: Sequence[Row]) -> None:
        """Store the prompts of a version's trial. Raises MissingEnvironment for a full disk."""
        folder, name = _folder(root, version), version.rpartition("@")[0]
        drawn = random.Random(version).sample(list(rows), len(rows))
        try:
            for old in folder.parent.glob(f"{glob.escape(name)}@*"):  # of the route's last trial
                shutil.rmtree(old, ignore_errors=True)
            folder.mkdir(parents=True)
            text = "".join(json.dumps(asdict(row)) + "\n" for row in drawn)
            (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(folder, error, "name another --state") from error

    @classmethod
    def read(cls, root: Path, version: str) -> Prompts:
        """The prompts of a version's trial, with the answers so far."""
        folder = _folder(root, version)
        found = cls(folder, corpus.read(str(folder / "prompts.jsonl")))
        lines = found._answers.read_bytes() if found._answers.is_file() else b""
        for _, line in corpus.lines(lines):
            try:
                value = json.loads(line)
                run = str(value["variant"]), int(value["launch"])
                found.labelled.add(run, structured(Answer, value["values"], "quality"))
            except (BadInput, *BROKEN):  # a crash has torn it: it is asked again
                continue
        if lines and not lines.endswith(b"\n"):
            found._append("\n")
        return found

    def left(self) -> list[Row]:
        """The prompts that were not asked."""
        return [self._rows[id_] for id_ in self.labelled.left(self._rows)]

    async def ask(
        self, asker: Asker, row: Row, served: Mapping[str, str], schema: Mapping[str, Json] | None, new_tokens: int
    ) -> None:
        """Ask the live version a prompt twice and the new one once, and again in doubt. `served`: the names at the
        engine."""
        body = labelled_body(row.messages, new_tokens)

        async def one(run: Run) -> Answer:
            said = await _patient(asker, body, served[run[0]])
            return await asyncio.to_thread(answer, row, said, schema, asker.vocabulary)

        found = {run: await one(run) for run in random.sample(RUNS, len(RUNS))}
        first, second, new = (found[run] for run in RUNS)
        if doubtful(new, (first, second)):
            new = kindest([new, *[await one((NEW, 1)) for _ in range(TIMES)]])
            second = harshest([second, *[await one((LIVE, 2)) for _ in range(TIMES)]])
        for run, each in zip(RUNS, (first, second, new), strict=True):
            self.labelled.add(run, each)
            self._keep(run, each)

    def _keep(self, run: Run, each: Answer) -> None:
        """Add an answer to the file; a full disk loses it, and after a restart it is asked again."""
        line = {"probe": "quality", "variant": run[0], "launch": run[1], "values": asdict(each)}
        self._append(json.dumps(line) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self._answers.open("a", encoding="utf-8") as lines:
                lines.write(text)
        except OSError:
            return


async def _patient(asker: Asker, body: Mapping[str, Json], served: str) -> Said:
    """An answer, whenever there is room."""
    tries = 0
    while True:
        await asker.room()
        try:
            said = await asker.ask(CHAT, body, served)
        except Full:  # a user was quicker
            continue
        tries += 1
        if not said.error or tries == TRIES:
            return said


def _folder(root: Path, version: str) -> Path:
    return root / "trials" / version
