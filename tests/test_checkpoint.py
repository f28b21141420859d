"""The safetensors format: read as the reference implementation reads it, and garbage never."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.errors import BadInput
from peftopt.merging import blocks
from peftopt.models.checkpoint import Checkpoint, Draft, read_header


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda b: len(b).to_bytes(8, "little") + b))
@pytest.mark.fault(18, "refused")
def test_garbage_is_never_a_safetensors_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(data)
        with contextlib.suppress(BadInput):
            entries, _ = read_header(file)
            assert sum(e.nbytes for e in entries) <= len(data)


HEADERS = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]),
            "shape": st.lists(st.integers(-1, 4), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2),
        }
    ),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.integers(0, 64))
@pytest.mark.fault(18, "read where the reference implementation reads it, else refused")
def test_a_header_is_read_as_the_reference_implementation_reads_it(header: dict[str, Any], size: int) -> None:
    from safetensors import SafetensorError, safe_open

    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        try:
            with safe_open(file, framework="np") as reference:
                names = set(reference.keys())
        except SafetensorError:
            names = None
        try:
            found = {e.name for e in read_header(file)[0]}
        except BadInput:
            found = None
        assert found == names


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.text("abc", min_size=1), SHAPES, min_size=1), min_size=1, max_size=3), st.integers(1, 3)
)
def test_what_no_adapter_touches_is_copied_byte_for_byte_with_its_digest(
    shards: list[dict[str, tuple[int, ...]]], threads: int
) -> None:
    import numpy as np
    import xxhash
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "PIECE", 8)  # so that a tensor is more than one thread's work
        folder, dice = Path(name), np.random.default_rng(0)
        for n, shapes in enumerate(shards):
            values = {f"{n}{key}": np.asarray(dice.random(shape), np.float32) for key, shape in shapes.items()}
            save_file(values, folder / f"{n}.safetensors")
        files = sorted(folder.glob("*.safetensors"))
        with Checkpoint(files) as base, blocks.Blocks(threads) as loops:
            with Draft(folder / "out", base.files, base) as draft:
                written = list(loops.transfer(base, draft, list(base.entries.values()), {}))
            assert sorted(w.name for w in written) == sorted(base.entries)
            assert not any(w.changed for w in written)
            for file in files:
                assert (folder / "out" / file.name).read_bytes() == file.read_bytes()
                for key, value in load_file(file).items():
                    assert draft.digests[key] == xxhash.xxh3_128_hexdigest(value.tobytes())
