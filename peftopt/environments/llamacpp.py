"""llama.cpp through llama-cpp-python: the `gguf` transform and the `llamacpp` engine, built for this very CPU."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from peftopt.errors import MissingEnvironment

REQUIREMENTS = (
    "llama-cpp-python==0.3.36",
    "transformers==5.17.0",  # its tokenizers and chat templates: the same token ids as in the other engines
    "numpy==2.4.6",
    "Jinja2==3.1.6",
    "jsonschema==4.26.0",
    "psutil==7.2.2",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
)
MEGABYTES = 350

CMAKE = "-DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"
"""Not OpenMP: its threads sleep at each barrier under the passive wait policy that measured processes have, and
llama.cpp has some five hundred of them per token. Its own threads spin within a token and end with it."""

CONVERTERS = "llama.cpp"
"""The folder, in the environment's, of the converters that belong to this version of the library."""

KEPT = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


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
    pip("download", "--no-deps", "--no-binary", library.split("==")[0], "--dest", str(sources), library)
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
