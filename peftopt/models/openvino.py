"""An OpenVINO model's folder."""

from __future__ import annotations

from pathlib import Path

from peftopt.errors import BadInput
from peftopt.models.prompts import check_engine
from peftopt.records import Model

WEIGHTS = "openvino_model.xml"


def refuse_adapters(model: Model) -> None:
    """Raises BadInput for a model with adapters on top."""
    for adapter in model.adapters:
        check_engine("openvino", Path(adapter), baked=False)
    if model.adapters:
        raise BadInput("OpenVINO cannot apply an adapter at run time", "merge it first: [merge, openvino_ir, …]")
