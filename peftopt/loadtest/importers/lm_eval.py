"""lm-evaluation-harness: results_*.json (scores of tasks), or samples_TASK_*.jsonl (each answer, with --log_samples).

Only the file's name tells whose samples they are.
Source: lm_eval/evaluator.py and lm_eval/loggers/evaluation_tracker.py of lm-evaluation-harness 0.4.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from peftopt import stats
from peftopt.errors import BadInput
from peftopt.loadtest.importers import RAW, About, Found
from peftopt.records import Json

NAME, VERSIONS = "lm-evaluation-harness", "0.4.x"

FILE = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl")
"""What the harness calls a task's samples: the task's name and when it was asked."""


def recognises(data: Json) -> bool:
    """Whether it holds `results` (a mapping), or the samples of a task (a list)."""
    if isinstance(data, Mapping):
        return isinstance(data.get("results"), Mapping) and ("n-samples" in data or "lm_eval_version" in data)
    return bool(data) and all(isinstance(r, Mapping) and r.keys() >= {"doc_id", "resps"} for r in data)


def read(data: Json, about: About) -> list[Found]:
    """A Found for each metric of each task. Raises ValueError for another version, or samples without a number."""
    return _results(data) if isinstance(data, Mapping) else _samples(data, about)


def _results(data: Mapping[str, Json]) -> list[Found]:
    version = str(data.get("lm_eval_version", "0.4"))
    if not version.startswith("0.4"):
        raise ValueError(f"lm-evaluation-harness {version}, not 0.4")
    results = []
    for task, scores in data["results"].items():
        n = ((data.get("n-samples") or {}).get(task) or {}).get("effective")
        for key, value in scores.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = scores.get(f"{metric}_stderr,{filter_}")
            stderr = stderr if _is_number(stderr) else None
            number = value if _is_number(value) else None
            values = {"task": task, "metric": metric, "filter": filter_, "value": number, "stderr": stderr, "n": n}
            lacks = [f"{RAW}; its standard error does not pair two variants (give samples_*.jsonl, --log_samples)"]
            if number is None:
                lacks.append(f"a number: its {metric} is {value}")
            results.append(Found(f"{task} {metric}", f"{NAME} {version}", tuple(lacks), probe="task", values=values))
    return results


def _samples(rows: list[Mapping[str, Json]], about: About) -> list[Found]:
    """The scores that decide, as `peftopt run` takes them of a task, and then what else was scored. A task of several
    (a group) has a file for each: given as one `task`, their rows are that task's."""
    rows = _as_since_046(rows)
    told = FILE.fullmatch(about.name)
    subtask = told[1] if told else about.task
    task = about.task or subtask
    try:
        decides = scores({subtask: rows})
    except BadInput as error:
        raise ValueError(error.message) from error
    lacks = [] if task else ["the task's name, so no recipe can require it: give --task NAME"]
    if n := decides.get("set_aside"):
        lacks.append(f"a number for {n} of {n + decides['n']} samples: they are set aside, whatever was answered")
    named = {"task": task} if task else {}
    values = {**named, "filter": rows[0].get("filter", "none"), **decides}
    results = [Found(f"{task} {decides['metric']}".strip(), f"{NAME} 0.4", tuple(lacks), probe="task", values=values)]
    names = dict.fromkeys((row.get("filter", "none"), metric) for row in rows for metric in row["metrics"])
    for filter_, metric in names:
        own = [row[metric] for row in rows if row.get("filter", "none") == filter_ and _is_number(row.get(metric))]
        if own and (filter_, metric) != (values["filter"], decides["metric"]):
            mean = stats.mean(own)
            values_ = {**named, "metric": metric, "filter": filter_, "value": mean.estimate, "n": mean.n}
            results.append(Found(f"{task} {metric} ({filter_})", f"{NAME} 0.4", (), probe="task", values=values_))
    return results


def scores(samples: Mapping[str, Sequence[Mapping[str, Json]]]) -> dict[str, Json]:
    """What each row got, from the harness's log of (sub)task -> samples: of its first metric and first filter.

    A row's id holds the name of its subtask. A row whose metric is not a finite number is set
    aside; `set_aside` counts them. Raises BadInput where no metric is a number per row.
    """
    by_row: dict[str, float] = {}
    named, aside = "", 0
    for subtask, rows in samples.items():
        first = rows[0].get("filter", "none") if rows else "none"
        rows = [row for row in rows if row.get("filter", "none") == first]
        metrics = dict.fromkeys(m for row in rows for m in row.get("metrics", ()))
        metric = next((m for m in metrics if any(_is_number(row.get(m)) for row in rows)), "")
        named = named or metric
        numbers = {f"{subtask}/{row['doc_id']}": float(row[metric]) for row in rows if _is_number(row.get(metric))}
        aside += len(rows) - len(numbers) if metric else 0
        by_row |= numbers
    if not by_row:
        raise BadInput("none of the task's metrics is a number for each row", "choose a task with acc or exact_match")
    mean = sum(by_row.values()) / len(by_row)
    rows_found = [{"id": id_, "value": value} for id_, value in by_row.items()]
    left = {"set_aside": aside} if aside else {}
    return {"metric": named, "value": mean, "n": len(by_row), **left, "samples": rows_found}


_OWN = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
_OWN |= {"doc_hash", "prompt_hash", "target_hash"}
"""What a sample holds beside its metrics."""


def _as_since_046(rows: Sequence[Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    """Samples of 0.4.0 to 0.4.5 name neither their filter nor their metrics: a row's other numbers are its metrics, and
    a row that comes again has gone through the next filter."""
    rows_of: Counter[str] = Counter()
    whole: list[Mapping[str, Json]] = []
    for row in rows:
        if "metrics" not in row:
            rows_of[str(row["doc_id"])] += 1
            number = rows_of[str(row["doc_id"])]
            own = {"filter": "none" if number == 1 else f"filter {number}"} if "filter" not in row else {}
            row = {**row, **own, "metrics": [key for key in row if key not in _OWN]}
        whole.append(row)
    return whole


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
