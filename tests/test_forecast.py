"""Will this be slower? What is weighed and judged, what is told from prompts alone, and what a user is warned of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import command, errors, prompts
from helpers.finished_runs import finished_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from peftopt import store
from peftopt.decision import forecast
from peftopt.engines import _shapes, compiled
from peftopt.engines._speculation import Speculation
from peftopt.errors import BadInput
from peftopt.measurements import Forecast, Measured, Pass, as_json
from peftopt.models import cut
from peftopt.records import Interval, Measurement
from peftopt.runner import recipe_run
from peftopt.runner.forecast import Outlook
from peftopt.runner.judged import read_recipe

MS = st.floats(0.1, 1e3)


# ---- weighing ----------------------------------------------------------------------------------


@given(MS, MS, MS, MS, st.integers(5, 100))
def test_the_whole_model_is_weighed_from_its_parts(
    fixed_prompt: float, fixed_step: float, prompt: float, step: float, layers: int
) -> None:
    def model(n: int) -> Pass:
        return Pass(prompt_ms=fixed_prompt + n * prompt, step_ms=fixed_step + n * step)

    fixed = forecast.beside([model(1)] * 3, [model(4)] * 3, 4)
    assert fixed.prompt_ms == pytest.approx(fixed_prompt, abs=1e-6 * model(4).prompt_ms)
    assert fixed.step_ms == pytest.approx(fixed_step, abs=1e-6 * model(4).step_ms)
    whole = forecast.whole(model(4), fixed, 4, layers)
    if 4 * step > forecast.LEAST * model(4).step_ms and 4 * prompt > forecast.LEAST * model(4).prompt_ms:
        assert whole.step_ms == pytest.approx(model(layers).step_ms)
        assert whole.prompt_ms == pytest.approx(model(layers).prompt_ms)


@given(MS, MS, MS, MS)
def test_noise_leaves_no_time_that_is_none(prompt: float, step: float, fixed_prompt: float, fixed_step: float) -> None:
    cut_ms, fixed = Pass(prompt_ms=prompt, step_ms=step), Pass(prompt_ms=fixed_prompt, step_ms=fixed_step)
    whole = forecast.whole(cut_ms, fixed, 4, 30)
    assert whole.prompt_ms >= prompt and whole.step_ms >= step
    assert forecast.beside([cut_ms], [fixed], 4).step_ms >= 0


@given(st.lists(MS, min_size=6, max_size=20), st.floats(0.2, 5.0))
def test_a_variant_is_as_many_times_slower_whatever_the_machine_does_to_both(times: list[float], factor: float) -> None:
    interval = forecast.ratio([factor * each for each in times], times)
    assert interval.low == pytest.approx(factor) and interval.high == pytest.approx(factor)
    assert forecast.slower(interval) == (factor > forecast.SURE) or factor == pytest.approx(forecast.SURE)
    assert not (forecast.slower(interval) and forecast.faster(interval))


@given(st.lists(st.tuples(MS, MS), min_size=6, max_size=20))
def test_the_other_way_round_it_is_the_inverse(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [mine for mine, _ in pairs], [other for _, other in pairs]
    one, other = forecast.ratio(ours, theirs), forecast.ratio(theirs, ours)
    assert one.low == pytest.approx(1 / other.high) and one.high == pytest.approx(1 / other.low)
    assert forecast.slower(one) == forecast.faster(other)


@given(st.lists(st.builds(Pass, prompt_ms=MS, step_ms=MS), max_size=60), st.integers(0, 59))
def test_a_moment_that_disturbs_one_pass_of_a_group_changes_nothing(passes: list[Pass], at: int) -> None:
    groups = forecast.least(passes)
    assert len(groups) >= min(len(passes), forecast.GROUPS)
    assert all(group.step_ms >= min(each.step_ms for each in passes) for group in groups)
    if at < len(passes) and len(passes) >= 2 * forecast.GROUPS:
        disturbed = [*passes[:at], Pass(prompt_ms=1e6, step_ms=1e6), *passes[at + 1 :]]
        again = forecast.least(disturbed)
        assert all(group.step_ms < 1e6 and group.prompt_ms < 1e6 for group in again)
        assert sum(one != other for one, other in zip(groups, again, strict=True)) <= 1


@given(st.lists(MS, min_size=8, max_size=20), st.floats(0.5, 2.0))
def test_the_clock_that_differs_less_tells(times: list[float], scale: float) -> None:
    passes = [Pass(prompt_ms=each, step_ms=each) for each in times]
    scaled = [Pass(prompt_ms=scale * each, step_ms=scale * each) for each in times]
    still = [Pass(prompt_ms=1.0, step_ms=1.0)] * len(times)
    assert not forecast.by_cpu(passes, scaled)  # as noisy as each other: the wall clock
    assert not forecast.by_cpu(still, passes)
    middle = sorted(times)[len(times) // 2]
    if sum(each == pytest.approx(middle) for each in times) < len(times) / 3:
        assert forecast.by_cpu(passes, still)


def test_rounds_too_few_for_an_interval_warn_of_nothing() -> None:
    assert not forecast.slower(forecast.ratio([9.0, 9.0, 9.0], [1.0, 1.0, 1.0]))


@pytest.mark.parametrize(("low", "warns"), [(1.04, False), (1.06, True)])
def test_it_warns_only_where_it_is_sure(low: float, warns: bool) -> None:
    told = forecast.rank(Interval(1.3, low, 1.6, 8), 12, 16)
    assert told.warns == warns


def test_a_variant_is_warned_of_once_for_each_workload() -> None:
    told = Forecast(kind="speed", against="merged", ratio=2.0, low=1.8, high=2.2, warns=True, reason="r")
    base = Forecast(kind="speed", against="adapter", ratio=1.5, low=1.4, high=1.6, warns=True, reason="r")
    outlook = Outlook((Measured(told, "int8", "chat"), Measured(base, "int8", "chat"), Measured(base, "int8", "bulk")))
    first, second = outlook.warnings
    assert "merged" in first and "chat" in first and "2.00x (1.80–2.20)" in first
    assert "adapter" in second and "bulk" in second


# ---- shapes under compile ----------------------------------------------------------------------


class Recorded(compiled.Compiled):
    """The engine's own choice of shapes, without a model: nothing is compiled."""

    def __init__(self, params: compiled.Params, ahead: int) -> None:
        self._params = params
        self._longest, self._prefix, self.virtual_tokens = 2**31, None, 0
        self._speculation, self._ahead = Speculation(tokens=ahead) if ahead else None, ahead
        self._steps, self._prompts, self._verifiers, self._warmed = {}, {}, {}, set()

    def _step(self, shape: Any) -> Any:
        self._steps[shape] = (None, None)
        return self._steps[shape]

    def _verifier(self, shape: Any) -> Any:
        self._verifiers[shape] = (None, None)
        return self._verifiers[shape]

    def _prompt(self, shape: Any) -> Any:
        self._prompts[shape] = (None, None)
        return self._prompts[shape]

    def answered(self, length: int, new_tokens: int) -> tuple[bool, bool, int]:
        """Whether a request of one prompt is compiled, whether its prompt is, and what that is padded to."""
        shape = self._shape(1, length + new_tokens, timed=True)
        if isinstance(shape, str):
            return False, False, 0
        bucket = self._bucket(shape, length, timed=True)
        return (True, False, 0) if isinstance(bucket, str) else (True, True, bucket[2])


@given(
    st.lists(st.integers(2, 700), min_size=1, max_size=60),
    st.integers(1, 64),
    st.sampled_from([0, 128, 256, 512]),
    st.sampled_from(["auto", "none", "64, 200"]),
    st.integers(1, 4),
    st.sampled_from([0, 0, 4]),
)
def test_shapes_told_from_lengths_are_those_of_the_engine(
    lengths: list[int], new_tokens: int, cache_len: int, prompt_buckets: str, prompt_graphs: int, ahead: int
) -> None:
    params = compiled.Params(cache_len=cache_len, prompt_buckets=prompt_buckets, prompt_graphs=prompt_graphs)
    engine = Recorded(params, ahead)
    engine.warm(lengths, 1, new_tokens, timed=True)
    answers = [engine.answered(length, new_tokens) for length in lengths]
    wanted = _shapes.wanted(lengths, 1, new_tokens, params, ahead)
    whole = [prompt for request, prompt, _ in answers if request]
    assert wanted.uncompiled == pytest.approx(1 - len(whole) / len(lengths))
    assert wanted.graphs == len(engine._steps) + len(engine._prompts) + len(engine._verifiers)
    if whole and prompt_buckets != "none":
        assert wanted.eager == pytest.approx(1 - sum(whole) / len(whole))
    padded = [(bucket, length) for (_, there, bucket), length in zip(answers, lengths, strict=True) if there]
    if padded:
        assert wanted.padding == pytest.approx(sum(b for b, _ in padded) / sum(n for _, n in padded))


@given(st.lists(st.integers(2, 700), min_size=1, max_size=30), st.integers(1, 8))
def test_larger_batches_are_never_more_often_compiled(lengths: list[int], rows: int) -> None:
    params = compiled.Params(cache_len=256)
    alone, together = (_shapes.wanted(lengths, n, 16, params) for n in (1, rows))
    assert together.uncompiled >= alone.uncompiled - 1e-9
    assert not alone.uncompiled or forecast.shapes(alone.uncompiled, 0.0, 1, 1.0, alone.longest).warns


# ---- the first layers --------------------------------------------------------------------------


def hidden(base: Path, adapter: Path | None = None) -> Any:
    """Hidden states [layers + 1, tokens, width] of a model as a user would load it; the last is normalized."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        states = model(input_ids=torch.arange(3, 40)[None], output_hidden_states=True).hidden_states
    return [state[0].float() for state in states]


def test_a_cut_model_computes_what_the_whole_one_does_in_its_first_layers(
    deep: tuple[Path, Path], tmp_path: Path
) -> None:
    base = cut.cut_model(deep[0], tmp_path / "base", 3)
    lora = cut.cut_adapter(deep[1], tmp_path / "lora", 3)
    assert cut.layers_of(deep[0]) == 6 and cut.layers_of(base) == 3
    ours, whole = hidden(base, lora), hidden(*deep)
    assert len(ours) == 4
    assert all(one.equal(other) for one, other in zip(ours[:3], whole[:3], strict=True))


def test_an_adapter_padded_to_a_rank_is_the_same_adapter(deep: tuple[Path, Path], tmp_path: Path) -> None:
    import torch

    narrow, wide = (cut.cut_adapter(deep[1], tmp_path / str(rank), 6, rank) for rank in (0, 8))
    shapes = {min(tensor.shape) for tensor in load_file(wide / "adapter_model.safetensors").values()}
    assert shapes == {8}
    # PEFT scales by alpha / r, so twice the rank is half the delta: undone here
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    for one, other in zip(hidden(deep[0], narrow), hidden(deep[0], wide), strict=True):
        torch.testing.assert_close(one, other)


def test_layers_that_are_not_alike_tell_nothing_of_each_other(deep: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((deep[0] / "config.json").read_text())
    odd = tmp_path / "odd"
    cut.cut_model(deep[0], odd, 6)
    (odd / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(BadInput, match="7 layers"):
        cut.layers_of(odd)


# ---- what a user meets -------------------------------------------------------------------------

RECIPE = """model: {{base: {base}, adapter: {adapter}}}
workloads:
  chat: {{prompts: {prompts}, new_tokens: 4, batch: 1}}
measure: {{requests: 1, warmup: 1, max_blocks: 10, threads: 1}}
variants:
  adapter: []
  other: {steps}
minimize: latency.p50@chat
"""

PLANTED = '''"""Eight bits that take their time: every answer of what it wrote comes late."""

import time
from dataclasses import dataclass
from pathlib import Path

from peftopt import plugins
from peftopt.engines import eager
from peftopt.transforms import int8

usual = eager.Transformers.generate


def late(self, *arguments, **more):
    if self.late:
        time.sleep(0.5)
    return usual(self, *arguments, **more)


def opened(model, params):
    engine = eager.Transformers(model, params.device)
    engine.late = (Path(model.path) / "late").exists()
    return engine


eager.Transformers.late = False
eager.Transformers.generate = late
eager.open = opened


@dataclass(frozen=True)
class Params:
    keep: str = ""


PLUGIN = plugins.quantizer(Params, needs=("torchao",))


def transform(model, params, out, texts, seed):
    made = int8.transform(model, int8.Params(params.keep), out, texts, seed)
    (out / "late").touch()
    return made
'''


def recipe(deep: tuple[Path, Path], folder: Path, steps: str) -> Path:
    path = folder / "recipe.yaml"
    questions = prompts(folder / "eval.jsonl", 12, "eval")
    path.write_text(RECIPE.format(base=deep[0], adapter=deep[1], prompts=questions, steps=steps))
    return path


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """The environment in which a quantizer of another package is found that makes everything slow."""
    home = tmp_path / "site"
    info = home / "others-1.0.dist-info"
    info.mkdir(parents=True)
    (home / "others.py").write_text(PLANTED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peftopt.transforms]\nlate8 = others\n")
    return {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_check_warns_of_a_quantizer_that_is_slow_here(
    deep: tuple[Path, Path], tmp_path: Path, planted: dict[str, str]
) -> None:
    path = recipe(deep, tmp_path, "[late8]")
    words = [sys.executable, "-m", "peftopt.cli", "check", str(path), "--results", str(tmp_path / "results")]
    done = subprocess.run(words, env=planted, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode == 0, said
    assert "other is expected to take" in said and "of adapter's time on chat" in said
    assert not (tmp_path / "results" / "artifacts").exists()
    quiet = subprocess.run([*words, "--no-forecast"], env=planted, capture_output=True, text=True, check=False)
    assert quiet.returncode == 0 and "expected" not in quiet.stderr


def test_check_does_not_warn_of_a_merge(
    deep: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", recipe(deep, tmp_path, "[merge]")) == 0
    said = errors(capsys)
    assert "of adapter's time" not in said and "forecast of 1 variants" in said


def test_a_run_keeps_what_was_expected_and_asks_once(deep: tuple[Path, Path], tmp_path: Path) -> None:
    heard = Heard()
    with recipe_run.prepare(*read_recipe(recipe(deep, tmp_path, "[merge]")), tmp_path / "results", heard) as run:
        for _ in range(2):
            recipe_run.foretell(run)
    kept = [m for m in store.read(run.folder / "measurements.jsonl", heard.warn) if isinstance(m.values, Forecast)]
    speeds = [m for m in kept if isinstance(m.values, Forecast) and m.values.kind == "speed"]
    assert [(m.variant, m.workload) for m in speeds] == [("other", "chat")]
    assert run.evidence.forecasts[0][2] == kept[0].values


def test_the_report_shows_what_was_expected_beside_what_was_measured(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path, tiny_base, tiny_lora, ratio=0.5, built=False)
    told = Forecast(kind="speed", against="adapter", ratio=0.7, low=0.6, high=0.8, reason="on 4 of 30 layers")
    store.append(folder / "measurements.jsonl", Measurement("forecast", "merged", "chat", values=as_json(told)))
    command("report", folder)
    for report in ("report.md", "report.html"):
        text = (folder / report).read_text()
        section = text[text.index("Expected and measured") :]
        row = section[section.index("merged") : section.index("on 4 of 30 layers")]
        assert "0.70x" in row and "0.60–0.80" in row and "0.50x" in row


def test_what_cannot_be_told_is_said_and_stops_nothing(
    deep: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "[{truncate: {over: 100 tokens}}]".replace("100 tokens", "100")
    assert command("check", recipe(deep, tmp_path, steps)) == 0
    assert "no forecast of other" in errors(capsys)


class Heard:
    """A listener that keeps its warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)

    def done(self, *_: object) -> None:
        """Not kept."""

    def tell(self, *_: object) -> None:
        """Not kept."""

    def progress(self, *_: object) -> Any:
        import contextlib

        return contextlib.nullcontext(lambda *_: None)
