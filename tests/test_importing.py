"""A worker leaves out what its model does not use; whoever asks later finds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftopt.models import importing


def test_a_package_is_absent_inside_and_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unused_here").mkdir()
    (tmp_path / "unused_here" / "__init__.py").write_text("answer = 42\n")
    (tmp_path / "unused_here" / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with importing.absent(["unused_here"]):
        for name in ("unused_here", "unused_here.part"):
            with pytest.raises(ModuleNotFoundError):
                __import__(name)
    assert __import__("unused_here.part").answer == 42


def test_a_package_that_is_in_use_stays() -> None:
    with importing.absent(["json"]):
        assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("config", "packing"),
    [
        ('{"quantization_config": {"quant_method": "torchao"}}', "torchao"),
        ('{"quantization_config": null}', ""),
        ("{}", ""),
        ("[]", None),
        ("{", None),
        ('{"quantization_config": []}', ""),
        ('{"quantization_config": "int8"}', None),
    ],
)
def test_how_weights_are_packed_is_read_from_the_config(tmp_path: Path, config: str, packing: str | None) -> None:
    (tmp_path / "config.json").write_text(config)
    assert importing.packing(tmp_path) == packing


def test_of_a_folder_without_a_config_nothing_is_known(tmp_path: Path) -> None:
    assert importing.packing(tmp_path) is None
    assert importing.useless(str(tmp_path)) == (), "nobody knows yet how it will be packed"


@pytest.mark.parametrize(("method", "unpacker"), [("", ""), ("torchao", "torchao"), ("bitsandbytes", "bitsandbytes")])
def test_a_process_imports_what_unpacks_its_model_and_nothing_else(tmp_path: Path, method: str, unpacker: str) -> None:
    """In a process of its own, as in a worker: what is imported stays imported."""
    settings = {"quantization_config": {"quant_method": method}} if method else {}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    code = (
        "import json, sys; from peftopt.models import importing; importing.torch_side(sys.argv[1]); "
        "names = (*importing.UNUSED, *importing.UNPACKERS); "
        "print(json.dumps([name for name in names if name in sys.modules])); "
        "import scipy.special; import peft.tuners.lora"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    imported = json.loads(done.stdout.splitlines()[0])
    assert not set(importing.UNUSED) & set(imported)
    assert set(importing.UNPACKERS) & set(imported) <= {unpacker}
