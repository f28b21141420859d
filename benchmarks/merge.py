"""What a merge costs: LoRA's time over `cp`, memory at two sizes (DoRA's too), error against fp64; and its peers.

    python benchmarks/merge.py --axolotl VENV/bin/python --mergekit VENV/bin/python --json merge.json

Makes a Llama checkpoint of random bf16 weights and a rank-16 LoRA of all its linear layers, then merges them in fresh
processes, in rounds of random order beside `cp -r`, with the base in the page cache and nothing left to write back.
The same LoRA as a DoRA shows, once at each size, the memory of the types that go through PEFT's own layers.
Each peer merges the smaller checkpoint, to warm up, and then the larger, once. Needs about three times `--gb` on the
disk and, for PEFT, twice `--gb` of memory; no model hub.

Two times are given for each run: until the process ends, and until its output is on the disk too (`sync`). peftopt
syncs its files before it ends, `cp` and the peers do not, so the second compares like with like. Peak memory is the
kernel's ru_maxrss: the largest of a tree's processes, with the pages of mapped files that were touched.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peftopt import machine

ROOT = Path(__file__).resolve().parents[1]
RANK, ALPHA, VOCAB, SEED = 16, 32, 32_000, 0
ELEMENTS = 24_000_000
"""About how many merged weights are recomputed in fp64."""

START = "import numpy and numba"
"""What a worker does before it can merge."""

INDEX = "model.safetensors.index.json"
PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, shard = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size=shard)
"""
AXOLOTL = """
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
base, adapter, out, _ = sys.argv[1:]
merge_lora_sharded_efficient(base, adapter, out, device="cpu")
"""
MERGEKIT = """
import sys
from mergekit.common import ModelReference
base, adapter, out, _ = sys.argv[1:]
ModelReference.parse(f"{base}+{adapter}").merged(cache_dir=out, lora_merge_dtype="bfloat16")
"""
PEERS = {"peft": PEFT, "axolotl": AXOLOTL, "mergekit": MERGEKIT}
"""Each as its own users run it on a CPU, from Python where its command line wants more than a merge: axolotl's
`merge-lora` (memory efficient, its default) and the step with which mergekit resolves MODEL+LORA."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; heads of 128, embeddings not tied."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def layer(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in) of a layer's linear modules."""
        h, m, kv = self.hidden, self.intermediate, 128 * self.kv_heads
        sizes = {"k_proj": (kv, h), "v_proj": (kv, h), "gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}
        return {f"{part}.{name}": sizes.get(name, (h, h)) for part, names in PROJECTIONS.items() for name in names}

    def layers(self, nbytes: float) -> int:
        """How many layers come nearest to so many bytes in bf16."""
        each = sum(rows * columns for rows, columns in self.layer().values())
        return max(1, round((nbytes / 2 - 2 * self.vocab * self.hidden) / each))


LARGE, SMALL = Shape(2560, 6912, 20, 4, VOCAB), Shape(1024, 2816, 8, 2, VOCAB // 4)
"""The second for checkpoints below 1 GB, which only try this file out."""


@dataclass(frozen=True)
class Run:
    """One process: seconds until it ended and until its output was on the disk; its largest resident set, in bytes."""

    seconds: float
    synced: float
    rss: int
    stdout: str = ""


# ---- the checkpoint ------------------------------------------------------------------------------


def make(folder: Path, shape: Shape, layers: int, shard: int) -> int:
    """Write base, LoRA and DoRA, one tensor in memory at a time. Returns the bytes of the base's shards."""
    import torch

    torch.manual_seed(SEED)
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    lora: dict[str, tuple[int, ...]] = {}
    magnitudes: dict[str, tuple[int, ...]] = {}
    for n in range(layers):
        for module, (rows, columns) in shape.layer().items():
            names[f"model.layers.{n}.{module}.weight"] = (rows, columns)
            lora[f"base_model.model.model.layers.{n}.{module}.lora_A.weight"] = (RANK, columns)
            lora[f"base_model.model.model.layers.{n}.{module}.lora_B.weight"] = (rows, RANK)
            magnitudes[f"base_model.model.model.layers.{n}.{module}.lora_magnitude_vector"] = (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"model.layers.{n}.{norm}.weight"] = (shape.hidden,)
    names |= {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}

    base = folder / "base"
    base.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in names.items():
        if shards[-1] and _bytes({**shards[-1], name: size}) > shard:
            shards.append({})
        shards[-1][name] = size
    weight_map: dict[str, str] = {}
    for n, tensors in enumerate(shards, 1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        _write(base / file, tensors)
    total = _bytes(names)
    _dump(base / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _dump(base / "config.json", _config(shape, layers))
    for kind, tensors in (("adapter", lora), ("dora", lora | magnitudes)):
        (folder / kind).mkdir()
        _write(folder / kind / "adapter_model.safetensors", tensors)
        _dump(folder / kind / "adapter_config.json", _adapter_config(base) | {"use_dora": kind == "dora"})
    return total


def _write(file: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of random bf16 tensors (vectors are ones), written as they are drawn."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + _bytes({name: size})
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for size in tensors.values():
            values = torch.ones(size) if len(size) == 1 else torch.randn(size).mul_(0.02)
            handle.write(values.bfloat16().view(torch.uint8).numpy().tobytes())


def _bytes(tensors: Mapping[str, tuple[int, ...]]) -> int:
    total = 0
    for rows, *columns in tensors.values():
        total += 2 * rows * (columns[0] if columns else 1)
    return total


def _config(shape: Shape, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": 128,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def _adapter_config(base: Path) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": [name for names in PROJECTIONS.values() for name in names],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# ---- against fp64 --------------------------------------------------------------------------------


def errors(folder: Path, out: Path | None) -> dict[str, float]:
    """How far the weights in `out` (None: torch's own rounding of the fp64 values) are from W + scale * B A in fp64.

    Of blocks of rows of every merged tensor: the share of elements for which one of the two neighbouring bf16 values
    is nearer, the share that torch's conversion (through fp32, so rounded twice) would give otherwise, the largest
    error in units in the last place of the exact value (`max_ulp`: any fp32 sum is off by many where W and the delta
    cancel) and of the larger of it and W (`max_ulp_of_w`), and the mean of the absolute errors.
    """
    import torch
    from safetensors import safe_open

    base = _Reader(folder / "base")
    merged = _Reader(out) if out else None
    dice = random.Random(SEED)
    count, wrong, other, total, most, most_of_w = 0, 0, 0, 0.0, 0.0, 0.0
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as lora:
        names = [key for key in lora.keys() if ".lora_A." in key]  # noqa: SIM118 (not a mapping)
        every = sum(lora.get_slice(n).get_shape()[1] * _rows(lora, n) for n in names)
        for key in names:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            a, b = lora.get_tensor(key).double(), lora.get_tensor(key.replace(".lora_A.", ".lora_B.")).double()
            rows = min(len(b), -(-len(b) * ELEMENTS // every))
            for block in _blocks(len(b), rows, dice):
                weight = base.read(name, block).double()
                exact = weight + ALPHA / RANK * (b[block] @ a)
                rounded = exact.to(torch.bfloat16)
                found = merged.read(name, block) if merged else rounded
                if found.dtype != torch.bfloat16:
                    raise ValueError(f"{out}: {name} is {found.dtype}, not bf16")
                off = (found.double() - exact).abs()
                nearer = [(_neighbour(found, step).double() - exact).abs() < off for step in (-1, 1)]
                count += exact.numel()
                wrong += int((nearer[0] | nearer[1]).sum())
                other += int((found != rounded).sum())
                most = max(most, float((off / _unit(exact)).max()))
                most_of_w = max(most_of_w, float((off / _unit(torch.maximum(exact.abs(), weight.abs()))).max()))
                total += float(off.sum())
    return {
        "elements": count,
        "not_nearest": wrong / count,
        "differs_from_torch": other / count,
        "max_ulp": most,
        "max_ulp_of_w": most_of_w,
        "mean_error": total / count,
    }


class _Reader:
    """Rows of the tensors of a folder, sharded or not."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        self.owner = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118

    def read(self, name: str, rows: slice) -> Any:
        return self.owner[name].get_slice(name)[rows]


def _rows(lora: Any, key: str) -> int:
    return int(lora.get_slice(key.replace(".lora_A.", ".lora_B.")).get_shape()[0])


def _blocks(total: int, rows: int, dice: random.Random) -> list[slice]:
    """So many rows, one run of them at a random place in each quarter of the tensor."""
    starts = [total * n // 4 for n in range(5)]
    found = []
    for low, high in pairwise(starts):
        size = min(high - low, -(-rows // 4))
        start = dice.randint(low, high - size)
        found.append(slice(start, start + size))
    return found


def _unit(values: Any) -> Any:
    """bf16's unit in the last place at these fp64 values."""
    import torch

    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent.clamp_min(-125) - 8)


def _neighbour(values: Any, step: int) -> Any:
    """The bf16 value next above (1) or below (-1): as integers, the bits of floats of one sign lie in order."""
    import torch

    bits = values.view(torch.int16).int()
    order = torch.where(bits < 0, -(bits & 0x7FFF), bits) + step
    bits = torch.where(order < 0, -order - 0x8000, order)
    return bits.short().view(torch.bfloat16)


# ---- running -------------------------------------------------------------------------------------


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own. This one must stay small: a child's ru_maxrss starts from its parent's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def run(command: Sequence[str], folder: Path, warm: Path | None = None) -> Run:
    """Time a fresh process, with the files of `warm` in the page cache and no dirty pages. Raises RuntimeError."""
    if warm:
        _read(warm)
    os.sync()
    ours = command[0] == sys.executable
    # An installed package has its bytecode, so Python may keep it here too.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    env |= {"HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(ROOT)} if ours else {}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        os.sync()
        synced = time.perf_counter() - started
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            last = stderr.read().decode(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"exit code {process.returncode}: {' | '.join(last)}")
        return Run(seconds, synced, usage.ru_maxrss * 1024, stdout.read().decode(errors="replace"))


def _read(folder: Path) -> None:
    buffer = bytearray(1 << 23)
    for file in sorted(folder.glob("*")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def merge_command(folder: Path, out: Path, adapter: str = "adapter") -> list[str]:
    """peftopt's own, as a user types it."""
    ends = ["--base", str(folder / "base"), "--adapter", str(folder / adapter), "--out", str(out)]
    return [sys.executable, "-m", "peftopt.cli", "merge", *ends, "--certify", "blocks", "--json"]


def rounds(folder: Path, count: int) -> tuple[dict[str, list[Run]], Path]:
    """Every arm `count` times in random order; also the last folder that peftopt wrote."""
    out, kept = folder / "out", folder / "merged"
    arms = {
        "cp -r": ["cp", "-r", str(folder / "base"), str(out)],
        "peftopt merge": merge_command(folder, out),
        START: [sys.executable, "-c", "import peftopt.merging.kernel"],
        "peftopt --version": [sys.executable, "-m", "peftopt.cli", "--version"],
    }
    for name in ("peftopt merge", START, "peftopt --version"):
        run(arms[name], folder)  # compiles and caches what is imported, and the merge's loop
        shutil.rmtree(out, ignore_errors=True)
    found: dict[str, list[Run]] = {name: [] for name in arms}
    dice = random.Random(SEED)
    for n in range(count):
        for name in dice.sample(sorted(arms), len(arms)):
            found[name].append(run(arms[name], folder, folder / "base"))
            _say(f"round {n + 1}: {name} {found[name][-1].seconds:.2f} s")
            if name == "peftopt merge" and n == count - 1:
                out.rename(kept)
            shutil.rmtree(out, ignore_errors=True)
    return found, kept


def peer(name: str, python: str, folder: Path, shard: int) -> tuple[Run, dict[str, float]]:
    """One merge of a peer and its errors against fp64."""
    out = folder / name
    ends = [str(folder / "base"), str(folder / "adapter"), str(out), f"{shard // 10**6}MB"]
    try:
        found = run([python, "-c", PEERS[name], *ends], folder, folder / "base")
        _say(f"{name}, {folder.name} checkpoint: {found.seconds:.2f} s")
        written = next(out.rglob("config.json")).parent  # mergekit adds a folder of its own
        return found, apart(errors, folder, written)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def versions(name: str, python: str) -> str:
    """A peer's version and those of what it merges with, in its own environment."""
    script = "import sys; from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in sys.argv[1:]))"
    names = dict.fromkeys((name, "peft", "transformers", "torch"))
    answer = subprocess.run([python, "-c", script, *names], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "versions unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- printing ------------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def _spread(values: Sequence[float]) -> list[str]:
    return [f"{median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}"]


def print_times(found: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Times and ratios to cp; returns the ratios."""
    ended = {name: [r.seconds for r in runs] for name, runs in found.items()}
    synced = {name: [r.synced for r in runs] for name, runs in found.items()}
    start_up = [a + b for a, b in zip(ended[START], ended["peftopt --version"], strict=True)]
    ended["start-up (both)"] = synced["start-up (both)"] = start_up
    for times in (ended, synced):
        times["merge, no start-up"] = [a - b for a, b in zip(times["peftopt merge"], start_up, strict=True)]
    rows, ratios = [], {}
    for name in ended:
        cells = [name]
        for kind, times in (("ended", ended), ("synced", synced)):
            ratio = ratios[f"{name}, {kind}"] = median(times[name]) / median(times["cp -r"])
            cells += [*_spread(times[name]), f"{ratio:.2f}"]
        rows.append(cells)
    title = "Time in seconds: median and range until the process ends, and until its output is on the disk"
    table(title, ["", "ended", "range", "/ cp", "synced", "range", "/ cp"], rows)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gb", type=float, default=5.5, help="size of the checkpoint")
    parser.add_argument("--second-gb", type=float, default=1.5, help="a smaller one, for the memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to make the temporary folder")
    parser.add_argument("--peers", default="peft,axolotl,mergekit")
    parser.add_argument("--axolotl", default="", metavar="PYTHON", help="interpreter of a venv that has axolotl")
    parser.add_argument("--mergekit", default="", metavar="PYTHON", help="interpreter of a venv that has mergekit")
    parser.add_argument("--json", type=Path, help="file for all raw figures")
    arguments = parser.parse_args()
    pythons = {"peft": sys.executable, "axolotl": arguments.axolotl, "mergekit": arguments.mergekit}
    peers = [name for name in arguments.peers.split(",") if name]
    if unknown := set(peers) - pythons.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")

    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # so that a log shows how far it is
    here = machine.describe()
    told = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    print(f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB; Python {here['python']}, {told}")
    raw: dict[str, Any] = {"machine": here, "load": [os.getloadavg()[0]], "arguments": {**vars(arguments)}}
    try:
        with tempfile.TemporaryDirectory(prefix="merge-", dir=arguments.work) as name:
            measure(Path(name).resolve(), arguments, {p: pythons[p] for p in peers}, raw)
    finally:
        raw["load"].append(os.getloadavg()[0])
        print("\nload average {:.1f} before, {:.1f} after".format(*raw["load"]))
        if arguments.json:
            arguments.json.write_text(json.dumps(raw, indent=1, default=str) + "\n", encoding="utf-8")


def measure(work: Path, arguments: argparse.Namespace, peers: Mapping[str, str], raw: dict[str, Any]) -> None:
    sizes = {"first": arguments.gb * 1e9, "second": arguments.second_gb * 1e9}
    if shutil.disk_usage(work).free < (need := 3.2 * sizes["first"] + 2.2 * sizes["second"]):
        raise SystemExit(f"{work}: {need / 1e9:.1f} GB are needed; choose another --work or a smaller --gb")
    shape = LARGE if min(sizes.values()) >= 1e9 else SMALL
    shard = 10**9 if shape is LARGE else int(min(sizes.values()) / 2)
    total = {}
    for name, size in sizes.items():
        layers = shape.layers(size)
        total[name] = apart(make, work / name, shape, layers, shard)
        files = len(list((work / name / "base").glob("*.safetensors")))
        print(f"{name}: {total[name] / 1e9:.2f} GB in {files} shards, {layers} layers, hidden {shape.hidden}")
    raw |= {"shape": asdict(shape), "bytes": total}

    first, second = work / "first", work / "second"
    found, merged = rounds(first, arguments.rounds)
    raw["runs"] = {name: [asdict(r) for r in runs] for name, runs in found.items()}
    raw["ratios"] = print_times(found)
    small = []
    for _ in range(arguments.rounds):
        small.append(run(merge_command(second, second / "out"), second, second / "base"))
        shutil.rmtree(second / "out")
    raw["second"] = [asdict(r) for r in small]
    modular = {}
    for name in sizes:
        folder = work / name
        modular[f"{name}, DoRA"] = [run(merge_command(folder, folder / "out", "dora"), folder, folder / "base")]
        shutil.rmtree(folder / "out")
    raw["dora"] = {name: asdict(one) for name, [one] in modular.items()}
    print_memory({"first": found["peftopt merge"], "second": small} | modular, found[START], total)

    raw["accuracy"] = {"torch's rounding": apart(errors, first, None), "peftopt": apart(errors, first, merged)}
    shutil.rmtree(merged)
    raw |= {"peers": {}, "notes": []}
    for name, python in peers.items():
        if not python:
            raw["notes"].append(f"{name}: skipped, no --{name} PYTHON was given")
            continue
        try:
            before, _ = peer(name, python, second, shard)
            after, raw["accuracy"][name] = peer(name, python, first, shard)
        except (RuntimeError, OSError, ValueError, KeyError, StopIteration) as error:
            raw["notes"].append(f"{name}: failed, {error!r}")
            continue
        raw["peers"][name] = {"first": asdict(after), "second": asdict(before)}
        raw["notes"].append(f"{name}: {versions(name, python)}")
    ours = {"first": _typical(found["peftopt merge"]), "second": _typical(small)}
    print_peers({"peftopt": ours, **raw["peers"]}, total)
    for note in raw["notes"]:
        print(f"  {note}")
    print_accuracy(raw["accuracy"])


def print_memory(runs: Mapping[str, Sequence[Run]], started: Sequence[Run], total: Mapping[str, int]) -> None:
    """What peftopt's worker reports of itself, beside a process that only imports what it needs."""
    answers = {name: [json.loads(r.stdout) for r in given] for name, given in runs.items()}
    print(f"  of which in the worker, its imports included: {_worker(answers['first'])}")
    bare = max(r.rss for r in started)
    rows = [[f"{START} alone", "", *[_mb(f([r.rss for r in started])) for f in (median, max)], ""]]
    for name, given in answers.items():
        values = [a["peak_memory_bytes"] for a in given]
        size = f"{total[name.partition(',')[0]] / 1e9:.2f} GB"
        rows.append([f"peftopt merge, {name}", size, _mb(median(values)), _mb(max(values)), _mb(max(values) - bare)])
    table("Peak memory in MB, of peftopt's worker", ["", "checkpoint", "median", "most", "over that"], rows)


def _worker(answers: Sequence[Mapping[str, Any]]) -> str:
    middle, spread = _spread([a["seconds"] for a in answers])
    return f"{middle} ({spread}) s"


def _typical(runs: Sequence[Run]) -> dict[str, float]:
    return {kind: median(getattr(r, kind) for r in runs) for kind in ("seconds", "synced", "rss")}


def print_peers(found: Mapping[str, Mapping[str, Mapping[str, Any]]], total: Mapping[str, int]) -> None:
    ours = found["peftopt"]
    columns = [("first", "seconds", "ended s"), ("first", "synced", "synced s"), ("first", "rss", "peak MB")]
    columns += [("second", "rss", f"MB at {total['second'] / 1e9:.1f} GB")]
    header, rows = [""], [[name] for name in found]
    for size, kind, title in columns:
        header += [title, "/ peftopt"]
        for row, theirs in zip(rows, found.values(), strict=True):
            value = theirs[size][kind]
            row += [_mb(value) if kind == "rss" else f"{value:.2f}", f"{value / ours[size][kind]:.2f}"]
    table("Peers, once each, start-up included (peftopt: median of its rounds)", header, rows)


def print_accuracy(found: Mapping[str, Mapping[str, float]]) -> None:
    best = found["torch's rounding"]["mean_error"]
    rows = []
    for name, e in found.items():
        shares = [f"{e[k]:.2e}" for k in ("not_nearest", "differs_from_torch")]
        most = [f"{e[k]:.4f}" for k in ("max_ulp", "max_ulp_of_w")]
        rows.append([name, *shares, *most, f"{e['mean_error']:.5e}", f"{e['mean_error'] / best - 1:+.1e}"])
    count = found["peftopt"]["elements"]
    title = f"Error against W + scale * B A in fp64, of {count} elements of every merged tensor"
    table(title, ["", "not nearest", "not torch's", "most ulp", "of W", "mean error", "over torch's"], rows)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f}"


if __name__ == "__main__":
    main()
