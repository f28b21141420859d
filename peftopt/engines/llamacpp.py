"""llama.cpp in process, through llama-cpp-python: GGUF weights, LoRA adapters unmerged, batches in one step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import machine, plugins
from peftopt.engines import Generation, Scores
from peftopt.engines._logits import scored, scores_of
from peftopt.engines._text import Text, ends
from peftopt.environments.llamacpp import model_settings
from peftopt.errors import BadInput
from peftopt.models import hf
from peftopt.models.gguf import WEIGHTS, library, lora_file, lora_scale
from peftopt.records import Model

if TYPE_CHECKING:
    import numpy as np


ROUND_TO = 256
"""Tokens; the room that each sequence has grows in steps of this."""

STEP = 2048
"""Tokens that one call decodes at most; a longer prompt takes several."""


@dataclass(frozen=True)
class Params:
    """`context`: tokens that each sequence has room for from the start (it grows for a longer request). `gpu_layers`:
    layers on a GPU, where the environment was built for one; -1 = all."""

    context: int = 0
    gpu_layers: int = 0


PLUGIN = plugins.engine(Params, environment="llamacpp", format="gguf")


def prepare(model: Model) -> None:
    """Import llama.cpp and the tokenizers."""
    import transformers  # noqa: F401

    library()


def open(model: Model, params: Params) -> LlamaCpp:
    """Load the model and its adapters. Raises BadInput for a folder without a GGUF, or a GGUF that cannot be read."""
    return LlamaCpp(model, params)


class LlamaCpp(Text):
    """A loaded model that decodes through llama.cpp's batches; see `peftopt.engines.Engine` for what each method
    promises. One prompt is one sequence, each with a key-value cache of its own."""

    scores = True

    def __init__(self, model: Model, params: Params) -> None:
        self._lib = library()
        folder = Path(model.path)
        tokenizer = hf.tokenizer(hf.tokenizer_home(model), model.path)
        super().__init__(tokenizer, ends(folder, tokenizer))
        self.threads = machine.threads()
        self.device = "cuda" if params.gpu_layers and self._lib.llama_supports_gpu_offload() else "cpu"
        settings = model_settings(self._lib)
        settings.n_gpu_layers = params.gpu_layers
        self._model = _load(self._lib, folder / WEIGHTS, settings)
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        started = time.perf_counter()
        self._adapters = [(self._adapter(folder, Path(a)), lora_scale(Path(a))) for a in model.adapters]
        self.adapter_switch_time = time.perf_counter() - started if model.adapters else None
        self._least = params.context
        self._context: Any = None
        self._rows, self._length = 0, 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """All prompts in one batch, which a row leaves when it ends. Raises MemoryError where no context fits them."""
        self._make_room(len(prompts), max(map(len, prompts)) + new_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        times: list[list[int]] = [[] for _ in prompts]
        turns = [_Turn(row, 0, prompt, [len(prompt) - 1]) for row, prompt in enumerate(prompts)]
        for _ in range(new_tokens):
            best = [int(token) for logits in self._decode(turns) for token in logits.argmax(axis=1)]
            now, going = time.perf_counter_ns(), []
            for turn, token in zip(turns, best, strict=True):
                answers[turn.row].append(token)
                times[turn.row].append(now)
                if not (stop and token in self.eos):
                    going.append(_Turn(turn.row, turn.start + len(turn.tokens), [token], [0]))
            turns = going
            if not turns:
                break
        ended = [bool(stop and answer and answer[-1] in self.eos) for answer in answers]
        return [Generation(*each) for each in zip(answers, times, ended, strict=True)]

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """In one batch; logits are kept only where an answer's token is predicted. MemoryError as in `generate`."""
        import numpy as np

        self._make_room(len(prompts), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
        turns = [
            # the prediction of an answer's token is at the one before it; the last token predicts nothing
            _Turn(row, 0, [*prompt, *answer[:-1]], list(range(len(prompt) - 1, len(prompt) + len(answer) - 1)))
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        given = np.array([token for answer in answers for token in answer])
        chunks, done = [], 0
        for logits in self._decode(turns):
            chunks.append(scored(logits, given[done : done + len(logits)]))
            done += len(logits)
        whole = [np.concatenate(each) for each in zip(*chunks, strict=True)]
        stops = np.cumsum([len(answer) for answer in answers])
        parts = [slice(stop - len(answer), stop) for stop, answer in zip(stops, answers, strict=True)]
        return [scores_of(*(each[part] for each in whole)) for part in parts]

    def close(self) -> None:
        """Free the context, the model, and the adapters with it."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)  # and its adapters with it
        self._context = self._model = None

    def _adapter(self, folder: Path, adapter: Path) -> Any:
        file = lora_file(folder, adapter)
        opened = self._lib.llama_adapter_lora_init(self._model, str(file).encode()) if file.is_file() else None
        if not opened:
            hint = "quantize the base with this adapter on it: peftopt quantize --method gguf --adapter …"
            raise BadInput(f"{folder} has no GGUF form of adapter {adapter}", hint)
        return opened

    def _make_room(self, rows: int, length: int) -> None:
        """An empty context for `rows` sequences of `length` tokens: the one that is there, or a larger one."""
        if self._context is not None and rows <= self._rows and length <= self._length:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
            return
        if self._context is not None:
            self._lib.llama_free(self._context)
        same = self._length if rows == self._rows else 0
        self._rows, self._length = rows, -(-max(length, self._least, same) // ROUND_TO) * ROUND_TO
        settings = self._lib.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = rows, rows * self._length
        settings.n_batch = STEP
        settings.n_threads = settings.n_threads_batch = self.threads
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if self._context is None:
            raise MemoryError(f"out of memory: no context for {rows} sequences of {self._length} tokens")
        if self._adapters:
            self._attach()

    def _attach(self) -> None:
        import ctypes

        n = len(self._adapters)
        pointers = (self._lib.llama_adapter_lora_p_ctypes * n)(*(pointer for pointer, _ in self._adapters))
        scales = (ctypes.c_float * n)(*(scale for _, scale in self._adapters))
        if self._lib.llama_set_adapters_lora(self._context, pointers, n, scales):
            raise RuntimeError("llama.cpp did not take the adapters")

    def _decode(self, turns: Sequence[_Turn]) -> Iterator[np.ndarray]:
        """Run some tokens of several sequences; yields logits [wanted positions, vocabulary] in order, a view that
        lasts until the next."""
        import numpy as np

        batch = _Batch(turns, self._lib)
        for start in range(0, batch.size, STEP):
            part, wanted = batch.part(start, min(start + STEP, batch.size))
            if code := self._lib.llama_decode(self._context, part):
                raise RuntimeError(f"llama.cpp could not decode (code {code})")
            if wanted:
                yield np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (wanted, self._vocabulary))


@dataclass(frozen=True)
class _Turn:
    """Tokens that one sequence goes on with from position `start`; logits are wanted at `wanted` of them."""

    row: int
    start: int
    tokens: Sequence[int]
    wanted: Sequence[int] = field(default_factory=list)


class _Batch:
    """Turns side by side in the arrays of a `llama_batch`, of which any range can be decoded."""

    def __init__(self, turns: Sequence[_Turn], lib: Any) -> None:
        import numpy as np

        self._lib = lib
        self.size = sum(len(turn.tokens) for turn in turns)
        self._tokens = np.fromiter((t for turn in turns for t in turn.tokens), np.int32, self.size)
        self._positions = np.concatenate([turn.start + np.arange(len(turn.tokens), dtype=np.int32) for turn in turns])
        self._rows = np.repeat(np.array([turn.row for turn in turns], np.int32), [len(turn.tokens) for turn in turns])
        self._counts = np.ones(self.size, np.int32)
        self._wanted = np.zeros(self.size, np.int8)
        start = 0
        for turn in turns:
            self._wanted[start + np.array(turn.wanted, dtype=np.int64)] = 1
            start += len(turn.tokens)
        # each token points to a list of the sequences that it belongs to: its one row
        self._lists = (self._rows.ctypes.data + self._rows.itemsize * np.arange(self.size)).astype(np.uintp)

    def part(self, start: int, end: int) -> tuple[Any, int]:
        """A `llama_batch` of the tokens from `start` to `end`, and how many of them have logits."""
        import ctypes

        fields = dict(self._lib.llama_batch._fields_)

        def pointer(name: str, array: Any) -> Any:
            return ctypes.cast(array[start:end].ctypes.data, fields[name])

        part = self._lib.llama_batch(
            n_tokens=end - start,
            token=pointer("token", self._tokens),
            embd=None,
            pos=pointer("pos", self._positions),
            n_seq_id=pointer("n_seq_id", self._counts),
            seq_id=pointer("seq_id", self._lists),
            logits=pointer("logits", self._wanted),
        )
        return part, int(self._wanted[start:end].sum())


def _load(lib: Any, file: Path, settings: Any) -> Any:
    if not file.is_file():
        hint = f"make one: peftopt quantize --method gguf --model {file.parent} --out …"
        raise BadInput(f"{file.parent} holds no {WEIGHTS}", hint)
    model = lib.llama_model_load_from_file(str(file).encode(), settings)
    if model is None:
        raise BadInput(f"llama.cpp cannot load {file}", "it may be damaged, or from another version: make it again")
    return model
