"""llama.cpp, by llama-cpp-python and as a server, built for this very CPU: the `gguf` transform and its engines."""

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

CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DGGML_OPENMP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
"""Not OpenMP: its threads soon sleep at a barrier, as measured processes have it, and llama.cpp has some
five hundred of them per token. Its own threads spin within a token and end with it. No web page, which it would
download, and no TLS: the server is for this machine."""

BUILDERS = ("cmake==4.4.5", "ninja==1.13.2")
"""What builds it, gone when it is built."""

SERVER = "lib/llama-server"
"""The server, in the folder of the library's package, beside the libraries that both use."""

CONVERTERS = "llama.cpp"
"""The folder, in the environment's, of the converters that belong to this version of the library."""

KEPT = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


def has_amx(library: Any) -> bool:
    """Whether it would use AMX, which it must not: in virtual machines that announce it, its kernels may die of SIGILL
    at their first tile instruction (seen with 0.3.36). `library` is the module llama_cpp."""
    return b"AMX_INT8 = 1" in library.llama_print_system_info()


def model_settings(library: Any) -> Any:
    """llama.cpp's own for opening a model, but never AMX."""
    settings = library.llama_model_default_params()
    settings.use_extra_bufts = not has_amx(library)
    return settings


def check() -> None:
    """It is compiled here, which takes a C++ compiler; cmake and ninja come from pip."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        raise MissingEnvironment(
            "llama-cpp-python is built from source, and there is no C++ compiler",
            "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select "
            "--install), then try again",
        )


def build(folder: Path, module: Callable[..., None]) -> None:
    """Download the library's sources, and make of them what is needed: the converters that belong to this version,
    llama.cpp's libraries and server, and the Python package on those."""
    sources = folder / "sources"
    library, *others = REQUIREMENTS
    module("pip", "download", "--no-deps", "--no-binary", LIBRARY, "--dest", str(sources), library)
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    inside = sources / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    for kept in KEPT:
        target = folder / CONVERTERS / kept
        (shutil.copytree if kept.endswith("/") else shutil.copy)(inside / kept, _with_parent(target))
    module("pip", "install", *BUILDERS)
    made, own = sources / "made", os.environ.get("CMAKE_ARGS", "").split()
    ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"
    module("cmake", "-S", str(inside), "-B", str(made), "-G", "Ninja", ninja, *CMAKE, *own)
    module("cmake", "--build", str(made), "--target", "llama-server")
    module("pip", "install", str(archive), *others, CMAKE_ARGS="-DLLAMA_BUILD=OFF")
    (package,) = folder.glob("lib/python*/site-packages/llama_cpp")
    for file in (*made.glob("bin/*.so*"), *made.glob("bin/*.dylib"), made / "bin" / "llama-server"):
        shutil.copy2(file, _with_parent(package / "lib" / file.name), follow_symlinks=False)
    module("pip", "uninstall", "--yes", *(pin.partition("==")[0] for pin in BUILDERS))
    shutil.rmtree(sources)


def _with_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
