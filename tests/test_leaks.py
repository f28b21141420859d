"""A leak is told from steps, waves, noise and caches that fill; and the other way round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftopt.diagnose.unloading import leaks
from peftopt.diagnose.unloading.leaks import Kept

MB = 2.0**20
BEFORE = 200 * MB
CYCLES = leaks.LOOKS[-1]
RUNS = 20


def noise(dice: np.random.Generator, spread: float, alike: float = 0.0) -> np.ndarray:
    """Noise whose neighbours are `alike` (0 to 1): an autoregressive series."""
    fresh = dice.normal(0, spread * math.sqrt(1 - alike**2), CYCLES + 1)
    series = np.zeros(CYCLES + 1)
    for at, each in enumerate(fresh):
        series[at] = each + (alike * series[at - 1] if at else 0.0)
    return series


def cycled(series: np.ndarray) -> Kept:
    """What is said of a server that is cycled until a look decides."""
    for look in leaks.LOOKS:
        if kept := leaks.decided([BEFORE + float(each) for each in series[: look + 1]]):
            return kept
    raise AssertionError("the last look is final")


def steps(dice: np.random.Generator) -> np.ndarray:
    """An allocator that grows by some MB now and then."""
    return np.cumsum((dice.random(CYCLES + 1) < 0.02) * dice.uniform(2, 8, CYCLES + 1) * MB)


def wave(dice: np.random.Generator) -> np.ndarray:
    """A collector that comes by after some cycles."""
    period = dice.integers(2, 6)
    return (np.arange(CYCLES + 1) + dice.integers(period)) % period * MB


def filling(dice: np.random.Generator) -> np.ndarray:
    """A cache of adapters that is full after some cycles."""
    return np.minimum(np.arange(CYCLES + 1), dice.integers(1, 30)) * 4 * MB


SHAPES = {
    "flat": lambda dice: noise(dice, 20e3),
    "noise": lambda dice: noise(dice, 150e3),
    "much noise": lambda dice: noise(dice, 3 * MB),
    "neighbours alike": lambda dice: noise(dice, 200e3, 0.8),
    "steps": lambda dice: noise(dice, 20e3) + steps(dice),
    "waves": lambda dice: noise(dice, 20e3) + wave(dice),
    "a cache": lambda dice: noise(dice, 20e3) + filling(dice),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_grows_for_a_while_or_by_steps_is_no_leak(shape: str) -> None:
    for seed in range(RUNS):
        assert cycled(SHAPES[shape](np.random.default_rng(seed))).outcome != "leaks"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_megabyte_a_cycle_is_a_leak_whatever_lies_on_top(shape: str) -> None:
    for seed in range(RUNS):
        kept = cycled(SHAPES[shape](np.random.default_rng(seed)) + np.arange(CYCLES + 1) * MB)
        assert kept.outcome == "leaks"
        assert leaks.TOLERATED < kept.per_cycle.low < 1.1 * MB < 1.1 * kept.per_cycle.high


def test_a_quiet_server_is_told_to_free_whatever_the_noise() -> None:
    for shape in ("flat", "noise", "much noise", "neighbours alike"):
        for seed in range(RUNS):
            assert cycled(SHAPES[shape](np.random.default_rng(seed))).outcome in ("frees", "caches")


def test_twenty_of_twenty_clean_runs_are_clean_and_twenty_of_twenty_leaks_are_found() -> None:
    for number in range(20):
        dice = np.random.default_rng(number)
        series = noise(dice, 60e3, 0.5) + steps(dice) * (number % 2)
        assert cycled(series).outcome in ("frees", "caches")
        assert cycled(series + np.arange(CYCLES + 1) * MB).outcome == "leaks"


@given(slots=st.integers(1, 30), megabytes=st.floats(0.5, 50))
def test_a_cache_has_its_bound(slots: int, megabytes: float) -> None:
    kept = cycled(np.minimum(np.arange(CYCLES + 1), slots) * megabytes * MB)
    assert kept.outcome == ("caches" if slots * megabytes > 1 else "frees")
    assert kept.bound == pytest.approx(slots * megabytes * MB)


@given(steps=st.dictionaries(st.integers(1, CYCLES), st.floats(0.1, 100), max_size=2))
def test_one_step_or_two_are_no_leak_wherever_they_are(steps: dict[int, float]) -> None:
    kept = cycled(sum((np.arange(CYCLES + 1) >= at) * size * MB for at, size in steps.items()) + np.zeros(CYCLES + 1))
    assert kept.outcome in ("frees", "caches")


@given(period=st.integers(1, 12), phase=st.integers(0, 11), megabytes=st.floats(0.1, 20))
def test_waves_are_no_leak(period: int, phase: int, megabytes: float) -> None:
    assert cycled((np.arange(CYCLES + 1) + phase) % period * megabytes * MB).outcome in ("frees", "caches")


@given(levels=st.lists(st.integers(0, 10**9), max_size=40), up=st.integers(0, 10**9))
def test_how_much_was_held_before_does_not_matter(levels: list[int], up: int) -> None:
    shown, above = leaks.judge(levels), leaks.judge([each + up for each in levels])
    assert shown.outcome == above.outcome
    assert shown.bound == pytest.approx(above.bound, abs=1)


def test_a_cache_that_is_known_of_is_left_out() -> None:
    levels = [BEFORE + min(cycle, 20) * 4 * MB for cycle in range(51)]
    assert leaks.judge(levels[:31]).outcome == "undecided", "it may grow on"
    assert leaks.judge(levels[:31], full=20).outcome == "caches"


def test_small_leaks_in_much_noise_are_not_called_free() -> None:
    """They may be undecided. A quarter of a megabyte is four times what is tolerated."""
    for number in range(20):
        levels = noise(np.random.default_rng(number), 0.5 * MB) + np.arange(CYCLES + 1) * MB / 4
        assert cycled(levels).outcome in ("leaks", "undecided")


def test_few_cycles_decide_nothing() -> None:
    for count in range(12):
        kept = leaks.judge([BEFORE + cycle * MB for cycle in range(count)])
        assert kept.outcome == "undecided"
    assert leaks.judge([BEFORE + cycle * MB for cycle in range(26)]).outcome == "undecided", "it may be a cache"


def test_an_unload_that_never_returned_is_an_outcome_whatever_memory_says() -> None:
    assert leaks.judge([BEFORE, BEFORE], returned=False).outcome == "never returned"
    assert leaks.judge([], returned=False).outcome == "never returned"


def test_a_growth_that_stops_is_no_leak_and_one_that_goes_on_is() -> None:
    stops = [BEFORE + min(cycle, 140) * MB for cycle in range(CYCLES + 1)]
    goes_on = [BEFORE + cycle * MB for cycle in range(CYCLES + 1)]
    assert leaks.judge(stops).outcome != "leaks"
    assert leaks.judge(goes_on).outcome == "leaks"
