"""Jobs are done after what they need, so many at a time, the first listed first."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.runner.schedule import Job, work


def noting(done: list[str], name: str) -> Callable[[], None]:
    return lambda: done.append(name)


@given(st.data(), st.integers(1, 9), st.integers(1, 3))
def test_every_job_is_done_once_and_after_what_it_needs(data: st.DataObject, count: int, lanes: int) -> None:
    names = data.draw(st.permutations([f"job{n}" for n in range(count)]))
    done: list[str] = []
    jobs = {}
    for place, name in enumerate(sorted(names)):
        after = data.draw(st.frozensets(st.sampled_from(sorted(names)[:place]))) if place else frozenset()
        jobs[name] = Job(noting(done, name), after)
    work({name: jobs[name] for name in names}, lanes)
    assert sorted(done) == sorted(names)
    assert all(done.index(need) < done.index(name) for name, job in jobs.items() for need in job.after)


def test_what_is_listed_first_goes_first_as_soon_as_it_can() -> None:
    done: list[str] = []
    after = {"late": {"base"}, "base": set(), "other": set(), "last": {"other"}}
    work({name: Job(noting(done, name), frozenset(needs)) for name, needs in after.items()}, 1)
    assert done == ["base", "late", "other", "last"]


def test_lanes_work_side_by_side_and_no_more_of_them() -> None:
    meeting, lock, running, most = threading.Barrier(2, timeout=60), threading.Lock(), 0, 0

    def meet() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        meeting.wait()  # breaks unless two are there at once
        with lock:
            running -= 1

    work({str(n): Job(meet) for n in range(6)}, 2)
    assert most == 2


def test_an_error_lets_what_runs_end_and_starts_nothing_more() -> None:
    failed, done = threading.Event(), list[str]()

    def fail() -> None:
        failed.set()
        raise ValueError("no baseline")

    def run() -> None:
        assert failed.wait(60)
        done.append("running")

    jobs = {"running": Job(run), "bad": Job(fail), "next": Job(noting(done, "next"), frozenset({"bad"}))}
    with pytest.raises(ValueError, match="no baseline"):
        work(jobs, 2)
    assert done == ["running"]
