"""Rows and matrices decoded from rows that lie by themselves, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
from kernels import built
from layouts import drawn

from porter.lower.blocks.vector import matrices, rows
from porter.lower.kernels.layout import Layout

LAYOUTS = [
    Layout("fp32", 5, 33),
    Layout("bf16", 37, 172),
    Layout("int3", 37, 172, 10),
    Layout("int4", 37, 172, 33),
    Layout("e4m3b11fnuz", 37, 172, 172),
    Layout("uint4", 37, 172, 32, zero="uint8"),
    Layout("uint8", 37, 33, 33, zero="int8", rows=0),
    Layout("e2m1", 37, 172, 16, scale="e4m3fn", factor=True),
    Layout("mx6", 37, 171, 16, scale="e8m0", micro=2),
    Layout("e4m3fn", 150, 300, 128, rows=128),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_rows_and_matrices_are_what_is_stored(layout: Layout) -> None:
    rng = np.random.default_rng(1)
    layout = replace(layout, lanes=1)
    stack = replace(layout, stack=3)
    some, every = built([rows(layout), matrices(stack)])
    buffers, (stored,), _ = drawn(layout, rng)
    numbers = np.array([0, layout.n - 1, -1, -layout.n, *rng.integers(-layout.n, layout.n, 5)])
    got = some(numbers, *buffers, shape=(9, layout.k))
    np.testing.assert_array_equal(got.view(np.uint32), stored[numbers].view(np.uint32))
    for wrong in (layout.n, -layout.n - 1, 2**40):
        with pytest.raises(RuntimeError, match="outside"):
            some(np.array([0, wrong]), *buffers, shape=(2, layout.k))
    buffers, stored, _ = drawn(stack, rng)
    ids = np.array([2, -1, -3])
    got = every(ids, *buffers, shape=(3, layout.n, layout.k))
    np.testing.assert_array_equal(got.view(np.uint32), stored[ids].view(np.uint32))
    with pytest.raises(RuntimeError, match="outside"):
        every(np.array([3]), *buffers, shape=(1, layout.n, layout.k))
