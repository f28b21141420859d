"""What crosses the border to a worker comes out as it went in, and every job is one that a worker does."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from peftopt import jobs
from peftopt.corpus import Row
from peftopt.jobs import JOBS, OpenJob, QualityJob, Served, SpeedJob, TransformJob
from peftopt.loadtest.protocols import Prompt, Target
from peftopt.measurements import as_json, structured
from peftopt.records import Invariants, Model, Step
from peftopt.worker import Worker

ROW = Row("1", ({"role": "user", "content": "ümlaut \U0001f600"},), "yes", True, ("short",))
OTHER = Row("2", ({"role": "system", "content": "a"}, {"role": "user", "content": "b\nc"}))
MODEL = Model("base", ("one", "two"))


@pytest.mark.parametrize(
    "job",
    [
        TransformJob(plugin="gptq", params={"bits": 4, "keep": ""}, model=MODEL, out="out", rows=(ROW, OTHER), seed=3),
        OpenJob(plugin="eager", model=MODEL, params={}, policies=(Step("cap", "policy", "shorten", {"most": 5}),)),
        SpeedJob(batches=((ROW, OTHER), (OTHER,)), new_tokens=8, warmup=1, rate=2.5, seed=7),
        QualityJob(rows=(ROW,), new_tokens=8, batch=2, schema={"type": "object"}, invariants=Invariants(labels=("a",))),
        jobs.FactsJob(),
    ],
)
def test_a_request_comes_out_as_it_went_in(job: jobs.Job[object]) -> None:
    line = jobs.as_line(job)
    assert line.count("\n") == 1 and jobs.from_line(line) == job


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_a_method_of_the_worker_that_gives_its_reply(name: str) -> None:
    hints = get_type_hints(getattr(Worker, name))
    assert hints == {"job": JOBS[name], "return": JOBS[name].reply()}
    assert is_dataclass(JOBS[name].reply()) and JOBS[name].__doc__


def test_a_worker_does_no_job_that_has_no_record() -> None:
    methods = {name for name, _ in inspect.getmembers(Worker, inspect.isfunction) if not name.startswith("_")}
    assert methods == JOBS.keys()


def test_a_reply_comes_out_as_it_went_in() -> None:
    prompts = {"1": Prompt(({"role": "user", "content": "a"},), "a", (1, 2)), "2": Prompt(text="b")}
    served = Served(target=Target("http://localhost:1", timeout_s=2.0), prompts=prompts, new_tokens=4, slots=0)
    again = structured(Served, as_json(served), "served")
    assert [getattr(again, each.name) for each in fields(again) if each.name != "prompts"] == [served.target, 4, 0]
    assert [tuple(p.ids) for p in again.prompts.values()] == [(1, 2), ()] and again.prompts["2"].text == "b"
