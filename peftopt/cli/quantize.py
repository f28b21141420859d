"""quantize: store a model's weights in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftopt.cli.shared import AsJson, ModelFolder, Out, app, model_of, params_of, transform
from peftopt.errors import BadInput


@app.command()
def quantize(
    method: Annotated[
        str,
        typer.Option(help="int8, w8a8, fp8, gptq, awq, bnb8, nf4 or another quantizer that `peftopt doctor` lists."),
    ],
    model: ModelFolder,
    out: Out,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="For gptq, awq and w8a8: prompts with answers, like the real traffic; or generic, for built-in texts.",
        ),
    ] = "",
    adapter: Annotated[Path | None, typer.Option(help="Adapter to keep unmerged on the quantized base.")] = None,
    bits: Annotated[str, typer.Option(metavar="N", help="Bits per weight, where the method has a choice.")] = "",
    group_size: Annotated[
        str,
        typer.Option(
            metavar="N", help="Weights that share a scale; by default the largest size that divides every layer."
        ),
    ] = "",
    mixed: Annotated[
        str,
        typer.Option(
            metavar="SHARE", help="Share of the weights, such as 0.2, that may keep 8 bits: the most sensitive."
        ),
    ] = "",
    keep: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Layers to leave as they are, besides the output head: names or patterns, with commas between.",
        ),
    ] = "",
    samples: Annotated[str, typer.Option(metavar="N", help="Calibration rows to use.")] = "",
    max_tokens: Annotated[str, typer.Option(metavar="N", help="Most tokens of a calibration row.")] = "",
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="NAME=VALUE", help="Any other parameter of the method; repeat for more."),
    ] = [],  # noqa: B006
    type_: Annotated[
        str,
        typer.Option("--type", metavar="TYPE", help="gguf: q4_k_m, q8_0, bf16, …; openvino_ir: int8, int4, bf16, … ."),
    ] = "",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Quantize a model's weights to 8 or 4 bits, with the maintained library for each method, and open the result."""
    from peftopt import corpus, plugins
    from peftopt.jobs import TransformJob
    from peftopt.recipe.reader import nearest
    from peftopt.records import GENERIC

    known = {p.name: p for p in plugins.catalogue().values() if p.technique == "quantize"}
    if method not in known:
        raise BadInput(f"no quantizer named {method!r}", nearest(method, known))
    options = {"bits": bits, "group_size": group_size, "mixed": mixed, "keep": keep}
    options |= {"samples": samples, "max_tokens": max_tokens, "type": type_}
    params = params_of(known[method], {name: value for name, value in options.items() if value}, settings)
    if known[method].calibrates and not calibration:
        raise BadInput(
            f"{method} needs calibration texts", "add --calibration FILE.jsonl (rows like the real traffic), or generic"
        )
    if calibration and not known[method].calibrates:
        raise BadInput(f"{method} needs no calibration texts", "leave --calibration out")
    job = TransformJob(
        plugin=method,
        params=params,
        model=model_of(model, adapter),
        out=str(out),
        rows=corpus.calibration(calibration),
        seed=seed,
        calibration=GENERIC if calibration == GENERIC else "task",
    )
    transform(job, as_json)
