"""merge: fold adapters into their base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftopt.cli.shared import AsJson, BaseFolder, app, transform, weighted
from peftopt.errors import BadInput

if TYPE_CHECKING:
    from peftopt.records import Model


@app.command()
def merge(
    base: BaseFolder,
    adapter: Annotated[
        list[str],
        typer.Option(help="Folder of a PEFT adapter (safetensors), or FOLDER=WEIGHT; repeat to merge several."),
    ],
    out: Annotated[Path | None, typer.Option(help="New folder to write; it appears whole or not at all.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; the base's own by default.")] = "",
    certify: Annotated[
        str,
        typer.Option(
            help="blocks (while merging), full (the saved model's predictions too), or auto: full up to 1 GB."
        ),
    ] = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for the full certificate; built-in ones by default.")
    ] = None,
    merge_base: Annotated[
        str,
        typer.Option(
            help="For an adapter trained on a 4-bit base: full (merge into the 16-bit weights), dequantized (into the "
            "dequantized 4-bit weights), auto (both; keep the one closer to the adapter on its 4-bit base), or "
            "in-place (packed weights stay 4-bit)."
        ),
    ] = "full",
    scheme: Annotated[str, typer.Option(help="The 4-bit scheme of that base: nf4 or fp4.")] = "nf4",
    combination: Annotated[
        str, typer.Option(help="How to combine several LoRAs: cat (exact sum), or linear, svd, ties, … as in PEFT.")
    ] = "cat",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change, tensor by tensor.")] = False,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge even if the adapter names another base.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fold adapters into their base model, and certify that the result gives the same answers."""
    from peftopt import corpus
    from peftopt.jobs import TransformJob
    from peftopt.records import Model

    folders, weights = zip(*(weighted(text, "--adapter") for text in adapter), strict=True)
    model = Model(str(base), folders)
    params = {
        "dtype": dtype,
        "certify": certify,
        "weights": ",".join(map(str, weights)) if any(w != 1 for w in weights) else "",
        "combination": combination,
        "merge_base": merge_base,
        "scheme": scheme,
        "allow_base_mismatch": allow_base_mismatch,
    }
    if dry_run:
        _preview(params, model, as_json)
    elif out is None:
        raise BadInput("merge needs --out", "name a folder that does not exist yet, or give --dry-run")
    else:
        rows = tuple(corpus.read(str(prompts))) if prompts else ()
        transform(TransformJob(plugin="merge", params=params, model=model, out=str(out), rows=rows), as_json)


def _preview(params: dict[str, Any], model: Model, as_json: bool) -> None:
    """Print what a merge would change, the largest change first. Warn of tensors without a change."""
    from peftopt.cli.console import Console, print_json
    from peftopt.jobs import PreviewJob
    from peftopt.metrics import format_value
    from peftopt.runner import single

    changes = single.preview(PreviewJob(plugin="merge", params=params, model=model))
    if as_json:
        print_json({"tensors": changes})
        return
    ratio = {t.name: t.delta_norm / t.weight_norm if t.weight_norm else 0.0 for t in changes}
    rows = [
        [
            t.name,
            "x".join(map(str, t.shape)),
            t.dtype,
            format_value("size", t.bytes),
            f"{ratio[t.name]:.2e}",
        ]
        for t in sorted(changes, key=lambda t: -ratio[t.name])
    ]
    console = Console()
    console.table(["tensor", "shape", "dtype", "size", "delta / weight"], rows)
    total = sum(t.bytes for t in changes)
    console.say(f"{len(changes)} tensors of {format_value('size', total)} would change; nothing was written")
    unchanged = [t.name for t in changes if not t.delta_norm]
    if unchanged:
        console.warn(f"no delta at all in {len(unchanged)} of {len(changes)}: {', '.join(unchanged[:3])}")
