"""What a merge rounds: to the nearest of the exact sum, once, and its largest magnitude."""

from __future__ import annotations

import math

from helpers.rounding import round_once
from hypothesis import given, settings
from hypothesis import strategies as st

from peftopt.merging import blocks
from peftopt.models import values as weights
from peftopt.models.checkpoint import Entry


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.sampled_from(["BF16", "F16"]),
    st.integers(1, 40),
    st.floats(-6, 2),
    st.floats(-25, 2),
    st.sampled_from(["float32", "float64"]),
)
def test_every_sum_is_rounded_to_the_nearest(
    seed: int, given_: str, wanted: str, rank: int, weight: float, delta: float, precision: str
) -> None:
    import numpy as np
    import torch

    dice = np.random.default_rng(seed)
    rows, width = 5, 577  # neither a multiple of what the loop takes at a time
    before = (dice.standard_normal((rows, width)) * 10**weight).astype(weights.dtype_of(given_))
    before[dice.random((rows, width)) < 0.1] = 0  # where the old weights say nothing of fp32's error
    b, a = dice.standard_normal((rows, rank)) * 10**delta, dice.standard_normal((rank, width))
    b[0] = 0
    b = b.astype(precision)
    loop = blocks.Blocks(1)
    entries = [Entry("w", name, (rows, width)) for name in (given_, wanted)]
    found = loop._sum(entries[0], entries[1], before, blocks.Delta.product(b, a))
    exact = before.astype(np.float64) + b @ a
    wanted_ = round_once(torch.from_numpy(exact), getattr(torch, weights.dtype_of(wanted).name))
    assert (torch.from_numpy(found.view(np.int16)).view(wanted_.dtype) == wanted_).all()


def test_what_a_delta_may_be_off_shrinks_with_it() -> None:
    import numpy as np

    dice = np.random.default_rng(0)
    b, a = dice.standard_normal((5, 8)).astype(np.float32), dice.standard_normal((8, 20))
    small = blocks.Delta.product(b * np.float32(2.0**-80), a)
    assert (small.slack > 0).all() and (small.slack == blocks.Delta.product(b, a).slack * 2.0**-80).all()


@given(st.floats(-1e30, 1e30) | st.floats(-1.0, 1.0), st.sampled_from(["bfloat16", "float16"]))
def test_rounding_once_gives_the_nearest_value(value: float, dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    exact = torch.tensor([value], dtype=torch.float64)
    found = round_once(exact, kind)
    if found.isinf().all():
        assert abs(value) > torch.finfo(kind).max
        return
    near = found.view(torch.int16) + torch.tensor([-1, 0, 1], dtype=torch.int16)
    others = near.view(kind).double()
    others = others[others.isfinite()]
    assert (found.double() - exact).abs() <= (others - exact).abs().min()


@given(
    st.lists(st.floats(width=16), min_size=1, max_size=9),
    st.sampled_from(["BF16", "F16", "F32", "F64"]),
)
def test_the_largest_magnitude_is_found_in_the_bits(values: list[float], dtype: str) -> None:
    import numpy as np

    given_ = np.array(values).astype(weights.dtype_of(dtype))
    found = weights.largest(given_)
    if np.isfinite(given_).all():
        assert found == np.abs(given_).max()
    else:
        assert not math.isfinite(found)


def test_rounding_once_does_not_round_a_near_tie_twice() -> None:
    import torch

    above_a_tie = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    assert round_once(above_a_tie, torch.bfloat16).tolist() == [1 + 2.0**-7, 1.0]
    assert above_a_tie.bfloat16().tolist() == [1.0, 1.0], "as torch does, through fp32"
