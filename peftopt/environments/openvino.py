"""OpenVINO through optimum-intel: the `openvino_ir` transform and the `openvino` engine, which is fast on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

TORCH = "torch==2.13.0"

REQUIREMENTS = (
    "optimum-intel==2.2.0",
    "annotated-doc==0.0.7",
    "anyio==4.16.0",
    "attrs==26.1.0",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.2",
    "click==8.5.1",
    "cloudpickle==3.1.3",
    "filelock==4.2.12",
    "fsspec==2026.9.0",
    "h11==0.16.0",
    "hf-xet==1.8.0",
    "httpcore==1.0.9",
    "httpx==0.28.1",
    "huggingface_hub==1.21.0",
    "idna==3.20",
    "Jinja2==3.1.6",
    "joblib==1.6.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "markdown-it-py==4.3.0",
    "MarkupSafe==3.0.4",
    "mdurl==0.1.2",
    "mpmath==1.3.0",
    "narwhals==2.29.0",
    "networkx==3.6.1",
    "ninja==1.13.2",
    "nncf==3.4.0",
    "numpy==2.4.6",
    "openvino==2026.4.1",
    "openvino-telemetry==2025.2.0",
    "openvino-tokenizers==2026.4.1.0",
    "optimum==2.3.0",
    "packaging==26.3",
    "psutil==7.2.2",
    "pydot==4.0.1",
    "Pygments==2.21.0",
    "pyparsing==3.3.3",
    "PyYAML==6.0.4",
    "referencing==0.37.0",
    "regex==2026.11.19",
    "requests==2.34.2",
    "rich==15.0.0",
    "rpds-py==2026.9.1",
    "safetensors==0.8.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "shellingham==1.5.4",
    "sympy==1.14.0",
    "tabulate==0.10.0",
    "threadpoolctl==3.8.0",
    "tokenizers==0.22.2",
    "tqdm==4.70.1",
    "transformers==5.5.4",
    "typer==0.25.1",
    "typing_extensions==4.16.0",
    "urllib3==2.8.0",
    TORCH,
)
"""All that it takes, and no more: torchvision, which optimum-intel asks for, is for images, and comes in builds that
need not fit this torch and then break transformers. transformers is older than ours: optimum-intel's newest."""

MEGABYTES = 1600


def build(folder: Path, module: Callable[..., None]) -> None:
    """torch with whatever it takes on this machine, then exactly what is listed."""
    module("pip", "install", TORCH)
    module("pip", "install", "--no-deps", *REQUIREMENTS)
