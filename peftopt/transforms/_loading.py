"""What the quantizers share that transformers applies while it loads the weights: int8, bnb8 and nf4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftopt.models import hf, provenance
from peftopt.records import Model
from peftopt.transforms import _layers


def quantize(
    model: Model,
    params: Any,
    out: Path,
    seed: int,
    method: str,
    libraries: Sequence[str],
    settings: Callable[[list[str]], Any],
) -> Model:
    """Load the model quantized, and save it so that plain `from_pretrained` reads it back.

    `settings` makes transformers' quantization config from the names of the layers that keep their dtype: the output
    head, often one tensor with the embeddings and the most sensitive, and what `params.keep` names. Adapters are
    carried along, unchanged, on the quantized base. Raises BadInput for weights that are already quantized, and for a
    model that is nearly all experts.
    """
    parts = _layers.find(hf.unquantized_config(model, "quantize"))
    left = _layers.left_alone(parts, method)
    kept, notices = _layers.kept(parts.layers, params.keep)
    notices = [*left, *notices]
    hf.save(hf.load(model.path, quantization_config=settings([*parts.heads, *parts.odd, *kept])), model.path, out)
    provenance.write(out, method, [*libraries, "transformers", "torch"], asdict(params), seed, notices=notices)
    return Model(str(out), model.adapters)
