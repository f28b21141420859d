"""Threads keep to a file of their own while there are files enough, and nothing is lost when a job fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.merging.lanes import Lanes


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 5), max_size=40))
def test_every_job_is_done_once_and_its_result_is_in_its_place(threads: int, files: list[int]) -> None:
    lanes, done = Lanes(threads), Counter[int]()

    def job(number: int) -> int:
        done[number] += 1
        return number

    futures = lanes.submit((Path(str(file)), partial(job, number)) for number, file in enumerate(files))
    assert [future.result() for future in futures] == list(range(len(files)))
    lanes.close()
    assert done == Counter(range(len(files)))


def test_two_threads_do_not_write_to_one_file_while_another_waits() -> None:
    lanes, lock, now, met = Lanes(2), threading.Lock(), Counter[str](), []
    left = Counter({"a": 12, "b": 3, "c": 3})

    def job(file: str) -> None:
        with lock:
            now[file] += 1
            others = [name for name in left if name != file and left[name] and not now[name]]
            met.append(now[file] > 1 and bool(others))
            left[file] -= 1
        time.sleep(0.002)
        with lock:
            now[file] -= 1

    for future in lanes.submit((Path(file), partial(job, file)) for file in "aaaaaaaaaaaabbbccc"):
        future.result()
    lanes.close()
    assert len(met) == 18 and not any(met)


def test_the_last_file_is_shared() -> None:
    lanes, both = Lanes(2), threading.Barrier(2, timeout=60)
    for future in lanes.submit([(Path("only"), both.wait), (Path("only"), both.wait)]):
        future.result()
    lanes.close()


def test_an_error_is_raised_where_the_result_is_asked_for_and_what_has_not_begun_is_left() -> None:
    lanes, begun, left = Lanes(1), threading.Event(), threading.Event()

    def broken() -> None:
        raise ValueError("broken")

    def working() -> bool:
        begun.set()
        return left.wait(60)

    futures = lanes.submit((Path("file"), job) for job in (broken, working, broken))
    with pytest.raises(ValueError, match="broken"):
        futures[0].result()
    assert begun.wait(60)
    futures[2].add_done_callback(lambda _: left.set())
    lanes.close()
    assert futures[1].result() and futures[2].cancelled()
