"""The jobs that tests/helpers/sweeps.py runs: verbs on tiny models, and parts of the gateway that write files.

`python -m helpers.swept PART HOME` is a part of the gateway or of the store.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.command_line import prompts
from peftopt import identity, store
from peftopt.errors import PeftoptError
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
    print("lost", lines.lost)


PARTS: dict[str, Callable[[Path], None]] = {"artifact": artifact, "registry": registry, "log": log}


def main(part: str, home: str) -> int:
    """The exit code of a part, as the command line would have it."""
    try:
        PARTS[part](Path(home))
    except PeftoptError as error:
        print(f"error: {error.message}\nhint: {error.hint}")
        return error.exit_code
    except OSError as error:
        from peftopt.errors import unusable

        print(f"error: {unusable(error).message}\nhint: {unusable(error).hint}")
        return unusable(error).exit_code
    return 0


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
    rules = [(v["name"], v["outcome"], sorted((r["rule"], r["outcome"]) for r in v["verdicts"])) for v in variants(decision)]
    return [(decision["outcome"], store.is_finished(newest)), *rules]


def variants(decision: Any) -> list[Any]:
    return list(decision["variants"])


# ---- the jobs ----------------------------------------------------------------------------------


def jobs(base: Path, lora: Path, folder: Path, url: str = "") -> dict[str, Any]:
    """All jobs by name, begun in `folder`; `url` of a server to load."""
    from helpers.finished_runs import finished_run
    from helpers.inside import adapter
    from helpers.sweeps import HOME, Job

    def begun(name: str) -> Path:
        (folder / name / "tmp").mkdir(parents=True)
        return folder / name

    def part(name: str, check: Callable[[Path], None], result: Callable[[Path], object]) -> Job:
        return Job(name, ("helpers.swept", name, HOME), begun(name), check, result)

    folder.mkdir(exist_ok=True)
    cli = "peftopt.cli"
    model = ("--base", str(base), "--adapter", str(lora), "--out", f"{HOME}/out", "--certify", "blocks")
    questions = prompts(folder / "eval.jsonl", 8, "eval")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(base=base, adapter=lora, prompts=questions))
    found = {}

    decided = begun("decide")
    run = finished_run(decided / "results", base, lora, built=False)
    (run / "machine.json").write_text("{}")
    where = f"{HOME}/{run.relative_to(decided)}"

    def reports(home: Path) -> dict[str, str]:
        return {name: identity.of_file(home / run.relative_to(decided) / name) for name in REPORTS}

    found["decide"] = Job("decide", (cli, "decide", where), decided, whole_run, reports)
    shutil.copytree(decided, folder / "report")
    from helpers.sweeps import attempt

    assert attempt(found["decide"], folder / "report").code == 0
    found["report"] = Job("report", (cli, "report", where), folder / "report", whole_run, reports)

    found["artifact"] = part("artifact", whole_artifacts, lambda home: names(home / "results" / "artifacts" / "aa"))
    found["registry"] = part("registry", whole_registry, lambda home: read(home / "state" / "registry.json")["routes"])
    adapter(found["registry"].begin / "one", 1.0)
    adapter(found["registry"].begin / "two", 2.0)
    found["log"] = part("log", log_lines, lambda home: log_lines(home) > 0)
    if url:
        words = (cli, "load", url, "--prompts", str(questions), "--requests", "4", "--rate", "200", "--model", "support")
        words = (*words, "--new-tokens", "2", "--quiet", "--out", f"{HOME}/measurements.jsonl")
        kept = lambda home: whole_lines(home / "measurements.jsonl")[-1]["probe"]  # noqa: E731
        found["load"] = Job("load", words, begun("load"), lambda home: None, kept)

    def model_job(name: str, words: tuple[str, ...]) -> Job:
        wanted = folder / f"{name}-wanted"
        job = Job(
            name,
            words,
            begun(name),
            lambda home: same_model(home / "out", wanted / "out"),
            lambda home: names(home / "out"),
            again=frozenset({2}),
        )
        wanted.mkdir()
        ended = attempt(job, wanted)
        assert ended.code == 0, ended.said
        return job

    found["merge"] = model_job("merge", (cli, "merge", *model))
    quantized = ("--model", str(base), "--out", f"{HOME}/out", "--method", "int8")
    found["quantize"] = model_job("quantize", (cli, "quantize", *quantized))

    compiled = begun("compile")
    shutil.copytree(base, compiled / "base")
    words = (cli, "compile", "--model", f"{HOME}/base", "--new-tokens", "2", "--threads", "1")
    words = (*words, "--set", "prompt_buckets=40", "--set", "cache_len=64")
    found["compile"] = Job("compile", words, compiled, lambda home: None, lambda home: names(home))
    decides = frozenset({0, 1, 3})
    run_words = (cli, "run", str(recipe), "--results", f"{HOME}/results", "--quiet", "--no-forecast")
    found["run"] = Job("run", run_words, begun("run"), whole_run, verdicts, decides)
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
