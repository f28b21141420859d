"""A run that is killed, resumed, damaged and started twice, in any order: what has its own name is whole, and the
verdict is the one of a run that nothing happened to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import sweeps, swept
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from peftopt import machine, store
from peftopt.errors import ENVIRONMENT

EXAMPLES = int(os.environ.get("RESUMED_EXAMPLES", "2"))
STEPS = int(os.environ.get("RESUMED_STEPS", "4"))
OPERATIONS = 130
"""About as many as a run has."""

pytestmark = pytest.mark.skipif(bool(machine.gpus()), reason="copies of a process cannot share a GPU")


@pytest.fixture(scope="module")
def run(
    tiny_base: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[sweeps.Job, object]]:
    """The job, and what a run without a fault decides."""
    folder = tmp_path_factory.mktemp("resumed")
    job = swept.job("run", swept.Place(tiny_base, tiny_lora, folder, ""))
    yield job, sweeps.reference(job, folder)[0]
    sweeps.FIRST.close()


@pytest.mark.fault(1, "killed at any moment, again and again: the run goes on to the same verdict")
@pytest.mark.fault(8, "two at once: one measures, the other is told so or does the same")
@pytest.mark.fault(11, "a damaged artifact is built again, and the verdict is the same")
def test_whatever_happens_to_a_run_its_files_are_whole_and_its_verdict_is_the_same(
    run: tuple[sweeps.Job, object],
) -> None:
    job, wanted = run

    class Happenings(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.home = Path(tempfile.mkdtemp()) / "home"
            shutil.copytree(job.begin, self.home)
            self.damaged = False

        @rule(at=st.integers(1, OPERATIONS))
        def kill(self, at: int) -> None:
            sweeps.attempt(job, self.home, "kill -9", at)

        @rule()
        def resume(self) -> None:
            ended = sweeps.attempt(job, self.home)
            assert ended.code in job.codes, ended.said
            assert "Traceback" not in ended.said
            assert job.result(self.home) == wanted
            assert not sweeps.left(self.home)
            self.damaged = False

        @rule(at=st.integers(0, 1000), what=st.sampled_from(["model.safetensors", "artifact.json", "measurements.jsonl"]))
        def corrupt(self, at: int, what: str) -> None:
            for file in sorted(self.home.rglob(what)):
                if what == "measurements.jsonl":
                    if not store.is_finished(file.parent):
                        with file.open("ab") as lines:
                            lines.write(b'{"format": 1, "probe": "spe')
                elif ".tmp." not in str(file) and ".damaged." not in str(file):
                    whole = bytearray(file.read_bytes())
                    whole[at % len(whole)] ^= 0x40
                    file.write_bytes(whole)
                    self.damaged = True

        @rule()
        def two(self) -> None:
            with ThreadPoolExecutor(2) as both:
                runs = [both.submit(sweeps.attempt, job, self.home, name=name) for name in ("-a", "-b")]
            ended = [each.result() for each in runs]
            assert {each.code for each in ended} <= {*job.codes, ENVIRONMENT}, ended
            assert any(each.code in job.codes for each in ended), ended
            assert not [each for each in ended if "Traceback" in each.said]
            assert job.result(self.home) == wanted
            self.damaged = False

        @invariant()
        def whole(self) -> None:
            if not self.damaged:
                job.check(self.home)

        def teardown(self) -> None:
            ended = sweeps.attempt(job, self.home)
            assert ended.code in job.codes and job.result(self.home) == wanted, ended.said
            job.check(self.home)
            shutil.rmtree(self.home.parent)

    run_state_machine_as_test(
        Happenings,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            phases=[Phase.generate],  # a smaller example would take minutes to be found
            suppress_health_check=list(HealthCheck),
        ),
    )
