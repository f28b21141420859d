"""One merge: which way it goes, what the new checkpoint holds, what is checked, and what comes along."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt.errors import BadInput
from peftopt.merging import certificate
from peftopt.merging.blocks import HALVES, Blocks, Written, read_tensor, threads
from peftopt.merging.certificate import Check
from peftopt.merging.training import TrainingBase
from peftopt.merging.wholeness import checked_beside
from peftopt.models import hf
from peftopt.models.adapter import Adapter, Pair, is_embedding, plain_pairs, targets
from peftopt.models.checkpoint import SINGLE, Draft, Entry, open_model
from peftopt.models.values import FLOATS
from peftopt.records import Json, Model

if TYPE_CHECKING:
    from peftopt.merging.modules import Hollow

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The format's words and those of a model's config."""


TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types of transformers whose layers are Conv1D: weights are [in, out], which a square one does not show, and
PEFT transposes the delta whatever the adapter's fan_in_fan_out says."""


class Merge:
    """One base, its adapters and how to merge them; `checks` fill up as it goes. `dtype` is the output's in the
    format's words, "" for the base's own. Use as a context manager: it holds files open."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Json],
        adapters: Sequence[Adapter],
        training: TrainingBase = TrainingBase(),  # noqa: B008 (frozen)
        dtype: str = "",
        combination: str = "cat",
    ) -> None:
        self.folder, self.config, self.adapters = folder, dict(config), adapters
        self.training, self.dtype, self.combination = training, dtype, combination
        self.stack = ExitStack()
        self.base = self.stack.enter_context(open_model(folder))
        for adapter in adapters:
            self.stack.enter_context(adapter.weights)
        self.checks: list[Check] = []
        self.digests: dict[str, str] = {}
        self.tensors: dict[str, Json] = {}
        self.method = ""
        self.whole = False

    def __enter__(self) -> Merge:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def check_whole(self) -> None:
        """Raises BadInput when the base lacks a weight of its model; this loads torch and transformers."""
        if not self.whole:
            config = hf.config(str(self.folder))
            self.training.clean(config)
            shapes = {name: self.base.entries[name].shape for name in self.training.names(self.base)}
            hf.check_whole(str(self.folder), shapes, config, any_shape=self.training.packed)
            self.whole = True

    @cached_property
    def kept(self) -> set[str]:
        """Tensors of the base in fp32 that the model keeps so, whatever the output's dtype."""
        wide = [e.name for e in self.base.entries.values() if e.dtype == "F32"]
        if self.dtype not in HALVES or not wide:
            return set()
        return hf.kept_in_fp32(hf.config(str(self.folder)), CONFIG_DTYPES[self.dtype], wide)

    # ---- which way ---------------------------------------------------------------------------

    def pairs(self) -> dict[str, list[Pair]] | None:
        """Tensor -> the LoRA pairs that add up, when blocks can do it all; None when PEFT's own layers are needed.

        Raises BadInput for a pair that does not fit its weight.
        """
        if self.training.scheme or self.training.packed or self.combination != "cat":
            return None
        if self.config.get("model_type") in TRANSPOSED:
            return None
        by_tensor: dict[str, list[Pair]] = {}
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
                by_tensor.setdefault(entry.name, []).append(pair)
            modules = [e.name.removesuffix(".weight") for e in self.base.entries.values() if len(e.shape) == 2]
            if any(module not in pairs and targets(adapter.config, module) for module in modules):
                return None  # lacking keys, or fused experts: PEFT's own layers tell which
        return by_tensor

    def _is_head(self, entry: Entry) -> bool:
        """An output head may be one with the input embedding, and then has to be parted from it first."""
        text = self.config.get("text_config") or self.config
        return entry.shape[0] == text.get("vocab_size") and bool(text.get("tie_word_embeddings", True))

    # ---- writing -----------------------------------------------------------------------------

    def write(self, out: Path) -> None:
        """The merged folder, with all that was checked while it streamed by."""
        _give_memory_back()
        pairs = self.pairs()
        with Blocks(threads()) as blocks, ThreadPoolExecutor(1) as beside:
            beside.map(attrgetter("sha256"), self.adapters)  # asked for when all is written, and known by then
            if pairs is not None:
                self.method = "LoRA in blocks, fp32, rounded once"
                written, samples = self._blocks(blocks, out, pairs)
            else:
                self.method = f"PEFT's own {self.adapters[0].kind} layers, module by module, fp32, rounded once"
                written, samples = self._modules(blocks, out)
        self._check_written(written, samples, out)
        self._extras(out)

    def write_packed(self, out: Path) -> None:
        """Merge into 4-bit weights that stay 4-bit: each sum is rounded to 4 bits again, and what that loses only
        predictions show. The packed tensors that change are held in memory, since their state changes in length."""
        self.method = "PEFT's own layers, rounded to 4 bits again by bitsandbytes"
        hollow = self._hollow()
        packed: dict[str, Any] = {}
        for values in hollow.changes():
            for name, value in values.items():
                group = hollow.groups[name]
                if name in hollow.packed:
                    packed |= self.training.pack(self.base, group.tensors[0][0], value)
                else:
                    packed |= hollow.stored(group, {name: value})
        layout = {
            file: [
                Entry(e.name, e.dtype, tuple(packed[e.name].shape) if e.name in packed else e.shape) for e in entries
            ]
            for file, entries in self.base.files.items()
        }
        with Blocks(threads()) as blocks, Draft(out, layout, self.base) as draft:
            list(blocks.transfer(self.base, draft, [e for n, e in self.base.entries.items() if n not in packed], {}))
            for name, value in packed.items():
                blocks.put(draft, name, value)
            self.digests = draft.digests
        same = {name for name in packed if packed[name].equal(read_tensor(self.base, self.base.entries[name]))}
        weights = [Written(name, name not in same) for name in packed if self.training.is_packed(self.base, name)]
        self._check_written(weights, [], out)
        self._extras(out, packed=True)

    def _blocks(
        self, blocks: Blocks, out: Path, pairs: Mapping[str, Sequence[Pair]]
    ) -> tuple[list[Written], list[tuple[str, float, int]]]:
        whole = contextlib.nullcontext() if self.whole else checked_beside(self.folder)
        with whole, Draft(out, self._layout({}, {}), self.base) as draft:
            entries = list(self.base.entries.values())
            written = {w.name: w for w in blocks.transfer(self.base, draft, entries, pairs)}
            samples = certificate.sample_lora(self.base, draft, pairs)
            self.digests = draft.digests
        return [written[name] for name in pairs], samples

    def _modules(self, blocks: Blocks, out: Path) -> tuple[list[Written], list[tuple[str, float, int]]]:
        from peftopt.merging.modular import Rewrite

        rewrite = Rewrite(self._hollow())
        self.config = rewrite.config(self.config)
        stored = rewrite.stored
        with Draft(out, self._layout(stored, rewrite.added), self.base) as draft:
            rest = [e for e in self.base.entries.values() if e.name not in stored and e.name in draft.entries]
            list(blocks.transfer(self.base, draft, rest, {}))
            self.digests = draft.digests
            return rewrite.write(blocks, draft)

    def _hollow(self) -> Hollow:
        from peftopt.merging.modules import Hollow

        self.check_whole()
        return Hollow(str(self.folder), self.base, self.adapters, self.combination, self.training)

    def _layout(
        self, shapes: Mapping[str, tuple[int, ...] | None], added: Mapping[str, tuple[int, ...]]
    ) -> dict[str, list[Entry]]:
        """Which file holds which tensor, in the base's order; what is new goes into the last file."""
        keep = set(self.training.names(self.base))
        layout = {}
        for file, entries in self.base.files.items():
            kept = [self._slot(e, shapes.get(e.name) or e.shape) for e in entries if e.name in keep]
            layout[SINGLE if len(self.base.files) == 1 else file] = kept
        layout[list(layout)[-1]] += [Entry(name, self._dtype_of(name), shape) for name, shape in added.items()]
        return layout

    def _slot(self, entry: Entry, shape: tuple[int, ...]) -> Entry:
        dtype = entry.dtype
        if dtype not in FLOATS and self.training.packed and entry.dtype == "U8":
            dtype = self.dtype or "BF16"
        narrows = self.dtype and dtype in FLOATS and entry.name not in self.kept
        return Entry(entry.name, self.dtype if narrows else dtype, shape)

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
        self.checks.append(self._tensors(out))
        count = self.checks[-1].values["tensors"]
        self.checks.append(Check("finite", True, f"every value of all {count} tensors is finite"))
        unchanged = [w.name for w in written if not w.changed]
        detail = f"{len(written) - len(unchanged)} of {len(written)} tensors with a delta changed"
        if unchanged:
            detail += f"; not {', '.join(unchanged[:3])}: zero, or lost in the rounding"
        values = {"changed": len(written) - len(unchanged), "unchanged": unchanged}
        self.checks.append(Check("differs from the base", True, detail, values))
        if samples:
            self.checks.append(certificate.recomputed(samples))

    def _tensors(self, out: Path) -> Check:
        """Names and shapes of what was written: the base's, but for what new tokens and parted embeddings change."""
        with open_model(out) as new:
            shapes = {name: entry.shape for name, entry in new.entries.items()}
            self.tensors = {
                name: {"dtype": entry.dtype, "shape": list(entry.shape), "xxh3_128": self.digests[name]}
                for name, entry in new.entries.items()
            }
        before = {name: self.base.entries[name].shape for name in self.training.names(self.base)}
        missing = sorted(before.keys() - shapes.keys())
        other = [n for n in before.keys() & shapes.keys() if before[n] != shapes[n]]
        resized = [n for n in other if is_embedding(n) or self.training.is_packed(self.base, n)]
        wrong = missing + sorted(set(other) - set(resized))
        notes = [f"{name} is new" for name in sorted(shapes.keys() - before.keys() - self.base.entries.keys())]
        notes += [f"{n} is {list(shapes[n])}, was {list(before[n])}" for n in resized if is_embedding(n)]
        detail = f"{len(shapes)} tensors, names and shapes as in the base" + "".join(f"; {note}" for note in notes)
        if wrong:
            detail = f"{wrong[0]} is missing or has another shape"
        return Check("tensors", not wrong, detail, {"tensors": len(shapes)})

    def predictions(self, out: Path, texts: Sequence[str], lossy: bool = False) -> Check:
        """Compare what the saved folder predicts with the live adapter; see certificate.full."""
        return certificate.full(self.folder, out, self.adapters, self.combination, self.training, texts, lossy)

    def certify(self, out: Path, depth: str) -> dict[str, Json]:
        """Leave the certificate in the folder, and return what it says."""
        return certificate.write(out, self.folder, self.adapters, self.method, depth, self.checks, self.tensors)

    # ---- looking -----------------------------------------------------------------------------

    def preview(self) -> Iterator[dict[str, Json]]:
        """Tensor by tensor, computed as a merge would, written nowhere."""
        pairs = self.pairs()
        if pairs is not None:
            draft = _Nowhere({e.name: self._slot(e, e.shape) for e in self.base.entries.values()})
            with Blocks(threads()) as blocks:
                entries = [self.base.entries[name] for name in pairs]
                written = {w.name: w for w in blocks.transfer(self.base, draft, entries, pairs, norms=True)}  # type: ignore[arg-type]
            for entry in entries:
                yield _line(entry, written[entry.name].delta_norm or 0.0, written[entry.name].weight_norm or 0.0)
            return
        hollow = self._hollow()
        for values in hollow.changes():
            for name, value in values.items():
                before = hollow.value(name)
                entry = Entry(name, self.dtype or self._dtype_of(name), tuple(value.shape))
                yield _line(entry, float((value - before).norm()), float(before.norm()))

    def _dtype_of(self, name: str) -> str:
        entry = self.base.entries.get(name)
        return entry.dtype if entry else next(e.dtype for e in self.base.entries.values() if e.dtype in FLOATS)

    # ---- what comes along --------------------------------------------------------------------

    def _extras(self, out: Path, packed: bool = False) -> None:
        """Config, tokenizer, chat template, generation config, and a line in the model card."""
        config = {k: v for k, v in self.config.items() if packed or k != "quantization_config"}
        if self.dtype:
            config |= {("torch_dtype" if "torch_dtype" in config else "dtype"): CONFIG_DTYPES[self.dtype]}
        hf.copy_extras(str(self.folder), out)
        original = (self.folder / "config.json").read_text(encoding="utf-8")
        changed = config != json.loads(original)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n" if changed else original
        (out / "config.json").write_text(text, encoding="utf-8")
        hf.copy_tokenizer(Model(str(self.folder), tuple(str(a.folder) for a in self.adapters)), out)
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


def _give_memory_back() -> None:
    """Have glibc map every block over 1 MB for itself, and unmap it when it is freed. By default it learns to keep
    blocks of up to 32 MB in its heap, where weights of many sizes leave gaps, and memory grows with the model."""
    m_mmap_threshold = -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


class _Nowhere:
    """A draft that forgets what is written."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self.digests: dict[str, str] = dict.fromkeys(entries, "")

    def hasher(self) -> None:
        """None: nobody will read it."""

    def write(self, entry: Entry, at: int, data: memoryview) -> None:
        """Nothing."""

    def settle(self, file: Path) -> None:
        """Nothing."""

    def digest(self, name: str) -> None:
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
