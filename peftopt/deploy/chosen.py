"""What a run decided to serve, as far as launch scripts ask, and what they all say of it. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from peftopt.deploy.flags import Flag, Variable
from peftopt.engines._server import Option
from peftopt.errors import BadInput
from peftopt.gateway.decided import NO_LIMITS, Decided
from peftopt.models.prompts import AS_WORDS
from peftopt.records import SAFETENSORS

DTYPES = ("bfloat16", "float16", "float32")
NAMED = ("compressed-tensors", "torchao", "bitsandbytes")
"""Formats of quantized weights that `config.json` and engines call the same. For others, such as AutoGPTQ's, an engine
that is told no name takes the faster of its kernels."""


@dataclass(frozen=True)
class Chosen:
    """`decided` by the run in `folder`; `format` of the weights and their `dtype`; `quantized`: their format by
    `config.json`, "" for none, and `gpu_only`: what an engine calls it that has no kernels for it on a CPU;
    `provenance`: how it was quantized, in a line. Of an adapter that is not merged: its `rank`; `odd`: what it is where
    that is no plain LoRA; `prompt`: whether it is virtual tokens; `scaled`: its GGUF form with its scale. `threads` and
    `device`: what computed in the run, 0 and "" where it does not tell. `amx`: the processor has AMX, which llama.cpp
    must not use."""

    decided: Decided
    folder: str
    format: str = SAFETENSORS
    dtype: str = ""
    quantized: str = ""
    gpu_only: str = ""
    provenance: str = ""
    rank: int = 0
    odd: str = ""
    prompt: bool = False
    scaled: str = ""
    threads: int = 0
    device: str = ""
    amx: bool = False

    @property
    def engine(self) -> str:
        """The engine that the run measured the variant on."""
        return self.decided.measured_on.plugin

    @property
    def name(self) -> str:
        """The name that users ask for."""
        return self.decided.name

    @property
    def adapter(self) -> str:
        """The folder of the adapter that is not merged, "" for none."""
        return next(iter(self.decided.model.adapters), "")


def check(chosen: Chosen, engine: str, format_: str, own: bool) -> None:
    """Raises BadInput for what another engine than the run's cannot serve: weights of another format, and a variant
    that was chosen for its engine."""
    variant = chosen.decided.origin.variant
    if chosen.format != format_:
        what = f"{engine} reads {format_} weights, and the model of {variant} has {chosen.format} weights"
        raise BadInput(what, "name another variant of the run: --variant, or another target")
    if chosen.decided.measured_on.technique and not own:
        what = f"{variant} was chosen for its engine, {chosen.engine}, which {engine} is not"
        raise BadInput(what, "name another variant of the run: --variant, or the target peftopt")
    if len(chosen.decided.model.adapters) > 1:
        raise BadInput(f"{engine} applies one adapter to a request", "merge several into one first: merge")


def unserved(chosen: Chosen, engine: str) -> BadInput:
    """That an engine cannot serve the adapter which stays apart, and what to do."""
    instead = AS_WORDS if chosen.prompt else "merge it"
    return BadInput(f"{engine} cannot serve {chosen.odd} ({chosen.adapter})", f"{instead}, or use the target peftopt")


def head(chosen: Chosen, title: str, target: str, own: bool) -> tuple[str, ...]:
    """The first lines of a launch script: what it starts, by which decision, and whether that was measured so."""
    variant = chosen.decided.origin.variant
    return (
        f"{title}: {chosen.name} is {chosen.decided.origin}",
        f"By: peftopt export {target} {shlex.quote(chosen.folder)} --variant {variant}",
        *another(chosen),
        *((f"Measured on {chosen.engine}.",) if own else unmeasured(chosen, title)),
    )


def another(chosen: Chosen) -> tuple[str, ...]:
    """What is said of a variant that a person has named in place of the chosen one."""
    decided = chosen.decided
    if decided.origin.variant == decided.chosen:
        return ()
    return (f"The run chose {decided.chosen or 'no variant'}; {decided.origin.variant} was named in its place.",)


def unmeasured(chosen: Chosen, engine: str) -> tuple[str, ...]:
    """What is said where the run measured on another engine."""
    on = "a server over HTTP (endpoint)" if chosen.engine == "endpoint" else chosen.engine
    return (f"Measured on {on}; {engine} was not: its speed, its limits and its answers are not known.",)


def paths(chosen: Chosen) -> tuple[Variable, ...]:
    """The variables MODEL and, where an adapter is not merged, ADAPTER."""
    model = Variable("MODEL", chosen.decided.model.path, "the folder of the model")
    adapter = Variable("ADAPTER", chosen.adapter, "the folder of the adapter")
    return (model, adapter) if chosen.adapter else (model,)


def draft(chosen: Chosen) -> tuple[Variable, ...]:
    """The variable DRAFT, where a draft model proposes tokens. A folder whose name JSON would escape has none."""
    folder = chosen.decided.draft
    if not folder or '"' in folder or "\\" in folder:
        return ()
    return (Variable("DRAFT", folder, "the folder of the draft model, which proposes tokens"),)


def given(chosen: Chosen) -> tuple[list[Flag], list[str]]:
    """The options that the run gave the engine beyond its parameters: the recipe's `args`, and those by which it
    speculates; and the words of `args` alone."""
    args = shlex.split(str(chosen.decided.measured_on.params.get("args", "")))
    speculation = shlex.split(str(chosen.decided.params.get("args", "")))[len(args) :]
    flags = [Flag(tuple(args), "args of the run's recipe")] if args else []
    if speculation:
        bash = " ".join(_named(word, draft(chosen)) for word in speculation)
        flags.append(Flag(tuple(speculation), "how the run proposed tokens", bash=bash))
    return flags, args


def _named(word: str, variables: Sequence[Variable]) -> str:
    """A word as bash reads it, with a variable in the place of its value, which may stand within JSON."""
    for variable in variables:
        for value in (variable.value, json.dumps(variable.value)[1:-1]):
            if value in word:
                parts = (shlex.quote(part) if part else "" for part in word.split(value, 1))
                return f'"${variable.name}"'.join(parts)
    return shlex.quote(word)


def dtype(chosen: Chosen, own: bool, given: Sequence[str]) -> tuple[list[Flag], list[Flag]]:
    """The option for the dtype that the run computed with, or why it is left; `given`: the recipe's own options."""
    option = "--dtype"
    if option in given:
        return [], []
    if chosen.dtype not in DTYPES:
        return [], [Flag((option,), "the model's config names none")]
    if own and chosen.dtype == "float32":
        return [], [Flag((option,), "auto, as the run measured, which is not the float32 of the checkpoint")]
    return [Flag((option, chosen.dtype), "what the run measured with, the checkpoint's own")], []


def quantization(chosen: Chosen) -> tuple[list[Flag], list[Flag]]:
    """The option for the format of quantized weights, or why it is left."""
    option = "--quantization"
    if not chosen.quantized:
        return [], []
    how = f" ({chosen.provenance})" if chosen.provenance else ""
    if chosen.quantized not in NAMED:
        return [], [Flag((option,), f"it finds {chosen.quantized} in config.json and chooses its kernels{how}")]
    why = f"the format of what the run chose{how}; it ends at once where MODEL holds another"
    return [Flag((option, chosen.quantized), why)], []


def as_measured(options: Sequence[Option], reasons: dict[str, str]) -> list[Flag]:
    """Options by which the run measured, each with its reason."""
    return [Flag(option, reasons[option[0]]) for option in options]


def little(chosen: Chosen) -> str:
    """How many requests are under way at the highest load that held, in words."""
    held = chosen.decided.held
    assert held
    return f"{held.rate:.3g} requests/s x {held.worked_s:.3g} s: {held.level} held there ({held.source})"


def no_limits(chosen: Chosen, own: bool) -> str:
    """Why an engine gets no limits."""
    if own:
        return f"the run has no load that met its limits on times. To find some, {NO_LIMITS}"
    return f"the run measured no load on this engine, and limits of {chosen.engine} are not this one's"
