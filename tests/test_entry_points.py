"""A plug-in of another package is found by its entry point, and used like one of peftopt's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OWN = """\"\"\"Eight bits, by another package.\"\"\"

from dataclasses import dataclass

from peftopt import plugins
from peftopt.transforms import int8


@dataclass(frozen=True)
class Params:
    keep: str = ""


PLUGIN = plugins.quantizer(Params, needs=("torchao",))


def transform(model, params, out, texts, seed):
    return int8.transform(model, int8.Params(params.keep), out, texts, seed)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder on the path, as pip leaves a package: its module, and what it declares."""
    home = tmp_path / "site"
    info = home / "others-1.0.dist-info"
    info.mkdir(parents=True)
    (home / "others.py").write_text(OWN)
    (home / "undeclared.py").write_text('"""Says nothing of itself."""\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peftopt.transforms]\ntheirs = others\nint8 = undeclared\n")
    return home


def peftopt(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "peftopt.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_quantizer_of_another_package_quantizes(installed: Path, tiny_base: Path, tmp_path: Path) -> None:
    done = peftopt(installed, "quantize", "--method", "theirs", "--model", tiny_base, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "quantization.json").is_file()


def test_a_name_of_peftopts_own_is_not_replaced(installed: Path) -> None:
    done = peftopt(installed, "doctor")
    assert "undeclared" not in done.stderr and done.returncode in (0, 4)


def test_a_module_that_declares_nothing_is_refused_by_name(installed: Path) -> None:
    (installed / "others-1.0.dist-info" / "entry_points.txt").write_text("[peftopt.transforms]\nhalf = undeclared\n")
    done = peftopt(installed, "quantize", "--method", "half", "--model", "x", "--out", "y")
    assert done.returncode == 2 and "undeclared" in done.stderr and "PLUGIN" in done.stderr
