"""Products of 8-bit values: integer sums to the bit, and all of it within the rounding of float32."""

import numpy as np
import pytest
from kernels import UNIT, built
from layouts import drawn, elements

from porter.lower.kernels.layout import Layout
from porter.lower.kernels.products import LONGEST, Activation, exact, fits, products

CASES = [
    (Layout("int8", 37, 75, 75), Activation("int8", 75)),
    (Layout("int8", 37, 75, 75, rows=0), Activation("uint8", 75, zero=True)),
    (Layout("int8", 37, 75, 16), Activation("int8", 75)),
    (Layout("int4", 37, 75, 32), Activation("int8", 75)),
    (Layout("int3", 37, 75, 10), Activation("int8", 30)),
    (Layout("uint4", 37, 75, 32, zero="uint8"), Activation("int8", 75)),
    (Layout("uint8", 5, 33, 8, zero="uint8"), Activation("uint8", 16, zero=True)),
    (Layout("e4m3fn", 37, 75, 75), Activation("fp32", 75)),
    (Layout("e5m2", 37, 75, 16), Activation("e4m3fn", 75)),
    (Layout("uint4", 37, 75, 32, zero="fp32"), Activation("int8", 75)),
    (Layout("mx9", 37, 75, 16, scale="e8m0", micro=2), Activation("int8", 75)),
    (Layout("fp16", 37, 75), Activation("int8", 75)),
]


@pytest.fixture(scope="module")
def kernels() -> list:
    """Each case, scaled."""
    return built([products(*case) for case in CASES])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{x.codec} {w.name}" for w, x in CASES])
@pytest.mark.parametrize("m", [1, 7])
def test_products(kernels: list, number: int, m: int) -> None:
    layout, spec = CASES[number]
    rng = np.random.default_rng(0)
    buffers, _, (weight,) = drawn(layout, rng)
    codes, values = elements(spec.codec, (m, layout.k), rng)
    groups = -(-layout.k // spec.group)
    scales = rng.random((m, groups)).astype(np.float32)
    arguments, x = [codes, scales], values.astype(np.float64)
    if spec.zero:
        zeros = rng.integers(0, 256, (m, groups)).astype(np.int32)
        arguments.append(zeros)
        x = x - np.repeat(zeros, spec.group, 1)[:, : layout.k]
    x = x * np.repeat(scales, spec.group, 1)[:, : layout.k]
    got = kernels[number](*arguments, *buffers, shape=(m, layout.n))
    # Of each term: two zero points taken off, a product and at most k additions; of each group's sum: the
    # scales' product (and a factor), the sum times it, its addition to at most k others.
    bound = (2 * layout.k + 6) * UNIT * (np.abs(x) @ np.abs(weight).T)
    assert np.all(np.abs(got - x @ weight.T) <= bound)


SUMS = [
    (Layout("int8", 37, 75, 75, rows=0), Activation("int8", 75)),
    (Layout("uint8", 37, 75, 16, zero="uint8"), Activation("uint8", 75, zero=True)),
    (Layout("int3", 37, 75, 10), Activation("int8", 75)),
]


@pytest.mark.parametrize("number", range(len(SUMS)))
def test_integer_sums_are_exact(number: int) -> None:
    layout, spec = SUMS[number]
    rng = np.random.default_rng(1)
    (kernel,) = built([products(layout, spec, "int32")])
    codes, values = elements(spec.codec, (9, layout.k), rng)
    raw, weight = elements(layout.codec_name, (layout.n, layout.k), rng)
    buffers = [layout.pack_codes(raw), layout.pack_scales(np.ones((layout.n, layout.groups), np.float32)
               if layout.rows else np.ones((1, 1), np.float32))]  # fmt: skip
    arguments = [codes, np.ones((9, 1), np.float32)]
    if spec.zero:
        zeros, less = elements("uint8", (layout.n, layout.groups), rng)
        buffers.append(layout.pack_zeros(zeros))
        weight = weight - np.repeat(less, layout.group, 1)[:, : layout.k]
        arguments.append(np.full((9, 1), 200, np.int32))
        values = values - 200
    got = kernel(*arguments, *buffers, shape=(9, layout.n), dtype="int32")
    np.testing.assert_array_equal(got, values.astype(np.int64) @ weight.astype(np.int64).T)


def test_the_longest_sum_of_the_largest_terms_fits() -> None:
    assert 255 * 255 * LONGEST < 2**31
    layout = Layout("uint8", 1, LONGEST, LONGEST)
    spec = Activation("uint8", LONGEST)
    assert exact(layout, spec)
    assert not exact(Layout("uint8", 1, LONGEST + 1, LONGEST + 1), spec)
    (kernel,) = built([products(layout, spec, "int32")])
    buffers = [
        layout.pack_codes(np.full((1, LONGEST), 255, np.uint8)),
        layout.pack_scales(np.ones((1, 1), np.float32)),
    ]
    x = np.full((1, LONGEST), 255, np.uint8)
    got = kernel(x, np.ones((1, 1), np.float32), *buffers, shape=(1, 1), dtype="int32")
    assert got.item() == 255 * 255 * LONGEST


def test_groups_of_x_hold_whole_groups_of_the_weight() -> None:
    weight = Layout("int8", 8, 64, 16)
    assert [fits(weight, Activation("int8", g)) for g in (8, 16, 24, 32, 64)] == [
        False,
        True,
        False,
        True,
        True,
    ]
