"""What every test finds set, and the tiny models that they share."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import sweeps
from helpers.forked import COMMANDS, WORKERS, starting_by, workers
from helpers.tiny_models import TEXTS, make_base, make_lora
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure of what is tested
settings.load_profile("untimed")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("helpers.command_line", "helpers.engine_contract")  # what they assert is told in full

LONG = (
    *("test_plugins", "test_cli", "test_demo", "test_endpoint", "test_run", "test_gateway_shadow", "test_merge"),
    *("test_architectures", "test_server", "test_tasks", "test_gateway_trial", "test_export", "test_decide"),
    *("test_gateway_second", "test_quantize", "test_workers", "test_gateway_itself", "test_serve_run"),
)
"""Files that take longest: they start first, so that no process is still at one when the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX")}


@pytest.fixture(autouse=True)
def compilers() -> None:
    """PEFT leaves CXX=gcc behind where it cannot build BOFT's CUDA code, and fixtures here make such adapters."""
    for name, value in COMPILERS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Workers are copies of one process (helpers/forked.py), but with a GPU, which copies cannot share."""
    with starting_by(WORKERS.worker) if workers() else contextlib.nullcontext():
        yield
    for first in (COMMANDS, WORKERS, sweeps.FIRST):
        first.close()


@pytest.fixture(autouse=True)
def fresh_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests with that mark, workers start from nothing, as users' do."""
    fresh = request.node.get_closest_marker("fresh_workers")
    with starting_by(subprocess.Popen) if fresh else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 base model's folder, as served."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    make_base(folder, "bfloat16")
    return folder


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of six layers and its LoRA."""
    folder = tmp_path_factory.mktemp("deep")
    make_base(folder / "base", "bfloat16", layers=6)
    make_lora(folder / "base", folder / "lora")
    return folder / "base", folder / "lora"


@pytest.fixture(scope="session")
def tiny_base_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in fp32, where batching must not change a single greedy token."""
    folder = tmp_path_factory.mktemp("tiny32") / "base"
    make_base(folder, "float32")
    return folder


@pytest.fixture(scope="session")
def tiny_lora(tiny_base: Path) -> Path:
    """A LoRA on `tiny_base` (and `tiny_base_fp32`) that visibly changes its answers."""
    folder = tiny_base.parent / "lora"
    make_lora(tiny_base, folder)
    return folder


@pytest.fixture(scope="session")
def calibration_texts() -> list[str]:
    """Rendered texts for quantizers that calibrate."""
    return [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n" for text in TEXTS]
