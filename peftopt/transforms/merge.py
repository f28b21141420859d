"""Fold adapters into the base weights: the same model, certified, without their cost per token."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftopt import hf
from peftopt.adapter import Adapter, Pair, check_base, check_mergeable, open_adapter, plain_pairs, targets
from peftopt.checkpoint import SINGLE, Draft, Entry, open_model
from peftopt.errors import BadInput
from peftopt.merging import certificate
from peftopt.merging.blocks import FLOATS, Blocks, Written, read, threads
from peftopt.merging.certificate import Check
from peftopt.merging.training import TrainingBase, check_scheme, is_packed
from peftopt.records import Json, Model

TECHNIQUE = "merge"
NEEDS = ("torch", "transformers", "peft", "safetensors")

DTYPES = {"": "", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DEPTHS = ("blocks", "full")
BASES = ("full", "dequantized", "auto")
COMBINATIONS = ("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune")

SAMPLED_MODULES, SAMPLED_ELEMENTS = 4, 1 << 26
"""Modules that are merged a second time in fp64, and the largest that is."""


@dataclass(frozen=True)
class Params:
    """`dtype`: "bf16", "fp16", "fp32", or "" for the base's own. `certify`: "blocks" (while streaming) or "full" (the
    saved folder's predictions too). `weights`: one per adapter, separated by commas ("" = all 1). `combination`: how
    several LoRAs become one, "cat" (their exact weighted sum) or another type of PEFT's. `merge_base`: the weights
    that the delta is added to, "full" as they are, "dequantized" as `scheme` (nf4, fp4) left them in training, "auto"
    for whichever is nearer to the adapter on its 4-bit base. `allow_base_mismatch`: merge though names or revisions say
    that the base is another one."""

    dtype: str = ""
    certify: str = "full"
    weights: str = ""
    combination: str = "cat"
    merge_base: str = "full"
    scheme: str = "nf4"
    allow_base_mismatch: bool = False


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Merge the adapters: W <- W + delta, e.g. scaling * B A of LoRA (arXiv:2106.09685, 4.1), computed in fp32 or
    better and rounded once. Plain LoRA streams through small blocks, every other type goes module by module through
    PEFT's own code; the model is never loaded, except for the predictions of a full certificate.

    Leaves a folder that loads as the base did (same shards, dtype, tokenizer, chat template) with parity.json in it,
    and says there whether every check passed. Embeddings stay tied unless an adapter changes one side only. Raises
    BadInput without an adapter, for one that has no weight delta or depends on the input, does not fit, is not finite
    or changes nothing, and for a quantized base that `merge_base` does not say how to read.
    """
    with _opened(model, params) as job:
        if job.params.merge_base == "auto":
            return job.better(out, texts)
        job.write(out)
        job.certify(out, texts)
    return Model(str(out))


def preview(model: Model, params: Params) -> list[dict[str, Json]]:
    """What a merge would change, tensor by tensor: its name, shape, dtype, bytes, and the norm of its delta and of its
    weight (Frobenius). Nothing is written."""
    with _opened(model, params) as job:
        return list(job.preview())


# ---- one merge -----------------------------------------------------------------------------------


def _opened(model: Model, params: Params) -> Job:
    """Everything that can be refused before a weight is read is refused here."""
    folder = Path(model.path)
    if not model.adapters:
        raise BadInput(f"nothing to merge: {model.path} has no adapter", "name one as model.adapter, or drop `merge`")
    for name, value, known in (
        ("dtype", params.dtype, tuple(DTYPES)),
        ("certify", params.certify, DEPTHS),
        ("merge_base", params.merge_base, BASES),
        ("combination", params.combination, COMBINATIONS),
    ):
        if value not in known:
            raise BadInput(f"merge has no {name}: {value}", f"use {', '.join(filter(None, known))}")
    check_scheme(params.scheme)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = is_packed(config.get("quantization_config"))
    if not packed or params.merge_base == "full":
        _refuse_quantized(folder, config, packed)
    weights = _weights(params, model.adapters)
    adapters = [open_adapter(Path(a), weight) for a, weight in zip(model.adapters, weights, strict=True)]
    if len(kinds := sorted({a.kind for a in adapters})) > 1:
        raise BadInput(f"adapters of different types: {', '.join(kinds)}", "merge one, then the other into the result")
    for adapter in adapters:
        check_mergeable(adapter)
        if not params.allow_base_mismatch:
            check_base(adapter, folder, config)
    training = TrainingBase("" if packed or params.merge_base == "full" else params.scheme, packed)
    if packed:
        params = replace(params, merge_base="dequantized")
    return Job(folder, config, adapters, params, training)


def _refuse_quantized(folder: Path, config: Mapping[str, Json], packed: bool) -> None:
    if settings := config.get("quantization_config"):
        method = settings.get("quant_method", "?")
        hint = "merge into the full-precision model, then quantize the result"
        if packed:
            hint = f"--merge-base dequantized writes 16-bit weights from these; or {hint}"
        raise BadInput(
            f"cannot merge into {folder}: its weights are already quantized ({method}), and rounding the sum to so few "
            "bits again would round most of the delta away",
            hint,
        )


def _weights(params: Params, adapters: Sequence[str]) -> list[float]:
    if not params.weights:
        return [1.0] * len(adapters)
    try:
        found = [float(text) for text in params.weights.split(",")]
    except ValueError as error:
        raise BadInput(f"weights: {params.weights!r} are not numbers", "one per adapter, such as 0.7,0.3") from error
    if len(found) != len(adapters) or not all(map(math.isfinite, found)):
        raise BadInput(f"{len(found)} weights for {len(adapters)} adapters", "one finite number per adapter")
    return found


class Job:
    """One base, its adapters and how to merge them. Use as a context manager: it holds files open."""

    def __init__(
        self, folder: Path, config: dict[str, Json], adapters: list[Adapter], params: Params, training: TrainingBase
    ) -> None:
        self.folder, self.config, self.adapters = folder, config, adapters
        self.params, self.training = params, training
        self.stack = ExitStack()
        self.base = self.stack.enter_context(open_model(folder))
        for adapter in adapters:
            self.stack.enter_context(adapter.weights)
        self.dtype = DTYPES[params.dtype]
        self.checks: list[Check] = []
        self.method = ""

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    # ---- which way ---------------------------------------------------------------------------

    def pairs(self) -> dict[str, list[Pair]] | None:
        """Tensor -> the LoRA pairs that add up, when blocks can do it all; None when PEFT's own layers are needed."""
        if self.training.scheme or self.training.packed or self.params.combination != "cat":
            return None
        found: dict[str, list[Pair]] = {}
        for adapter in self.adapters:
            pairs = plain_pairs(adapter)
            if pairs is None:
                return None
            for module, pair in pairs.items():
                entry = self.base.entries.get(f"{module}.weight")
                if entry is None or entry.dtype not in FLOATS or len(entry.shape) != 2 or self._is_head(entry):
                    return None
                if entry.shape != (pair.b.shape[0], pair.a.shape[1]):
                    raise BadInput(
                        f"adapter {adapter.folder} does not fit {self.folder}: {module} is {list(entry.shape)} there "
                        f"and {[pair.b.shape[0], pair.a.shape[1]]} in the adapter",
                        "it was trained on another base: give that one",
                    )
                found.setdefault(entry.name, []).append(pair)
            modules = [e.name.removesuffix(".weight") for e in self.base.entries.values() if len(e.shape) == 2]
            if any(module not in pairs and targets(adapter.config, module) for module in modules):
                return None  # lacking keys, or fused experts: PEFT's own layers tell which
        return found

    def _is_head(self, entry: Entry) -> bool:
        """An output head may be one with the input embedding, and then has to be parted from it first."""
        text = self.config.get("text_config") or self.config
        return entry.shape[0] == text.get("vocab_size") and bool(text.get("tie_word_embeddings", True))

    # ---- writing -----------------------------------------------------------------------------

    def write(self, out: Path) -> None:
        """The merged folder, with all that was checked while it streamed by."""
        pairs = self.pairs()
        with Blocks(threads()) as blocks:
            if pairs is not None:
                self.method = "LoRA in blocks, fp32, rounded once"
                written, samples = self._blocks(blocks, out, pairs)
            else:
                self.method = f"PEFT's own {self.adapters[0].kind} layers, module by module, fp32, rounded once"
                written, samples = self._modules(blocks, out)
        self._check_written(written, samples, out)
        self._extras(out)

    def _blocks(
        self, blocks: Blocks, out: Path, pairs: Mapping[str, Sequence[Pair]]
    ) -> tuple[list[Written], list[tuple[str, float, int]]]:
        with Draft(out, self._layout({}, []), self.base) as draft:
            entries = list(self.base.entries.values())
            written = list(blocks.transfer(self.base, draft, entries, pairs))
            samples = certificate.sample_lora(self.base, draft, pairs)
        return [w for w in written if w.name in pairs], samples

    def _modules(self, blocks: Blocks, out: Path) -> tuple[list[Written], list[tuple[str, float, int]]]:
        from peftopt.merging.modules import Hollow

        hollow = Hollow(str(self.folder), self.base, self.adapters, self.params.combination, self.training)
        held = self._embeddings(hollow)
        self._hollow_config(hollow, held)
        apart = set(hollow.tied or ()) if held else set()
        touched = hollow.touched
        stored = {key for n in touched if n in hollow.groups for key, _ in hollow.groups[n].tensors}
        added = [] if hollow.tied is None else [n for n in held if n not in hollow.groups and self._untied]
        shapes = {n: tuple(hollow.params[n].shape) for n in touched if n in self.base.entries}
        with Draft(out, self._layout(shapes, added), self.base) as draft:
            rest = [e for e in self.base.entries.values() if e.name not in stored and e.name in draft.entries]
            list(blocks.transfer(self.base, draft, rest, {}))
            units = [unit for unit, names in hollow.units.items() if not apart & set(names)]
            sampled = self._sampled(hollow, units)
            written: list[Written] = []
            samples: list[tuple[str, float, int]] = []
            waiting = dict(held)
            for unit in units:
                exact = hollow.merged(unit, exact=True) if unit in sampled else {}
                waiting |= hollow.merged(unit)
                written += self._flush(blocks, draft, hollow, waiting, touched)
                for name, value in exact.items():
                    if name in draft.entries and self.base.entries[name].shape == draft.entries[name].shape:
                        found = read(draft, draft.entries[name])
                        error = certificate.ulps(found, value, hollow.value(name).double())
                        samples.append((name, error, value.numel()))
            inside = {n for names in hollow.units.values() for n in names}
            for name in sorted(touched - inside - apart):
                waiting[name] = hollow.value(name)
                written += self._flush(blocks, draft, hollow, waiting, touched)
            written += self._flush(blocks, draft, hollow, waiting, touched, last=True)
        return written, samples

    def _sampled(self, hollow: Any, units: Sequence[str]) -> set[str]:
        small = [u for u in units if sum(hollow.params[n].numel() for n in hollow.units[u]) <= SAMPLED_ELEMENTS]
        return set(small[:: max(1, len(small) // SAMPLED_MODULES)][:SAMPLED_MODULES])

    def _embeddings(self, hollow: Any) -> dict[str, Any]:
        """Tied embeddings that an adapter touches, both sides merged: they decide whether they can stay tied."""
        import torch

        self._untied = False
        if hollow.tied is None or not set(hollow.tied) & hollow.touched:
            return {}
        held = {name: hollow.value(name) for name in hollow.tied}
        for unit, names in hollow.units.items():
            if set(names) & held.keys():
                held |= hollow.merged(unit)
        self._untied = not torch.equal(*(held[name] for name in hollow.tied))
        if not self._untied and hollow.tied[1] not in hollow.groups:
            del held[hollow.tied[1]]  # written once, as the base has it
        return held

    def _flush(
        self,
        blocks: Blocks,
        draft: Draft,
        hollow: Any,
        waiting: dict[str, Any],
        touched: set[str],
        last: bool = False,
    ) -> Iterator[Written]:
        """Write what is complete: parameters that share tensors on disk wait for each other."""
        import torch

        for name in list(waiting):
            group = hollow.groups.get(name)
            if name not in waiting:
                continue
            if group is None:
                blocks.put(draft, name, waiting.pop(name))
                if name in hollow.adapted:
                    yield Written(name, True)
                continue
            needed = set(group.params) & touched
            if not last and not needed <= waiting.keys():
                continue
            values = {n: waiting.pop(n) if n in waiting else hollow.value(n) for n in group.params}
            for key, value in hollow.stored(group, values).items():
                blocks.put(draft, key, value)
                target = draft.entries[key]
                same = target.shape == self.base.entries[key].shape and torch.equal(
                    read(draft, target), hollow.training.tensor(self.base, key).to(value.dtype)
                )
                if hollow.adapted & set(group.params):
                    yield Written(key, not same)

    def _layout(self, shapes: Mapping[str, tuple[int, ...]], added: Sequence[str]) -> dict[str, list[Entry]]:
        """Which file holds which tensor, in the base's order; what is new goes into the file of the embeddings."""
        keep = set(self.training.names(self.base))
        single = len(self.base.files) == 1
        layout = {}
        for file, entries in self.base.files.items():
            kept = [self._slot(e, shapes.get(e.name, e.shape)) for e in entries if e.name in keep]
            layout[SINGLE if single else file] = kept
        if added:
            last = list(layout)[-1]
            dtype = next(e.dtype for entries in layout.values() for e in entries if e.dtype in FLOATS)
            layout[last] += [Entry(name, dtype, self._added_shapes[name]) for name in added]
        return layout

    def _slot(self, entry: Entry, shape: tuple[int, ...]) -> Entry:
        dtype = entry.dtype
        if dtype not in FLOATS and self.training.packed and entry.dtype == "U8":
            dtype = self.dtype or "BF16"
        return Entry(entry.name, self.dtype if self.dtype and dtype in FLOATS else dtype, shape)

    # ---- checking ----------------------------------------------------------------------------

    def _check_written(self, written: Sequence[Written], samples: Sequence[tuple[str, float, int]], out: Path) -> None:
        names = ", ".join(str(a.folder) for a in self.adapters)
        if not any(w.changed for w in written):
            raise BadInput(
                f"merging changed nothing: every weight equals the base's ({names})",
                "the adapter is untrained, or its delta is lost in the rounding; `--dry-run` shows its norms",
            )
        keys = sum(len(a.weights.entries) for a in self.adapters)
        self.checks.append(Check("adapter keys", True, f"each of {keys} consumed once, none missing", {"keys": keys}))
        with open_model(out) as new:
            odd = [e for e in self.base.entries.values() if e.name not in new.entries]
            count = len(new.entries)
        same = not odd or self.training.packed
        detail = f"{count} tensors, names and shapes as in the base" if same else f"{odd[0].name} is missing"
        self.checks.append(Check("tensors", same, detail, {"tensors": count}))
        self.checks.append(Check("finite", True, f"every value of all {count} tensors is finite"))
        unchanged = [w.name for w in written if not w.changed]
        detail = f"{len(written) - len(unchanged)} of {len(written)} tensors with a delta changed"
        if unchanged:
            detail += f"; not {', '.join(unchanged[:3])}: zero, or lost in the rounding"
        values = {"changed": len(written) - len(unchanged), "unchanged": unchanged}
        self.checks.append(Check("differs from the base", True, detail, values))
        if samples:
            self.checks.append(certificate.recomputed(samples))

    def certify(self, out: Path, texts: Sequence[str]) -> dict[str, Json]:
        """Finish the certificate and leave it in the folder."""
        if self.params.certify == "full":
            self.checks.append(self._predictions(out, texts))
        return certificate.write(out, self.folder, self.adapters, self.method, self.params.certify, self.checks)

    def _predictions(self, out: Path, texts: Sequence[str]) -> Check:
        return certificate.full(self.folder, out, self.adapters, self.params.combination, self.training, texts)

    def better(self, out: Path, texts: Sequence[str]) -> Model:
        """Merge into both bases, measure each against the adapter on its 4-bit base, and keep the nearer one."""
        found: dict[str, tuple[Path, Job, Check]] = {}
        for base in ("full", "dequantized"):
            training = self.training if base == "dequantized" else TrainingBase()
            job = Job(self.folder, self.config, self.adapters, replace(self.params, merge_base=base), training)
            with job:
                side = out.with_name(f"{out.name}.{base}")
                job.write(side)
                found[base] = side, job, self._predictions(side, texts)
        kept = min(found, key=lambda base: float(found[base][2].values["kl"]))
        figures = {base: check.values["kl"] for base, (_, _, check) in found.items()}
        shown = ", ".join(f"KL {value:.2g} when merged into the {base} weights" for base, value in figures.items())
        side, job, check = found[kept]
        job.checks.append(Check("merge base", True, f"{kept}: {shown}", figures))
        job.checks.append(check)
        for other, _, _ in found.values():
            if other != side:
                shutil.rmtree(other)
        side.rename(out)
        certificate.write(out, self.folder, self.adapters, job.method, "full", job.checks)
        return Model(str(out))

    def preview(self) -> Iterator[dict[str, Json]]:
        """Tensor by tensor, computed as a merge would, written nowhere."""
        pairs = self.pairs()
        if pairs is not None:
            draft = _Nowhere({e.name: self._slot(e, e.shape) for e in self.base.entries.values()})
            with Blocks(threads()) as blocks:
                for w in blocks.transfer(self.base, draft, [self.base.entries[n] for n in pairs], pairs, norms=True):  # type: ignore[arg-type]
                    yield _line(self.base.entries[w.name], w.delta_norm or 0.0, w.weight_norm or 0.0)
            return
        from peftopt.merging.modules import Hollow

        hollow = Hollow(str(self.folder), self.base, self.adapters, self.params.combination, self.training)
        for values in hollow.changes():
            for name, value in values.items():
                before = hollow.value(name)
                entry = Entry(name, self.dtype or self._dtype_of(name), tuple(value.shape))
                yield _line(entry, float((value - before).norm()), float(before.norm()))

    def _dtype_of(self, name: str) -> str:
        entry = self.base.entries.get(name)
        return entry.dtype if entry else next(e.dtype for e in self.base.entries.values() if e.dtype in FLOATS)

    # ---- what comes along --------------------------------------------------------------------

    def _hollow_config(self, hollow: Any, held: Mapping[str, Any]) -> None:
        """What the merge changes of the config: embeddings no longer tied, or of another size."""
        self._added_shapes = {name: tuple(value.shape) for name, value in held.items()}
        text = self.config.get("text_config") or self.config
        if self._untied:
            self.config = {**self.config, "tie_word_embeddings": False}
        size = hollow.config.get_text_config().vocab_size
        if text.get("vocab_size", size) != size:
            if text is self.config or "text_config" not in self.config:
                self.config = {**self.config, "vocab_size": size}
            else:
                self.config = {**self.config, "text_config": {**text, "vocab_size": size}}

    def _extras(self, out: Path) -> None:
        """Config, tokenizer, chat template, generation config, and a line in the model card."""
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        if self.dtype:
            config |= {("torch_dtype" if "torch_dtype" in config else "dtype"): CONFIG_DTYPES[self.dtype]}
        hf.copy_extras(str(self.folder), out)
        original = (self.folder / "config.json").read_text(encoding="utf-8")
        changed = config != json.loads(original)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n" if changed else original
        (out / "config.json").write_text(text, encoding="utf-8")
        for adapter in self.adapters:
            hf.copy_tokenizer(adapter.folder, out)
        card = out / "README.md"
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        card.write_text(before + self._card(), encoding="utf-8")

    def _card(self) -> str:
        lines = [
            f"- {a.kind} adapter `{a.folder.resolve().name}`, weight {a.weight:g}, sha256 `{a.sha256}`"
            for a in self.adapters
        ]
        base = f"- base `{self.folder.resolve().name}`, {self.method}"
        return "\n".join(["", "## Merged by peftopt", "", base, *lines, f"- certificate: `{certificate.FILE}`", ""])


class _Nowhere:
    """A draft that forgets what is written."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def write(self, entry: Entry, at: int, data: memoryview) -> None:
        """Nothing."""

    def settle(self, file: Path) -> None:
        """Nothing."""


def _line(entry: Entry, delta: float, weight: float) -> dict[str, Json]:
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "bytes": entry.nbytes,
        "delta_norm": delta,
        "weight_norm": weight,
    }
