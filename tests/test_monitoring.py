"""What operators monitor a decision by: rules that promtool tests, and expressions that a real Prometheus answers."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.gateways import Gateway, held, serving
from helpers.paced import paced
from helpers.prometheus_tools import Prometheus, needs_prometheus, needs_promtool, promtool, scraping
from helpers.waiting import wait_until
from hypothesis import assume, given
from hypothesis import strategies as st

from peftopt.deploy.deployed import Exported
from peftopt.deploy.monitoring import exported
from peftopt.deploy.monitoring.burn import burns, fewest
from peftopt.deploy.monitoring.panels import ACROSS
from peftopt.deploy.monitoring.sources import SOURCES, Metrics, le
from peftopt.gateway.metrics import Metrics as Registry
from peftopt.watch.promise import Bound, Promise

TTFT = Bound("ttft.p95@chat <= 500 ms", "ttft", 0.5, 0.05)
LATENCY = Bound("latency.p90@chat <= 1 s", "latency", 1.0, 0.1)
TPOT = Bound("tpot.p50@chat <= 25 ms", "tpot", 0.025, 0.5)
DRIFT = Bound("ttft.p95@chat when it was decided", "ttft", 0.312, 0.05)
PROMISE = Promise("2026-11-01-chat", "merged", (TTFT, LATENCY, TPOT), (DRIFT,), errors={"oom": 0.004}, rate=6.5)
ONE = Promise("chat", "merged", (TTFT,))
BOTH: tuple[Metrics, ...] = ("gateway", "vllm")


def written(folder: Path, promise: Promise, metrics: Metrics = "gateway") -> Path:
    for file in exported(promise, metrics).files:
        (folder / file.name).write_text(file.text)
    return folder


def text(of: Exported, name: str) -> str:
    return next(file.text for file in of.files if file.name == name)


def rules(of: Exported, name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text(of, name))["groups"] for rule in group["rules"]]


# ---- when a share of misses pages --------------------------------------------------------------

shares = st.floats(1e-4, 0.95)


@given(shares)
def test_the_limit_is_silent_and_twice_its_misses_page_within_a_day(allowed: float) -> None:
    found = burns(allowed)
    assert all(burn.hours(allowed) == math.inf for burn in found)
    if 2 * allowed <= 1:
        assert min(burn.hours(2 * allowed) for burn in found) < 24
    assert min(burn.hours(1.0) for burn in found) <= 1.0, "a service where every request is too slow is told in an hour"
    assert sorted((burn.threshold for burn in found), reverse=True) == [burn.threshold for burn in found]


@given(shares, st.floats(1.2, 10))
def test_so_many_requests_are_seldom_above_a_threshold_by_chance(allowed: float, times: float) -> None:
    """The exact binomial chance."""
    from scipy.stats import binom

    threshold = min(times * allowed, (1 + allowed) / 2)
    n = fewest(allowed, threshold, chance=1e-3)
    assume(n < 10**7)
    assert binom.sf(math.ceil(n * threshold) - 1, n, allowed) <= 1e-3


def test_where_no_request_may_miss_one_is_enough() -> None:
    (burn,) = burns(0.0)
    assert burn.threshold == 0 and burn.hours(0.001) == 0
    assert not burns(1.0)


# ---- buckets -----------------------------------------------------------------------------------


@given(st.one_of(st.floats(1e-6, 1e5), st.integers(1, 10**5).map(lambda ms: ms / 1e3)))
def test_a_bucket_is_named_as_the_gateway_names_it(limit: float) -> None:
    registry = Registry([limit])
    registry.ttft.labels("a", "v", "live").observe(0.1)
    told = re.findall(r'peftopt_ttft_seconds_bucket\{[^}]*le="([^"]+)"', registry.text().decode())
    assert le(limit) in told


@given(st.floats(1e-4, 3000), st.sampled_from(["ttft", "latency", "tpot"]))
def test_vllms_buckets_never_count_more_misses_than_there_are(limit: float, time: Any) -> None:
    vllm = SOURCES["vllm"]
    end = vllm.end(Bound("x", time, limit, 0.05))
    below = [bound for bound in vllm.bounds[time] if bound < limit]
    assert (end is None and len(below) == len(vllm.bounds[time])) or (end is not None and end >= limit)
    assert end is None or vllm.bounds[time][len(below)] == end, "the next one"


def test_a_limit_that_no_bucket_ends_at_is_told() -> None:
    notes = " ".join(
        exported(Promise("r", "v", (Bound("a", "ttft", 0.6, 0.05), Bound("b", "tpot", 99, 0.05))), "vllm").notes
    )
    assert "a: counted at 0.75 s" in notes and "b: no bucket" in notes
    told = exported(Promise("r", "v", (Bound("a", "ttft", 0.6, 0.05),)), "gateway")
    assert "counted at" not in " ".join(told.notes) and 'le="0.6"' in text(told, "recording.yaml")


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", BOTH)
def test_every_alert_says_what_happened_where_from_and_what_to_do(metrics: Metrics) -> None:
    for rule in rules(exported(PROMISE, metrics), "alerts.yaml"):
        notes = rule["annotations"]
        assert notes["summary"] and PROMISE.run in notes["description"] and PROMISE.variant in notes["description"]
        assert notes["runbook"].startswith(f"peftopt watch results/runs/{PROMISE.run}")
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("metrics", BOTH)
def test_a_run_without_limits_has_the_other_alerts(metrics: Metrics) -> None:
    bare = exported(Promise("r", "v"), metrics)
    assert "slo.yaml" not in {file.name for file in bare.files} and any("no limit" in note for note in bare.notes)
    names = {rule["alert"] for rule in rules(bare, "alerts.yaml")}
    assert {"PeftoptErrors", "PeftoptNoMetrics"} <= names and not {"PeftoptOverLimit", "PeftoptDemand"} & names


@pytest.mark.parametrize("metrics", BOTH)
def test_the_dashboard_can_be_imported(metrics: Metrics) -> None:
    board = json.loads(text(exported(PROMISE, metrics), "dashboard.json"))
    assert board["schemaVersion"] >= 36 and re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", board["uid"])
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"]) for p in panels]
    for i, (x, y, w, h) in enumerate(places):
        assert x >= 0 and x + w <= ACROSS
        assert not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in places[:i]), "no overlap"
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) <= {*names, "__rate_interval", "__all"}
    drawn = [target["legendFormat"] for panel in panels for target in panel.get("targets", ())]
    assert {bound.name for bound in (TTFT, LATENCY, TPOT, DRIFT)} <= set(drawn), "limits are lines"


def test_two_runs_have_two_dashboards() -> None:
    uids = {json.loads(text(exported(p, m), "dashboard.json"))["uid"] for p in (PROMISE, ONE) for m in BOTH}
    assert len(uids) == 4


@pytest.mark.parametrize("metrics", BOTH)
def test_an_objective_is_an_openslo(metrics: Metrics) -> None:
    """By the text of OpenSLO v1; no registry has a schema that follows it."""
    service, *objectives = yaml.safe_load_all(text(exported(PROMISE, metrics), "slo.yaml"))
    assert service["kind"] == "Service" and len(objectives) == 3
    for each, bound in zip(objectives, (TTFT, LATENCY, TPOT), strict=True):
        assert each["apiVersion"] == "openslo/v1" and each["kind"] == "SLO"
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", each["metadata"]["name"])
        spec = each["spec"]
        assert spec["service"] == service["metadata"]["name"] and spec["budgetingMethod"] == "Occurrences"
        ratio = spec["indicator"]["spec"]["ratioMetric"]
        assert ratio["counter"] is True and {"good", "total"} < ratio.keys()
        assert all(ratio[part]["metricSource"]["spec"]["query"] for part in ("good", "total"))
        (window,), (objective,) = spec["timeWindow"], spec["objectives"]
        assert window == {"duration": "30d", "isRolling": True}
        assert objective["target"] == pytest.approx(1 - bound.share)


@pytest.mark.parametrize("metrics", BOTH)
def test_an_analysis_has_three_outcomes(metrics: Metrics) -> None:
    """Where neither condition holds, a measurement of Argo is inconclusive."""
    spec = yaml.safe_load(text(exported(PROMISE, metrics), "analysis-template.yaml"))["spec"]
    judged = [metric for metric in spec["metrics"] if "failureCondition" in metric]
    assert len(judged) == 4
    for metric in judged:
        good, bad = (float(metric[f"{way}Condition"].split()[-1]) for way in ("success", "failure"))
        assert good <= bad and metric["inconclusiveLimit"] > metric["failureLimit"] >= 1
        query = metric["provider"]["prometheus"]["query"]
        assert set(re.findall(r"\{\{(.*?)\}\}", query)) == {"args.canary"}, "a brace before it would be a part of it"
    assert {arg["name"] for arg in spec["args"]} == {"prometheus", "canary"}


# ---- promtool ----------------------------------------------------------------------------------


@needs_promtool
@pytest.mark.parametrize("metrics", BOTH)
def test_promtool_takes_the_rules_and_they_pass_their_tests(tmp_path: Path, metrics: Metrics) -> None:
    """30 days at exactly each limit wake nobody, twice the misses page, and so do all misses."""
    written(tmp_path, replace(PROMISE, sla=(TTFT, TPOT)) if metrics == "gateway" else ONE, metrics)
    for arguments in (
        ("check", "rules", "recording.yaml", "alerts.yaml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts_test.yaml", "month_test.yaml"),
    ):
        code, said = promtool(tmp_path, *arguments)
        assert code == 0 and "FAILED" not in said, said


def only(folder: Path, about: str) -> None:
    """Of the tests of the rules, those whose name has a word; the others cost time."""
    for file in folder.glob("*_test.yaml"):
        every = yaml.safe_load(file.read_text())
        every["tests"] = [test for test in every["tests"] if about in test["name"]]
        file.write_text(yaml.safe_dump(every))


NASTY = Promise('r {{ x }} "q" \\ $1', "v # é\n- a: b", (Bound('t.p95@a"b\\ {{ $x }} <= 1 s', "ttft", 1.0, 0.05),))


@needs_promtool
@pytest.mark.parametrize("metrics", BOTH)
def test_no_name_breaks_a_rule(tmp_path: Path, metrics: Metrics) -> None:
    only(written(tmp_path, NASTY, metrics), "t.p95")
    for file in tmp_path.glob("*.y*ml"):
        assert list(yaml.safe_load_all(file.read_text()))
    code, said = promtool(tmp_path, "check", "rules", "recording.yaml", "alerts.yaml")
    assert code == 0, said
    code, said = promtool(tmp_path, "test", "rules", "alerts_test.yaml")
    assert code == 0, said


def mutants() -> Iterator[Any]:
    """A file, a piece of it, what somebody writes in its place, and what its tests are about."""
    yield pytest.param("recording.yaml", 'le="0.5"', 'le="0.25"', "ttft", id="half the limit")
    yield pytest.param("recording.yaml", 'le="0.5"', 'le="1.0"', "ttft", id="twice the limit")
    yield pytest.param("alerts.yaml", "> 0.075", "> 0.15", "ttft", id="twice the threshold")
    yield pytest.param("alerts.yaml", "> 0.075", "> 0.04", "ttft", id="a threshold below the limit")
    yield pytest.param("alerts.yaml", "> 0.525", "> 0.72", "ttft", id="the workbook's own for all requests")
    yield pytest.param("alerts.yaml", "rate1d", "rate6h", "ttft", id="a shorter window")
    yield pytest.param("alerts.yaml", "waiting|wait", "no_such", "Refused", id="a reason that is not there")
    yield pytest.param("alerts.yaml", 'kind="oom"} offset 1h', 'kind="oom"} offset 1m', "Memory", id="forgets at once")
    yield pytest.param("alerts.yaml", "peftopt_ready == 0", "peftopt_ready == 2", "NotReady", id="never not ready")


@needs_promtool
@pytest.mark.parametrize(("file", "before", "after", "about"), mutants())
def test_a_changed_rule_fails_its_tests(tmp_path: Path, file: str, before: str, after: str, about: str) -> None:
    rule = (written(tmp_path, ONE) / file).read_text()
    assert before in rule
    only(tmp_path, about)
    (tmp_path / file).write_text(rule.replace(before, after))
    code, said = promtool(tmp_path, "test", "rules", "alerts_test.yaml", "month_test.yaml")
    assert code == 1 and "FAILED" in said


# ---- a real Prometheus reads a real gateway ----------------------------------------------------

UNTOLD = "peftopt_gpu_"
"""Without a GPU, or an engine that tells its memory."""


class Users(threading.Thread):
    """They ask as long as it lasts: some are answered, some fail, some are refused, some give up."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(daemon=True)
        self.gateway, self.over = gateway, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for model in ("base", "support"):
                self.gateway.ask("x", model, stream=True, max_tokens=4, stream_options={"include_usage": True})
            self.gateway.ask("oom")
            with held(self.gateway, 1):
                pass


@pytest.fixture(scope="module")
def production(tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Gateway]]:
    folder = written(tmp_path_factory.mktemp("production"), PROMISE)
    options = ("--adapter", f"support={tiny_lora}", "--limits", "running=2,waiting=1,wait=1s")
    with paced() as engine, serving(folder, "--upstream", engine.url, *options) as gateway:
        target = gateway.url.removeprefix("http://")
        with scraping(folder, target, "recording.yaml", "alerts.yaml") as prometheus:
            users = [Users(gateway) for _ in range(4)]
            for user in users:
                user.start()
            try:
                wait_until(lambda: prometheus.query("adapter:peftopt_over_limit:ratio_rate1d"))
                wait_until(lambda: prometheus.query('ALERTS{alertname="PeftoptErrors",alertstate="firing"}'))
                wait_until(lambda: prometheus.query("rate(peftopt_refused_total[1m])"))
                wait_until(lambda: prometheus.query("rate(peftopt_cancelled_total[1m])"))
                yield prometheus, gateway
            finally:
                for user in users:
                    user.over.set()
                for user in users:
                    user.join(60)


def asked(expr: str) -> str:
    """An expression of the dashboard, with what a reader has chosen."""
    return re.sub(r"\$__rate_interval", "1m", re.sub(r"\$adapter", ".*", expr))


def of_dashboard() -> list[tuple[str, str]]:
    board = json.loads(text(exported(PROMISE, "gateway"), "dashboard.json"))
    panels = [(p["title"], target["expr"]) for p in board["panels"] for target in p.get("targets", ())]
    return panels + [("annotation", each["expr"]) for each in board["annotations"]["list"]]


@needs_prometheus
def test_every_expression_of_the_dashboard_is_answered(production: tuple[Prometheus, Gateway]) -> None:
    prometheus, _ = production
    for title, expr in of_dashboard():
        answer = prometheus.query(asked(expr))
        assert bool(answer) != (UNTOLD in expr), f"{title}: {expr}"


@needs_prometheus
def test_every_rule_is_evaluated_and_what_goes_well_is_silent(production: tuple[Prometheus, Gateway]) -> None:
    prometheus, _ = production
    wait_until(lambda: prometheus.query('ALERTS{alertname="PeftoptOutOfMemory",alertstate="firing"}'))
    groups = prometheus.get("rules")["groups"]
    every = [rule for group in groups for rule in group["rules"]]
    assert len(every) == sum(
        len(rules(exported(PROMISE, "gateway"), f"{name}.yaml")) for name in ("recording", "alerts")
    )
    assert {rule["health"] for rule in every} == {"ok"}, [rule.get("lastError") for rule in every]
    for rule in every:
        if rule["type"] == "recording":
            assert prometheus.query(rule["query"]), rule["name"]
    wrong = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}
    assert "PeftoptOutOfMemory" in wrong <= {"PeftoptOutOfMemory", "PeftoptErrors", "PeftoptDemand", "PeftoptRefused"}


@needs_prometheus
def test_a_limit_that_the_gateway_does_not_count_is_told(production: tuple[Prometheus, Gateway]) -> None:
    """The same alert with a limit that was never promised: it would be silent for ever, so another one speaks."""
    prometheus, _ = production
    other = Promise("r", "v", (Bound("ttft.p95@chat <= 333 ms", "ttft", 0.333, 0.05),))
    told = [
        rule for rule in rules(exported(other, "gateway"), "alerts.yaml") if rule["alert"] == "PeftoptLimitUnwatched"
    ]
    assert len(told) == 1 and prometheus.query(told[0]["expr"])
    mine = [rule for rule in rules(exported(PROMISE, "gateway"), "alerts.yaml") if rule["alert"] == told[0]["alert"]]
    assert len(mine) == 3 and not any(prometheus.query(rule["expr"]) for rule in mine)


@needs_prometheus
def test_argo_and_openslo_ask_what_prometheus_answers(production: tuple[Prometheus, Gateway]) -> None:
    prometheus, _ = production
    of = exported(PROMISE, "gateway")
    (version,) = {each["metric"]["version"] for each in prometheus.query("peftopt_adapter_info")}
    for metric in yaml.safe_load(text(of, "analysis-template.yaml"))["spec"]["metrics"]:
        query = metric["provider"]["prometheus"]["query"].replace("{{args.canary}}", f'version="{version}"')
        alone = query.partition("\n  and")[0]
        (answer,) = prometheus.query(alone)
        assert 0 <= float(answer["value"][1]) <= 1
    for slo in list(yaml.safe_load_all(text(of, "slo.yaml")))[1:]:
        ratio = slo["spec"]["indicator"]["spec"]["ratioMetric"]
        good, total = (
            float(prometheus.query(ratio[part]["metricSource"]["spec"]["query"])[0]["value"][1])
            for part in ("good", "total")
        )
        assert 0 <= good <= total and total > 0
