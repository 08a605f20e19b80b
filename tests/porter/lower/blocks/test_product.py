"""Products in the operands of a matrix unit, against float64 on operands that numpy rounds."""

import numpy as np
import operands
import pytest
from kernels import UNIT, built
from layouts import elements

from porter.formats.elements import FP8
from porter.lower.blocks.operand import Operand
from porter.lower.blocks.packed import grouped
from porter.lower.blocks.product import Product
from porter.lower.blocks.unit import Unit
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.products import Activation

LAYOUTS = [
    Layout(c, n, k, lanes=1) for c in ("fp32", "fp16", "bf16") for n, k in ((37, 172), (1, 7), (16, 1))
]
LAYOUTS += [Layout(c, 37, 172, 172, lanes=1) for c in ("int8", "int4", *FP8)]
LAYOUTS += [Layout(c, 37, 172, 32, lanes=1) for c in ("int8", "int4", "int3", "int2", "e4m3fn")]
LAYOUTS += [Layout(c, 37, 172, 10, lanes=1) for c in ("int2", "int3", "int4", "e2m3", "mx6")]
LAYOUTS += [Layout("int4", 37, 172, 33, lanes=1), Layout("uint3", 37, 172, 7, zero="uint8", lanes=1)]
LAYOUTS += [Layout("int8", 37, 33, 1, lanes=1), Layout("e4m3fn", 150, 300, 128, rows=128, lanes=1)]
LAYOUTS += [
    Layout("e2m1", 37, 172, 16, scale="e4m3fn", factor=True, lanes=1),
    Layout("e2m1", 37, 172, 32, scale="e8m0", lanes=1),
    Layout("e3m2", 37, 171, 32, scale="e8m0", lanes=1),
    Layout("mx9", 37, 172, 16, scale="e8m0", micro=2, lanes=1),
    Layout("mx6", 37, 171, 16, scale="e8m0", micro=2, lanes=1),
    Layout("uint4", 37, 172, 32, scale="bf16", zero="fp16", lanes=1),
    Layout("uint8", 37, 33, 33, zero="int8", rows=0, lanes=1),
    Layout("int8", 37, 40, 40, scale="e8m0", factor=True, lanes=1),
]
FEW = [LAYOUTS[0], LAYOUTS[10], LAYOUTS[-8], LAYOUTS[-3]]


def unit(form: str, step: int, accumulator: str = "fp32", flush: bool = False) -> Unit:
    """A unit that rounds both sides alike."""
    operand = Operand(form, flush=flush)
    return Unit(operand, operand, step, accumulator, form)


CASES = [Product(layout, unit("bf16", 32)) for layout in LAYOUTS]
CASES += [
    Product(w, unit(form, step)) for w in FEW for form, step in (("tf32", 8), ("fp16", 16), ("fp32", 128))
]
CASES += [Product(w, unit("bf16", 256, flush=True)) for w in FEW]


@pytest.fixture(scope="module")
def kernels() -> dict:
    """Every case, compiled together."""
    return dict(zip(CASES, built([case.kernel() for case in CASES]), strict=True))


def weights(layout: Layout, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Packed buffers; what is rounded to an operand, float32 [stack, n, k], with the scales of groups but not
    those of rows; and what a sum is multiplied by, float64 [stack, n]."""
    shape, rows = (layout.stack, layout.n, layout.k), layout.n if layout.rows == 1 else layout.row_groups
    raw, value = elements(layout.codec_name, shape, rng)
    buffers, value, of_sum = [layout.pack_codes(raw)], value.astype(np.float32), np.ones(shape[:2])

    def spread(array: np.ndarray) -> np.ndarray:
        array = np.repeat(array.astype(np.float32), 1 if layout.rows == 1 else layout.rows or layout.n, 1)
        return np.repeat(array[:, : layout.n], layout.group, 2)[..., : layout.k]

    if layout.group:
        raw, scales = elements(layout.scale, (layout.stack, rows, layout.groups), rng)
        buffers.append(layout.pack_scales(raw))
    if layout.zero:
        raw, zeros = elements(layout.zero, (layout.stack, rows, layout.groups), rng)
        buffers.append(layout.pack_zeros(raw))
        value = value - spread(zeros)
    if layout.micro:
        bits = rng.integers(0, 2, (*shape[:2], -(-layout.k // layout.micro))).astype(np.uint8)
        buffers.append(layout.pack_shifts(bits))
        value = value * np.repeat(np.float32(0.5) ** bits, layout.micro, 2)[..., : layout.k].astype(
            np.float32
        )
    if layout.factor:
        buffers.append(np.float32([0.3]))
        of_sum = of_sum * np.float32(0.3)
    if layout.group and grouped(layout):
        value = value * spread(scales)
    elif layout.group:
        of_sum = of_sum * spread(scales)[..., 0].astype(np.float64)
    return buffers, value, of_sum


def near(got: np.ndarray, x: np.ndarray, w: np.ndarray, extra: int = 4) -> bool:
    """Products of operands are exact in float32, but for two float32, whose product is rounded once; a term
    is rounded at most k times as part of the sum (Higham 2002, section 3.1). `extra`: the scales of a row
    and of a token, their product, and the sum times it. x [..., m, k], w [..., n, k], float64."""
    turned = w.swapaxes(-1, -2)
    bound = (x.shape[-1] + 1 + extra) * UNIT * (np.abs(x) @ np.abs(turned))
    return bool(np.all(np.abs(got - x @ turned) <= bound))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("m", [1, 3])
def test_a_product_is_that_of_rounded_operands(kernels: dict, case: Product, m: int) -> None:
    rng, layout, side = np.random.default_rng(0), case.layout, case.unit.x
    buffers, (value,), (of_sum,) = weights(layout, rng)
    x = rng.standard_normal((m, layout.k)).astype(np.float32)
    if side.flush:
        x[:, ::2] *= np.float32(1e-39)  # subnormal: gone, and with it half of the sum
        x[:, 1::2] = 0
    left, right = (operands.rounded(side.form, v, flush=side.flush) for v in (x, value))
    got = kernels[case](x, *buffers, shape=(m, layout.n))
    assert near(got, left, right * of_sum[:, None])
    if side.flush:
        assert not got.any()


def test_rounding_is_seen(kernels: dict) -> None:
    """The bound of float32 is tight enough to tell that operands were rounded."""
    case, rng = CASES[0], np.random.default_rng(0)
    buffers, (value,), _ = weights(case.layout, rng)
    x = rng.standard_normal((3, case.layout.k)).astype(np.float32)
    got = kernels[case](x, *buffers, shape=(3, case.layout.n))
    assert not near(got, x.astype(np.float64), value.astype(np.float64))


def coded(x: str, w: str, step: int) -> Unit:
    """A unit that multiplies codes as they are."""
    whole = x.startswith("int") and w.startswith("int")
    return Unit(Operand(x), Operand(w), step, "int32" if whole else "fp32", w)


CODED = [
    (Layout("int8", 37, 75, 75, lanes=1), Activation("int8", 75), coded("int8", "int8", 64)),
    (Layout("int8", 37, 75, 75, rows=0, lanes=1), Activation("int8", 75), coded("int8", "int8", 256)),
    (Layout("int8", 37, 75, 16, lanes=1), Activation("int8", 75), coded("int8", "int8", 32)),
    (Layout("int8", 37, 75, 15, lanes=1), Activation("int8", 30), coded("int8", "int8", 32)),
    (Layout("int4", 37, 75, 75, lanes=1), Activation("int8", 75), coded("int8", "int8", 64)),
    (Layout("int4", 37, 75, 32, lanes=1), Activation("int8", 75), coded("int8", "int4", 64)),
    (Layout("int4", 37, 75, 32, lanes=1), Activation("int8", 75), unit("bf16", 8)),
    (Layout("uint4", 37, 75, 32, zero="uint8", lanes=1), Activation("uint8", 75, True), unit("bf16", 8)),
    (Layout("uint8", 5, 33, 8, zero="uint8", lanes=1), Activation("uint8", 16, True), unit("fp32", 32)),
    *((Layout(f, 37, 75, 75, lanes=1), Activation(f, 75), coded(f"fp8-{f}", f"fp8-{f}", 32)) for f in FP8),
    (Layout("e4m3fn", 37, 75, 16, lanes=1), Activation("e5m2", 75), coded("fp8-e5m2", "fp8-e4m3fn", 32)),
]


@pytest.mark.parametrize("number", range(len(CODED)), ids=[f"{x.codec}_{w.name}" for w, x, _ in CODED])
@pytest.mark.parametrize("m", [1, 3])
def test_codes_are_multiplied_as_they_are(number: int, m: int, coded_kernels: list) -> None:
    layout, given, on = CODED[number]
    rng = np.random.default_rng(1)
    buffers, (value,), (of_sum,) = weights(layout, rng)
    codes, values = elements(given.codec, (m, layout.k), rng)
    scales = rng.random((m, -(-layout.k // given.group))).astype(np.float32)
    arguments, x = [codes, scales], values.astype(np.float64)
    if given.zero:
        zeros = rng.integers(0, 256, scales.shape).astype(np.int32)
        arguments.append(zeros)
        x = x - np.repeat(zeros, given.group, 1)[:, : layout.k]
    if not on.w.coded:
        x, value = (operands.rounded(on.x.form, v.astype(np.float32)) for v in (x, value))
    x = x * np.repeat(scales, given.group, 1)[:, : layout.k]
    got = coded_kernels[number](*arguments, *buffers, shape=(m, layout.n))
    # Where codes keep groups' scales out of the product, these are rounded with each group's sum.
    assert near(got, x, value.astype(np.float64) * of_sum[:, None], extra=6)


@pytest.fixture(scope="module")
def coded_kernels() -> list:
    """Each case of codes."""
    return built([Product(layout, on, x).kernel() for layout, x, on in CODED])


def test_integer_sums_are_exact_beyond_what_float32_holds() -> None:
    layout = Layout("int8", 3, 5000, 5000, lanes=1)
    (kernel,) = built([Product(layout, coded("int8", "int8", 64), Activation("int8", 5000)).kernel()])
    codes = np.full((3, 5000), 127, np.int8)
    codes[2, 7] = 126
    arguments = [codes[:1], np.ones((1, 1), np.float32), layout.pack_codes(codes)]
    got = kernel(*arguments, layout.pack_scales(np.ones((3, 1), np.float32)), shape=(1, 3))
    exact = codes[:1].astype(np.int64) @ codes.T.astype(np.int64)
    np.testing.assert_array_equal(got, exact.astype(np.float32))


def test_an_accumulator_of_float16_overflows_and_rounds() -> None:
    layout = Layout("fp32", 1, 64, lanes=1)
    (kernel,) = built([Product(layout, unit("fp16", 16, "fp16")).kernel()])
    w = np.ones((1, 64), np.float32)
    x = np.float32([[1] * 64, [2.0**-12] * 64, [2000] * 64])
    x[1, 0] = 4  # steps of 16 vanish one by one: 16 * 2^-12 is half of the last place of 4
    got = kernel(x, layout.pack_codes(w), shape=(3, 1))[:, 0]
    total = np.float16(0)
    for step in x[1].reshape(4, 16).sum(1):
        total = np.float16(total + np.float16(step))
    np.testing.assert_array_equal(got, [64, total, np.inf])


STACKS = [
    Layout("fp32", 5, 33, stack=3, lanes=1),
    Layout("int3", 37, 45, 10, stack=3, lanes=1),
    Layout("e2m1", 37, 40, 16, scale="e4m3fn", factor=True, stack=3, lanes=1),
    Layout("uint4", 20, 33, 8, zero="uint8", rows=16, stack=3, lanes=1),
    Layout("int8", 20, 33, 33, stack=3, lanes=1),
]


@pytest.mark.parametrize("layout", STACKS, ids=lambda layout: layout.name)
def test_products_with_a_stack(layout: Layout) -> None:
    rng, on = np.random.default_rng(0), unit("bf16", 16)
    ways = [("all", False), ("all", True), ("picked", False), ("picked", True)]
    every, every_shared, picked, picked_shared = built(
        [Product(layout, on, stack=stack, shared=shared).kernel() for stack, shared in ways]
    )
    buffers, value, of_sum = weights(layout, rng)
    w = operands.rounded("bf16", value) * of_sum[..., None]
    ids = np.array([2, -1, 0, -3, 1, 1])
    x = rng.standard_normal((6, 2, layout.k)).astype(np.float32)
    left = operands.rounded("bf16", x)
    shape = (6, 2, layout.n)
    assert near(every(x, *buffers, shape=shape), left, w[np.arange(6) % 3])
    assert near(every_shared(x[:1], *buffers, shape=(3, *shape[1:])), left[:1], w)
    assert near(picked(ids, x, *buffers, shape=shape), left, w[ids])
    assert near(picked_shared(ids, x[:1], *buffers, shape=shape), left[:1], w[ids])
    with pytest.raises(RuntimeError, match="outside"):
        picked(np.array([3]), x[:1], *buffers, shape=(1, 2, layout.n))
