"""llama.cpp, by llama-cpp-python and as a server, built for this very CPU: the `gguf` transform and its engines."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from peftopt.environments._builder import Builder, Module, locked
from peftopt.errors import MissingEnvironment

LIBRARY = "llama-cpp-python"

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

TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
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


def builder() -> Builder:
    """Pins from llamacpp.lock, and how llama.cpp is compiled for this machine."""
    return Builder(locked("llamacpp"), megabytes=350, tools=TOOLS, check=_check, build=_build)


def _check() -> None:
    """It is compiled here, which takes a C++ compiler; cmake and ninja come from pip."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        raise MissingEnvironment(
            "llama-cpp-python is built from source, and there is no C++ compiler",
            "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select "
            "--install), then try again",
        )


def _build(own: Builder, folder: Path, module: Module) -> None:
    """Download the library's sources, and make of them what is needed: the converters that belong to this version,
    llama.cpp's libraries and server, and the Python package on those."""
    sources = folder / "sources"
    library = own.pin(LIBRARY)
    module("pip", "download", "--no-deps", "--no-binary", LIBRARY, "--dest", str(sources), library)
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    inside = sources / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    for kept in KEPT:
        target = folder / CONVERTERS / kept
        (shutil.copytree if kept.endswith("/") else shutil.copy)(inside / kept, _with_parent(target))

    module("pip", "install", *own.tools)
    built = sources / "made"
    arguments = os.environ.get("CMAKE_ARGS", "").split()
    ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"
    module("cmake", "-S", str(inside), "-B", str(built), "-G", "Ninja", ninja, *CMAKE, *arguments)
    module("cmake", "--build", str(built), "--target", "llama-server")

    others = [pin for pin in own.pins if pin != library]
    module("pip", "install", str(archive), *others, CMAKE_ARGS="-DLLAMA_BUILD=OFF")
    (package,) = folder.glob("lib/python*/site-packages/llama_cpp")
    for file in (*built.glob("bin/*.so*"), *built.glob("bin/*.dylib"), built / "bin" / "llama-server"):
        shutil.copy2(file, _with_parent(package / "lib" / file.name), follow_symlinks=False)
    module("pip", "uninstall", "--yes", *(pin.partition("==")[0] for pin in own.tools))
    shutil.rmtree(sources)


def _with_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
