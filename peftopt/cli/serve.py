"""serve: a base and its adapters with vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from peftopt.cli.shared import BaseFolder, app
from peftopt.errors import BadInput


@app.command()
def serve(
    base: BaseFolder,
    adapter: Annotated[list[str], typer.Option(help="Adapter folder, or NAME=FOLDER; repeat for several.")] = [],  # noqa: B006
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8000,
    slots: Annotated[int, typer.Option(help="Adapters in one batch (vLLM: max-loras); 0 = all.")] = 0,
    compile_: Annotated[bool, typer.Option("--compile", help="Let vLLM compile the model: a slower start.")] = False,
    prefix_caching: Annotated[bool, typer.Option("--prefix-caching", help="Keep prompts' keys and values.")] = False,
    args: Annotated[str, typer.Option(help="More of `vllm serve`'s own options, as on its command line.")] = "",
) -> None:
    """Serve a base and its adapters with vLLM until Ctrl-C, as the engine `vllm` does: for load and canary."""
    from peftopt import environments
    from peftopt.cli.console import Console
    from peftopt.engines import vllm
    from peftopt.engines._server import check_port
    from peftopt.records import Model
    from peftopt.runner import preflight

    preflight.check_base(base, quantized=True, ours=False)
    named = dict(_named(text) for text in adapter)
    if len(named) < len(adapter) or vllm.BASE in named:
        raise BadInput(
            f"two adapters, or an adapter and the base ({vllm.BASE}), have the same name",
            "name each: --adapter NAME=FOLDER",
        )
    for folder in named.values():
        preflight.check_adapter(folder, base, [])
    model = Model(str(base.resolve()), tuple(map(str, named.values())))
    params = vllm.Params(compile=compile_, prefix_caching=prefix_caching, max_loras=slots, args=args)
    python = environments.python(vllm.PLUGIN.environment)
    check_port(port)
    command, variables = vllm.command(model, params, port, tuple(named), python)
    Console().say(f"http://127.0.0.1:{port} will serve {', '.join([vllm.BASE, *named])}; Ctrl-C ends it")
    os.execve(command[0], command, {**os.environ, **variables})


def _named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER, or a folder that is called by its own name."""
    name, equals, folder = text.rpartition("=")
    path = Path(folder if equals else text)
    return name or path.resolve().name, path
