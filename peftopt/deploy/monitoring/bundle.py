"""All files of a promise, for one source of metrics. Pure."""

from __future__ import annotations

from peftopt.deploy.deployed import Exported, File
from peftopt.deploy.monitoring import cases, gateway, limits, release, vllm
from peftopt.deploy.monitoring.burn import burns
from peftopt.deploy.monitoring.dashboard import dashboard
from peftopt.deploy.monitoring.sources import SOURCES, Metrics, Source
from peftopt.deploy.monitoring.texts import as_yaml
from peftopt.records import JsonValue
from peftopt.watch.promise import Bound, Promise

CHECK = "promtool check rules recording.yaml alerts.yaml; promtool test rules alerts_test.yaml month_test.yaml"
USE = f"{CHECK}; name recording.yaml and alerts.yaml in rule_files of Prometheus; import dashboard.json in Grafana"


def exported(promise: Promise, metrics: Metrics) -> Exported:
    """Rules and their tests, a dashboard, an OpenSLO file, an analysis, an example of Prometheus' configuration.
    `metrics`: of the gateway, or of a vLLM that has none before it."""
    source = SOURCES[metrics]
    notes = _notes(promise, source)
    told = gateway if metrics == "gateway" else vllm
    alerts = [*limits.alerts(promise, source), *told.alerts()]
    by = f"By: peftopt export monitoring, for the run {promise.run}, variant {promise.variant}; metrics of {metrics}"
    records: JsonValue = {"groups": [{"name": "peftopt-limits", "rules": limits.recording(promise, source)}]}
    rules: JsonValue = {"groups": [{"name": "peftopt-alerts", "rules": [alert.rule(promise) for alert in alerts]}]}
    head = (
        by,
        f"Check: {CHECK}",
        *notes,
    )
    files = [
        File("recording.yaml", as_yaml(head, records)),
        File("alerts.yaml", as_yaml(head, rules)),
        File("alerts_test.yaml", as_yaml((by,), cases.cases(promise, source, alerts, told.healthy))),
        File("month_test.yaml", as_yaml((by,), cases.months(promise, source, told.healthy))),
        File("dashboard.json", dashboard(promise, source)),
        File("analysis-template.yaml", release.analysis_template(promise, source, by)),
        File("prometheus.yml", release.prometheus(source, by)),
    ]
    if limits.watched(promise, source):
        files.append(File("slo.yaml", release.open_slo(promise, source, by)))
    return Exported(tuple(files), USE, tuple(notes))


def _notes(promise: Promise, source: Source) -> list[str]:
    """What a reader of the rules should know."""
    notes = list(vllm.NOT_TOLD) if source.name == "vllm" else []
    for bound in promise.sla:
        notes += _of_bound(bound, source)
    if not promise.sla:
        notes.append("the run has no limit on a time, so no alert on one and no slo.yaml is written")
    return notes + [f"not watched: {what}" for what in promise.unwatched]


def _of_bound(bound: Bound, source: Source) -> list[str]:
    end = source.end(bound)
    if end is None:
        return [f"{bound.name}: no bucket of {source.times[bound.time]} ends so high, so nothing watches it"]
    if not burns(bound.share):
        return [f"{bound.name}: every request may miss it, so nothing watches it"]
    notes = []
    if end != bound.bound_s:
        notes.append(
            f"{bound.name}: counted at {end:g} s, the next bound of a bucket, so misses up to there are not counted"
        )
    slowest = burns(bound.share)[-1]
    if slowest.pace.hours >= 24:
        notes.append(
            f"{bound.name}: small excesses page only where a model has {slowest.requests:,} requests a day or more; "
            "peftopt watch judges fewer"
        )
    return notes
