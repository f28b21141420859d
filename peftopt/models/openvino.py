"""An OpenVINO model's folder."""

from __future__ import annotations

from peftopt.errors import BadInput
from peftopt.records import Model

WEIGHTS = "openvino_model.xml"


def refuse_adapters(model: Model) -> None:
    """Raises BadInput for a model with adapters on top."""
    if model.adapters:
        raise BadInput("OpenVINO cannot apply an adapter at run time", "merge it first: [merge, openvino_ir, …]")
