"""Train the demo's LoRA adapter on CPU: loss on the answer tokens only, a plain torch loop, no network.

Speed on a small machine comes from five things: the head that all prompts share is computed once per batch, rows
of like length share a batch, only answer positions go through the 49k-wide output layer, fp32 adapter weights
compute in bf16 under autocast, and freed memory is kept instead of being handed back and faulted in again.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: spinning starves a shared machine

import peft
import torch
import transformers
from peft.helpers import disable_input_dtype_casting
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the data and library versions.

    With `minutes` above zero the schedule also follows the clock and ends by then, on a busy machine short of
    `epochs`; the log says how many steps were run.
    """

    rank: int = 8
    alpha: int = 16
    epochs: float = 2.5
    minutes: float = 0.0
    batch_tokens: int = 1_000
    learning_rate: float = 2e-3
    warmup: float = 0.06
    clip: float = 1.0
    dtype: str = "bfloat16"
    seed: int = 7


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


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """The training rows through the chat template, as they are at inference, followed by the answer."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        head = tokenizer(prompt, add_special_tokens=False).input_ids
        tail = tokenizer(row["expected"] + tokenizer.eos_token, add_special_tokens=False).input_ids
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

    The first `shared` tokens are the same in all rows, so they are computed once and their keys and values
    repeated: the loss and gradients are those of the plain computation at little more than half its cost.
    """
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [pad] * (width - len(example.ids)) for example in batch])
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for index, example in enumerate(batch):
        answer[index, example.start : len(example.ids)] = True
    causal = model.get_base_model()
    cache = causal.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    hidden = causal.model(input_ids=ids[:, shared:-1], past_key_values=cache, use_cache=True).last_hidden_state
    target = answer[:, shared + 1 :]
    logits = causal.lm_head(hidden[target])
    return cross_entropy(logits.float(), ids[:, shared + 1 :][target])


def rate(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine down to a twentieth."""
    if progress < warmup:
        return progress / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def make_model(base: Path, settings: Settings) -> Any:
    """The frozen base with a fresh LoRA in fp32 on every linear layer but the output."""
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings.dtype))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


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
    """Write the adapter under the base's portable name, naming no path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(config.target_modules)  # a set, whose order changes from run to run
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "adapter_model.safetensors").chmod(0o644)
    (out / "README.md").unlink(missing_ok=True)


def main() -> int:
    """Command line: train, save the adapter and its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=HERE.parent / "models" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "train.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "adapter")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-steps", type=int, default=10**9, help="stop early (a dry run)")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    settings = Settings(**{name: arguments[name] for name in asdict(Settings())})
    if not (arguments["base"] / "config.json").is_file():
        print("train_adapter: no base model; run demo/fetch_model.py first", file=sys.stderr)
        return 1
    keep_freed_memory()
    torch.set_num_threads(arguments["threads"])
    tokenizer = AutoTokenizer.from_pretrained(arguments["base"])
    examples = read_examples(arguments["data"], tokenizer)
    model = make_model(arguments["base"], settings)
    arguments["out"].mkdir(parents=True, exist_ok=True)
    with (arguments["out"] / "training_log.jsonl").open("w", encoding="utf-8") as log:
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
            "threads": arguments["threads"],
            "trainable": sum(w.numel() for w in model.parameters() if w.requires_grad),
        }
        print(json.dumps(header), file=log, flush=True)
        train(model, examples, settings, tokenizer.pad_token_id, log, arguments["max_steps"])
    save(model, arguments["out"])
    print(f"{arguments['out']}: adapter saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
