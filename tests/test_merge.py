"""Merging: every PEFT type and architecture gives the live adapter's logits, or is refused with what to do instead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.rounding import round_once
from helpers.tiny_models import make_lora
from xxhash import xxh3_128_hexdigest

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.merging import blocks
from peftopt.merging.modules import Hollow
from peftopt.models import hf
from peftopt.models.adapter import NO_DELTA
from peftopt.models.checkpoint import Draft, open_model
from peftopt.records import Model
from peftopt.transforms import merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}

ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {**LLAMA, "tie_word_embeddings": False}, LINEAR),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}, LINEAR),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}, LINEAR),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}, ["c_attn", "c_proj", "c_fc"]),
    "opt": (
        "OPT",
        {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}, LINEAR[:4]),
}


def peft_config(kind: str, **settings: Any) -> Any:
    import peft

    return getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random fp32 model of each architecture, made when it is first asked for."""
    root = tmp_path_factory.mktemp("architectures")

    def base(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            import torch
            import transformers

            family, settings, _ = ARCHITECTURES[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(initializer_range=0.2, **settings)
            model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
                config
            )
            model.save_pretrained(folder)
        return folder

    return base


def make_adapter(base: Path, folder: Path, config: Any, std: float = 0.05) -> Path:
    """An adapter of any type on `base`, every trainable weight moved by noise of size `std`."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    adapted.save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 63)[None]).logits


def merged(base: Path, *adapters: Path, out: Path, **params: Any) -> Path:
    settings = merge.Params(**{"certify": "blocks", **params})
    merge.transform(Model(str(base), tuple(map(str, adapters))), settings, out, [], 0)
    assert certificate(out)["passed"], certificate(out)["checks"]
    assert_as_certified(out)
    return out


def assert_as_certified(out: Path) -> None:
    """Every tensor on disk is there with the dtype, shape and digest that the certificate gives, and no other."""
    with open_model(out) as weights:
        found = {}
        for name, entry in weights.entries.items():
            weights.read(entry, 0, memoryview(data := bytearray(entry.nbytes)))
            found[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "xxh3_128": xxh3_128_hexdigest(data)}
    assert certificate(out)["tensors"] == found


def certificate(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "parity.json").read_text())
    return found


def assert_same_model(base: Path, adapter: Path, out: Path) -> None:
    """The merged and reloaded model is the live adapter (1e-4), and not the base."""
    live, plain, found = logits(base, adapter), logits(base), logits(out)
    assert (live - plain).abs().max() > 0.01, "the adapter must do something"
    assert (found - live).abs().max() < 1e-4


# ---- types -------------------------------------------------------------------------------------

Q_V = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
TYPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", {"r": 4, "target_modules": LINEAR}),
    "rslora": ("Lora", {"r": 4, "use_rslora": True, "target_modules": LINEAR}),
    "rank and alpha patterns": (
        "Lora",
        {
            "r": 4,
            "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"k_proj": 3},
            "target_modules": LINEAR,
        },
    ),
    "lora by pattern": ("Lora", {"r": 4, "target_modules": r".*\.self_attn\.(q|v)_proj"}),
    "lora on some layers": ("Lora", {"r": 4, "layers_to_transform": [1], **Q_V}),
    "lora with bias": ("Lora", {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "lora of gaussian init": ("Lora", {"r": 4, "init_lora_weights": "gaussian", **Q_V}),
    "dora": ("Lora", {"r": 4, "use_dora": True, **Q_V}),
    "lora and a whole norm": ("Lora", {"r": 4, "modules_to_save": ["norm", "lm_head"], **Q_V}),
    "lora on embeddings": ("Lora", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "lora on the head": ("Lora", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "lora and tokens": ("Lora", {"r": 4, "trainable_token_indices": [5, 7], **Q_V}),
    "adalora": ("AdaLora", {"init_r": 6, "target_r": 4, "total_step": 10, **Q_V}),
    "loha": ("LoHa", {"r": 4, **Q_V}),
    "lokr": ("LoKr", {"r": 4, **Q_V}),
    "vera": ("Vera", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
    "oft": ("OFT", {"oft_block_size": 8, "use_cayley_neumann": False, **Q_V}),
    "boft": ("BOFT", {"boft_block_size": 8, **Q_V}),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln tuning": ("LNTuning", {"target_modules": ["input_layernorm", "norm"]}),
    "fourierft": ("FourierFT", {"n_frequency": 50, **Q_V}),
    "hra": ("HRA", {"r": 4, **Q_V}),
    "vblora": ("VBLoRA", {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2, **Q_V}),
    "miss": ("Miss", {"r": 4, **Q_V}),
    "randlora": ("RandLora", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
    "trainable tokens": ("TrainableTokens", {"token_indices": [4, 5, 9], "target_modules": ["embed_tokens"]}),
    "shira": ("Shira", {"r": 4, **Q_V}),
    "c3a": ("C3A", {"block_size": 16, **Q_V}),
    "road": ("Road", {"group_size": 16, **Q_V}),
    "waveft": ("WaveFT", {"n_frequency": 50, **Q_V}),
    "delora": ("Delora", {"r": 4, **Q_V}),
    "gralora": ("Gralora", {"r": 4, "gralora_k": 2, **Q_V}),
    "osf": ("OSF", {"effective_rank": 8, **Q_V}),
    "tinylora": ("TinyLora", {"r": 2, **Q_V}),
    "psoft": ("Psoft", {"r": 8, **Q_V}),
    "hira": ("Hira", {"r": 4, **Q_V}),
    "adamss": ("Adamss", {"r": 4, **Q_V}),
    "unilora": ("UniLora", {"r": 4, **Q_V}),
    "glora": ("Glora", {"r": 4, **Q_V}),
    "frod": ("Frod", {**Q_V}),
    "deft": ("Deft", {"r": 4, **Q_V}),
    "beft": ("Beft", {"target_modules": ["v_proj"]}),
    "peanut": ("Peanut", {"r": 4, **Q_V}),
    "supertuning": ("Supertuning", {**Q_V}),
    "pvera": ("Pvera", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
}


BIASED = ("lora with bias", "beft")
"""Types whose delta has a bias, which only a base with biases can take."""


@pytest.mark.parametrize("name", TYPES)
def test_every_type_merges_to_the_live_adapter(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    kind, settings = TYPES[name]
    if name == "adamss":
        pytest.importorskip("sklearn")
    base = bases("qwen2" if name in BIASED else "llama")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config(kind, **settings))
    assert_same_model(base, adapter, merged(base, adapter, out=tmp_path / "out"))


def test_an_adapter_whose_code_peft_cannot_build_leaves_the_compilers_as_they_were(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CXX=gcc, which PEFT leaves behind for BOFT, TorchInductor's C++ does not link."""
    kind, settings = TYPES["boft"]
    adapter = make_adapter(bases("llama"), tmp_path / "adapter", peft_config(kind, **settings))
    monkeypatch.setenv("CC", "mine")
    monkeypatch.delenv("CXX", raising=False)
    hf.attach(hf.load(str(bases("llama"))), str(adapter))
    assert os.environ["CC"] == "mine" and "CXX" not in os.environ


def test_the_types_are_all_that_peft_has() -> None:
    """A new PEFT type has to be put in the matrix, or among those that cannot be merged."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {f"{kind}Config" for kind, _ in TYPES.values()}
    tested = {kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__name__ in names}
    assert {kind.value for kind in peft.PeftType} == tested | NO_DELTA.keys()


# ---- architectures -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_merges_to_the_live_adapter(
    name: str, settings: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(name)
    config = peft_config("Lora", r=4, target_modules=ARCHITECTURES[name][2], **settings)
    adapter = make_adapter(base, tmp_path / "adapter", config)
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    assert (out / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    assert ("blocks" in certificate(out)["method"]) == (not settings and name != "gpt2")


def test_fused_experts_are_merged_and_split_again(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft_config("Lora", r=2, target_modules=["q_proj"], target_parameters=experts)
    adapter = make_adapter(base, tmp_path / "adapter", config)
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    with open_model(base) as before, open_model(out) as after:
        assert [(e.name, e.shape) for e in before.entries.values()] == [
            (e.name, e.shape) for e in after.entries.values()
        ]


def test_a_checkpoint_with_older_names_is_understood(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 as it lies on the hub has no `transformer.` before its names."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(bases("gpt2"), base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    adapter = make_adapter(base, tmp_path / "adapter", peft_config("Lora", r=4, target_modules=["c_attn", "c_fc"]))
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    assert "h.0.attn.c_attn.weight" in open_model(out).entries


# ---- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_tied_embeddings_stay_tied_exactly_when_they_are_still_one(
    settings: dict[str, Any], tied: bool, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config("Lora", r=4, **settings))
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in open_model(out).entries) is not tied


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_adapter_with_new_tokens_brings_its_embeddings(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base, ids = bases(name), torch.arange(3, 63)[None]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(100)
    adapted = get_peft_model(model, peft_config("Lora", r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with torch.inference_mode():
        live = adapted.eval()(input_ids=ids).logits
    out = merged(base, tmp_path / "adapter", out=tmp_path / "out")
    assert logits(out).shape[-1] == 100
    assert (logits(out) - live).abs().max() < 1e-4
    assert isinstance(adapted, PeftModel)


# ---- several adapters, dtypes, shards ----------------------------------------------------------


def lora_pair(base: Path, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """Two different LoRAs on one base."""
    a = make_adapter(base, tmp_path / "a", peft_config("Lora", r=4, **Q_V, **settings))
    b = make_adapter(base, tmp_path / "b", peft_config("Lora", r=2, target_modules=["q_proj", "up_proj"]), std=0.1)
    return a, b


@pytest.mark.parametrize(
    ("combination", "settings"), [("cat", {}), ("cat", {"use_rslora": True}), ("svd", {}), ("ties_svd", {})]
)
def test_several_adapters_merge_by_weight_as_peft_combines_them(
    combination: str, settings: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = bases("llama")
    a, b = lora_pair(base, tmp_path, **settings)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(a), "a")
    live.load_adapter(str(b), "b")
    extra = {"density": 0.5} if combination.startswith("ties") else {}
    live.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type=combination, **extra)
    live.set_adapter("both")
    for layer in live.modules():
        if hasattr(layer, "set_scale"):
            layer.scaling["both"] = 1.0  # PEFT 0.21 takes the root of the rank here when the adapters are rsLoRA
    with torch.inference_mode():
        expected = live.eval()(input_ids=torch.arange(3, 63)[None]).logits
    out = merged(base, a, b, out=tmp_path / "out", weights="0.7,0.3", combination=combination)
    assert (logits(out) - expected).abs().max() < 1e-4
    assert [x["weight"] for x in certificate(out)["adapters"]] == [0.7, 0.3]


def test_adapters_that_do_not_add_up_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    lora = make_adapter(base, tmp_path / "lora", peft_config("Lora", r=4, **Q_V))
    loha = make_adapter(base, tmp_path / "loha", peft_config("LoHa", r=4, **Q_V))
    with pytest.raises(BadInput, match="different types") as refused:
        merged(base, lora, loha, out=tmp_path / "out")
    assert "one, then the other" in refused.value.hint
    with pytest.raises(BadInput, match="LOHA adapters cannot be weighted"):
        merged(base, loha, out=tmp_path / "out2", weights="0.5")
    for weights in ("1", "1,x", "1,nan"):
        with pytest.raises(BadInput, match="weights"):
            merged(base, lora, lora, out=tmp_path / "out3", weights=weights)


def exact_sums(base: Path, adapter: Path) -> dict[str, Any]:
    """The merged weights in fp64: W + alpha / r * B A."""
    from safetensors.torch import load_file

    sums = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in (key for key in factors if ".lora_A." in key):
        a, b = factors[key].double(), factors[key.replace(".lora_A.", ".lora_B.")].double()
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        sums[name] += config["lora_alpha"] / config["r"] * (b @ a)
    return sums


def test_a_tensor_of_several_pieces_comes_out_as_one_of_one(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config(TYPES["lora"][0], **TYPES["lora"][1]))
    whole = merged(base, adapter, out=tmp_path / "whole", dtype="bf16")
    monkeypatch.setattr(blocks, "PIECE", 256)
    pieces = merged(base, adapter, out=tmp_path / "pieces", dtype="bf16")  # its digests too are those of the files
    assert (whole / "model.safetensors").read_bytes() == (pieces / "model.safetensors").read_bytes()


def test_lora_is_merged_and_certified_without_loading_torch(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from peftopt.records import Model
from peftopt.transforms import merge
merge.transform(Model({str(tiny_base)!r}, ({str(tiny_lora)!r},)), merge.Params(certify="blocks"), Path("out"), [], 0)
print(sorted({{"torch", "transformers", "peft"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert certificate(tmp_path / "out")["passed"]


def test_a_lora_is_rounded_to_the_nearest_of_the_exact_sum_where_weight_and_delta_cancel(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    adapter = make_adapter(base, tmp_path / "adapter", peft_config(TYPES["lora"][0], **TYPES["lora"][1]))
    weights = load_file(base / "model.safetensors")
    for name, value in exact_sums(base, adapter).items():
        delta = value - weights[name].double()
        if delta.abs().max() > 0:
            weights[name] = (weights[name] * 1e-3 - delta).bfloat16()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    found = load_file(merged(base, adapter, out=tmp_path / "out", dtype="bf16") / "model.safetensors")
    for name, exact in exact_sums(base, adapter).items():
        assert (found[name] == round_once(exact, found[name].dtype)).all(), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("dtype", "stored", "word"), [("bf16", "BF16", "bfloat16"), ("fp16", "F16", "float16")])
def test_dtype_rounds_once_and_says_so_in_the_config(
    kind: str, dtype: str, stored: str, word: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config(TYPES[kind][0], **TYPES[kind][1]))
    exact = load_file(merged(base, adapter, out=tmp_path / "exact") / "model.safetensors")
    out = merged(base, adapter, out=tmp_path / "out", dtype=dtype)
    rounded = load_file(out / "model.safetensors")
    assert {e.dtype for e in open_model(out).entries.values()} == {stored}
    if kind == "lora":  # whose sums are not taken from fp32: it would round some near ties the other way
        exact = exact_sums(base, adapter)
    assert all(
        (rounded[name] == round_once(value.double(), rounded[name].dtype)).all() for name, value in exact.items()
    )
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == word


@pytest.mark.parametrize("kind", ["lora", "dora", "lora on embeddings"])
def test_shards_stay_shards_and_strangers_stay_out(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(bases("llama")).save_pretrained(base, max_shard_size="100kB")
    shutil.copyfile(base / "model-00001-of-00004.safetensors", base / "consolidated.safetensors")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config(TYPES[kind][0], **TYPES[kind][1]))
    out = merged(base, adapter, out=tmp_path / "out")
    assert_same_model(base, adapter, out)
    shards = {f.name for f in base.glob("model-*.safetensors")}
    assert {f.name for f in out.glob("*.safetensors")} == shards and len(shards) > 2
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, out))
    assert before["weight_map"] == after["weight_map"]
    assert before["metadata"]["total_size"] == after["metadata"]["total_size"]


def test_untouched_tensors_and_headers_are_the_same_bytes(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config("Lora", r=4, target_modules=["q_proj"]))
    out = merged(base, adapter, out=tmp_path / "out")
    ours, theirs = (f.joinpath("model.safetensors").read_bytes() for f in (out, base))
    for entry in open_model(base).entries.values():
        here = slice(entry.start, entry.start + entry.nbytes)
        assert (ours[here] == theirs[here]) is ("q_proj" not in entry.name), entry.name
    first = min(e.start for e in open_model(base).entries.values())
    assert ours[:first] == theirs[:first]


def test_what_serving_needs_comes_along(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    out = merged(tiny_base, tiny_lora, out=tmp_path / "out")
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (out / file).read_bytes() == (tiny_base / file).read_bytes(), file
    card = (out / "README.md").read_text()
    assert "Merged by peftopt" in card and certificate(out)["adapters"][0]["sha256"] in card


def test_the_tokenizer_that_the_adapter_was_trained_with_comes_along(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    shutil.copytree(tiny_lora, lora)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / file, lora / file)
    (lora / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    out = merged(tiny_base, lora, out=tmp_path / "out")
    assert (out / "chat_template.jinja").read_text().endswith("!")


# ---- refusals ----------------------------------------------------------------------------------


def prompt_config(kind: str) -> Any:
    settings: dict[str, dict[str, Any]] = {
        "PromptEncoder": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
        "PromptTuning": {"num_virtual_tokens": 4},
        "PrefixTuning": {"num_virtual_tokens": 4},
        "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    }
    return peft_config(kind, **settings[kind])


@pytest.mark.parametrize("kind", ["PromptEncoder", "PromptTuning", "PrefixTuning", "CPT"])
@pytest.mark.fault(33, "refused with what to do instead")
def test_prompt_methods_are_refused_with_what_to_do_instead(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_adapter(bases("llama"), tmp_path / "adapter", prompt_config(kind))
    with pytest.raises(BadInput, match="has no weight delta") as refused:
        merged(bases("llama"), adapter, out=tmp_path / "out")
    assert "bake it" in refused.value.hint


SETTINGS: Mapping[str, dict[str, Any]] = {
    "only after its invocation tokens": {"alora_invocation_tokens": [3, 4]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "unconverted after 'pissa'": {"init_lora_weights": "pissa"},
    "unconverted after 'olora'": {"init_lora_weights": "olora"},
    "r: 5 in adapter_config": {"r": 5},
    "which target_modules does not name": {"target_modules": ["q_proj"]},
    "was trained on a MistralForCausalLM": {"auto_mapping": {"base_model_class": "MistralForCausalLM"}},
    "Arrow routes each token": {"arrow_config": {"top_k": 2}},
    **{rf"\({kind}\) cannot be merged": {"peft_type": kind} for kind in NO_DELTA},
}


@pytest.mark.parametrize("why", SETTINGS)
def test_a_config_that_cannot_be_merged_is_refused(why: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    shutil.copytree(tiny_lora, lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | SETTINGS[why]))
    with pytest.raises(BadInput, match=why) as refused:
        merged(tiny_base, lora, out=tmp_path / "out")
    assert refused.value.hint


@pytest.mark.fault(23, "refused by name and revision, unless `--allow-base-mismatch`")
def test_a_foreign_base_is_refused_by_name_and_revision_unless_allowed(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    base = tmp_path / "models--org--other" / "snapshots" / "0123456789abcdef"
    shutil.copytree(tiny_base, base)
    lora = tmp_path / "lora"
    shutil.copytree(tiny_lora, lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    for said, why in (
        ({"base_model_name_or_path": "org/mine"}, "trained on org/mine, and the base is org/other"),
        ({"base_model_name_or_path": "org/other", "revision": "fedcba98"}, "trained on revision fedcba98"),
    ):
        (lora / "adapter_config.json").write_text(json.dumps(config | said))
        with pytest.raises(BadInput, match=why) as refused:
            merged(base, lora, out=tmp_path / "out")
        assert "--allow-base-mismatch" in refused.value.hint
    merged(base, lora, out=tmp_path / "out", allow_base_mismatch=True)


@pytest.mark.fault(19, "a base with other weights than the adapter's card names is refused")
def test_a_base_with_other_weights_than_the_one_in_training_is_refused(
    bases: Callable[[str], Path], tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    merged(other, tiny_lora, out=tmp_path / "same")
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="whose weights are not those of"):
        merged(other, tiny_lora, out=tmp_path / "out")
    merged(other, tiny_lora, out=tmp_path / "out", allow_base_mismatch=True)


def with_value(source: Path, out: Path, file: str, tensor: str, value: float) -> Path:
    """A copy of a folder in which one element of the first tensor of that name is `value`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    weights = load_file(out / file)
    name = next(n for n in weights if tensor in n)
    weights[name].view(-1)[0] = value
    save_file(weights, out / file, {"format": "pt"})
    return out


@pytest.mark.parametrize("tensor", ["q_proj", "norm"])
@pytest.mark.fault(20, "refused with the weight's name")
def test_a_weight_that_is_not_finite_is_refused_by_name(
    tensor: str, tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    base = with_value(tiny_base, tmp_path / "base", "model.safetensors", tensor, float("nan"))
    with pytest.raises(BadInput, match=rf"weight \S*{tensor}\S* holds NaN"):
        merged(base, tiny_lora, out=tmp_path / "out")
    large = with_value(tiny_lora, tmp_path / "large", "adapter_model.safetensors", "lora_A", 1e20)
    huge = with_value(large, tmp_path / "lora", "adapter_model.safetensors", "lora_B", 1e20)
    with pytest.raises(BadInput, match="holds NaN or infinity"):
        merged(tiny_base, huge, out=tmp_path / "out2")


@pytest.mark.fault(25, "refused with what to do; a payload that would run does not")
@pytest.mark.fault(28, "refused; the layout of the hub's cache is understood")
def test_a_pickle_is_never_opened_and_a_link_never_followed(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    import pickle

    class Canary:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    lora = tmp_path / "lora"
    shutil.copytree(tiny_lora, lora)
    weights = lora / "adapter_model.safetensors"
    secret = tmp_path / "secret.safetensors"
    weights.rename(secret)
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(BadInput, match="never opened"):
        merged(tiny_base, lora, out=tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    weights.symlink_to(secret)
    with pytest.raises(BadInput, match="outside its folder"):
        merged(tiny_base, lora, out=tmp_path / "out")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"  # the hub's own layout is no stranger
    shutil.copytree(tiny_lora, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot.parent.parent / "blobs").mkdir()
    shutil.copyfile(secret, snapshot.parent.parent / "blobs" / "abc")
    (snapshot / weights.name).symlink_to("../../blobs/abc")
    merged(tiny_base, snapshot, out=tmp_path / "out")


@pytest.mark.fault(4, "what a merge takes is compared with what is free before it writes")
def test_a_disk_too_small_is_found_before_writing(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Full", (), {"f_bavail": 10, "f_frsize": full.f_frsize})())
    with pytest.raises(MissingEnvironment, match=r"GB free, and .* GB are needed"):
        merged(tiny_base, tiny_lora, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ---- the certificate ---------------------------------------------------------------------------


def test_a_full_certificate_compares_predictions(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    out = merged(tiny_base, tiny_lora, out=tmp_path / "out", certify="full")
    found = {check["name"]: check for check in certificate(out)["checks"]}
    assert found.keys() == {
        "adapter keys",
        "tensors",
        "finite",
        "differs from the base",
        "recomputed in fp64",
        "predictions",
    }
    values = found["predictions"]["values"]
    assert values["kl"] < values["kl_null"] < values["kl_base"]
    assert 0.8 < values["delta_survival"] < 1.2 and values["top1"] > 0.9
    assert found["differs from the base"]["values"] == {"changed": 14, "unchanged": []}


def test_a_folder_that_is_another_model_does_not_pass(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """The base passed off as the merge (verl#7285), and one tensor forgotten."""
    from peftopt.merging import certificate as parity
    from peftopt.merging.training import TrainingBase
    from peftopt.models.adapter import open_adapter

    out = merged(tiny_base, tiny_lora, out=tmp_path / "out")
    adapter = open_adapter(tiny_lora)

    def predictions(folder: Path) -> parity.Check:
        return parity.full(tiny_base, folder, [adapter], "cat", TrainingBase(), [])

    assert predictions(out).passed
    assert "not nearer to the adapter than the base" in predictions(tiny_base).detail
    assert not predictions(tiny_base).passed
    base, whole = open_model(tiny_base), open_model(out)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        forgot = tmp_path / name
        shutil.copytree(out, forgot)
        data = bytearray((forgot / "model.safetensors").read_bytes())
        entry = whole.entries[name]
        source = (tiny_base / "model.safetensors").read_bytes()
        start = base.entries[name].start
        data[entry.start : entry.start + entry.nbytes] = source[start : start + entry.nbytes]
        (forgot / "model.safetensors").write_bytes(data)
        assert not predictions(forgot).passed, name


def test_a_wrong_block_on_disk_fails_the_fp64_samples(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    from peftopt.merging import blocks
    from peftopt.merging import certificate as parity
    from peftopt.models.adapter import open_adapter, plain_pairs
    from peftopt.models.checkpoint import open_model

    base, adapter = open_model(tiny_base), open_adapter(tiny_lora)
    pairs = {f"{module}.weight": [pair] for module, pair in (plain_pairs(adapter) or {}).items()}
    with Draft(tmp_path / "out", base.files, base) as draft, blocks.Blocks(2) as loop:
        list(loop.transfer(base, draft, list(base.entries.values()), pairs))
        assert parity.recomputed(parity.sample_lora(base, draft, pairs)).passed
        list(loop.transfer(base, draft, list(base.entries.values()), {}))  # the base, undoing the merge
        assert not parity.recomputed(parity.sample_lora(base, draft, pairs)).passed


def test_what_is_merged_again_in_fp64_takes_no_more_room_than_the_largest_module(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sizes = Hollow.merged, {True: [0], False: [0]}

    def watched(hollow: Hollow, unit: str, exact: bool = False) -> Any:
        found = plain(hollow, unit, exact)
        sizes[exact].append(sum(value.nbytes for value in found.values()))
        return found

    monkeypatch.setattr(Hollow, "merged", watched)
    config = peft_config("Lora", r=4, use_dora=True, target_modules="all-linear")
    merged(bases("llama"), make_adapter(bases("llama"), tmp_path / "dora", config), out=tmp_path / "out")
    assert 0 < max(sizes[True]) <= max(sizes[False])


def test_a_preview_shows_each_delta_and_writes_nothing(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    found = merge.preview(Model(str(tiny_base), (str(tiny_lora),)), merge.Params())
    assert len(found) == 14 and all(0 < t["delta_norm"] < t["weight_norm"] for t in found)
    make_lora(tiny_base, tmp_path / "zero", std=0)
    still = merge.preview(Model(str(tiny_base), (str(tmp_path / "zero"),)), merge.Params())
    assert [t["delta_norm"] for t in still] == [0.0] * 14


# ---- 4-bit bases -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bit(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base saved in NF4 by bitsandbytes, and a LoRA trained on it."""
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    root = tmp_path_factory.mktemp("four-bit")
    scheme = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(bases("llama"), quantization_config=scheme, device_map="cpu")
    model.save_pretrained(root / "base")
    make_adapter(bases("llama"), root / "lora", peft_config("Lora", r=4, target_modules=LINEAR[:4]), std=0.2)
    return root / "base", root / "lora"


def test_a_merge_into_packed_weights_is_refused_and_into_dequantized_ones_done(
    four_bit: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, lora = four_bit
    with pytest.raises(BadInput, match=r"already quantized .* would round most of the delta away") as refused:
        merged(base, lora, out=tmp_path / "out")
    assert "--merge-base dequantized" in refused.value.hint
    out = merged(base, lora, out=tmp_path / "out", merge_base="dequantized", dtype="fp32", certify="full")
    opened = AutoModelForCausalLM.from_pretrained(base, device_map="cpu").dequantize()
    with torch.inference_mode():
        live = PeftModel.from_pretrained(opened, str(lora)).eval()
        expected = live(input_ids=torch.arange(3, 63)[None]).logits.float()
    assert (logits(out) - expected).abs().max() < 1e-4
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not [name for name in open_model(out).entries if "absmax" in name or "quant" in name]


def test_packed_weights_are_merged_in_place_only_when_forced(four_bit: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = four_bit
    out = merged(base, lora, out=tmp_path / "out", merge_base="in-place")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    found = {check["name"]: check for check in certificate(out)["checks"]}
    assert found["differs from the base"]["values"]["changed"] == 8
    values = found["predictions"]["values"]
    assert values["kl_null"] < values["kl"] < values["kl_base"], "rounding to 4 bits again shows"


def test_in_place_needs_packed_weights(tiny_base: Path, tiny_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no 4-bit weights"):
        merged(tiny_base, tiny_lora, out=tmp_path / "out", merge_base="in-place")


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_auto_keeps_the_base_that_is_nearer_to_the_adapter_in_training(
    scheme: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", peft_config("Lora", r=4, target_modules=LINEAR))
    out = tmp_path / "made" / "out"
    out.parent.mkdir()
    settings = {"merge_base": "auto", "scheme": scheme, "certify": "full"}
    merged(base, adapter, out=out, **settings)
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    check = next(c for c in certificate(out)["checks"] if c["name"] == "merge base")
    assert check["values"]["dequantized"] < check["values"]["full"]
    assert check["detail"].startswith("dequantized")
