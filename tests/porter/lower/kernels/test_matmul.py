"""Packed weights: matmul and gather against float64, and every code of every codec to the bit."""

import ml_dtypes
import numpy as np
import pytest
from kernels import UNIT, built

from porter.lower.kernels.matmul import Layout, gather, matmul

FP8 = {"fp8-e4m3fn": ml_dtypes.float8_e4m3fn, "fp8-e5m2": ml_dtypes.float8_e5m2}
FLOATS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPES = [(64, 64), (37, 172), (5, 33), (16, 1), (1, 7)]
LAYOUTS = [Layout(c, n, k) for c in FLOATS for n, k in SHAPES] + [
    Layout(c, n, k, min(g or k, k)) for c in ("int8", "int4", *FP8) for n, k in SHAPES for g in (0, 32)
]
LAYOUTS = list(dict.fromkeys(LAYOUTS))


@pytest.fixture(scope="module")
def kernels() -> dict:
    """(matmul, gather) of every layout, compiled together."""
    functions = [make(layout) for layout in LAYOUTS for make in (matmul, gather)]
    found = built(functions)
    return {layout: (found[2 * i], found[2 * i + 1]) for i, layout in enumerate(LAYOUTS)}


def drawn(layout: Layout, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Packed buffers, and the weight they stand for in float32 (as stored) and float64 (code times scale)."""
    shape = (layout.n, layout.k)
    if layout.codec_name in FLOATS:
        values = rng.standard_normal(shape).astype(FLOATS[layout.codec_name])
        raw = values.view(np.uint16) if layout.codec_name == "bf16" else values
    elif layout.codec_name in FP8:
        raw = rng.integers(0, 256, shape).astype(np.uint8)
        raw[~np.isfinite(raw.view(FP8[layout.codec_name]).astype(np.float32))] = 1
        values = raw.view(FP8[layout.codec_name])
    else:
        low, high = (-8, 8) if layout.codec_name == "int4" else (-128, 128)
        values = raw = rng.integers(low, high, shape).astype(np.int8)
    buffers, stored, exact = [layout.pack_codes(raw)], values.astype(np.float32), values.astype(np.float64)
    if layout.group:
        scales = rng.random((layout.n, layout.groups)).astype(np.float32)
        buffers.append(layout.pack_scales(scales))
        spread = np.repeat(scales, layout.group, 1)[:, : layout.k]
        stored, exact = stored * spread, exact * spread
    return buffers, stored, exact


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_matmul_is_within_the_rounding_of_its_sums(kernels: dict, layout: Layout) -> None:
    rng = np.random.default_rng(0)
    buffers, _, exact = drawn(layout, rng)
    for m in (1, 3, 4, 9):
        x = rng.standard_normal((m, layout.k)).astype(np.float32)
        got = kernels[layout][0](x, *buffers, shape=(m, layout.n))
        # A term is rounded once for its scale, once as a product and at most k times as part of the sum
        # (Higham 2002, section 3.1); decoding is exact.
        bound = (layout.k + 2) * UNIT * (np.abs(x).astype(np.float64) @ np.abs(exact).T)
        assert np.all(np.abs(got - x.astype(np.float64) @ exact.T) <= bound)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gather_gives_the_rows_to_the_bit(kernels: dict, layout: Layout) -> None:
    rng = np.random.default_rng(1)
    buffers, stored, _ = drawn(layout, rng)
    rows = np.array([0, layout.n - 1, -1, -layout.n, *rng.integers(-layout.n, layout.n, 5)])
    got = kernels[layout][1](rows, *buffers, shape=(len(rows), layout.k))
    np.testing.assert_array_equal(got.view(np.uint32), stored[rows].view(np.uint32))


@pytest.mark.parametrize("row", [5, -6, 2**40, -(2**40)])
def test_gather_stops_at_a_row_outside_of_the_table(kernels: dict, row: int) -> None:
    layout = Layout("int8", 5, 33, 33)
    buffers, _, _ = drawn(layout, np.random.default_rng(2))
    with pytest.raises(RuntimeError, match="outside"):
        kernels[layout][1](np.array([0, row]), *buffers, shape=(2, 33))


CODES = {
    "int8": np.arange(-128, 128).astype(np.int8),
    "int4": np.arange(-8, 8).astype(np.int8),
    **{name: np.arange(256).astype(np.uint8) for name in FP8},
    "fp16": np.arange(65536).astype(np.uint16).view(np.float16),
    "bf16": np.arange(65536).astype(np.uint16),
}


@pytest.mark.parametrize("name", CODES)
def test_every_code_decodes_exactly(name: str) -> None:
    codes = CODES[name]
    types = {**FP8, "bf16": ml_dtypes.bfloat16}
    wanted = (codes.view(types[name]) if name in types else codes).astype(np.float32)
    layout = Layout(name, len(codes), 1, 0 if name in FLOATS else 1)
    scale = [] if name in FLOATS else [layout.pack_scales(np.ones((len(codes), 1), np.float32))]
    by_matmul, by_gather = built([matmul(layout), gather(layout)])
    packed = layout.pack_codes(codes[:, None])
    # One term, 0 + 1 * w: nothing is rounded (only -0 becomes 0, which compares equal).
    np.testing.assert_array_equal(
        by_matmul(np.ones((1, 1), np.float32), packed, *scale, shape=(1, len(codes)))[0], wanted
    )
    rows = by_gather(np.arange(len(codes)), packed, *scale, shape=(len(codes), 1))[:, 0]
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_array_equal(np.signbit(rows[~np.isnan(wanted)]), np.signbit(wanted[~np.isnan(wanted)]))


def test_every_nibble_decodes_in_either_half_of_its_byte() -> None:
    low, high = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))
    codes = np.stack([low.reshape(-1), high.reshape(-1)], 1).astype(np.int8)
    layout = Layout("int4", 256, 2, 2)
    (kernel,) = built([matmul(layout)])
    scales = layout.pack_scales(np.ones((256, 1), np.float32))
    got = kernel(np.eye(2, dtype=np.float32), layout.pack_codes(codes), scales, shape=(2, 256))
    np.testing.assert_array_equal(got, codes.T)  # 0 * w + 1 * w


def test_the_pad_of_an_odd_row_of_nibbles_does_not_touch_the_sum(kernels: dict) -> None:
    layout = Layout("int4", 5, 33, 32)
    x = np.zeros((1, 33), np.float32)
    x[0, 32] = np.inf
    buffers = [layout.pack_codes(np.ones((5, 33), np.int8)), layout.pack_scales(np.ones((5, 2), np.float32))]
    assert np.all(kernels[layout][0](x, *buffers, shape=(1, 5)) == np.inf)
