"""What variants take on the first layers of a model, in seconds: made by their own plug-ins, opened by their engine.

The base and its adapters are cut to a few layers (models/cut.py). What a quantizer does to a layer, and how the engine
then runs it, is what it will do to all of them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peftopt import plugins, progress
from peftopt.corpus import Row
from peftopt.engines import Engine
from peftopt.engines._text import encoded
from peftopt.errors import BadInput, PeftoptError
from peftopt.measurements import Pass
from peftopt.models import cut, hf
from peftopt.models.adapter import is_embedding
from peftopt.models.checkpoint import open_model
from peftopt.records import Json, Model, Step, Variant

FEW = 4
"""Layers of a model that is tried: enough to outweigh what a request takes beside them."""

TOKENS = 12
"""That a request generates: the prompt's time is that of the first, a step's the shortest gap between the others."""

ROUNDS = 8
"""At least: from six on there is an exact 95 % interval, and from eight one that a single round does not spoil."""

PLAIN, PLAIN_ONE = "~plain", "~plain one"
"""The base without an adapter, cut to FEW layers and to one: what a request takes beside the layers."""

APART, APART_ONE = "~apart", "~apart one"
"""The same with the adapter on top, which has costs of its own beside the layers."""

PADDED = "~padded"
"""The adapter on the base, padded to a server's rank."""

EASY: Mapping[str, Json] = {"samples": 8, "max_tokens": 256, "n_grid": 1, "certify": "blocks"}
"""Parameters that only shape what the weights are, or how they are checked, and not how fast they are: the cheapest."""

BEYOND_CACHE = 1 << 27
"""Bytes of weights to multiply with in turn, more than a processor's caches hold: the products of a whole model do."""

REPEATS = 5

PYTHON_S = 0.5
"""Seconds from the start of a process to its first job."""


@dataclass(frozen=True)
class Asked:
    """A workload: its prompts, `batch` of them together."""

    workload: str
    batch: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Shape:
    """A workload's requests: `rows` times a prompt of these ids."""

    workload: str
    rows: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Tried:
    """The passes of one variant on a workload, in the order of rounds: the n-th of all variants are one round. `apart`:
    an adapter is on top; `cpu`: the same passes in CPU time of the process."""

    variant: str
    workload: str
    apart: bool
    passes: tuple[Pass, ...]
    cpu: tuple[Pass, ...]


@dataclass(frozen=True)
class Products:
    """A step's matrix products alone on a workload, all layers and the head, in milliseconds."""

    workload: str
    ms: float


@dataclass(frozen=True)
class Few:
    """What was tried on `few` of a model's `layers`; `left_out` says of a variant why it could not be. `lengths`: the
    tokens of every prompt of a workload; of the prompts whose answers are checked those of each, and of each answer
    that is known. `start_s`: from a process without libraries to an open engine."""

    few: int
    layers: int
    tried: tuple[Tried, ...]
    products: tuple[Products, ...]
    lengths: Mapping[str, tuple[int, ...]]
    left_out: Mapping[str, str]
    prompt_tokens: tuple[int, ...] = ()
    answer_tokens: tuple[int, ...] = ()
    start_s: float = 0.0


class Bench:
    """The cut models and what is made of them, below one folder."""

    def __init__(self, model: Model, folder: Path, texts: Sequence[str]) -> None:
        self.folder = folder
        self.texts = texts
        self.base = Path(model.path)
        self.layers = cut.layers_of(self.base)
        if self.layers <= FEW:
            raise BadInput(f"{self.base} has {self.layers} layers", "it is measured as soon as it is tried")
        self.adapters = [Path(adapter) for adapter in model.adapters]
        self.plain = Model(str(cut.cut_model(self.base, folder / "plain", FEW)))
        self.plain_one = Model(str(cut.cut_model(self.base, folder / "one", 1)))
        self.source = Model(self.plain.path, self._adapters(FEW))
        self.models: dict[tuple[str, ...], Model] = {(): self.source}

    def padded(self, rank: int) -> Model:
        """The adapter on the base, padded to a rank."""
        return Model(self.plain.path, self._adapters(FEW, rank))

    def source_one(self) -> Model:
        """The adapter on the base, both of one layer."""
        return Model(self.plain_one.path, self._adapters(1))

    def _adapters(self, layers: int, rank: int = 0) -> tuple[str, ...]:
        places = [self.folder / f"adapter-{n}-{layers}-{rank}" for n in range(len(self.adapters))]
        pairs = zip(self.adapters, places, strict=True)
        return tuple(str(cut.cut_adapter(adapter, place, layers, rank)) for adapter, place in pairs)

    def model(self, steps: Sequence[Step]) -> Model:
        """What these steps make of the cut model; each is done once, whoever asks for it."""
        key = tuple(f"{step.plugin} {sorted(step.params.items())}" for step in steps)
        if key not in self.models:
            before = self.model(steps[:-1])
            self.models[key] = self._made(steps[-1], before, self.folder / f"made-{len(self.models)}")
        return self.models[key]

    def _made(self, step: Step, before: Model, out: Path) -> Model:
        source = plugins.module("transform", step.plugin)
        known = {each.name for each in fields(source.Params)}
        params = {**step.params, **{name: value for name, value in EASY.items() if name in known}}
        made: Model = source.transform(before, source.Params(**params), out, self.texts if step.calibrates else (), 0)
        return made


def try_out(
    bench: Bench,
    variants: Sequence[Variant],
    asked: Sequence[Asked],
    seconds: float,
    rank: int = 0,
    seed: int = 0,
    answers: Sequence[Row] = (),
) -> Few:
    """Time every variant on every workload, in rounds of random order, for some `seconds` each. `rank`: an adapter
    padded to it is timed too, 0 for none. `answers`: the prompts whose answers will be checked, of which the tokens are
    counted. A variant that fails is left out, with its reason."""
    started = time.perf_counter()
    lengths = {each.workload: _lengths(bench.source, each.rows) for each in asked}
    words = hf.config(bench.plain.path).get_text_config().vocab_size
    shapes = [
        Shape(each.workload, each.batch, _words(typical(lengths[each.workload], each.batch), words)) for each in asked
    ]
    steps = len(variants) + 1
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        apart: set[str] = set()

        def opened(name: str, model: Model, engine: Step | None = None) -> None:
            plugin = plugins.module("engine", engine.plugin if engine else "eager")
            engines[name] = plugin.open(model, plugin.Params(**(engine.params if engine else {})))
            stack.callback(engines[name].close)
            if model.adapters:
                apart.add(name)

        opened(PLAIN_ONE, bench.plain_one)
        start_s = PYTHON_S + time.perf_counter() - started
        opened(PLAIN, bench.plain)
        for n, variant in enumerate(variants):
            progress.report("forecast", n, steps, f"making {variant.name} of {FEW} layers")
            try:
                opened(variant.name, bench.model(variant.steps), variant.engine)
            except Exception as error:  # noqa: BLE001 (whatever a library raises is no reason not to time the others)
                left_out[variant.name] = _why(error)
        if rank:
            opened(PADDED, bench.padded(rank))
        if apart:
            opened(APART_ONE, bench.source_one())
            opened(APART, bench.source)
        progress.report("forecast", steps - 1, steps, "timing")
        draw = random.Random(seed)
        tried = [each for shape in shapes for each in _timed(engines, apart, shape, seconds, draw, left_out)]
    products = tuple(Products(shape.workload, products_ms(bench.base, bench.layers, shape.rows)) for shape in shapes)
    progress.report("forecast", steps, steps)
    return Few(
        few=FEW,
        layers=bench.layers,
        tried=tuple(tried),
        products=products,
        lengths=lengths,
        left_out=left_out,
        prompt_tokens=_lengths(bench.source, answers),
        answer_tokens=_expected(bench.source, answers),
        start_s=start_s,
    )


def _lengths(model: Model, rows: Sequence[Row]) -> tuple[int, ...]:
    tokenizer = hf.tokenizer(hf.tokenizer_home(model), model.path)
    return tuple(len(encoded(tokenizer, row.messages)) for row in rows)


def _expected(model: Model, rows: Sequence[Row]) -> tuple[int, ...]:
    """Tokens of each answer that is known, with the one that ends it."""
    tokenizer = hf.tokenizer(hf.tokenizer_home(model), model.path)
    return tuple(len(tokenizer(r.expected, add_special_tokens=False).input_ids) + 1 for r in rows if r.expected)


def _words(count: int, known: int) -> tuple[int, ...]:
    """So many ids of a vocabulary: what they say does not change a time."""
    return tuple((7919 * n + 101) % known for n in range(count))


def typical(lengths: Sequence[int], rows: int) -> int:
    """The median length of a batch of so many rows, which is that of its longest one."""
    place: int = math.ceil(len(lengths) * 0.5 ** (1 / rows))
    return sorted(lengths)[place - 1]


def _why(error: Exception) -> str:
    text = error.message if isinstance(error, PeftoptError) else f"{type(error).__name__}: {error}"
    return text.strip().partition("\n")[0][:200]


def _timed(
    engines: dict[str, Engine],
    apart: Set[str],
    shape: Shape,
    seconds: float,
    order: random.Random,
    left_out: dict[str, str],
) -> Iterator[Tried]:
    """The passes of all engines on a shape. The first of each is not timed: it unpacks, and fills caches."""
    for name in list(engines):
        try:
            _pass(engines[name], shape)
        except Exception as error:  # noqa: BLE001 (as above)
            left_out[name] = _why(error)
            del engines[name]
    rounds: list[dict[str, tuple[Pass, Pass]]] = []
    until = time.perf_counter() + seconds * len(engines)
    with _uncollected():
        while len(rounds) < ROUNDS or time.perf_counter() < until:
            names = list(engines)
            order.shuffle(names)
            rounds.append({name: _pass(engines[name], shape) for name in names})
    for name in engines:
        walls, cpus = zip(*(each[name] for each in rounds), strict=True)
        yield Tried(name, shape.workload, name in apart, walls, cpus)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No collection of garbage inside a request."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _pass(engine: Engine, shape: Shape) -> tuple[Pass, Pass]:
    """One request for a single token and one for TOKENS: by the wall clock, and in CPU time, which other processes on
    the same processors do not lengthen as much."""
    prompts = [shape.prompt] * shape.rows
    started, cpu_started = time.perf_counter_ns(), time.process_time_ns()
    (first, *_) = engine.generate(prompts, 1, stop=False)[0].times
    between, cpu_between = time.perf_counter_ns(), time.process_time_ns()
    times = engine.generate(prompts, TOKENS, stop=False)[0].times
    cpu_done = time.process_time_ns()
    prompt_ns = min(first - started, times[0] - between)
    step_ns = min(later - earlier for earlier, later in itertools.pairwise(times))
    cpu_prompt_ns = cpu_between - cpu_started
    cpu_steps_ns = max(cpu_done - cpu_between - cpu_prompt_ns, 1)
    wall = Pass(prompt_ms=prompt_ns / 1e6, step_ms=step_ns / 1e6)
    return wall, Pass(prompt_ms=cpu_prompt_ns / 1e6, step_ms=cpu_steps_ns / 1e6 / (TOKENS - 1))


def products_ms(base: Path, layers: int, rows: int) -> float:
    """The matrix products of one step alone, in the base's own dtype on the CPU or the GPU that the engines take: the
    layers' and the head's, in milliseconds. Weights are taken in turn: they come from memory, as a model's do."""
    import torch

    matrices = {e.name: e for e in open_model(base).entries.values() if len(e.shape) == 2}
    of_layer = [e.shape for name, e in matrices.items() if cut.layer_of(name) == 0]
    heads = [e.shape for name, e in matrices.items() if cut.layer_of(name) < 0 and is_embedding(name)]
    dtype = _dtype(next(iter(matrices.values())).dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def product_ms(shape: tuple[int, ...]) -> float:
        copies = max(1, BEYOND_CACHE // (shape[0] * shape[1] * dtype.itemsize))
        weights = [torch.ones(shape, dtype=dtype, device=device) for _ in range(min(copies, layers))]
        x = torch.ones(rows, shape[1], dtype=dtype, device=device)
        best = float("inf")
        with torch.inference_mode():
            for _ in range(REPEATS):
                started = time.perf_counter()
                for weight in weights:
                    y = torch.nn.functional.linear(x, weight)
                float(y[0, 0])  # a GPU is done when the number is here
                best = min(best, (time.perf_counter() - started) / len(weights))
        return best * 1e3

    each = {shape: product_ms(shape) for shape in dict.fromkeys(of_layer)}
    head = product_ms(max(heads, key=lambda shape: shape[0])) if heads else 0.0
    return layers * sum(each[shape] for shape in of_layer) + head


def _dtype(word: str) -> Any:
    """Torch's dtype for a word of the safetensors format."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16}.get(word, torch.bfloat16)
