"""llamacpp: a script that starts llama.cpp's server on what a run chose. Pure."""

from __future__ import annotations

import shlex
from dataclasses import replace

from peftopt.deploy import chosen as common
from peftopt.deploy.chosen import Chosen
from peftopt.deploy.deployed import Exported
from peftopt.deploy.flags import Flag, Variable
from peftopt.deploy.scripts import LISTEN, Script, address
from peftopt.engines import llamacpp_server
from peftopt.models.gguf import WEIGHTS

NAME = "llama.cpp's server"
VERSION = "0.3.36"
"""The version of llama-cpp-python whose llama.cpp has these options."""
LIBRARY, SERVER = "llamacpp", "llamacpp_server"
"""The engines that run llama.cpp: in a worker's process, and as a server."""

REASONS = {
    "--parallel": "requests that it works on at once, as the run measured",
    "--ctx-size": "tokens of all of them together: each has as many as in the run",
    "--fit": "sizes are those above, and none is fitted to the memory that is free, as the run measured",
    "--cache-prompt": "the run measured with it",
    "--no-cache-prompt": "the run measured without it, since it asks a prompt more than once",
    "--cache-ram": "MiB for the prompts of other requests, as the run measured",
    "--n-gpu-layers": "layers on a GPU, as the run measured",
    "--threads": "threads for answers, as the run measured",
    "--threads-batch": "threads for prompts, as the run measured",
    "--no-repack": "this processor has AMX, whose kernels may die in a virtual machine; the run measured without",
}


def check(chosen: Chosen) -> None:
    """Raises BadInput for what llama.cpp cannot serve."""
    common.check(chosen, "llama.cpp", "gguf", own=True)


def exported(chosen: Chosen) -> Exported:
    """The script. Raises BadInput for what llama.cpp cannot serve."""
    check(chosen)
    own = chosen.engine == SERVER
    params = chosen.decided.params
    computing = llamacpp_server.computing(int(params.get("gpu_layers", 0)), chosen.threads, chosen.amx)
    flags = [*_served(chosen), LISTEN, *common.as_measured(computing, REASONS)]
    measured = common.as_measured(llamacpp_server.measured(llamacpp_server.Params()), REASONS)
    left = [Flag(tuple(flag.words[0] for flag in measured), "the run measured llama.cpp without its server")]
    if own:
        left = []
        given, _ = common.given(chosen)
        flags += [*_slots(chosen), *given]
    model = Variable("MODEL", chosen.decided.model.path, "the folder of the model")
    script = Script(
        "llamacpp.sh",
        (
            *common.head(chosen, NAME, "llamacpp", own),
            f"Its options are those of the llama.cpp in llama-cpp-python {VERSION}.",
        ),
        '"${LLAMA_SERVER:-llama-server}"',
        tuple(flags),
        variables=(model, *(common.draft(chosen) if own else ()), *address()),
        left=tuple(left),
    )
    use = f"bash llamacpp.sh; then ask http://127.0.0.1:8000/v1 for {chosen.name}"
    return Exported((script.file,), use, () if own else common.unmeasured(chosen, NAME))


def _served(chosen: Chosen) -> list[Flag]:
    file = f"{chosen.decided.model.path}/{WEIGHTS}"
    flags = [
        Flag(("--model", file), "what the run chose" + _how(chosen), bash=f'--model "$MODEL"/{WEIGHTS}'),
        Flag(("--alias", chosen.name), "the run's adapter"),
    ]
    if chosen.adapter:
        why = "the adapter in llama.cpp's form, and its scale; it is applied to every request"
        inside = shlex.quote(chosen.scaled.removeprefix(f"{chosen.decided.model.path}/"))
        flags.append(Flag(("--lora-scaled", chosen.scaled), why, bash=f'--lora-scaled "$MODEL"/{inside}'))
    return flags


def _how(chosen: Chosen) -> str:
    return f": {chosen.provenance}" if chosen.provenance else ""


def _slots(chosen: Chosen) -> list[Flag]:
    """The options by which the run measured, with as many requests at once as its limits say."""
    params = llamacpp_server.Params(**chosen.decided.params)
    limits = chosen.decided.limits
    if not limits:
        return common.as_measured(llamacpp_server.measured(params), REASONS)
    params = replace(params, slots=limits.running)
    reasons = REASONS | {"--parallel": common.little(chosen)}
    return common.as_measured(llamacpp_server.measured(params), reasons)
