"""A run that is killed, resumed, damaged and started twice, in any order: what has its own name is whole, and the
verdict is the one of a run that nothing happened to."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import sweeps, swept
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from peftopt import machine, store
from peftopt.errors import ENVIRONMENT

EXAMPLES = int(os.environ.get("RESUMED_EXAMPLES", "1"))
STEPS = int(os.environ.get("RESUMED_STEPS", "3"))
OPERATIONS = 700
"""About as many as a run has."""

SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    phases=[Phase.generate],  # a smaller example would take minutes to be found
    suppress_health_check=list(HealthCheck),
)

pytestmark = pytest.mark.skipif(bool(machine.gpus()), reason="copies of a process cannot share a GPU")


class Happenings(RuleBasedStateMachine):
    """A folder of results, and what happens to it. `job` runs the recipe, and decides what is `wanted`."""

    job: sweeps.Job
    wanted: object

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp()) / "home"
        shutil.copytree(self.job.begin, self.home)
        self.damaged = False

    @rule(at=st.integers(1, OPERATIONS))
    def kill(self, at: int) -> None:
        assert not sweeps.attempt(self.job, self.home, "kill -9", at).hangs

    @rule()
    def resume(self) -> None:
        self.decided([sweeps.attempt(self.job, self.home)])
        assert not sweeps.left(self.home)

    @rule()
    def two(self) -> None:
        with ThreadPoolExecutor(2) as both:
            runs = [both.submit(sweeps.attempt, self.job, self.home, name=name) for name in ("-a", "-b")]
        self.decided([each.result() for each in runs])

    def decided(self, ended: list[sweeps.Ended]) -> None:
        """At least one has gone on to the verdict; another was told that it may not."""
        assert not any(each.hangs for each in ended), ended
        assert {each.code for each in ended} <= {*self.job.codes, ENVIRONMENT}, ended
        assert any(each.code in self.job.codes for each in ended), ended
        assert not [each for each in ended if "Traceback" in each.said]
        assert self.job.result(self.home) == self.wanted
        self.damaged = False

    @rule()
    def tear(self) -> None:
        for lines in self.home.rglob("measurements.jsonl"):
            if not store.is_finished(lines.parent):
                with lines.open("ab") as file:
                    file.write(b'{"format": 1, "probe": "spe')

    @rule(at=st.integers(0, 10**6), name=st.sampled_from(["model.safetensors", store.MANIFEST]))
    def flip(self, at: int, name: str) -> None:
        for file in sorted(self.home.glob(f"results/artifacts/*/*/**/{name}")):
            whole = bytearray(file.read_bytes())
            if whole and not re.search(r"\.(tmp|damaged)\.", str(file)):
                whole[at % len(whole)] ^= 0x40
                file.write_bytes(whole)
                self.damaged = True

    @invariant()
    def whole(self) -> None:
        if not self.damaged:
            self.job.check(self.home)

    def teardown(self) -> None:
        self.resume()
        self.whole()
        shutil.rmtree(self.home.parent)


@pytest.mark.fault(1, "killed at any moment, again and again: the run goes on to the same verdict")
@pytest.mark.fault(8, "two at once: one measures, the other is told so or does the same")
@pytest.mark.fault(11, "a damaged artifact is built again, and the verdict is the same")
def test_whatever_happens_to_a_run_its_files_are_whole_and_its_verdict_is_the_same(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    job = swept.job("run", swept.Place(tiny_base, tiny_lora, tmp_path, ""))
    wanted, _ = sweeps.reference(job, tmp_path)
    happenings = type("Run", (Happenings,), {"job": job, "wanted": wanted})
    run_state_machine_as_test(happenings, settings=SETTINGS)
