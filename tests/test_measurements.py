"""The border of measurements.jsonl: what a line says arrives as it is, and what it cannot say is named."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields

import pytest
from helpers.records import plan_of, whole

from peftopt.errors import BadInput
from peftopt.measurements import PROBES, Account, Answer, Gauge, Load, Measured, Memory, Turn, measured
from peftopt.records import Json, Measurement

REQUEST = {"request_duration_ms": 80.5, "new_tokens": 16, "warmup": False}
TURN = {"block": 3, "requests": [REQUEST]}
ANSWER = {"row": "p1", "tokens": [1, 2], "new_tokens": 3, "stopped": True, "correct": True, "valid": True}
ANSWER |= {"score": 1.0, "critical": False, "flags": []}


def line(probe: str, **values: Json) -> Measurement:
    return Measurement(probe, "merged", "chat", 1, values)


def refused(line: Measurement) -> str:
    with pytest.raises(BadInput) as error:
        measured(line, "m.jsonl:7")
    assert error.value.message.startswith("m.jsonl:7: ") and error.value.hint
    return error.value.message


def test_a_line_arrives_whole_and_unchanged() -> None:
    for each in whole(plan_of("merged", "int8"), {"merged": 0.8, "int8": 0.9}, blocks=2):
        found = measured(each)
        assert (found.variant, found.workload, found.launch) == (each.variant, each.workload, each.launch)
        back = json.loads(json.dumps(asdict(found.values)))
        kept = {key: value for key, value in back.items() if key in each.values}
        if each.probe == "speed":
            kept["requests"] = [
                {key: value for key, value in r.items() if key in asked}
                for r, asked in zip(back["requests"], each.values["requests"], strict=True)
            ]
        assert kept == each.values


def test_what_is_told_is_kept_and_what_is_not_is_said_to_be_unknown() -> None:
    told = measured(line("speed", **TURN, engine={"running": {"mean": 1.5, "peak": 2}, "slots": 4})).values
    assert isinstance(told, Turn) and told.requests[0].request_duration_ms == 80.5
    assert told.engine == Account(running=Gauge(mean=1.5, peak=2), slots=4) and told.engine.fill == 0.375
    assert told.order is None and told.machine.seconds is None and told.requests[0].ttft_ms is None
    answer = measured(line("quality", **ANSWER, parting=[4, 0.25], kl=math.nan)).values
    assert isinstance(answer, Answer) and answer.parting == (4, 0.25) and math.isnan(answer.kl or 0)
    assert answer.nll is None and answer.noise == () and answer.tokens == (1, 2)
    assert measured(line("memory")).values == Memory()


def test_a_servers_account_tells_how_full_its_batch_is() -> None:
    assert Account(busy=3.0, running=Gauge(mean=1.0), slots=4).fill == 0.75, "of every step, where that is told"
    assert Account(busy=0.0, slots=4).fill == 0
    assert Account(slots=4).fill is Account(busy=3.0).fill is Account(busy=3.0, slots=0).fill is None


def test_a_key_that_no_record_has_is_left_alone() -> None:
    assert measured(line("speed", **TURN, colour="red")) == measured(line("speed", **TURN))


def test_a_probe_that_is_not_known_is_named() -> None:
    assert "'spede'" in refused(line("spede", **TURN))


@pytest.mark.parametrize(
    ("probe", "values", "field"),
    [
        ("speed", {"requests": [REQUEST]}, "speed.block is missing"),
        ("speed", {"block": 1, "requests": [REQUEST, {**REQUEST, "warmup": None}]}, "speed.requests[1].warmup is not"),
        ("speed", {"block": 1, "requests": [{"warmup": False, "new_tokens": 1}]}, "request_duration_ms is missing"),
        ("speed", {"block": 1, "requests": 7}, "speed.requests is not a list"),
        ("speed", {"block": 1, "requests": [5]}, "speed.requests[0] is not an object"),
        ("speed", {**TURN, "engine": {"running": 3}}, "speed.engine.running is not an object"),
        ("speed", {**TURN, "machine": {"seconds": "4"}}, "speed.machine.seconds is not a number"),
        ("quality", {k: v for k, v in ANSWER.items() if k != "tokens"}, "quality.tokens is missing"),
        ("quality", {**ANSWER, "tokens": "ab"}, "quality.tokens is not a list"),
        ("quality", {**ANSWER, "tokens": [1, "2"]}, "quality.tokens is not"),
        ("quality", {**ANSWER, "correct": 1}, "quality.correct is not true or false"),
        ("quality", {**ANSWER, "parting": [1]}, "quality.parting is not"),
        ("build", {"id": "", "size_bytes": 0.5, "tier0": []}, "build.size_bytes is not a whole number"),
        ("build", {"id": "", "size_bytes": True, "tier0": []}, "build.size_bytes is not a whole number"),
        ("launch", {}, "launch.model_loading_time is missing"),
        ("load", {"requests": [REQUEST]}, "load.requests[0].scheduled is missing"),
        ("failure", {"stage": "build", "reason": 4, "detail": ""}, "failure.reason is not a text"),
    ],
)
def test_a_field_that_is_missing_or_of_another_kind_is_named(probe: str, values: Json, field: str) -> None:
    assert field in refused(line(probe, **values))


def test_a_line_that_is_no_measurement_of_anybody_is_refused() -> None:
    values: Json = [TURN]
    assert "values" in refused(Measurement("speed", "merged", values=values))
    name: Json = ["merged"]
    assert "variant" in refused(Measurement("speed", name, values=TURN))


def test_counts_of_other_tools_may_be_written_as_16_0() -> None:
    sent = {**REQUEST, "scheduled": 0, "done": 1, "new_tokens": 16.0}
    load = measured(line("load", requests=[sent])).values
    assert isinstance(load, Load) and load.requests[0].new_tokens == 16
    assert "new_tokens" in refused(line("load", requests=[{**sent, "new_tokens": 16.5}]))


def test_every_probe_has_a_record_of_its_own_that_cannot_be_changed() -> None:
    assert len(set(PROBES.values())) == len(PROBES)
    for record in PROBES.values():
        assert hasattr(record, "__slots__") and record.__doc__
        if names := [each.name for each in fields(record)]:
            found = Measured(record.__new__(record))
            with pytest.raises(AttributeError):
                setattr(found.values, names[0], 1)
