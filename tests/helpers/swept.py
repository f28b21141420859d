"""The jobs that tests/helpers/sweeps.py runs: verbs on tiny models, and parts of the gateway that write files.

`python -m helpers.swept PART HOME` is a part of the gateway or of the store.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.command_line import prompts
from helpers.finished_runs import finished_run
from helpers.inside import adapter
from helpers.sweeps import HOME, Job, attempt
from peftopt import identity, store
from peftopt.errors import ACCEPTED, BAD_INPUT, INCONCLUSIVE, REJECTED, PeftoptError, unusable
from peftopt.gateway import copies
from peftopt.gateway.lines import Log
from peftopt.gateway.registry import open_registry
from peftopt.gateway.routes import Route
from peftopt.records import Build, Model, Step

REPORTS = ("decision.json", "report.md", "report.html", "junit.xml")
BUILD = Build("a" * 64, "", Step("merge", "transform", "merge", {}))
LOG_LINES = 6

RECIPE = """model: {{base: {base}, adapter: {adapter}}}
workloads: {{chat: {{prompts: {prompts}, new_tokens: 2, batch: 1}}}}
quality: {{prompts: {prompts}, new_tokens: 2, batch: 4}}
measure: {{requests: 1, warmup: 1, relaunch: 10, max_blocks: 10, threads: 1}}
tradeoffs: {{merge: {{gain: off}}}}
variants: {{adapter: [], merged: [merge]}}
minimize: latency.p50@chat
"""
"""Nothing of it is decided by times: its verdicts are the same in every run."""


# ---- in the process that is swept --------------------------------------------------------------


def artifact(home: Path) -> None:
    """Build one, or find it."""

    def make(into: Path) -> tuple[Model, dict[str, object]]:
        into.mkdir()
        for name in ("config.json", "model.bin"):
            with (into / name).open("w") as file:
                file.write(name * 50)
        return Model(str(into)), {"seconds": 1.0, "tier0": []}

    results = store.Store(home / "results")
    with results.locked(BUILD):
        results.find(BUILD) or results.build(BUILD, make)


def registry(home: Path) -> None:
    """Put an adapter, put another as its canary, promote that and forget the first."""
    found = open_registry(home / "state")
    for name in [*found.versions]:
        found.forget(name)
    one, two = (found.copy("support", home / name) for name in ("one", "two"))
    found.keep(one, state="live")
    found.route("support", Route(one.version))
    found.keep(two, state="canary")
    found.route("support", Route(one.version, two.version, 0.1))
    found.route("support", Route(two.version))
    found.keep(two, state="live")
    found.forget(one.version.served)


def log(home: Path) -> None:
    """Lines of a log that is set aside as it grows."""

    class Line:
        def __init__(self, number: int) -> None:
            self.number = number

        def as_json(self) -> dict[str, object]:
            return {"kind": "test", "number": self.number, "text": "x" * 60}

    lines = Log(str(home / "requests.jsonl"), rotate_bytes=350, shared=True, keep=2)
    for number in range(LOG_LINES):
        lines.write(Line(number))
    lines.close()


PARTS: dict[str, Callable[[Path], None]] = {"artifact": artifact, "registry": registry, "log": log}


def main(part: str, home: str) -> int:
    """The exit code of a part, as the command line would have it."""
    try:
        PARTS[part](Path(home))
    except PeftoptError as error:
        return told(error)
    except OSError as error:
        return told(unusable(error))
    return 0


def told(error: PeftoptError) -> int:
    """Say what is wrong; the exit code."""
    sys.stdout.write(f"error: {error.message}\nhint: {error.hint}\n")
    return error.exit_code


# ---- what is checked of what they leave --------------------------------------------------------


def whole_artifacts(home: Path) -> None:
    """Every artifact that lies under its name is what its manifest says."""
    for manifest in (home / "results" / "artifacts").glob(f"*/*/{store.MANIFEST}"):
        if ".tmp." not in manifest.parent.name:
            content = read(manifest)["content"]
            assert identity.of_folder(manifest.parent / store.MODEL) == content, f"{manifest.parent.name} is torn"


def whole_run(home: Path) -> None:
    """Artifacts, and the files of runs."""
    whole_artifacts(home)
    for run in (home / "results" / "runs").glob("*"):
        whole_lines(run / "measurements.jsonl")
        for file in run.glob("*.json"):
            read(file)
        whole_reports(run)


def whole_reports(run: Path) -> None:
    for name in REPORTS:
        text = (run / name).read_bytes() if (run / name).exists() else b"\n"
        assert text.endswith((b"\n", b">", b"}")), f"{name} is torn"


def whole_registry(home: Path) -> None:
    """The registry is JSON, and each version's copy what its name says."""
    file = home / "state" / "registry.json"
    for stored in read(file)["versions"].values() if file.exists() else ():
        assert copies.whole(Path(stored["folder"])), f"the copy of {stored['id'][:12]} is torn"


def whole_lines(file: Path) -> list[Any]:
    """The values of a file's lines, of which the last may be torn."""
    text = file.read_text() if file.exists() else ""
    try:
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    except ValueError as error:
        raise AssertionError(f"a line of {file.name} is torn: {error}") from error


def read(file: Path) -> Any:
    """The JSON of a file."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise AssertionError(f"{file.name} is torn: {error}") from error


def log_lines(home: Path) -> int:
    """How many lines the log's files have that are whole; a torn one is the last of a process that was killed."""
    texts = [line for file in home.glob("requests.jsonl*") for line in file.read_text().splitlines()]
    whole = [text for text in texts if text.startswith("{") and text.endswith("}")]
    for text in whole:
        read_line(text)
    assert len(texts) - len(whole) <= 1, f"torn: {[text for text in texts if text not in whole]}"
    return len(whole)


def read_line(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise AssertionError(f"two lines became one: {text[:80]}") from error


def same_model(model: Path, wanted: Path) -> None:
    """A model's folder holds what another does, but for what tells when it was made."""
    if not model.exists():
        return
    assert names(model) == names(wanted), "files are missing"
    for file in model.iterdir():
        if file.suffix == ".json":
            read(file)
        elif file.name != "README.md":
            assert file.read_bytes() == (wanted / file.name).read_bytes(), f"{file.name} is torn"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def verdicts(home: Path) -> list[tuple[object, ...]]:
    """What the newest run decided, and each of its verdicts."""
    newest = max((home / "results" / "runs").iterdir())
    decision = read(newest / "decision.json")
    rules = [
        (each["name"], each["outcome"], sorted((rule["rule"], rule["outcome"]) for rule in each["verdicts"]))
        for each in decision["variants"]
    ]
    return [(decision["outcome"], store.is_finished(newest)), *rules]


# ---- the jobs ----------------------------------------------------------------------------------

CLI = "peftopt.cli"


@dataclass(frozen=True)
class Place:
    """Where jobs are begun: a tiny base and its adapter, a `folder` for the rest, and the `url` of a server to load."""

    base: Path
    lora: Path
    folder: Path
    url: str

    def begun(self, name: str) -> Path:
        """A folder that a job starts from."""
        (self.folder / name / "tmp").mkdir(parents=True)
        return self.folder / name

    def questions(self) -> str:
        """A file of prompts."""
        return str(prompts(self.folder / "eval.jsonl", 8, "eval"))


def job(name: str, place: Place) -> Job:
    """A job by its name."""
    return MAKERS[name](place)


def _part(name: str, check: Callable[[Path], object], result: Callable[[Path], object]) -> Callable[[Place], Job]:
    return lambda place: Job(name, ("helpers.swept", name, HOME), place.begun(name), check, result)


def _registry(place: Place) -> Job:
    def routes(home: Path) -> object:
        return read(home / "state" / "registry.json")["routes"]

    found = _part("registry", whole_registry, routes)(place)
    adapter(found.begin / "one", 1.0)
    adapter(found.begin / "two", 2.0)
    return found


def _decide(place: Place, name: str = "decide") -> Job:
    begin = place.begun(name)
    run = finished_run(begin / "results", place.base, place.lora, built=False)
    (run / "machine.json").write_text("{}")
    run = run.relative_to(begin)

    def reports(home: Path) -> object:
        return {file: identity.of_file(home / run / file) for file in REPORTS}

    return Job(name, (CLI, name, f"{HOME}/{run}"), begin, whole_run, reports)


def _report(place: Place) -> Job:
    found = _decide(place, "report")
    _once(replace(found, words=(CLI, "decide", found.words[2])), found.begin)
    return found


def _load(place: Place) -> Job:
    words = (CLI, "load", place.url, "--prompts", place.questions(), "--requests", "4", "--rate", "200", "--quiet")
    words = (*words, "--model", "support", "--new-tokens", "2", "--out", f"{HOME}/measurements.jsonl")

    def last(home: Path) -> object:
        return whole_lines(home / "measurements.jsonl")[-1]["probe"]

    return Job("load", words, place.begun("load"), lambda home: whole_lines(home / "measurements.jsonl"), last)


def _model(name: str, *words: str) -> Callable[[Place], Job]:
    def make(place: Place) -> Job:
        wanted = place.folder / f"{name}-wanted"
        known = {"{base}": str(place.base), "{lora}": str(place.lora)}
        found = Job(
            name,
            (CLI, name, *(known.get(word, word) for word in words), "--out", f"{HOME}/out"),
            place.begun(name),
            lambda home: same_model(home / "out", wanted / "out"),
            lambda home: names(home / "out"),
            again=frozenset({BAD_INPUT}),  # its folder is there already
        )
        wanted.mkdir()
        _once(found, wanted)
        return found

    return make


def _compile(place: Place) -> Job:
    begin = place.begun("compile")
    shutil.copytree(place.base, begin / "base")
    words = (CLI, "compile", "--model", f"{HOME}/base", "--new-tokens", "2", "--threads", "1")
    words = (*words, "--set", "prompt_buckets=40", "--set", "cache_len=64")
    return Job("compile", words, begin, lambda home: None, lambda home: (home / "base.compiled").is_dir())


def _run(place: Place) -> Job:
    recipe = place.folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(base=place.base, adapter=place.lora, prompts=place.questions()))
    words = (CLI, "run", str(recipe), "--results", f"{HOME}/results", "--quiet", "--no-forecast")
    return Job("run", words, place.begun("run"), whole_run, verdicts, frozenset({ACCEPTED, REJECTED, INCONCLUSIVE}))


def _sweep(place: Place) -> Job:
    """The page of a sweep whose only cell waits."""
    recipe = place.folder / "swept.yaml"
    recipe.write_text(RECIPE.format(base=place.base, adapter=place.lora, prompts=place.questions()))
    grid = place.folder / "grid.yaml"
    grid.write_text(f"recipe: swept.yaml\nmodels: {{m: {{base: {place.base}, adapters: {{a: {place.lora}}}}}}}\n")
    page = "results/sweeps/grid/report.html"

    def whole(home: Path) -> None:
        text = (home / page).read_bytes() if (home / page).exists() else b""
        assert not text or text.rstrip().endswith(b"</html>"), "the page is torn"

    words = (CLI, "sweep", "report", str(grid), "--results", f"{HOME}/results")
    return Job("sweep", words, place.begun("sweep"), whole, lambda home: identity.of_file(home / page))


def _once(job: Job, home: Path) -> None:
    ended = attempt(job, home)
    assert ended.code in job.codes, ended.said


MAKERS: dict[str, Callable[[Place], Job]] = {
    "artifact": _part("artifact", whole_artifacts, lambda home: names(home / "results" / "artifacts" / "aa")),
    "registry": _registry,
    "log": _part("log", log_lines, lambda home: log_lines(home) > 0),
    "decide": _decide,
    "report": _report,
    "sweep": _sweep,
    "load": _load,
    "merge": _model("merge", "--base", "{base}", "--adapter", "{lora}", "--certify", "blocks"),
    "quantize": _model("quantize", "--model", "{base}", "--method", "int8"),
    "compile": _compile,
    "run": _run,
}
"""The jobs, the quickest first."""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
