"""bake: compute the keys and values of an adapter's virtual tokens once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftopt.cli.shared import AsJson, BaseFolder, Out, app, transform


@app.command()
def bake(
    base: BaseFolder,
    adapter: Annotated[
        Path,
        typer.Option(help="Folder of a PEFT adapter that puts virtual tokens before every prompt (safetensors)."),
    ],
    out: Out,
    task: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The task of a multitask adapter, from 0.")
    ] = None,
    certify: Annotated[
        str,
        typer.Option(
            help="Compare predictions in fp32 (full) or in the base's dtype (own); auto: full up to 1 GB, if the base "
            "is not quantized."
        ),
    ] = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for the certificate (JSON lines); built-in ones by default.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--for",
            help="ours: write a folder with keys and values, which replaces the adapter. vllm: write a copy of the "
            "base with the virtual tokens in its vocabulary, which vLLM serves as a plain model.",
        ),
    ] = "ours",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Bake even if the adapter names another base.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compute the keys and values of an adapter's virtual tokens once, so that requests need not."""
    from peftopt import corpus
    from peftopt.jobs import TransformJob
    from peftopt.records import Model

    params = {
        "task": -1 if task is None else task,
        "certify": certify,
        "allow_base_mismatch": allow_base_mismatch,
        "target": target,
    }
    rows = tuple(corpus.read(str(prompts))) if prompts else ()
    model = Model(str(base), (str(adapter),))
    transform(TransformJob(plugin="bake", params=params, model=model, out=str(out), rows=rows), as_json)
