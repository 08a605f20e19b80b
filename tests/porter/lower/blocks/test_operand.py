"""Rounding to operands, bit for bit, against the formats' definition and against ml_dtypes."""

import ml_dtypes
import numpy as np
import operands
import pytest
from kernels import built

from porter.lower.blocks.define import block, define, store, tirx
from porter.lower.blocks.operand import Operand

WAYS = [(form, s, f) for form in operands.BITS for s in (True, False) for f in (True, False)]


def _kernel(operand: Operand) -> tirx.PrimFunc:
    """x [n] -> its operands, as float32."""

    def body(x, y, n):
        with block("cast", [n]) as (i,):
            store(y, tirx.Cast("float32", operand.rounded(x[i])), i)

    return define("cast", [("x", ("n",), "float32"), ("y", ("n",), "float32")], body)


@pytest.fixture(scope="module")
def kernels() -> dict:
    """Every form, saturating or not, flushing or not."""
    return dict(zip(WAYS, built([_kernel(Operand(*way)) for way in WAYS]), strict=True))


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    """Random bits of every kind of float32, all ties of each form near 1 and near its ends, and the edges."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    found = [bits, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 65536, 3.4e38])]
    for digits, least in operands.BITS.values():
        steps = np.arange(1 << min(digits, 12)) + 0.5
        for scale in (1.0, 2.0**least, 2.0 ** (least + 1), 2.0 ** (128 if least == -126 else 16)):
            ties = (steps / 2.0 ** (digits - 1) * scale / 2).astype(np.float32)
            found += [ties, -ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))]
    return np.concatenate(found).astype(np.float32)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rounding_is_that_of_the_definition(kernels: dict, numbers: np.ndarray, way: tuple) -> None:
    form, saturates, flush = way
    got = kernels[way](numbers, shape=numbers.shape)
    expected = operands.rounded(form, numbers, saturates=saturates, flush=flush)
    np.testing.assert_array_equal(got, expected.astype(np.float32))  # every operand is one


@pytest.mark.parametrize(("form", "dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_without_saturation_it_is_a_cast(numbers: np.ndarray, form: str, dtype: type) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = numbers.astype(dtype).astype(np.float64)
    np.testing.assert_array_equal(operands.rounded(form, numbers, saturates=False), cast)
