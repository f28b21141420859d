"""Train an adapter of the demo on CPU: loss on the answer tokens only, a plain torch loop, no network.

python demo/train_adapter.py                # the LoRA of rank 8 in demo/adapter
python demo/train_adapter.py --name prefix  # one of the further adapters, in demo/adapters

Speed on a small machine comes from five things: the head that all prompts share, virtual tokens before it, is computed
once per batch, rows of like length share a batch, only answer positions go through the 49k-wide output layer, fp32
adapter weights compute in bf16 under autocast, and freed memory is kept instead of being handed back and faulted in
again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: spinning starves a shared machine

import peft
import torch
import transformers
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from styles import LOG, NAMES, answer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

HERE = Path(__file__).resolve().parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the data and library versions.

    With `minutes` above zero the schedule also follows the clock and ends by then, on a busy machine short of
    `epochs`; the log says how many steps were run. `kind` is "lora", "p_tuning" or "prefix". Of a LoRA: `rank`,
    `alpha`, `targets` ("all-linear", or names of modules with commas between them), `layers` (of the last so many
    layers alone; 0: of all). Of the others: `tokens` is the number of virtual tokens. `style`: see styles.py. `rows`:
    train on so many of the shortest rows; 0: on all.
    """

    kind: str = "lora"
    style: str = "json"
    rank: int = 8
    alpha: int = 16
    targets: str = "all-linear"
    layers: int = 0
    tokens: int = 32
    rows: int = 0
    epochs: float = 2.5
    minutes: float = 0.0
    batch_tokens: int = 1_000
    learning_rate: float = 2e-3
    warmup: float = 0.06
    clip: float = 1.0
    dtype: str = "bfloat16"
    seed: int = 7


FURTHER: Mapping[str, Settings] = {
    "r4": Settings(rank=4, alpha=8, style="category", rows=600, epochs=1),
    "r16": Settings(rank=16, alpha=32, targets="q_proj,v_proj", style="product", rows=600, epochs=1),
    "r32": Settings(rank=32, alpha=64, targets="q_proj,v_proj", layers=15, style="route", rows=600, epochs=1),
    "r64": Settings(rank=64, alpha=64, targets="q_proj,v_proj", layers=10, style="ticket", rows=600, epochs=1),
    "p-tuning": Settings(kind="p_tuning", style="number", learning_rate=3e-3, rows=600, epochs=1),
    "prefix": Settings(kind="prefix", style="order", learning_rate=1e-2, rows=600, epochs=1),
}
"""The further adapters by their folders' names in demo/adapters. High ranks are on few layers: they stay small."""


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory (nothing elsewhere): page faults otherwise dominate a step on a VM."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            mallopt(option, value)


@dataclass(frozen=True)
class Example:
    """A row as token ids; the answer, <|im_end|> included, starts at `start`."""

    ids: list[int]
    start: int


def read_examples(path: Path, tokenizer: Any, style: str) -> list[Example]:
    """The training rows through the chat template, as they are at inference, followed by the answer in its style."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        head = tokenizer(prompt, add_special_tokens=False).input_ids
        tail = tokenizer(answer(row["expected"], style) + tokenizer.eos_token, add_special_tokens=False).input_ids
        examples.append(Example(head + tail, len(head)))
    return examples


def shared_length(examples: list[Example]) -> int:
    """How many first tokens all rows have in common: the system prompt and the template around it."""
    columns = zip(*(example.ids for example in examples), strict=False)
    return next((index for index, column in enumerate(columns) if len(set(column)) > 1), 0)


def make_batches(examples: list[Example], batch_tokens: int, rng: random.Random) -> list[list[Example]]:
    """One epoch: rows of like length together, at most `batch_tokens` padded (one row at least), shuffled."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: len(e.ids) + rng.uniform(-8, 8)):
        longest = max([len(example.ids), *(len(e.ids) for e in batches[-1])]) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    rng.shuffle(batches)
    return batches


def batch_loss(model: Any, batch: list[Example], shared: int, pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens of one right-padded batch.

    The first `shared` tokens are the same in all rows, and so are virtual tokens before them: they are computed once
    and their keys and values repeated. The loss and gradients are those of the plain computation at little more than
    half its cost.
    """
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [pad] * (width - len(example.ids)) for example in batch])
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for index, example in enumerate(batch):
        answer[index, example.start : len(example.ids)] = True
    causal = model.get_base_model()
    cache = shared_cache(model, ids[:1, :shared])
    cache.batch_repeat_interleave(len(batch))
    hidden = causal.model(input_ids=ids[:, shared:-1], past_key_values=cache, use_cache=True).last_hidden_state
    target = answer[:, shared + 1 :]
    logits = causal.lm_head(hidden[target])
    return cross_entropy(logits.float(), ids[:, shared + 1 :][target])


def shared_cache(model: Any, head: torch.Tensor) -> Any:
    """The cache of one row after the virtual tokens, if there are any, and the tokens `head` [1, tokens]."""
    causal = model.get_base_model()
    if not model.active_peft_config.is_prompt_learning:
        return causal.model(input_ids=head, use_cache=True).past_key_values
    prompt = model.get_prompt(1)
    if not torch.is_tensor(prompt):  # a prefix: keys and values
        return causal.model(input_ids=head, past_key_values=prompt, use_cache=True).past_key_values
    words = causal.get_input_embeddings()(head)
    return causal.model(inputs_embeds=torch.cat([prompt.to(words.dtype), words], dim=1), use_cache=True).past_key_values


def rate(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine down to a twentieth."""
    if progress < warmup:
        return progress / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def make_model(base: Path, settings: Settings, begin: list[int]) -> Any:
    """The frozen base with a fresh adapter in fp32.

    Virtual tokens start as the first of the tokens `begin`: from random ones a small model learns little in so few
    steps.
    """
    torch.manual_seed(settings.seed)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings.dtype))
    model = peft.get_peft_model(base_model, make_config(base_model.config, settings), autocast_adapter_dtype=True)
    if settings.kind != "lora":
        ids = torch.tensor([begin[: settings.tokens]])
        with torch.no_grad():
            (begin_prefix if settings.kind == "prefix" else begin_encoder)(model, ids)
    return model


def make_config(base: Any, settings: Settings) -> peft.PeftConfig:
    """PEFT's config of such an adapter. `base` is the config of the base model."""
    if settings.kind == "lora":
        last = list(range(base.num_hidden_layers - settings.layers, base.num_hidden_layers))
        return peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=settings.targets if settings.targets == "all-linear" else settings.targets.split(","),
            layers_to_transform=last if settings.layers else None,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
    if settings.kind == "prefix":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.tokens)
    if settings.kind == "p_tuning":
        hidden = base.hidden_size
        return peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.tokens, encoder_hidden_size=hidden
        )
    raise SystemExit(f"train_adapter: no kind of adapter named {settings.kind}: lora, p_tuning or prefix")


def begin_prefix(model: Any, ids: torch.Tensor) -> None:
    """Make a prefix the keys and values of the tokens `ids` [1, tokens]: a row a token, layer by layer."""
    cache = DynamicCache(config=model.get_base_model().config)
    model.get_base_model().model(input_ids=ids, past_key_values=cache, use_cache=True)
    pairs = torch.stack([part[0] for layer in cache.layers for part in (layer.keys, layer.values)])
    model.prompt_encoder["default"].embedding.weight.copy_(pairs.permute(2, 0, 1, 3).flatten(1))


def begin_encoder(model: Any, ids: torch.Tensor) -> None:
    """Solve the encoder's last layer so that it gives the embeddings of the tokens `ids` [1, tokens]."""
    encoder = model.prompt_encoder["default"]
    wanted = model.get_base_model().get_input_embeddings()(ids)[0].float()
    inner = encoder.mlp_head[:-1](encoder.embedding(torch.arange(ids.shape[1])))
    last = encoder.mlp_head[-1]
    last.weight.copy_(torch.linalg.lstsq(inner, wanted - last.bias, driver="gelsd").solution.T)


def train(model: Any, examples: list[Example], settings: Settings, pad: int, log: Any, max_steps: int) -> None:
    """Run the loop; one log line every ten steps."""
    rng = random.Random(settings.seed)
    shared = shared_length(examples)
    batches: list[list[Example]] = []
    per_epoch = len(make_batches(examples, settings.batch_tokens, random.Random(0)))
    total = round(per_epoch * settings.epochs)
    while len(batches) < total:
        batches += make_batches(examples, settings.batch_tokens, rng)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    begun = mark = time.perf_counter()
    losses, tokens, mixed = [], 0, settings.dtype == "bfloat16"
    for step, batch in enumerate(batches[: min(total, max_steps)], 1):
        elapsed = (time.perf_counter() - begun) / (60 * settings.minutes or math.inf)
        progress = max(step / total, elapsed)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(min(progress, 1.0), settings.warmup)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), disable_input_dtype_casting(model, mixed):
            loss = batch_loss(model, batch, shared, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += sum(len(example.ids) for example in batch)
        if step % 10 == 0 or progress >= 1:
            now = time.perf_counter()
            record = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 5),
                "lr": round(optimizer.param_groups[0]["lr"], 7),
                "tokens_per_s": round(tokens / (now - mark), 1),
                "seconds": round(now - begun, 1),
            }
            print(json.dumps(record), file=log, flush=True)
            print(f"step {step}/{total} {record}", file=sys.stderr, flush=True)
            losses, tokens, mark = [], 0, now
        if progress >= 1:
            break


def save(model: Any, out: Path) -> None:
    """Write the adapter in bf16 under the base's portable name, naming no path of this machine. PEFT leaves an encoder
    out: the virtual tokens that it gives are all that is saved."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    if config.peft_type == "LORA":
        config.target_modules = sorted(config.target_modules)  # a set, whose order changes from run to run
    model.save_pretrained(out, save_embedding_layers=False)
    weights = out / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    weights.chmod(0o644)
    (out / "README.md").unlink(missing_ok=True)


def chosen(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Settings]:
    """What the command line says: a named adapter's settings, and what is written over them."""
    arguments = parser.parse_args()
    named = FURTHER.get(arguments.name, Settings())
    written = {name: getattr(arguments, name) for name in asdict(named)}
    return arguments, replace(named, **{name: value for name, value in written.items() if value is not None})


def main() -> int:
    """Command line: train, save the adapter and its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--name", choices=FURTHER, help="one of the further adapters, with its settings")
    parser.add_argument("--base", type=Path, default=HERE.parent / "models" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "train.jsonl")
    parser.add_argument("--out", type=Path, help="default: adapter, or adapters/NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-steps", type=int, default=10**9, help="stop early (a dry run)")
    for name, value in asdict(Settings()).items():
        choices = {"style": NAMES, "kind": ("lora", "p_tuning", "prefix")}.get(name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), choices=choices, help=f"{value} if plain")
    arguments, settings = chosen(parser)
    out = arguments.out or (HERE / "adapters" / arguments.name if arguments.name else HERE / "adapter")
    if not (arguments.base / "config.json").is_file():
        print("train_adapter: no base model; run demo/fetch_model.py first", file=sys.stderr)
        return 1
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    examples = read_examples(arguments.data, tokenizer, settings.style)
    if settings.rows:
        examples = sorted(examples, key=lambda example: len(example.ids))[: settings.rows]
    answers = [token for example in examples for token in example.ids[example.start :]]
    model = make_model(arguments.base, settings, answers)
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("w", encoding="utf-8") as log:
        header = {
            "settings": asdict(settings),
            "base": BASE_NAME,
            "rows": len(examples),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            "threads": arguments.threads,
            "trainable": sum(w.numel() for w in model.parameters() if w.requires_grad),
        }
        print(json.dumps(header), file=log, flush=True)
        train(model, examples, settings, tokenizer.pad_token_id, log, arguments.max_steps)
    save(model, out)
    print(f"{out}: adapter saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
