"""A run's folder as data: the decision, and every measurement as a pandas DataFrame.

docs/data.md says what the columns of each table are. They are the same for every run, in types and in order, whatever
it measured.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import stats, store
from peftopt.api.columns import tables
from peftopt.decision.evidence import Evidence
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.measurements import Answer, Launch, Load, Measured, Turn, as_json
from peftopt.records import Decision, Json, Plan
from peftopt.report.as_json import decision_from_json

if TYPE_CHECKING:
    from pandas import DataFrame

TABLES = tuple(tables())
"""The tables of a run, each a method of `Run`."""


@dataclass(frozen=True)
class Run:
    """A run's folder, opened by `open_run`. Files are read when they are first asked for."""

    folder: Path

    @cached_property
    def plan(self) -> Plan:
        """The recipe as it was planned."""
        return store.read_plan(self.folder / "plan.json")

    @cached_property
    def decision(self) -> Decision:
        """The decision with its verdicts. Raises BadInput for a run that has not decided yet."""
        file = self.folder / "decision.json"
        if not file.exists():
            raise BadInput(f"{self.folder} has no decision yet", "run its recipe again to go on, or: peftopt decide")
        return decision_from_json(store.read_text(file))

    @cached_property
    def machine(self) -> Mapping[str, Json]:
        """What the machine was that measured, as `peftopt doctor --json` says it."""
        return store.read_object(self.folder / "machine.json")

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the variants, in the recipe's order."""
        return tuple(self.plan.recipe.variants)

    @cached_property
    def records(self) -> tuple[Measured, ...]:
        """Every measurement, in the order in which they were made."""
        return tuple(store.read(self.folder / "measurements.jsonl"))

    def table(self, name: str) -> DataFrame:
        """One of `TABLES`. Raises BadInput for another name."""
        if name not in TABLES:
            raise BadInput(f"a run has no table {name!r}", f"known: {', '.join(TABLES)}")
        frame: DataFrame = getattr(self, name)()
        return frame

    def requests(self) -> DataFrame:
        """A row for each request: its variant, workload and block, its times and tokens."""
        rows: list[dict[str, Json]] = []
        for each in self.records:
            match each.values:
                case Turn() as turn:
                    whose = {**_whose(each), "block": turn.block, "order": turn.order, "source": "race"}
                    rows += [{**whose, **_flat(request)} for request in turn.requests]
                case Load() as load:
                    whose = {**_whose(each), "block": None, "order": None, "source": load.source}
                    rows += [{**whose, **_flat(request)} for request in load.requests]
        return _frame("requests", rows)

    def blocks(self) -> DataFrame:
        """A row for each turn of a variant in a block: medians of its timed requests, what else went on in the machine,
        and what the server said (`engine_…`)."""
        evidence = Evidence(self.plan, list(self.records))
        disturbed = {name: evidence.disturbed(name) for name in self.plan.recipe.workloads}
        launches: Counter[tuple[str, str]] = Counter()
        rows = []
        for each in self.records:
            if isinstance(each.values, Launch):
                launches[each.variant, each.workload] += 1
            if not isinstance(each.values, Turn):
                continue
            turn = each.values
            timed = [r for r in turn.requests if not r.warmup and r.request_duration_ms is not None]
            latencies = [r.request_duration_ms for r in timed if r.request_duration_ms is not None]
            total_s = sum(latencies) / 1e3
            rows.append(
                {
                    **_whose(each),
                    "block": turn.block,
                    "order": turn.order,
                    "launch": launches[each.variant, each.workload],
                    "requests": len(timed),
                    "latency_ms": stats.median(latencies) if latencies else None,
                    "ttft_ms": _median(r.ttft_ms for r in timed),
                    "tpot_ms": _median(r.tpot_ms for r in timed),
                    "throughput": sum(r.new_tokens for r in timed) / total_s if total_s else None,
                    "disturbed": "; ".join(disturbed.get(each.workload, {}).get(turn.block, ())),
                    **_flat(turn.machine),
                    **{f"engine_{name}": value for name, value in _flat(turn.engine).items()},
                }
            )
        return _frame("blocks", rows)

    def answers(self) -> DataFrame:
        """A row for each answer that was checked."""
        answers = [each for each in self.records if isinstance(each.values, Answer)]
        return _frame(
            "answers",
            ({"variant": each.variant, "second_run": each.launch == 2, **_flat(each.values)} for each in answers),
        )

    def figures(self) -> DataFrame:
        """A row for each metric of each variant, with its interval."""
        rows = [
            {"variant": variant.name, "outcome": variant.outcome, "metric": name, **_flat(interval)}
            for variant in self.decision.variants
            for name, interval in variant.figures.items()
        ]
        return _frame("figures", rows)

    def verdicts(self) -> DataFrame:
        """A row for each rule that judged a variant, with what it judged as `value_…`."""
        return _frame(
            "verdicts",
            (
                {"variant": variant.name, **_flat(verdict)}
                for variant in self.decision.variants
                for verdict in variant.verdicts
            ),
        )

    def measurements(self) -> DataFrame:
        """A row for each measurement, its values as a mapping."""
        return _frame(
            "measurements",
            (
                {"probe": each.probe, **_whose(each), "launch": each.launch, "values": as_json(each.values)}
                for each in self.records
            ),
        )


def open_run(folder: str | Path) -> Run:
    """Open a run's folder (results/runs/…) as data. Raises BadInput for a folder that is not a run."""
    run = Run(Path(folder))
    _ = run.plan
    return run


def export(run: Run, table: str, file: Path) -> int:
    """Write a table as Parquet or CSV, by the file's ending; how many rows. Raises BadInput for another ending,
    MissingEnvironment without pyarrow."""
    frame = run.table(table)
    ending = file.suffix.lower()
    if ending not in (".parquet", ".csv"):
        raise BadInput(f"{file} is neither Parquet nor CSV", "name a file that ends in .parquet or .csv")
    if "values" in frame:  # of each probe its own fields, which no column has in common
        frame["values"] = frame["values"].map(json.dumps)
    _write(frame, file, ending)
    return len(frame)


def write(rows: Sequence[Mapping[str, Json]], columns: Sequence[str], file: Path, ending: str) -> None:
    """Write rows with these columns as Parquet or CSV (`ending`). Raises MissingEnvironment without pandas or pyarrow,
    BadInput where the file cannot be written."""
    _write(_pandas().DataFrame(list(rows), columns=list(columns)), file, ending)


def _write(frame: DataFrame, file: Path, ending: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        if ending == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)
    except ImportError as error:
        raise MissingEnvironment("Parquet needs pyarrow", "pip install 'peftopt[data]', or write .csv") from error
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror}", "choose another place") from error
    else:
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _whose(each: Measured) -> dict[str, Json]:
    return {"variant": each.variant, "workload": each.workload}


def _flat(record: Any) -> dict[str, Json]:
    """A record's fields; those of a record inside it are `outer_inner`. Sequences stay, as lists."""
    values: dict[str, Json] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if is_dataclass(value):
            values |= {f"{each.name}_{name}": inner for name, inner in _flat(value).items()}
        elif isinstance(value, tuple | list):
            values[each.name] = list(value)
        elif not isinstance(value, Mapping):
            values[each.name] = value
    return values


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return stats.median(known) if known else None


def _frame(table: str, rows: Iterable[Mapping[str, Json]]) -> DataFrame:
    """The rows with the table's own columns, in their types: those that no row has are empty."""
    columns = tables()[table].columns
    frame = _pandas().DataFrame(list(rows), columns=[column.name for column in columns])
    return frame.astype({column.name: column.dtype for column in columns})


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingEnvironment("a run's data are pandas DataFrames", "pip install 'peftopt[data]'") from error
    return pandas
