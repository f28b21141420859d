"""A draft proposes tokens: answers stay, its weights are part of what is measured, other tokenizers are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.asked import ask, ids
from helpers.chains import check_refused
from helpers.chains import recipe as chain
from helpers.command_line import command, errors, prompts
from helpers.remote_engine import Remote
from helpers.tiny_models import make_base
from safetensors.torch import load_file, save_file

from peftopt import environments, machine, plugins
from peftopt.engines import Generation, eager, llamacpp_server, vllm
from peftopt.engines._speculation import Speculation
from peftopt.errors import BadInput
from peftopt.jobs import TransformJob
from peftopt.models import gguf
from peftopt.models.drift import another_tokenizer
from peftopt.recipe import plan as planning
from peftopt.recipe import rewriting
from peftopt.records import Folder, Model
from peftopt.runner import hashes, run, single
from peftopt.runner.judged import read_recipe

BASE = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"

RECIPE = """
model: {base: base, adapter: lora}
workloads: {chat: {prompts: eval.jsonl, new_tokens: 8, batch: 1}}
quality: {prompts: eval.jsonl, new_tokens: 8, batch: 4}
measure: {requests: 2, warmup: 1, relaunch: 4, max_blocks: 10, threads: 1}
variants:
  adapter: []
  merged:  [merge]
  drafted: [merge, {speculate: {tokens: 3, draft: drafts/small}}]
minimize: latency.p50@chat
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, with the tokenizer of `tiny_base`."""
    folder = tmp_path_factory.mktemp("small") / "small"
    make_base(folder, "float32", layers=1)
    return folder


@pytest.fixture
def recipe(tiny_base_fp32: Path, tiny_lora: Path, small: Path, tmp_path: Path) -> Path:
    """A recipe with a draft, on copies that a test may break."""
    for source, name in ((tiny_base_fp32, "base"), (tiny_lora, "lora"), (small, "drafts/small")):
        shutil.copytree(source, tmp_path / name)
    prompts(tmp_path / "eval.jsonl", 6, "eval")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def edited(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# ---- the answers -------------------------------------------------------------------------------


def opened(model: Model, draft: Path, tokens: int = 3) -> Any:
    return eager.open(model, eager.Params(), Speculation(tokens=tokens, draft=Folder(str(draft))))


def test_a_draft_changes_no_token(tiny_base_fp32: Path, tiny_lora: Path, small: Path) -> None:
    served = Model(str(tiny_base_fp32), (str(tiny_lora),))
    plain = eager.open(served, eager.Params())
    engine = opened(served, small)
    assert engine.speculates
    for batch in (True, False):
        assert ask(engine, 24, batch=batch) == ask(plain, 24)
    for answer in engine.generate(ids(engine), 24, False):
        assert len(answer.tokens) == len(answer.times) == 24 and answer.times == sorted(answer.times)
        assert 0 < answer.steps < 24
    given = [[7, 9, 11], [8, 2], [30] * 5]
    for ours, theirs in zip(engine.score(ids(engine), given), plain.score(ids(engine), given), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    for each in (engine, plain):
        each.close()


def test_a_draft_that_is_right_saves_steps(tiny_base_fp32: Path) -> None:
    engine = opened(Model(str(tiny_base_fp32)), tiny_base_fp32)
    for answer in engine.generate(ids(engine), 24, False):
        assert (answer.steps, answer.accepted) == (5, 18), "six steps of four tokens; the prompt's own is not counted"
    engine.close()


def test_an_answer_ends_where_it_ends_without_a_draft(tiny_base_fp32: Path) -> None:
    engine = opened(Model(str(tiny_base_fp32)), tiny_base_fp32)
    free = engine.generate(ids(engine), 24, False)
    end = free[0].tokens[9]  # make a token that the first row says the end of sequence
    engine._stopping.eos_token_id, engine.eos = [end], frozenset([end])
    for answer, whole in zip(engine.generate(ids(engine), 24, True), free, strict=True):
        count = whole.tokens.index(end) + 1 if end in whole.tokens else 24
        assert answer.tokens == whole.tokens[:count] and answer.stopped == (end in whole.tokens)
    engine.close()


def test_a_draft_with_other_padding_after_its_last_token_proposes(tiny_base_fp32: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    padded = AutoModelForCausalLM.from_pretrained(tiny_base_fp32)
    padded.resize_token_embeddings(448, mean_resizing=False)
    shutil.copytree(tiny_base_fp32, tmp_path / "padded")
    padded.save_pretrained(tmp_path / "padded")
    plain = eager.open(Model(str(tiny_base_fp32)), eager.Params())
    engine = opened(Model(str(tiny_base_fp32)), tmp_path / "padded")
    assert ask(engine, 12) == ask(plain, 12)
    assert all(answer.accepted for answer in engine.generate(ids(engine), 12, False))
    for each in (engine, plain):
        each.close()


def test_the_room_is_the_smaller_of_both_models(tiny_base_fp32: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(tiny_base_fp32, tmp_path / "draft", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = GPT2Config(vocab_size=384, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "draft")
    engine = opened(Model(str(tiny_base_fp32)), tmp_path / "draft")
    with pytest.raises(BadInput, match="32 positions"):
        engine.generate(ids(engine), 32, False)
    engine.close()


# ---- servers -----------------------------------------------------------------------------------


def test_servers_open_the_draft_with_their_own_options() -> None:
    speculation = Speculation(tokens=5, draft=Folder("/models/a draft"))
    served, _ = vllm.command(Model("model"), vllm.speculating(vllm.Params(), speculation), 8000, ())
    config = json.loads(served[served.index("--speculative-config") + 1])
    assert config == {"method": "draft_model", "model": "/models/a draft", "num_speculative_tokens": 5}
    params = llamacpp_server.speculating(llamacpp_server.Params(args="--mlock", gpu_layers=7), speculation)
    words = llamacpp_server.command(Model("model"), params, 8000, "llama-server", 2, False)
    assert words[words.index("--mlock") :] == [
        *("--mlock", "--spec-type", "draft-simple", "--spec-draft-model", f"/models/a draft/{gguf.WEIGHTS}"),
        *("--spec-draft-n-max", "5", "--spec-draft-ngl", "7"),
    ]


def test_vllm_takes_only_a_draft_with_as_many_tokens(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [])
    draft = Path(shutil.copytree(tiny_base, tmp_path / "draft"))
    vllm.check_draft(tiny_base, draft)
    edited(draft / "config.json", lambda config: config.update(vocab_size=config["vocab_size"] + 64))
    with pytest.raises(BadInput, match="vocab_size"):
        vllm.check_draft(tiny_base, draft)
    shutil.copyfile(tiny_base / "config.json", draft / "config.json")
    edited(draft / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(BadInput, match="bitsandbytes"):
        vllm.check_draft(tiny_base, draft)


def installed(name: str) -> Any:
    """The mark of a test of the real engine."""
    lacking, how = environments.lacking(plugins.catalogue()[name])
    absent = pytest.mark.skipif(bool(lacking) or not BASE.exists(), reason=how or "make models")
    return lambda test: pytest.mark.engines(absent(test))


def answered(name: str, model: Path, **params: Any) -> list[Generation]:
    """The real engine, with the model as its own draft, answers as it does without, one by one and together."""
    plain = Remote(name, Model(str(model)), **params)
    asked = ids(plain)
    expected = [answer.tokens for answer in plain.generate(asked, 24, False)]
    plain.close()
    engine = Remote(name, Model(str(model)), Speculation(tokens=3, draft=Folder(str(model))), **params)
    answers = [engine.generate([prompt], 24, False)[0] for prompt in asked]
    together = engine.generate(asked, 24, False)
    engine.close()
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in together] == expected
    return answers


@installed("llamacpp_server")
def test_the_real_llamacpp_answers_the_same_with_a_draft(tiny_base_fp32: Path, tmp_path: Path) -> None:
    model = Model(str(tiny_base_fp32))
    single.transform(TransformJob(plugin="gguf", params={"type": "f32"}, model=model, out=str(tmp_path / "f32")))
    for answer in answered("llamacpp_server", tmp_path / "f32", slots=3, context=256):
        assert answer.accepted >= 15 and answer.steps <= 8, "what it proposes to itself is right"


@installed("vllm")
def test_the_real_vllm_answers_the_same_with_a_draft() -> None:
    answered("vllm", BASE, max_model_len=256, args="--dtype float32")


# ---- a recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tried", "batch", "why", "hint"),
    [
        ("[merge, {speculate: {draft: d}}, {engine: compiled}]", 1, "compiled takes no draft model", "eager"),
        ("[merge, {speculate: {draft: d}}, {engine: continuous}]", 1, "continuous does not speculate", "eager"),
        ("[merge, {speculate: {draft: d}}]", 8, "one prompt at a time, and chat has a batch", "vllm"),
        ("[merge, {speculate: {draft: d, answers: true}}]", 1, "a draft model looks nothing up", ""),
        ("[merge, {speculate: {draft: d, ngram: 5}}]", 1, "a draft model looks nothing up", ""),
        ("[merge, {speculate: {draft: ''}}]", 1, "must be text", ""),
    ],
)
def test_what_an_engine_cannot_do_with_a_draft_is_refused_by_name(tried: str, batch: int, why: str, hint: str) -> None:
    check_refused(why, hint, tried, batch)


def test_a_folder_is_relative_to_the_recipe_and_one_for_every_engine_that_takes_it() -> None:
    engines = {p.name for p in plugins.catalogue().values() if "draft" in p.speculates}
    assert engines == {"eager", "llamacpp_server", "vllm"}
    (step,) = chain("[merge, {speculate: {draft: ../small}}, {engine: vllm}]", batch=8).variants["tried"].policies
    assert plugins.folders(step) == {"draft": Path("../small")}
    (bare,) = chain("[merge, speculate]").variants["tried"].policies
    assert plugins.folders(bare) == {}


def test_a_good_draft_checks_out(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", recipe, "--no-forecast") == 0
    assert "drafts/small" in "".join(capsys.readouterr().out.split())


def gone(draft: Path) -> None:
    shutil.rmtree(draft)


def no_model(draft: Path) -> None:
    (draft / "config.json").unlink()


def not_causal(draft: Path) -> None:
    edited(draft / "config.json", lambda config: config.update(architectures=["LlamaForSequenceClassification"]))


def other_words(draft: Path) -> None:
    def swap(read: Any) -> None:
        words = read["model"]["vocab"]
        words["e"], words["a"] = words["a"], words["e"]

    edited(draft / "tokenizer.json", swap)


def one_word_more(draft: Path) -> None:
    new = {"id": 100_000, "content": "<<own>>", "special": True}
    edited(draft / "tokenizer.json", lambda read: read["added_tokens"].append(new))


def of_llamacpp(draft: Path) -> None:
    (draft / "model.safetensors").rename(draft / gguf.WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (gone, "speculate: draft: there is no folder"),
        (no_model, "has no config.json"),
        (not_causal, "is not a causal language model"),
        (other_words, "has another tokenizer than the model"),
        (one_word_more, "'<<own>>' has the id 100000 in the draft's and none in the model's"),
        (of_llamacpp, "holds gguf weights"),
    ],
)
def test_a_draft_that_cannot_work_is_refused_before_anything_starts(
    recipe: Path, damage: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(recipe.parent / "drafts" / "small")
    assert command("run", recipe, "--results", recipe.parent / "results") == 2
    err = errors(capsys)
    assert says in err and "variant drafted" in err and "hint:" in err
    assert not (recipe.parent / "results").exists()


def test_llamacpp_wants_the_draft_as_gguf(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain_ = "[merge, {gguf: {type: f32}}, {speculate: {draft: drafts/small}}, {engine: llamacpp_server}]"
    recipe.write_text(RECIPE.replace("minimize", f"  served: {chain_}\nminimize"))
    assert command("check", recipe, "--no-forecast") == 2
    err = errors(capsys)
    assert "variant served: draft:" in err and f"holds no {gguf.WEIGHTS}" in err and "quantize --method gguf" in err


def test_tokenizers_of_one_file_are_compared_by_their_bytes(tmp_path: Path) -> None:
    home, draft = tmp_path / "home", tmp_path / "draft"
    for folder in (home, draft):
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    assert another_tokenizer(home, draft) == ""
    (draft / "tokenizer.model").write_bytes(b"others")
    assert "tokenizer.model" in another_tokenizer(home, draft)


# ---- what is measured is known by content --------------------------------------------------------


def changed(draft: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, draft / "model.safetensors", {"format": "pt"})


def test_other_weights_of_the_draft_are_another_run(recipe: Path) -> None:
    read, _ = read_recipe(recipe)
    before = run.planned(read)
    assert run.planned(read).key == before.key
    told = hashes.of(read, before.sources).folders
    changed(recipe.parent / "drafts" / "small")
    after = run.planned(read)
    assert after.key != before.key
    assert [b.id for b in after.plan.builds] == [b.id for b in before.plan.builds], "the draft shapes no artifact"
    assert told.keys() == {"drafted.speculate.draft"}
    assert hashes.of(read, after.sources).folders["drafted.speculate.draft"] != told["drafted.speculate.draft"]


def test_a_recipe_without_a_folder_keeps_its_key(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace(", draft: drafts/small", ""))
    read, _ = read_recipe(recipe)
    assert run.planned(read).sources.keys() == {"base", "adapter", "calibration"}


def test_a_recipe_that_moves_takes_its_folders_along() -> None:
    root = yaml.compose(RECIPE, Loader=yaml.SafeLoader)
    assert root is not None
    rewriting.make_absolute(root, Path("/recipes"))
    text = rewriting.written(root)
    assert "draft: /recipes/drafts/small" in text and "base: /recipes/base" in text
    assert yaml.safe_load(text)["variants"]["merged"] == ["merge"]


def test_a_run_is_judged_again_wherever_its_draft_lies_now(recipe: Path, tmp_path: Path) -> None:
    plan = planning.elsewhere(read_recipe(recipe)[0])
    elsewhere = tmp_path / "elsewhere" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(RECIPE)
    planning.rejudged(plan, read_recipe(elsewhere)[0])
    elsewhere.write_text(RECIPE.replace("drafts/small", "drafts/smaller"))
    with pytest.raises(BadInput, match=r"did not measure drafted.*smaller"):
        planning.rejudged(plan, read_recipe(elsewhere)[0])


# ---- a whole run -------------------------------------------------------------------------------


def test_a_run_judges_the_draft_and_tells_tokens_a_step(recipe: Path) -> None:
    results = recipe.parent / "results"
    assert command("run", recipe, "--results", results, "--quiet", "--no-forecast") in (0, 1, 3)
    (folder,) = (results / "runs").iterdir()
    decision = json.loads((folder / "decision.json").read_text())
    (drafted,) = (v for v in decision["variants"] if v["name"] == "drafted")
    by_rule = {verdict["rule"]: verdict for verdict in drafted["verdicts"]}
    assert by_rule["speculate.gain"]["against"] == by_rule["speculate.parity"]["against"] == "merged"
    assert drafted["figures"]["acceptance_length@chat"]["estimate"] >= 1
    assert json.loads((folder / "hashes.json").read_text())["folders"].keys() == {"drafted.speculate.draft"}
