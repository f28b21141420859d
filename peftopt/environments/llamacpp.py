"""llama.cpp through llama-cpp-python: the `gguf` transform and the `llamacpp` engine, built for this very CPU."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftopt.errors import MissingEnvironment

LIBRARY = "llama-cpp-python"

REQUIREMENTS = (
    "llama-cpp-python==0.3.36",
    "annotated-doc==0.0.7",
    "annotated-types==0.8.0",
    "anyio==4.16.0",
    "attrs==26.1.0",
    "certifi==2026.10.18",
    "click==8.5.1",
    "diskcache==5.6.3",
    "filelock==4.2.12",
    "fsspec==2026.9.0",
    "h11==0.16.0",
    "hf-xet==1.8.0",
    "httpcore==1.0.9",
    "httpx==0.28.1",
    "huggingface_hub==1.33.0",
    "idna==3.20",
    "Jinja2==3.1.6",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "markdown-it-py==4.3.0",
    "MarkupSafe==3.0.4",
    "mdurl==0.1.2",
    "numpy==2.4.6",
    "packaging==26.3",
    "psutil==7.2.2",
    "pydantic==2.14.3",
    "pydantic_core==2.50.4",
    "Pygments==2.21.0",
    "PyYAML==6.0.3",
    "referencing==0.37.0",
    "regex==2026.11.15",
    "rich==15.0.0",
    "rpds-py==2026.9.1",
    "safetensors==0.8.0",
    "shellingham==1.5.4",
    "tokenizers==0.23.3",
    "tqdm==4.70.1",
    "transformers==5.17.0",
    "typer==0.29.2",
    "typing-inspection==0.4.5",
    "typing_extensions==4.16.0",
)
"""All that it installs. transformers is there for its tokenizers and chat templates, without torch: the same token ids
as in the other engines."""

MEGABYTES = 350

CMAKE = "-DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"
"""Not OpenMP: its threads soon sleep at a barrier, as measured processes have it, and llama.cpp has some
five hundred of them per token. Its own threads spin within a token and end with it."""

CONVERTERS = "llama.cpp"
"""The folder, in the environment's, of the converters that belong to this version of the library."""

KEPT = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


def model_settings(library: Any) -> Any:
    """llama.cpp's own for opening a model, but never AMX: in virtual machines that announce it, its kernels may die of
    SIGILL at their first tile instruction (seen with 0.3.36). `library` is the module llama_cpp."""
    settings = library.llama_model_default_params()
    settings.use_extra_bufts = b"AMX_INT8 = 1" not in library.llama_print_system_info()
    return settings


def check() -> None:
    """It is compiled here, which takes a C++ compiler; cmake and ninja come from pip."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        raise MissingEnvironment(
            "llama-cpp-python is built from source, and there is no C++ compiler",
            "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select "
            "--install), then try again",
        )


def build(folder: Path, pip: Callable[..., None]) -> None:
    """Download the library's sources, keep their converters, and install from the very same file."""
    sources = folder / "sources"
    library, *others = REQUIREMENTS
    pip("download", "--no-deps", "--no-binary", LIBRARY, "--dest", str(sources), library)
    (archive,) = sources.glob("*.tar.gz")
    inside = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(inside)
            if member.name.startswith(inside) and name.startswith(KEPT):
                member.name = name
                tar.extract(member, folder / CONVERTERS, filter="data")
    pip("install", str(archive), *others, CMAKE_ARGS=f"{CMAKE} {os.environ.get('CMAKE_ARGS', '')}".strip())
    shutil.rmtree(sources)
