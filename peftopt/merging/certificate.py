"""The parity certificate: what was checked of a merged folder, and what came out. Written as parity.json.

Two depths. "blocks" is made while the weights stream by: keys, shapes, finite values, changed tensors, and samples
recomputed in fp64 and compared with what is on disk. "full" also loads the saved folder and compares its predictions
with the live adapter's on real prompts, against the adapter's own noise: the same adapter run in the output's dtype.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import __version__, identity, progress
from peftopt.corpus import TEXTS
from peftopt.errors import MissingEnvironment
from peftopt.merging.blocks import read, row_width
from peftopt.merging.training import TrainingBase, is_packed
from peftopt.metrics import percent
from peftopt.models import hf
from peftopt.models.adapter import Adapter, Pair
from peftopt.models.checkpoint import Checkpoint, Draft, open_model
from peftopt.models.values import FLOATS, dtype_of
from peftopt.records import FORMAT, Json

if TYPE_CHECKING:
    import numpy as np

FILE = "parity.json"
ULPS = 1.0
"""How far a weight may be from the exact result, in units in the last place of the output's dtype."""

PROMPTS, TOKENS = 12, 48
"""How many prompts "full" asks, and the most tokens of each."""

ANSWERS, NEW_TOKENS = 4, 12
"""How many of them the live adapter answers, and with how many tokens, which the others then have to predict."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked: `detail` is a sentence with its numbers, `values` the numbers themselves."""

    name: str
    passed: bool
    detail: str
    values: Mapping[str, Json] = field(default_factory=dict)


def write(
    out: Path,
    base: Path,
    adapters: Sequence[Adapter],
    method: str,
    depth: str,
    checks: Sequence[Check],
    tensors: Mapping[str, Json],
) -> dict[str, Json]:
    """Leave parity.json in the merged folder and return what it says. It names content, never the way to it.

    `tensors` maps a name to the dtype, shape and XXH3-128 of the bytes in the folder; only the file holds them.
    """
    certificate = {
        "format": FORMAT,
        "made_by": f"peftopt {__version__}",
        "base": {"name": base.resolve().name, "config": identity.of_file(base / "config.json")},
        "adapters": [
            {"name": a.folder.resolve().name, "type": a.kind, "weight": a.weight, "sha256": a.sha256} for a in adapters
        ],
        "method": method,
        "depth": depth,
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
    }
    # A line a tensor: a large model has thousands.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in tensors.items())
    text = json.dumps(certificate, indent=1, ensure_ascii=False).removesuffix("\n}")
    (out / FILE).write_text(f'{text},\n "tensors": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
    return certificate


def summary(certificate: Mapping[str, Json]) -> str:
    """The certificate in a line."""
    failed = [check for check in certificate["checks"] if not check["passed"]]
    if failed:
        return f"FAILED ({certificate['depth']}): {failed[0]['name']}: {failed[0]['detail']}"
    details = {check["name"]: check["detail"] for check in certificate["checks"]}
    figures = details.get("predictions") or details.get("recomputed in fp64", "")
    chosen = f"; merge base {details['merge base']}" if "merge base" in details else ""
    return f"passed ({certificate['depth']}, {len(details)} checks): {figures}{chosen}"


# ---- while streaming -----------------------------------------------------------------------------


def recomputed(errors: Sequence[tuple[str, float, int]]) -> Check:
    """From (tensor, largest error in ulps, elements) of each sample: none may be off by more than ULPS."""
    worst = max(errors, key=lambda e: e[1], default=("", math.nan, 0))
    count = sum(n for *_, n in errors)
    return Check(
        "recomputed in fp64",
        bool(errors) and worst[1] <= ULPS,
        f"{len(errors)} samples of {count} elements recomputed in fp64: at most {worst[1]:.3f} ulp off ({worst[0]})",
        {"samples": len(errors), "elements": count, "max_ulp": worst[1], "worst": worst[0]},
    )


def sample_lora(
    base: Checkpoint, draft: Draft, pairs: Mapping[str, Sequence[Pair]], samples: int = 16
) -> list[tuple[str, float, int]]:
    """Errors of what is on disk against W + sum of scale * B A in fp64, on some rows of some tensors, evenly spread."""
    import numpy as np

    names = sorted(pairs)
    errors = []
    for n, name in enumerate(names[:: max(1, len(names) // samples)][:samples]):
        entry, target = base.entries[name], draft.entries[name]
        count = max(1, min(65_536 // row_width(entry), entry.shape[0]))
        start = (entry.shape[0] - count) * n // samples  # from the first rows of one to the last of another
        rows = range(start, start + count)
        weight = exact = read(base, entry, rows).astype(np.float64)
        for pair in pairs[name]:
            b = read(pair.adapter.weights, pair.b, rows).astype(np.float64)
            exact = exact + pair.scale * (b @ read(pair.adapter.weights, pair.a).astype(np.float64))
        errors.append((name, ulps(read(draft, target, rows), exact, weight), weight.size))
    return errors


def ulps(written: np.ndarray, exact: np.ndarray, weight: np.ndarray | float) -> float:
    """The largest distance of `found` from `exact` (fp64), in units in the last place of found's dtype at `exact`.

    The unit holds fp32's own rounding of sums as large as the largest `weight` that goes into them, which is what an
    element keeps where terms cancel; in half precision that is next to nothing.
    """
    import ml_dtypes
    import numpy as np

    if not written.size:
        return 0.0
    exact, limits = exact.reshape(written.shape), ml_dtypes.finfo(written.dtype)
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), float(limits.tiny))))) * float(limits.eps)
    unit += float(np.finfo(np.float32).eps) * 32 * float(np.abs(weight).max())
    return float((np.abs(written.astype(np.float64) - exact) / unit).max())


# ---- on the saved folder -------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Token ids of a prompt, and of the live adapter's greedy answer where it was asked for one."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)


HELD = 1 << 28
"""Bytes of one model's predictions that stay in memory; what is more waits on the disk: 48 tokens of a prompt are 50 MB
where a vocabulary has 262,144 words, and four models have answered when the last is compared."""

ROWS = 16
"""Positions that are compared at a time, in fp64."""


class OnDisk(Sequence[Any]):
    """Tensors [positions, vocabulary] of fp32 in one file, read when they are asked for; gone when nobody has it."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this is)
        self._shapes: list[tuple[int, ...]] = []
        self._starts = [0]

    def append(self, tensor: Any) -> None:
        """Write one behind the others. Raises MissingEnvironment where the disk takes no more."""
        self._file.seek(self._starts[-1])
        try:
            tensor.contiguous().numpy().tofile(self._file)
        except OSError as error:
            raise MissingEnvironment(f"cannot keep predictions on the disk: {error}", "free some space") from error
        self._shapes.append(tuple(tensor.shape))
        self._starts.append(self._starts[-1] + tensor.numel() * tensor.element_size())

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, n: Any) -> Any:
        import numpy as np
        import torch

        if not 0 <= n < len(self):
            raise IndexError(n)
        self._file.seek(self._starts[n])
        shape = self._shapes[n]
        return torch.from_numpy(np.fromfile(self._file, np.float32, math.prod(shape)).reshape(shape))


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities [positions, vocabulary] after each token of each prompt and its answer."""

    logs: Sequence[Any]

    def greedy(self, asked: Sequence[Asked]) -> int:
        """How many answers are this model's own greedy answers too: each token its most likely one."""
        answered = [(log, a) for log, a in zip(self.logs, asked, strict=True) if a.answer]
        return sum(log.argmax(1)[len(a.prompt) - 1 : -1].tolist() == a.answer for log, a in answered)


def full(
    base: Path,
    out: Path,
    adapters: Sequence[Adapter],
    combination: str,
    training: TrainingBase,
    texts: Sequence[str],
    lossy: bool = False,
) -> Check:
    """Load what was saved and compare its predictions with the live adapter's, both computed in fp32.

    One model is in memory at a time. The merge passes when it is no farther from the adapter (mean KL divergence) than
    twice the adapter's own noise in the output's dtype, changes no more top tokens than that noise does (plus three of
    its standard deviations), and is at less than half the base's distance from the adapter. A `lossy` merge, into other
    weights than the adapter was trained on, has to meet only the last.
    """
    import torch

    dtype = _dtype(out)
    encoded = prompts(out, texts)
    narrows = dtype != torch.float32
    steps = Steps.of(len(encoded), models=3 + narrows, loads=2 + narrows)
    steps.next("loading the live adapter")
    model = _live(base, adapters, combination, training, torch.float32)
    asked = answered_by(model, encoded, steps)
    predict = partial(predicted_by, asked=asked, folder=out.parent, steps=steps)
    live = predict(model, what="the live adapter")
    with model.disable_adapter():
        plain = predict(model, what="the base")
    del model
    steps.next("loading the merged model")
    still_packed = is_packed(getattr(hf.config(str(out)), "quantization_config", None))
    model = hf.load(str(out)).dequantize().float() if still_packed else hf.load(str(out), dtype=torch.float32)
    merged, noisy = predict(model, what="the merged model"), live
    if narrows:
        del model
        steps.next("loading the live adapter in the output's dtype")
        model = _live(base, adapters, combination, training, dtype)
        noisy = predict(model, what="the live adapter in the output's dtype")
    return compare(live, merged, noisy, plain, asked, steps, decoder(out), lossy)


def compare(
    live: Predictions,
    merged: Predictions,
    noisy: Predictions,
    plain: Predictions,
    asked: Sequence[Asked],
    steps: Steps,
    decode: Callable[[list[int]], str],
    lossy: bool = False,
    change: str = "delta",
) -> Check:
    """The verdict over four sets of predictions: the adapter's, the merged model's, the adapter's in the output's
    dtype (the null), and the base's. `change`: what the adapter does to the base, in a word."""
    ours, null, away, left = [], [], [], []
    flips = null_flips = 0
    for exact, other, again, without in zip(live.logs, merged.logs, noisy.logs, plain.logs, strict=True):
        steps.next("comparing what they predict")
        ours.append(kl(exact, other))
        null.append(kl(exact, again))
        away.append(kl(exact, without))
        left.append(kl(other, without))
        top = exact.argmax(1)
        flips += int((top != other.argmax(1)).sum())
        null_flips += int((top != again.argmax(1)).sum())
    mean, noise, distance, survived = (_mean(x) for x in (ours, null, away, left))
    positions = sum(len(x) for x in ours)
    answers = sum(bool(a.answer) for a in asked)
    same, null_same = merged.greedy(asked), noisy.greedy(asked)
    worst = max(range(len(ours)), key=lambda i: float(ours[i].max()))
    at = int(ours[worst].argmax())
    problems = []
    if not (lossy or mean <= 2 * noise + 1e-6):
        problems.append("farther from the adapter than twice the adapter's own noise")
    if not lossy and flips > null_flips + 3 * math.sqrt(null_flips + 1):
        problems.append("more top tokens change than by the adapter's own noise")
    if not (mean < distance / 2):
        problems.append(f"not nearer to the adapter than the base is: the {change} is lost")
    values = {
        "kl": mean,
        "kl_null": noise,
        "kl_base": distance,
        "kl_worst": float(ours[worst].max()),
        "top1": 1 - flips / positions,
        "top1_null": 1 - null_flips / positions,
        "greedy_match": same,
        "greedy_match_null": null_same,
        "greedy_prompts": answers,
        "delta_survival": survived / distance if distance else math.nan,
        "prompts": len(asked),
        "positions": positions,
        "worst_token": decode([(asked[worst].prompt + asked[worst].answer)[at]]),
        "worst_top": [decode([int(x.logs[worst][at].argmax())]) for x in (live, merged)],
    }
    top, top_null = percent(1 - flips / positions, 1), percent(1 - null_flips / positions, 1)
    detail = (
        f"KL {mean:.2g} from the live adapter (its own noise {noise:.2g}, the base {distance:.2g}), "
        f"same top token {top} (noise {top_null}) of {positions}, "
        f"greedy {same} of {answers} (noise {null_same}), worst KL {values['kl_worst']:.2g} "
        f"after {values['worst_token']!r}"
    )
    return Check("predictions", not problems, "; ".join([*problems, detail]), values)


def kl(p: Any, q: Any) -> Any:
    """KL(P || Q) in nats per position, from log-probabilities [positions, vocabulary] (resized: the shared part)."""
    import torch

    shared, parts = min(p.shape[1], q.shape[1]), []
    for start in range(0, len(p), ROWS):
        a, b = (x[start : start + ROWS, :shared].double() for x in (p, q))
        parts.append((a.exp() * (a - b)).sum(dim=1).clamp_min(0))
    return torch.cat(parts)


def _mean(parts: Sequence[Any]) -> float:
    return sum(float(x.sum()) for x in parts) / sum(len(x) for x in parts)


def prompts(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts, at most TOKENS each; random ids where the folder has no tokenizer."""
    import torch

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        vocabulary = hf.config(str(folder)).get_text_config().vocab_size
        dice = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (PROMPTS // 2, TOKENS), generator=dice).tolist()
    tokenizer = hf.tokenizer(str(folder))
    rendered = list(texts[:PROMPTS])
    if not rendered:
        chat = tokenizer.chat_template
        rendered = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) if chat else text
            for text in TEXTS
        ]
    encoded = (tokenizer(text, add_special_tokens=False).input_ids[-TOKENS:] for text in rendered)
    return [ids for ids in encoded if len(ids) > 1]


def _live(base: Path, adapters: Sequence[Adapter], combination: str, training: TrainingBase, dtype: Any) -> Any:
    """The adapters on their training base, unmerged as PEFT runs them."""
    import torch

    # Packed weights are opened before anything runs: bitsandbytes' own kernels on a CPU compute in bf16.
    model = hf.load(str(base)).dequantize().to(dtype) if training.packed else hf.load(str(base), dtype=dtype)
    with torch.no_grad():
        for name in training.quantized(model):
            parameter = model.get_parameter(name)
            parameter.copy_(training.seen(name, parameter))
    for n, adapter in enumerate(adapters):
        model = hf.attach(model, str(adapter.folder), f"adapter{n}", keep_dtype=dtype != torch.float32)
    hf.combine(model, [f"adapter{n}" for n in range(len(adapters))], [a.weight for a in adapters], combination)
    return model


class Steps:
    """Says how far the certificate is: a step is a model that is loaded, one prompt that a model answers or predicts,
    or one prompt's predictions compared."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    @classmethod
    def of(cls, prompts: int, models: int, loads: int = 0) -> Steps:
        """Those of so many prompts, the predictions of so many models, and so many loads."""
        return cls(loads + min(ANSWERS, prompts) + (models + 1) * prompts)

    def next(self, what: str) -> None:
        """Another step begins."""
        progress.report("certifying", self.done, self.total, what)
        self.done += 1


def answered_by(model: Any, encoded: Sequence[list[int]], steps: Steps) -> list[Asked]:
    """The prompts, the first few with the model's greedy answer."""
    import torch

    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "temperature": None, "top_p": None, "top_k": None}
    asked = []
    for n, prompt in enumerate(encoded):
        answer = []
        if n < ANSWERS:
            steps.next("the live adapter answers")
            ids = torch.tensor([prompt])
            with torch.inference_mode(), hf.quiet():
                generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            answer = generated[0, len(prompt) :].tolist()
        asked.append(Asked(prompt, answer))
    return asked


def predicted_by(model: Any, asked: Sequence[Asked], folder: Path, steps: Steps, what: str) -> Predictions:
    """What the model expects after each token; kept on the folder's disk where it is much."""
    import torch

    logs: list[Any] | OnDisk = []
    held = 0
    for a in asked:
        steps.next(what)
        with torch.inference_mode(), hf.quiet():
            log = model(input_ids=torch.tensor([a.prompt + a.answer])).logits[0].float().log_softmax(-1)
        held += log.numel() * log.element_size()
        if isinstance(logs, list) and held > HELD:
            kept, logs = logs, OnDisk(folder)
            for earlier in kept:
                logs.append(earlier)
        logs.append(log)
    return Predictions(logs)


def _dtype(out: Path) -> Any:
    """The dtype of torch, of the floating ones, that most of a folder's weights have."""
    import torch

    with open_model(out) as written:
        totals: dict[str, int] = {}
        for entry in (e for e in written.entries.values() if e.dtype in FLOATS):
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.items
    return getattr(torch, dtype_of(max(totals, key=lambda name: totals[name])).name)


def decoder(out: Path) -> Any:
    """Token ids to text; the ids themselves where the folder has no tokenizer."""
    if (out / "tokenizer.json").is_file():
        return hf.tokenizer(str(out)).decode
    return str
