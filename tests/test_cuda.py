"""What only a CUDA GPU can show. Skipped without one; everything up to the kernels is tested elsewhere, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftopt import plugins
from peftopt.corpus import Row
from peftopt.probes import bandwidth, kernels, memory, speed
from peftopt.records import Model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = ["hi", "count the stars", "the quick brown fox number 7 jumps over the lazy dog"]
GRAPHED = {"mode": "reduce-overhead"}


def opened(name: str, model: Model, **params: Any) -> Any:
    plugin = plugins.module("engine", name)
    return plugin.open(model, plugin.Params(**params))


def asked(engine: Any, new_tokens: int = 16) -> list[list[int]]:
    prompts = [engine.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    return [a.tokens for a in engine.generate(prompts, new_tokens, stop=False)]


def quantized(method: str, base: Path, out: Path) -> Model:
    plugin = plugins.module("transform", method)
    return plugin.transform(Model(str(base)), plugin.Params(), out, [], 0)


@pytest.mark.parametrize("params", [{}, GRAPHED, {"dynamic": True}, {**GRAPHED, "fullgraph": False}])
@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_answers_and_scores_as_eager(
    params: dict[str, Any], adapted: bool, tiny_base_fp32: Path, tiny_lora: Path
) -> None:
    model = Model(str(tiny_base_fp32), (str(tiny_lora),) if adapted else ())
    eager, compiled = opened("eager", model), opened("compiled", model, **params)
    assert (eager.device, compiled.device) == ("cuda", "cuda")
    assert asked(compiled) == asked(eager)
    assert asked(compiled) == asked(eager), "and again, through the graph that was recorded"
    prompts = [eager.encode([{"role": "user", "content": text}])[0] for text in PROMPTS]
    answers = [[7, 9, 11, 2], [8, 2], [30] * 6]
    for ours, theirs in zip(compiled.score(prompts, answers), eager.score(prompts, answers), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert ours.best == theirs.best


def test_a_recorded_step_starts_from_the_compile_cache(tiny_base: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json; from peftopt import plugins; from peftopt.records import Model\n"
        "plugin = plugins.module('engine', 'compiled')\n"
        "engine = plugin.open(Model(sys.argv[1]), plugin.Params(mode='reduce-overhead'))\n"
        "told = [a.tokens for a in engine.generate([[5, 6, 7]], 12, stop=False)]\n"
        "print(json.dumps([told, engine.facts()]))"
    )

    def start() -> Any:
        import os

        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", code, str(tiny_base)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    (cold, first), (warm, second) = start(), start()
    assert cold == warm
    assert "compile_time" in first and "warm_start" not in first
    assert "warm_start" in second and "compile_time" not in second


@pytest.mark.parametrize("method", ["int8", "bnb8", "nf4", "fp8"])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_quantized_weights_answer_on_the_gpu(method: str, engine: str, tiny_base: Path, tmp_path: Path) -> None:
    if (method, engine) == ("bnb8", "compiled"):
        pytest.skip("refused: see tests/test_plugins.py")
    for library in plugins.catalogue()[method].needs:
        pytest.importorskip(library)
    model = quantized(method, tiny_base, tmp_path / method)
    found = opened(engine, model, **(GRAPHED if engine == "compiled" else {}))
    assert all(len(tokens) == 16 for tokens in asked(found))
    assert asked(found) == asked(found)


def test_the_gpu_is_measured(tiny_base: Path) -> None:
    engine = opened("compiled", Model(str(tiny_base)), **GRAPHED)
    rows = [Row("a", [{"role": "user", "content": PROMPTS[1]}])]
    first, second = speed.turn(engine, [rows, rows], 8, 1)
    assert first.warmup and second.gpu_ms > 0
    found = kernels.used(engine, rows, 8)
    assert found.kernels and found.gpu_busy > 0
    assert sum(kernel.share for kernel in found.kernels) <= 1.001
    peak = memory.peak()
    assert 0 < peak.gpu_memory_allocated <= peak.gpu_memory_reserved
    assert bandwidth.survey().gpu_read_bytes_per_s > 0


@pytest.mark.fault(12, "on a GPU it is told as such")
def test_running_out_of_memory_is_told_as_such() -> None:
    from peftopt.worker import _failure

    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 50, device="cuda")
    assert _failure(error.value).reason == "out of memory"
