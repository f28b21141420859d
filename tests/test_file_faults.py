"""Every operation on files fails or is the last one of its process, in turn: nothing half written is ever found."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.faulty_io import KILLED, SHORT, Faults, injected
from helpers.finished_runs import finished_run

from peftopt import errors, identity, store
from peftopt.cli import main
from peftopt.records import Build, Model, Step

FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, SHORT, KILLED)
FINAL = ("decision.json", "report.md", "report.html", "junit.xml", "judged.json")


@pytest.fixture(scope="module")
def run(tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = finished_run(tmp_path_factory.mktemp("faults"), tiny_base, tiny_lora, built=False)
    (folder / "machine.json").write_text("{}")
    assert forked(Faults(str(folder)), "decide", str(folder)).code == 0
    return folder


class Ended:
    """How a forked process ended: its exit code, or the negative number of its signal; what it said; the operations."""

    def __init__(self, status: int, said: str, count: int) -> None:
        self.code = os.waitstatus_to_exitcode(status)
        self.said = said
        self.count = count


def forked(faults: Faults, *arguments: str, work: Callable[[], int] | None = None) -> Ended:
    """The command line, or `work`, in a copy of this process whose files fail as `faults` say."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        code = 99
        with os.fdopen(writing, "w") as told, contextlib.redirect_stderr(io.StringIO()) as said:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    with injected(faults):
                        if work:
                            code = work()
                        else:
                            main(arguments)
                except SystemExit as ended:
                    code = int(ended.code or 0)
                except errors.PeftoptError as error:
                    code, _ = error.exit_code, said.write(error.message)
                except OSError as error:
                    code, _ = errors.unusable(error).exit_code, said.write(str(error))
            told.write(json.dumps([faults.count, said.getvalue()]))
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        heard = told.read()
    count, text = json.loads(heard) if heard else (0, "")
    return Ended(os.waitpid(child, 0)[1], text, count)


def sweep(
    folder: Path, fault: int | str, tmp_path: Path, *verb: str, work: Callable[[Path], int] | None = None
) -> Iterator[tuple[Path, Ended]]:
    """A fresh copy of the folder for each operation of the verb, which fails there; the folder and how it ended."""
    at = 0
    while True:
        at += 1
        copy = tmp_path / f"{at}" / folder.name
        shutil.copytree(folder, copy)
        faults = Faults(str(copy), at, fault)
        job = (lambda where=copy: work(where)) if work else None
        ended = forked(faults, *verb, str(copy), work=job)
        if ended.code != KILLED and ended.count < at:
            assert at > 5, "something was injected"
            return
        yield copy, ended
        shutil.rmtree(copy.parent)


def assert_whole(folder: Path, before: dict[str, bytes]) -> None:
    """Final files are as they were, or whole: JSON and reports that end."""
    for name in FINAL:
        file = folder / name
        if not file.exists():
            assert name == "judged.json" or name not in before
            continue
        text = file.read_bytes()
        if text == before.get(name):
            continue
        if name.endswith(".json"):
            json.loads(text)
        assert text.endswith((b"\n", b">", b"}")), f"{name} is torn"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", ["decide", "report"])
def test_no_fault_of_the_disk_tears_a_decision_or_a_report(
    run: Path, verb: str, fault: int | str, tmp_path: Path
) -> None:
    before = {name: (run / name).read_bytes() for name in FINAL if (run / name).exists()}
    for copy, ended in sweep(run, fault, tmp_path, verb):
        assert ended.code in (KILLED, 0, errors.ENVIRONMENT), ended.said
        assert "Traceback" not in ended.said
        assert_whole(copy, before)
        if ended.code == errors.ENVIRONMENT:
            assert "error:" in ended.said and "hint:" in ended.said
            assert not list(copy.glob(".*.tmp")), "temporary files are freed"
        assert forked(Faults(str(copy)), verb, str(copy)).code == 0, "the next one works"
        assert not list(copy.glob(".*.tmp"))
        assert {name: (copy / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_the_disk_leaves_half_an_artifact(fault: int | str, tmp_path: Path) -> None:
    build = Build("a" * 64, "", Step("merge", "transform", "merge", {}))
    (tmp_path / "results" / "old").mkdir(parents=True)

    def make(into: Path) -> tuple[Model, dict[str, object]]:
        into.mkdir()
        for name in ("config.json", "model.bin"):
            with (into / name).open("w") as file:
                file.write(name * 50)
        return Model(str(into)), {"seconds": 1.0, "tier0": []}

    def work(root: Path) -> int:
        home = store.Store(root)
        with home.locked(build):
            home.find(build) or home.build(build, make)
        return 0

    for root, ended in sweep(tmp_path / "results", fault, tmp_path, work=work):
        assert ended.code in (KILLED, errors.ENVIRONMENT), ended.said
        said: list[str] = []
        kept = store.Store(root, said.append).find(build)
        assert not said, "what is there is whole"
        assert kept is None or identity.of_folder(Path(kept.path) / store.MODEL) == kept.content
        assert forked(Faults(str(root)), work=lambda where=root: work(where)).code == 0
        assert not [f for f in root.rglob("*.tmp*")]
