"""sglang: a script that starts SGLang's server on what a run chose. Pure."""

from __future__ import annotations

import shlex

from peftopt.deploy import chosen as common
from peftopt.deploy.chosen import Chosen
from peftopt.deploy.deployed import Exported
from peftopt.deploy.flags import Flag
from peftopt.deploy.scripts import LISTEN, Script, address
from peftopt.errors import BadInput
from peftopt.records import SAFETENSORS

NAME = "SGLang"
VERSION = "0.5.23"
"""The version whose options these are."""
BASE = "base"
"""The name under which the base is served."""
PLACES = 2
"""Adapters in one batch: the one that is served, and the base, whose requests take a place too."""


def check(chosen: Chosen) -> None:
    """Raises BadInput for what SGLang cannot serve."""
    common.check(chosen, "SGLang", SAFETENSORS, own=False)
    if chosen.quantized == "torchao":
        what = f"SGLang {VERSION} reads no torchao checkpoints, and {chosen.decided.origin.variant} is one"
        raise BadInput(what, "name another variant of the run: --variant, or the target peftopt or vllm")
    if chosen.adapter and chosen.odd:
        raise common.unserved(chosen, "SGLang")


def exported(chosen: Chosen) -> Exported:
    """The script. Raises BadInput for what SGLang cannot serve."""
    check(chosen)
    dtype, no_dtype = common.dtype(chosen, False, ())
    format_, no_format = common.quantization(chosen)
    model = Flag(("--model-path", chosen.decided.model.path), "see MODEL above", bash='--model-path "$MODEL"')
    unmeasured = ("--max-running-requests", "--max-queued-requests", "--context-length", "--mem-fraction-static")
    script = Script(
        "sglang.sh",
        (
            *common.head(chosen, NAME, "sglang", own=False),
            f"Its options are those that the parser of SGLang {VERSION} takes; no such server was started with them.",
        ),
        '"${PYTHON:-python3}" -m sglang.launch_server',
        (model, *_served(chosen), LISTEN, *dtype, *format_),
        variables=(*common.paths(chosen), *address()),
        left=(*no_dtype, *no_format, Flag(unmeasured, common.no_limits(chosen, own=False))),
    )
    name = f"{BASE}:{chosen.name}" if chosen.adapter else chosen.name
    use = f"bash sglang.sh; then ask http://127.0.0.1:8000/v1 for {name}"
    return Exported((script.file,), use, common.unmeasured(chosen, NAME))


def _served(chosen: Chosen) -> list[Flag]:
    """The names that users ask for, and the adapter where it stays apart."""
    if not chosen.adapter:
        return [Flag(("--served-model-name", chosen.name), "the run's adapter, which the model holds")]
    return [
        Flag(("--served-model-name", BASE), f"the base without the adapter; with it, {BASE}:{chosen.name}"),
        Flag(("--enable-lora",), "the adapter stays apart"),
        Flag(
            ("--lora-paths", f"{chosen.name}={chosen.adapter}"),
            "the adapter, which the run chose to keep apart",
            bash=f'--lora-paths {shlex.quote(chosen.name)}="$ADAPTER"',
        ),
        Flag(("--max-lora-rank", str(chosen.rank)), "the adapter's rank"),
        Flag(("--max-loras-per-batch", str(PLACES)), "the adapter, and the base, whose requests take a place too"),
    ]
