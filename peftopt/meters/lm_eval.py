"""lm-evaluation-harness: results_*.json (scores of tasks), or samples_*.jsonl (each answer, with --log_samples).

Source: lm_eval/evaluator.py and lm_eval/loggers/evaluation_tracker.py of lm-evaluation-harness 0.4.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftopt import stats
from peftopt.meters import RAW, Found
from peftopt.records import Json

NAME, VERSIONS = "lm-evaluation-harness", "0.4.x"


def recognises(data: Json) -> bool:
    if isinstance(data, Mapping):
        return isinstance(data.get("results"), Mapping) and ("n-samples" in data or "lm_eval_version" in data)
    return bool(data) and all(isinstance(r, Mapping) and r.keys() >= {"doc_id", "resps", "metrics"} for r in data)


def read(data: Json) -> list[Found]:
    return _results(data) if isinstance(data, Mapping) else _samples(data)


def _results(data: Mapping[str, Json]) -> list[Found]:
    version = str(data.get("lm_eval_version", "0.4"))
    if not version.startswith("0.4"):
        raise ValueError(f"lm-evaluation-harness {version}, not 0.4")
    found = []
    for task, scores in data["results"].items():
        n = ((data.get("n-samples") or {}).get(task) or {}).get("effective")
        for key, value in scores.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = scores.get(f"{metric}_stderr,{filter_}")
            stderr = stderr if isinstance(stderr, int | float) else None
            values = {"task": task, "metric": metric, "filter": filter_, "value": value, "stderr": stderr, "n": n}
            lacks = (f"{RAW}; its standard error does not pair two variants (give samples_*.jsonl, --log_samples)",)
            found.append(Found(f"{task} {metric}", f"{NAME} {version}", lacks, probe="task", values=values))
    return found


def _samples(rows: list[Mapping[str, Json]]) -> list[Found]:
    found = []
    names = dict.fromkeys((row.get("filter", "none"), metric) for row in rows for metric in row["metrics"])
    for filter_, metric in names:
        own = [row for row in rows if row.get("filter", "none") == filter_ and isinstance(row.get(metric), int | float)]
        if not own:
            continue
        samples = [{"id": str(row.get("doc_hash") or row["doc_id"]), "value": row[metric]} for row in own]
        mean = stats.mean([s["value"] for s in samples])
        values = {"metric": metric, "filter": filter_, "value": mean.estimate, "n": mean.n, "samples": samples}
        found.append(Found(f"{metric} ({filter_})", f"{NAME} 0.4", (), probe="task", values=values))
    return found
