"""The technique `bake`: its rules, what a recipe may say of it, and a run whose baseline is a prompt method."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import command, errors, prompts
from helpers.records import builds, decide, of, outcome, plan_of, quality, speed, verdict, whole
from helpers.tiny_models import make_prompt

from peftopt.decision.stopping import undecidable
from peftopt.models import hf
from peftopt.models.prompts import facts, kv_bytes
from peftopt.records import Decision, Json, Measurement, Model, Rule
from peftopt.report import table

TOKENS = 5
WRONG: Json = {"correct": False, "flags": ["critical prompt answered wrong"]}

RECIPE = """
model: {{base: base, adapter: adapter}}
workloads:
  chat: {{prompts: eval.jsonl, new_tokens: 4}}
quality: {{prompts: eval.jsonl, new_tokens: 6, batch: 4}}
measure: {{requests: 1, warmup: 1, relaunch: 5, max_blocks: 10, threads: 1}}
variants:
  adapter: []
{variants}
minimize: latency.p50@chat
"""


# ---- verdicts on invented records ----------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "expected"), [(0.97, "accepted"), (1.05, "rejected"), (1.0, "inconclusive")])
def test_a_baked_prompt_must_be_faster_than_the_live_one_by_any_provable_amount(ratio: float, expected: str) -> None:
    plan = plan_of("baked")
    decision = decide(plan, whole(plan, {"baked": ratio}), {})
    assert outcome(decision, "baked", "bake.gain") == expected
    assert (decision.chosen == "baked") == (expected == "accepted")


def test_a_quantized_and_baked_variant_must_be_worth_it_as_a_whole() -> None:
    plan = plan_of("apart", "int8_baked")
    decision = decide(plan, whole(plan, {"apart": 0.8, "int8_baked": 0.85}), {})
    gain = verdict(decision, "int8_baked", "bake.gain")
    assert (gain.outcome, gain.against) == ("accepted", "adapter")  # slower than `apart`, and faster than the adapter


def test_a_baked_prompt_is_judged_by_itself_where_the_quantizer_may_cost_speed() -> None:
    plan = plan_of("baked", "int8_baked")
    memory = [rule for rule in plan.recipe.rules if rule.technique != "int8"]
    memory += [Rule("int8", "smaller", 0.0), Rule("int8", "not_slower", None)]
    plan = replace(plan, recipe=replace(plan.recipe, rules=tuple(memory)))
    decision = decide(plan, whole(plan, {"baked": 0.9, "int8_baked": 1.2}), {})
    gain = verdict(decision, "int8_baked", "bake.gain")
    assert gain.outcome == "accepted" and gain.reason.startswith("baked: ")


def test_answers_are_judged_on_the_prompt_baked_alone() -> None:
    """Errors of INT8 are INT8's, not those of the prompt that is baked on it; nobody knows without the bake alone."""
    changes = {"p0": WRONG}
    for names, expected in ((("baked", "int8_baked"), "accepted"), (("int8_baked",), "not judged")):
        plan = plan_of(*names)
        found = builds(plan) + speed(plan, dict.fromkeys(names, 0.8))
        found += quality("adapter") + quality("adapter", launch=2)
        found += [m for name in names for m in quality(name, **(changes if name == "int8_baked" else {}))]
        decision = decide(plan, found, {})
        for rule in ("bake.critical_errors", "bake.lost", "bake.parity"):
            assert outcome(decision, "int8_baked", rule) == expected, rule
        assert outcome(decision, "int8_baked", "int8.critical_errors") == "rejected"


def test_a_baked_prompt_that_answers_otherwise_is_rejected() -> None:
    plan = plan_of("baked")
    other = {f"p{n}": {"tokens": [7], "correct": False, "agree": 0} for n in range(100, 200)}
    found = builds(plan) + speed(plan, {"baked": 0.8}) + quality("adapter") + quality("adapter", launch=2)
    decision = decide(plan, found + quality("baked", **other), {})
    assert outcome(decision, "baked", "bake.parity") == outcome(decision, "baked", "bake.lost") == "rejected"
    assert decision.chosen is None


def test_compiling_a_baked_prompt_is_judged_against_the_baked_prompt() -> None:
    plan = plan_of("baked", "baked_compiled")
    decision = decide(plan, whole(plan, {"baked": 0.5, "baked_compiled": 0.6}), {})
    assert verdict(decision, "baked_compiled", "compile.gain").against == "baked"
    assert outcome(decision, "baked_compiled", "compile.gain") == "rejected"
    assert outcome(decision, "baked_compiled", "bake.gain") == "accepted"


def test_what_too_few_prompts_cannot_claim_of_a_baked_prompt_is_foreseen() -> None:
    claims = list(undecidable(plan_of("baked").recipe, 20))
    assert {claim.split(":")[0] for claim in claims} >= {"bake.lost", "bake.parity", "bake.critical_errors"}


# ---- reports -------------------------------------------------------------------------------------


def launched(name: str, **values: Json) -> list[Measurement]:
    return [Measurement("launch", name, "", 1, {"model_loading_time": 1.0, **values})]


def _further(decision: Decision) -> set[str]:
    """The columns of the report's further tables."""
    return {column for sheet in table.more(decision).values() for column in sheet.header}


def test_a_report_tells_virtual_tokens_their_cache_and_what_they_cost_live() -> None:
    plan = plan_of("baked", "merged")
    found = whole(plan, {"baked": 0.8, "merged": 0.8})
    found += launched("adapter", virtual_tokens=32, prompt_kv_bytes=737_280)
    found += launched("baked", virtual_tokens=32, prompt_kv_bytes=737_280, baked=True) + launched("merged")
    decision = decide(plan, found, {})
    live, cost, _ = of(decision, "adapter").remarks[:3]
    assert live.startswith("32 virtual tokens, live") and "737 KB" in live
    assert "ttft@chat is 1.25x that of baked" in cost
    assert of(decision, "baked").remarks[0].startswith("32 virtual tokens, baked")
    assert not any("virtual" in line for line in of(decision, "merged").remarks)
    for name in ("adapter", "baked"):
        figures = of(decision, name).figures
        assert (figures["virtual_tokens"].estimate, figures["prompt_kv"].estimate) == (32, 737_280)
    assert "virtual_tokens" not in of(decision, "merged").figures
    assert {"virtual tokens", "their KV cache"} <= _further(decision)


def test_a_report_of_weights_alone_says_nothing_of_virtual_tokens() -> None:
    plan = plan_of("merged")
    decision = decide(plan, whole(plan, {"merged": 0.8}) + launched("adapter") + launched("merged"), {})
    assert not any("virtual" in line for v in decision.variants for line in v.remarks)
    assert "virtual tokens" not in _further(decision)


@pytest.mark.parametrize("method", ["prompt", "p-mlp", "prefix", "multitask", "cpt"])
def test_virtual_tokens_and_their_cache_are_read_off_configs(tiny_base: Path, tmp_path: Path, method: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    adapter = make_prompt(tiny_base, tmp_path / "adapter", method, tokens=TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto")
    cache = model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert facts(Model(str(tiny_base), (str(adapter),))) == {
        "virtual_tokens": TOKENS,
        "prompt_kv_bytes": held,
        "baked": False,
    }


def test_an_adapter_of_weights_has_no_virtual_tokens(tiny_base: Path, tiny_lora: Path) -> None:
    assert facts(Model(str(tiny_base), (str(tiny_lora),))) == facts(Model(str(tiny_base))) == {}
    assert kv_bytes(hf.config(str(tiny_base))) > 0


# ---- recipes, through the command line -----------------------------------------------------------


@pytest.fixture
def folder(tiny_base: Path, tiny_lora: Path, prompted: Path, tmp_path: Path) -> Path:
    """A folder with a base, an adapter of p-tuning, a LoRA, and prompts; a test writes the recipe."""
    for name, source in (("base", tiny_base), ("adapter", prompted), ("lora", tiny_lora)):
        (tmp_path / name).symlink_to(source)
    prompts(tmp_path / "eval.jsonl", 12, "eval")
    return tmp_path


@pytest.fixture(scope="module")
def prompted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prompt(tiny_base, tmp_path_factory.mktemp("prompted") / "p-tuning", "p-mlp", tokens=TOKENS)


def written(folder: Path, *variants: str, adapter: str = "adapter", more: str = "") -> Path:
    recipe = folder / "recipe.yaml"
    lines = "\n".join(f"  v{n}: {chain}" for n, chain in enumerate(variants))
    text = RECIPE.format(variants=lines).replace("adapter: adapter}", f"adapter: {adapter}}}")
    recipe.write_text(text + more)
    return recipe


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        ("[bake, merge]", "keep one: bake for virtual tokens"),
        ("[merge, bake]", "keep one: bake for virtual tokens"),
        ("[bake, bake]", "remove the second bake"),
        ("[bake, int8]", "put bake after the quantizer"),
        ("[merge]", "put `bake` where `merge` is"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused_with_what_to_write(
    folder: Path, chain: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", written(folder, chain)) == 2
    assert says in errors(capsys)


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        ("[{engine: compiled}]", "[bake, {engine: compiled}]"),
        ("[{engine: continuous}]", "[bake, {engine: continuous}]"),
        ("[{engine: vllm}]", "{bake: {target: vllm}}"),
        ("[bake, {engine: vllm}]", "{bake: {target: vllm}}"),
        ("[{gguf: {type: q8_0}}, {engine: llamacpp}]", "{bake: {target: vllm}}"),
        ("[{openvino_ir: {type: int8}}, {engine: openvino}]", "{bake: {target: vllm}}"),
    ],
)
def test_an_engine_that_cannot_put_virtual_tokens_first_is_refused_before_anything_starts(
    folder: Path, chain: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", written(folder, chain)) == 2
    err = errors(capsys)
    assert "variant v0" in err and says in err


def test_virtual_tokens_as_words_of_the_base_are_weights_that_a_quantizer_may_follow(folder: Path) -> None:
    chain = "[{bake: {target: vllm}}, int8]"
    assert command("check", written(folder, chain, "[bake, {engine: compiled}]"), "--no-forecast") == 0


def test_an_adapter_that_needs_a_task_with_every_request_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "lora", folder / "poly")
    config = json.loads((folder / "poly" / "adapter_config.json").read_text())
    (folder / "poly" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "POLY"}))
    assert command("check", written(folder, "[int8]", adapter="poly")) == 2
    assert "task with every request" in errors(capsys)


def test_a_lora_is_not_baked_but_merged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", written(folder, "[bake]", adapter="lora")) == 2
    err = errors(capsys)
    assert "cannot be baked" in err and "put `merge` where `bake` is" in err


def test_a_baked_prompt_cannot_be_baked_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("bake", "--base", folder / "base", "--adapter", folder / "adapter", "--out", folder / "baked") == 0
    assert command("check", written(folder, "[bake]", adapter="baked")) == 2
    assert "is baked already" in errors(capsys)


@pytest.mark.parametrize(
    ("adapter", "chain", "proposed"),
    [
        ("adapter", "[int8]", "[bake]"),
        ("adapter", "[bake]", ""),
        ("lora", "[int8]", "[merge]"),
        ("lora", "[merge]", ""),
    ],
)
def test_check_proposes_what_fits_the_adapter(
    folder: Path, adapter: str, chain: str, proposed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", written(folder, chain, adapter=adapter), "--no-forecast") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no variant has" in line]
    assert len(lines) == bool(proposed) and all(proposed in line for line in lines)


def test_rules_of_bake_can_be_changed_and_switched_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(folder, "[bake]", more="tradeoffs: {bake: {gain: 5 %, lost: off}}\n")
    assert command("check", recipe, "--no-forecast") == 0
    assert command("check", written(folder, "[bake]", more="tradeoffs: {bake: {gian: 5 %}}\n")) == 2
    assert "gain" in errors(capsys)


# ---- a run ---------------------------------------------------------------------------------------


def test_a_prompt_of_one_task_of_several_is_quantized_baked_and_judged(tiny_base: Path, folder: Path) -> None:
    make_prompt(tiny_base, folder / "tasks", "multitask", tokens=TOKENS)
    engine = "{engine: {eager: {task: 1}}}"
    chains = (f"[int8, {{bake: {{task: 1}}}}, {engine}]", f"[{{bake: {{task: 1}}}}, {engine}]")
    recipe = written(folder, *chains, adapter="tasks")
    recipe.write_text(recipe.read_text().replace("adapter: []", f"adapter: [{engine}]"))
    assert command("run", recipe, "--results", folder / "results", "--quiet") in (0, 1, 3)
    (run,) = (folder / "results" / "runs").iterdir()
    both, baked = json.loads((run / "decision.json").read_text())["variants"][1:]
    assert "artifact.runs" not in [v["rule"] for v in (*both["verdicts"], *baked["verdicts"])]
    parity = next(v for v in both["verdicts"] if v["rule"] == "bake.parity")
    assert parity["outcome"] != "not judged"


def test_a_run_bakes_a_prompt_and_judges_it_against_the_live_one(
    folder: Path, tiny_base_fp32: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "base").unlink()
    (folder / "base").symlink_to(tiny_base_fp32)  # in bf16 two tokens may be equally likely
    recipe, results = written(folder, "[bake]", "[int8, bake]"), folder / "results"
    assert command("run", recipe, "--results", results, "--quiet") in (0, 1, 3)
    (run,) = (results / "runs").iterdir()
    decision = json.loads((run / "decision.json").read_text())
    live, baked, both = decision["variants"]
    assert baked["techniques"] == ["bake"] and both["techniques"] == ["int8", "bake"]
    rules = {"bake.gain", "bake.parity", "bake.lost", "bake.critical_errors"}
    for variant in (baked, both):
        assert rules <= {v["rule"] for v in variant["verdicts"]}
        intact = next(v for v in variant["verdicts"] if v["rule"] == "artifact.intact")
        assert intact["outcome"] == "accepted", intact
        assert any("certificate" in line for line in variant["certificates"])
    assert [v["figures"]["virtual_tokens"]["estimate"] for v in decision["variants"]] == [TOKENS] * 3
    assert baked["figures"]["prompt_kv"] == live["figures"]["prompt_kv"]
    assert baked["figures"]["greedy_match"]["estimate"] == 1.0
    assert any("live" in line for line in live["remarks"])
    assert "virtual tokens" in (run / "report.md").read_text()

    for target in ("vllm", "sglang"):
        assert command("export", target, run, "--variant", "v0", "--to", folder / target) == 2
        err = errors(capsys)
        assert "a baked prompt" in err and "--for vllm" in err
    assert command("export", "systemd", run, "--variant", "v0", "--to", folder / "systemd") == 0
