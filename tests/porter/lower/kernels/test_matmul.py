"""Packed weights: products and rows against float64, whatever the codes, the groups and the scales."""

import numpy as np
import pytest
from kernels import UNIT, built
from layouts import FLOATS, drawn

from porter.lower.kernels.gather import gather, matrices
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.matmul import matmul, stacked

SHAPES = [(64, 64), (37, 172), (5, 33), (16, 1), (1, 7)]
LAYOUTS = [Layout(c, n, k) for c in FLOATS for n, k in SHAPES] + [
    Layout(c, n, k, min(g or k, k)) for c in ("int8", "int4", "e4m3fn") for n, k in SHAPES for g in (0, 32)
]
LAYOUTS += [Layout(c, 37, 172, 10) for c in ("int2", "int3", "int4", "e2m3", "mx6")]  # groups that straddle
LAYOUTS += [Layout("int4", 37, 172, 33), Layout("uint3", 37, 172, 7, zero="uint8"), Layout("int8", 37, 33, 1)]
LAYOUTS += [
    Layout("e2m1", 37, 172, 16, scale="e4m3fn", factor=True),
    Layout("e2m1", 37, 172, 32, scale="e8m0"),
    Layout("mx9", 37, 172, 16, scale="e8m0", micro=2),
    Layout("mx6", 37, 171, 16, scale="e8m0", micro=2),
    Layout("mx6", 37, 33, 10, scale="fp16", micro=2),  # the bytes of micro-exponents straddle groups
    Layout("uint4", 37, 172, 32, scale="bf16", zero="fp16"),
    Layout("uint2", 37, 172, 32, scale="fp16", zero="fp32"),
    Layout("e4m3fn", 150, 300, 128, rows=128),
    Layout("uint8", 37, 33, 33, zero="int8", rows=0),
]
LAYOUTS = list(dict.fromkeys(LAYOUTS))
STACKS = [
    Layout("fp32", 5, 33, stack=3),
    Layout("int3", 37, 45, 10, stack=3),
    Layout("e2m1", 37, 40, 16, scale="e4m3fn", factor=True, stack=3),
    Layout("uint4", 20, 33, 8, zero="uint8", rows=16, stack=3),
    Layout("mx9", 20, 33, 16, scale="e8m0", micro=2, stack=3),
]


@pytest.fixture(scope="module")
def kernels() -> dict:
    """(matmul, gather) of every layout, compiled together."""
    functions = [make(layout) for layout in LAYOUTS for make in (matmul, gather)]
    found = built(functions)
    return {layout: (found[2 * i], found[2 * i + 1]) for i, layout in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_matmul_is_within_the_rounding_of_its_sums(kernels: dict, layout: Layout) -> None:
    rng = np.random.default_rng(0)
    buffers, stored, _ = drawn(layout, rng)
    exact = stored[0].astype(np.float64)
    for m in (1, 3, 4, 9):
        x = rng.standard_normal((m, layout.k)).astype(np.float32)
        got = kernels[layout][0](x, *buffers, shape=(m, layout.n))
        # What a code stands for is the same to the bit; a term is rounded once as a product and at most k
        # times as part of the sum (Higham 2002, section 3.1).
        bound = (layout.k + 1) * UNIT * (np.abs(x).astype(np.float64) @ np.abs(exact).T)
        assert np.all(np.abs(got - x.astype(np.float64) @ exact.T) <= bound)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gather_gives_the_rows_to_the_bit(kernels: dict, layout: Layout) -> None:
    rng = np.random.default_rng(1)
    buffers, (stored,), _ = drawn(layout, rng)
    rows = np.array([0, layout.n - 1, -1, -layout.n, *rng.integers(-layout.n, layout.n, 5)])
    got = kernels[layout][1](rows, *buffers, shape=(len(rows), layout.k))
    np.testing.assert_array_equal(got.view(np.uint32), stored[rows].view(np.uint32))


@pytest.mark.parametrize("row", [5, -6, 2**40, -(2**40)])
def test_gather_stops_at_a_row_outside_of_the_table(kernels: dict, row: int) -> None:
    layout = Layout("int8", 5, 33, 33)
    buffers, _, _ = drawn(layout, np.random.default_rng(2))
    with pytest.raises(RuntimeError, match="outside"):
        kernels[layout][1](np.array([0, row]), *buffers, shape=(2, 33))


@pytest.fixture(scope="module")
def stacks() -> dict:
    """(all, all of one x, picked, picked of one x, copied) of every stack."""
    ways = [(False, False), (False, True), (True, False), (True, True)]
    made = [[*(stacked(layout, picked=p, shared=s) for p, s in ways), matrices(layout)] for layout in STACKS]
    found = iter(built([f for functions in made for f in functions]))
    return {layout: [next(found) for _ in range(5)] for layout in STACKS}


@pytest.mark.parametrize("layout", STACKS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("m", [1, 6])
def test_products_with_a_stack(stacks: dict, layout: Layout, m: int) -> None:
    rng = np.random.default_rng(0)
    buffers, stored, _ = drawn(layout, rng)
    ids = np.array([2, -1, 0, -3, 1, 1])
    every, every_shared, picked, picked_shared, copied = stacks[layout]
    np.testing.assert_array_equal(copied(ids, *buffers, shape=(6, layout.n, layout.k)), stored[ids])
    x = rng.standard_normal((6, m, layout.k)).astype(np.float32)
    for got, left, numbers in (
        (every(x, *buffers, shape=(6, m, layout.n)), x, np.arange(6) % 3),
        (every_shared(x[:1], *buffers, shape=(3, m, layout.n)), x[:1], np.arange(3)),
        (picked(ids, x, *buffers, shape=(6, m, layout.n)), x, ids),
        (picked_shared(ids, x[:1], *buffers, shape=(6, m, layout.n)), x[:1], ids),
    ):
        w = stored[numbers].astype(np.float64).swapaxes(1, 2)
        bound = (layout.k + 1) * UNIT * (np.abs(left).astype(np.float64) @ np.abs(w))
        assert np.all(np.abs(got - left.astype(np.float64) @ w) <= bound)


@pytest.mark.parametrize("number", [3, -4, 2**40])
def test_a_matrix_outside_of_the_stack_stops_the_program(stacks: dict, number: int) -> None:
    layout = STACKS[0]
    buffers, _, _ = drawn(layout, np.random.default_rng(2))
    x = np.zeros((1, 1, layout.k), np.float32)
    with pytest.raises(RuntimeError, match="outside"):
        stacks[layout][2](np.array([number]), x, *buffers, shape=(1, 1, layout.n))
    with pytest.raises(RuntimeError, match="outside"):
        stacks[layout][4](np.array([number]), *buffers, shape=(1, layout.n, layout.k))


def test_the_pad_of_an_odd_row_of_nibbles_does_not_touch_the_sum(kernels: dict) -> None:
    layout = Layout("int4", 5, 33, 32)
    x = np.zeros((1, 33), np.float32)
    x[0, 32] = np.inf
    buffers = [layout.pack_codes(np.ones((5, 33), np.int8)), layout.pack_scales(np.ones((5, 2), np.float32))]
    assert np.all(kernels[layout][0](x, *buffers, shape=(1, 5)) == np.inf)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
def test_numbers_of_a_file_s_byte_order_are_packed_as_numbers(kind: type) -> None:
    codes = np.arange(35, dtype=kind).reshape(5, 7)
    layout = Layout({"float32": "fp32", "float16": "fp16", "int8": "int8"}[np.dtype(kind).name], 5, 7)
    swapped = codes.astype(np.dtype(kind).newbyteorder(">"))
    for given in (codes, codes.astype(np.dtype(kind).newbyteorder("<")), swapped):
        np.testing.assert_array_equal(layout.pack_codes(given), layout.pack_codes(codes))
