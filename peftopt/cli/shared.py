"""What the verbs share: the app, common options, and how results are printed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from peftopt.errors import EXIT, BadInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from peftopt.jobs import Transformed, TransformJob
    from peftopt.records import Model, Plugin, Recipe
    from peftopt.report.words import Section

Record = TypeVar("Record", bound="DataclassInstance")

app = typer.Typer(
    help="Make a PEFT model fast in production: merge, quantize, compile, benchmark, decide.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 accepted or done, 1 rejected, 2 bad input, 3 inconclusive, 4 environment, 5 bug, "
    "130 interrupted.",
)


Results = Annotated[Path, typer.Option(help="Folder of artifacts and runs.")]
Artifacts = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="A folder or a bucket (s3://BUCKET/PREFIX, gs://…) where machines share artifacts: what is there is not "
        "built again, and what is built here is put there.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable output on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
NoForecast = Annotated[
    bool,
    typer.Option(
        "--no-forecast", help="Skip the timing of the first layers, which shows which variants will be slower."
    ),
]
BaseFolder = Annotated[Path, typer.Option("--base", help="Folder of the base model (safetensors).")]
ModelFolder = Annotated[Path, typer.Option("--model", help="Folder of a model (safetensors).")]
Out = Annotated[Path, typer.Option("--out", help="New folder to write; it appears whole or not at all.")]
RunFolder = Annotated[Path | None, typer.Argument(help="A folder below results/runs; the newest by default.")]


def options_from(record: type[Record]) -> Callable[[Callable[[Record], None]], Callable[..., None]]:
    """Make a verb from a function that takes its options as one frozen dataclass. Each field is an option."""

    def decorate(function: Callable[[Record], None]) -> Callable[..., None]:
        def verb(**values: Any) -> None:
            function(record(**values))

        # typer reads the options from the signature
        hints = typing.get_type_hints(record, include_extras=True)
        verb.__name__ = function.__name__
        verb.__doc__ = function.__doc__
        verb.__annotations__ = hints
        verb.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # an attribute that typeshed lacks
            [
                inspect.Parameter(
                    option.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=_default(option),
                    annotation=hints[option.name],
                )
                for option in dataclasses.fields(record)
            ]
        )
        return verb

    return decorate


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def find_run(given: Path | None, results: Path, recipe: str = "") -> Path:
    """The given run, or the newest run, or the newest run of the named recipe. Raises BadInput without a run."""
    if given is not None:
        return given
    pattern = f"*-{recipe}-*" if recipe else "*"
    runs = sorted(f for f in (results / "runs").glob(pattern) if (f / "plan.json").exists())
    if not runs:
        what = f" of {recipe}" if recipe else ""
        raise BadInput(f"no runs{what} in {results / 'runs'}", "run a recipe first: peftopt run RECIPE")
    return runs[-1]


def conclude(folder: Path, console: Any, as_json: bool, recipe: Recipe | None = None) -> None:
    """Judge a run's folder (`judged.judge`), print the table, exit with the outcome."""
    from peftopt import report, store
    from peftopt.cli.console import print_json
    from peftopt.runner import judged

    decision = judged.judge(folder, console.warn, recipe, beside(folder))
    if as_json:
        print_json(json.loads(store.read_text(folder / "decision.json")))
    else:
        header, rows = report.table.rows(decision, compact=True)
        console.table(header, rows, [v.outcome for v in decision.variants])
        for warning in decision.warnings:
            console.warn(warning)
        console.say(report.headline.headline(decision), "bold")
        console.say(decision.sentence)
        console.say(f"report: {folder / 'report.html'}")
    raise typer.Exit(EXIT[decision.outcome])


def beside(folder: Path) -> list[Section]:
    """Further sections for a run's reports: its diagnosis and its plan, where `diagnose --run` wrote them."""
    from peftopt.diagnose import keeping, page
    from peftopt.diagnose.planning import planning

    diagnosed = [page.section(keeping.read(folder))] if (folder / keeping.DIAGNOSIS).exists() else []
    planned = planning.section(folder)
    return [*diagnosed, *([planned] if planned else [])]


def transform(job: TransformJob, as_json: bool) -> None:
    """Write the transformed model by `single.transform`. Print the time, the size and the checks."""
    from peftopt import measurements, store
    from peftopt.cli.console import Console
    from peftopt.metrics import format_value
    from peftopt.runner import single

    console = Console()
    transformed = single.transform(job, console.progress, console.tell)
    size = store.size(Path(job.out))
    peak = transformed.peak_memory_bytes
    kept = [folder for folder in transformed.model.adapters if folder != str(Path(job.out))]
    lines = {
        "time": f"{transformed.seconds:.1f} s",
        "size": format_value("size", size),
        **({} if peak is None else {"peak memory": format_value("memory", peak)}),
        **certified(transformed),
        **_provenance(transformed),
        **({"adapter": f"{job.model.adapters[0]}, kept apart"} if kept else {}),
    }
    values = {**measurements.as_json(transformed), "path": job.out, "size_bytes": size}
    print_lines(f"wrote {job.out}", lines, values, as_json)


def certified(transformed: Transformed) -> dict[str, str]:
    """The line on the checks of a new model: the certificate of a merge, else that all weights are finite."""
    if transformed.certificate is None:
        return {"weights": "all finite"}
    from peftopt.merging import certificate

    return {"certificate": certificate.summary(transformed.certificate)}


def _provenance(transformed: Transformed) -> dict[str, str]:
    """Lines on a quantizer's run: its calibration texts, its choices, and that its output works."""
    provenance = transformed.quantization or {}
    lines = {}
    calibration = provenance.get("calibration")
    if calibration:
        texts = f"{calibration['tokens']} tokens of {calibration['rows']} rows"
        lines["calibration"] = f"{texts} ({calibration['source']})"
    notices = provenance.get("notices")
    if notices:
        lines["notice"] = "; ".join(notices)
    if "verified" in provenance:
        lines["verified"] = provenance["verified"]
    return lines


def weighted(text: str, option: str) -> tuple[str, float]:
    """The name and the weight in `NAME` or `NAME=0.7`. The name of an existing folder may contain an equals sign.
    Raises BadInput, which names the `option`, for a weight that is not a number."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError as error:
        raise BadInput(f"{option} {text}: the weight {weight!r} is not a number", f"write {folder}=0.7") from error


def params_of(plugin: Plugin, options: dict[str, str], settings: Sequence[str]) -> dict[str, Any]:
    """A plug-in's parameters from its options and from `name=value`. Raises BadInput for unknown parameters."""
    from peftopt.recipe.reader import nearest
    from peftopt.records import Folder

    hints = typing.get_type_hints(plugin.params)
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or name in options:
            raise BadInput(f"--set {text}: write NAME=VALUE, each name once", f"names: {', '.join(hints)}")
        options = {**options, name: value}
    truth = {"true": True, "false": False}
    read: dict[object, Any] = {int: int, float: float, str: str, bool: truth.__getitem__, Folder: os.path.abspath}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in hints:
            raise BadInput(f"{plugin.name} has no parameter {name}", nearest(name, hints))
        try:
            values[name] = read[hints[name]](text)
        except (ValueError, KeyError) as error:
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}[hints[name]]
            raise BadInput(
                f"{name}: {text!r} is not {wanted}", f"its default is {plugin.params().__dict__[name]}"
            ) from error
    try:
        plugin.params(**values)
    except ValueError as error:
        raise BadInput(f"{plugin.name}: {error}") from error
    return values


def model_of(base: Path, adapter: Path | None) -> Model:
    """The base model, with the adapter on top if one is given."""
    from peftopt.records import Model

    return Model(str(base), (str(adapter),) if adapter else ())


def print_lines(title: str, lines: dict[str, str], result: Any, as_json: bool) -> None:
    """Print a result as JSON, or a title with its named `lines`."""
    from peftopt.cli.console import Console, print_json

    if as_json:
        print_json(result)
    else:
        Console().pairs(title, lines)


def named(text: str) -> tuple[str, Path]:
    """The name and the folder in NAME=FOLDER. A folder without a name is called by its own name."""
    name, equals, folder = text.rpartition("=")
    path = Path(folder if equals else text)
    return name or path.resolve().name, path


LENGTHS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
"""Units of a length of time, in seconds."""


def seconds(text: str) -> float:
    """A length of time such as 30s, 10m or 2h in seconds; 0 needs no unit. Raises BadInput for anything else."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ms|s|m|h|d)", text)
    if match:
        return float(match[1]) * LENGTHS[match[2]]
    if text == "0":
        return 0.0
    raise BadInput(f"{text!r} is not a length of time", "write 30s, 30m or 2h")
