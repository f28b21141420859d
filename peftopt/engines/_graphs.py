"""Graphs of one model's functions: compiled ahead of time, kept on disk for other processes, recorded on CUDA."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftopt import identity, machine
from peftopt.engines import _traced
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.engines.compiled import Params

RECORDING = ("reduce-overhead", "max-autotune")
"""Modes that send a step to the GPU as one CUDA graph."""
OPTIONS = {"cpp.dynamic_threads": True, "realize_reads_threshold": 0, "realize_opcount_threshold": 4}
"""Inductor's: kernels that serve any number of threads; and what several loops read is computed once, before them. By
default the normalized input of a projection was computed again for each of its outputs."""


class Graphs:
    """Makes them, and says what it took: `seconds` of compiling and of starting from what was kept, and a `log`. Those
    without breaks or free sizes are kept in TORCHINDUCTOR_CACHE_DIR where that is set."""

    def __init__(self, model: Any, params: Params, device: Any, backend: str) -> None:
        self._model, self._params, self._device, self._backend = model, params, device, backend
        self._any_shape: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.log: list[str] = []
        self.seconds = {"compile_time": 0.0, "warm_start": 0.0}

    def close(self) -> None:
        """Drop the model."""
        self._model = None
        self._any_shape.clear()

    @property
    def ahead(self) -> bool:
        """Whether graphs are compiled ahead of time. Those with breaks or free sizes only come just in time, with their
        guards; and so do all with a torch older than 2.10."""
        whole = self._params.fullgraph and not self._params.dynamic and self._backend == "inductor"
        return whole and _can_compile_ahead()

    def ready(
        self,
        function: Callable[..., Any],
        shape: tuple[int, ...],
        arguments: Sequence[Any],
        adapters: Sequence[str],
        what: str,
    ) -> Callable[..., Any]:
        """The graph of a function of the model and `arguments`, run once. Raises BadInput for a model that
        torch.compile cannot take in one graph. `adapters` are folders of those in it, `what` is its name in the log."""
        started = time.perf_counter()
        file = self._kept(function, shape, adapters)
        graph, how = None, "compile_time"
        if file is not None and file.exists():
            try:
                graph, how = self._loaded(file, arguments), "warm_start"
            except Exception as error:  # noqa: BLE001 (whatever torch makes of a broken file)
                self.log.append(f"{what}: the kept graph cannot be used ({type(error).__name__}), so compiled again")
        if graph is None:
            with _refusing():
                graph = self._compiled(function, arguments)
                graph(self._model, *arguments)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                whole = file.with_name(f"{file.name}.{os.getpid()}")  # a process that is killed leaves no half graph
                graph.save_compiled_function(str(whole))
                whole.replace(file)
        if self.ahead and self._device.type == "cuda" and self._params.mode in RECORDING:
            graph = _recorded(graph, self._model, arguments)
        seconds = time.perf_counter() - started
        self.seconds[how] += seconds
        how_long = "started from the compile cache" if how == "warm_start" else f"compiled in {seconds:.1f} s"
        self.log.append(f"{what}: {how_long}")
        return graph

    def _loaded(self, file: Path, arguments: Sequence[Any]) -> Any:
        import torch

        with file.open("rb") as handle:
            graph: Any = torch.compiler.load_compiled_function(handle)
        graph.disable_guard_check()
        graph(self._model, *arguments)
        return graph

    def _compiled(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        import torch

        build: Any = torch.compile  # its types promise no more than the function it is given
        if not self.ahead:
            settings: dict[str, Any] = {"fullgraph": self._params.fullgraph, "dynamic": self._params.dynamic}
            settings |= {"mode": self._params.mode} if self._backend == "inductor" else {"backend": self._backend}
            if function not in self._any_shape:
                self._any_shape[function] = build(function, **settings)
            return self._any_shape[function]
        # A mode and options exclude each other, but a mode is no more than options. CUDA graphs we record ourselves:
        # torch's own would look at every call whether its inputs are still the same.
        options = {**OPTIONS, **torch._inductor.list_mode_options(self._params.mode)}
        options["triton.cudagraphs"] = False
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
        lazy: Any = build(function, fullgraph=True, dynamic=False, options=options)
        graph: Any = lazy.aot_compile(((self._model, *arguments), {}))
        graph.disable_guard_check()
        return graph

    def _kept(self, function: Callable[..., Any], shape: tuple[int, ...], adapters: Sequence[str]) -> Path | None:
        """Where the compiled function for this shape is kept. Weights are inputs of a graph: their values do not
        matter."""
        home = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if not home or not self.ahead:
            return None
        tensors = [
            (n, str(t.dtype), tuple(t.shape))
            for n, t in [*self._model.named_parameters(), *self._model.named_buffers()]
        ]
        shaping = {
            "shape": shape,
            "mode": self._params.mode,
            "regions": self._params.regions,
            "attention": self._model.config._attn_implementation,
            "config": self._model.config.to_json_string(),
            "adapters": [identity.of_file(Path(a) / "adapter_config.json") for a in adapters],
            "tensors": tensors,
            "function": function.__name__,
            "device": str(self._device),
        }
        return graphs_of(Path(home)) / f"{identity.of_value(shaping)[:32]}.step"


GRAPHS = "steps"
"""The folder of kept graphs in a compile cache; below it, one folder for each state of what they were made by."""


@lru_cache
def graphs_of(cache: Path) -> Path:
    """The folder for graphs of this code, these libraries and this processor."""
    made_by = {
        "versions": machine.versions(),
        "processor": machine.processor(),
        "options": OPTIONS,
        "code": inspect.getsource(_traced),
    }
    return cache / GRAPHS / identity.of_value(made_by)[:16]


def drop_outdated(cache: Path) -> None:
    """Remove the graphs that no process can use any more."""
    for folder in (cache / GRAPHS).glob("*"):
        if folder != graphs_of(cache):
            shutil.rmtree(folder, ignore_errors=True)


@lru_cache
def _can_compile_ahead() -> bool:
    """Whether this torch can do it; up to 2.11 it must be enabled."""
    import torch

    if hasattr(torch._dynamo.config, "enable_aot_compile"):
        torch._dynamo.config.enable_aot_compile = True
    return hasattr(torch.compiler, "load_compiled_function")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """A model that Dynamo cannot take in one graph, as bad input that names the cause."""
    import torch

    try:
        yield
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        cause = " ".join(str(error).split())[:300]
        hint = "fullgraph: false compiles around the breaks and counts them; or use the eager engine"
        raise BadInput(f"torch.compile cannot take this model in one graph: {cause}", hint) from error


def dynamo_counts() -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Graphs, breaks by cause and recompiles by reason, of this process so far."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    reasons = Counter(m.recompile_reason.splitlines()[0] for m in get_compilation_metrics() if m.recompile_reason)
    return Counter(graphs=counters["stats"]["unique_graphs"]), Counter(counters["graph_break"]), reasons


def _recorded(compiled: Callable[..., Any], model: Any, arguments: Sequence[Any]) -> Callable[..., Any]:
    """A compiled function as one CUDA graph: a single call sends all its kernels, to work on tensors where they lie."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = compiled(model, *arguments)

    def replay(*_: Any) -> Any:
        graph.replay()
        return logits

    return replay
