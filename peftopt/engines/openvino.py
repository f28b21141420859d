"""OpenVINO on the CPU, in process: weights in its own format, its key-value cache inside the graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import machine, plugins
from peftopt.engines import Generation, Scores
from peftopt.engines._logits import scored, scores_of
from peftopt.engines._text import Text, ends, trimmed
from peftopt.errors import BadInput
from peftopt.models import hf
from peftopt.models.openvino import WEIGHTS, refuse_adapters
from peftopt.records import Model

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Params:
    """`precision`: what it computes in, "" for its own choice: bf16 where the CPU has instructions for it, else f32."""

    precision: str = ""


PLUGIN = plugins.engine(Params, environment="openvino", format="openvino")


def prepare(model: Model) -> None:
    """Import OpenVINO and the tokenizers."""
    import openvino  # noqa: F401
    import transformers  # noqa: F401


def open(model: Model, params: Params) -> OpenVino:
    """Load the model. Raises BadInput for adapters on top, and for a folder without OpenVINO's files."""
    if params.precision not in ("", "bf16", "f16", "f32"):
        raise BadInput(f"precision: {params.precision!r} is unknown", "use bf16, f16 or f32")
    refuse_adapters(model)
    if not (Path(model.path) / WEIGHTS).is_file():
        hint = f"make one: peftopt quantize --method openvino_ir --model {model.path} --out …"
        raise BadInput(f"{model.path} holds no {WEIGHTS}", hint)
    return OpenVino(model, params)


class OpenVino(Text):
    """A stateful graph and a decode loop of its own around it; see `peftopt.engines.Engine` for what each method
    promises. The graph that generates computes only the last token's logits, as OpenVINO's own pipelines have it;
    the one that scores is compiled when it is first asked."""

    scores = True
    device = "cpu"
    adapter_switch_time = None

    def __init__(self, model: Model, params: Params) -> None:
        tokenizer = hf.tokenizer(model.path)
        super().__init__(tokenizer, ends(Path(model.path), tokenizer))
        self.threads = machine.threads()
        self._file = Path(model.path) / WEIGHTS
        self._settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads, "CACHE_DIR": ""}
        if params.precision:
            self._settings["INFERENCE_PRECISION_HINT"] = params.precision
        self._generator: Any = _Graph(self._compiled(last_only=True))
        self._scorer: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: bool) -> list[Generation]:
        """A token of all rows at a time; with `stop`, until every row has ended."""
        import numpy as np

        ids, mask = _left_padded(prompts)
        self._generator.start(len(prompts))
        columns, times = [], []
        alive = np.ones(len(prompts), dtype=bool)
        eos = np.array(sorted(self.eos))
        for _ in range(new_tokens):
            token = self._generator.logits(ids, mask)[:, -1].argmax(axis=-1)
            columns.append(token.tolist())
            times.append(time.perf_counter_ns())
            alive &= ~np.isin(token, eos)
            if stop and not alive.any():
                break
            ids = token[:, None].astype(np.int64)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        return [trimmed(list(row), times, self.eos if stop else frozenset()) for row in zip(*columns, strict=True)]

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Scores]:
        """In one pass of the graph that scores, which the first call compiles."""
        import numpy as np

        if self._scorer is None:
            self._scorer = _Graph(self._compiled(last_only=False))
        # the prediction of an answer's token is at the one before it; the last token predicts nothing
        ids, mask = _left_padded([[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)])
        self._scorer.start(len(prompts))
        logits = self._scorer.logits(ids, mask)
        return [scores_of(*scored(logits[row, -len(answer) :], np.array(answer))) for row, answer in enumerate(answers)]

    def close(self) -> None:
        """Drop both graphs, with their key-value caches."""
        self._generator = self._scorer = None

    def _compiled(self, last_only: bool) -> Any:
        import openvino

        core = openvino.Core()
        graph = core.read_model(self._file)
        if last_only:
            _keep_last_token(graph)
        return core.compile_model(graph, "CPU", self._settings)


class _Graph:
    """A compiled graph and the request that holds its key-value cache."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._names = {name for port in compiled.inputs for name in port.names}
        self._rows = 0
        self._request: Any = None

    def start(self, rows: int) -> None:
        """Forget what was seen. Another number of rows gets another request: in one that grows, OpenVINO 2026.4 answers
        the new rows from a cache that nobody has written (INT8, tokens after the first)."""
        if self._request is None or rows != self._rows:
            self._request, self._rows = self._compiled.create_infer_request(), rows
        self._request.reset_state()

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits [rows, tokens or 1, vocabulary] of tokens [rows, tokens] that follow what the graph has seen; `mask`
        covers all of it. A view that lasts until the next call."""
        import numpy as np

        positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given["beam_idx"] = np.arange(len(ids), dtype=np.int32)
        named = {name: value for name, value in given.items() if name in self._names}
        self._request.infer(named, share_inputs=True)
        logits: np.ndarray = self._request.get_tensor("logits").data
        return logits


def _keep_last_token(graph: Any) -> None:
    """Cut what goes into the output head down to the last position: the head is a quarter of a small model's work, and
    a prompt's other logits are thrown away. Left as it is where the head is no plain matrix product."""
    from openvino import opset13

    node = graph.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        return
    start, stop, step, axis = (opset13.constant([n], dtype="int64") for n in (-1, -2, -1, 1))
    last = opset13.slice(node.input_value(0), start, stop, step, axis)
    node.input(0).replace_source_output(last.output(0))


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (0 where there is none) and attention mask, each int64 [prompts, longest prompt]."""
    import numpy as np

    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=np.int64)
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=np.int64)
    return ids, mask
