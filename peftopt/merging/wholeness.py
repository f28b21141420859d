"""Ask transformers whether a base has all its weights, in a process beside the merge: a merge in blocks needs neither
torch nor transformers, whose import takes longer than many a merge.

`python -m peftopt.merging.wholeness FOLDER` prints what is wrong as JSON, null if nothing is.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from peftopt import environments
from peftopt.errors import BadInput
from peftopt.models import hf, importing
from peftopt.models.checkpoint import open_model


@contextlib.contextmanager
def checked_beside(folder: Path) -> Iterator[None]:
    """Raises BadInput after the work inside, when the base lacks a weight of its model. Where transformers is there
    already, it is asked before the work begins."""
    if "transformers" in sys.modules:
        check(folder)
        yield
        return
    command = [*environments.module(__name__), str(folder.resolve())]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environments.variables(),
    ) as child:
        try:
            yield
            output = child.communicate()[0]
        finally:
            child.kill()
    lines = output.decode().splitlines()
    if not lines:  # it died, of a lack of memory perhaps: asked here, where whatever it is is raised
        check(folder)
    elif (problem := json.loads(lines[-1])) is not None:
        raise BadInput(problem["message"], problem["hint"])


def check(folder: Path) -> None:
    """Raises BadInput when the folder's checkpoint lacks a weight of its model."""
    with open_model(folder) as base:
        hf.check_whole(str(folder), {name: entry.shape for name, entry in base.entries.items()})


def main(folder: str) -> None:
    """Say what is wrong with the folder's checkpoint. The merge beside goes first."""
    os.nice(10)
    importing.torch_side(folder, adapters=False)
    problem = None
    try:
        check(Path(folder))
    except BadInput as error:
        problem = {"message": error.message, "hint": error.hint}
    print(json.dumps(problem))  # noqa: T201 (the answer to the process that started this one)


if __name__ == "__main__":
    main(sys.argv[1])
