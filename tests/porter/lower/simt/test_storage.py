"""Elements that WGSL does not have, on a device: what comes back is what numpy has, bit by bit."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from simt import on_device

from porter.errors import TargetError
from porter.lower.blocks.define import block, store
from porter.lower.kernels.define import T, define, tirx
from porter.lower.simt import storage
from porter.lower.simt.rebuild import replaced
from porter.run.webgpu import WebGPU
from porter.target import TargetSpec

HALVES = np.arange(65536, dtype=np.uint16)


def elementwise(source: str, to: str, value: Callable[[Any], Any]) -> tirx.PrimFunc:
    def body(x, y, n):
        with block("y", [n]) as (i,):
            store(y, value(x[i]), i)

    return define("each", [("x", ("n",), source), ("y", ("n",), to)], body)


@pytest.fixture
def computed(machine: WebGPU, webgpu: TargetSpec) -> Callable[..., np.ndarray]:
    def run(x: np.ndarray, to: str, value: Callable[[Any], Any], *, packed: bool) -> np.ndarray:
        function = elementwise(str(x.dtype), to, value)
        y = np.zeros(len(x), storage_dtype(to))
        return on_device(function, [x, y], webgpu, machine, constant=[0] if packed else [])[1]

    return run


def storage_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_floats_are_read_exactly(computed: Callable[..., np.ndarray], dtype: str) -> None:
    x = HALVES.view(storage_dtype(dtype))
    x = x[np.isfinite(x.astype(np.float32))]
    wide = x.astype(np.float32)
    if dtype == "bfloat16":  # adapters may flush what is below float32's normal numbers
        x, wide = x[np.abs(wide) >= 2.0**-126], wide[np.abs(wide) >= 2.0**-126]
    got = computed(x, "float32", lambda v: tirx.Cast("float32", v), packed=True)
    np.testing.assert_array_equal(got, wide)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("packed", [True, False])
def test_narrow_integers_wrap_as_numpy_s(
    computed: Callable[..., np.ndarray], dtype: str, packed: bool
) -> None:
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max + 1, 1001).astype(dtype)  # no whole words
    got = computed(x, dtype, lambda v: v + v * v, packed=packed)
    np.testing.assert_array_equal(got, x + x * x)


def test_float16_is_rounded_to_nearest_even(computed: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(20000) * np.exp2(rng.integers(-30, 18, 20000))
    exact = HALVES.view(np.float16)[:0x7C00].astype(np.float64)
    ties = (exact[1:] + exact[:-1]) / 2  # between every two neighbours
    x = np.concatenate([wide, exact, -exact, ties, -ties, [65519.9, 65520, 1e9, -0.0]]).astype(np.float32)
    got = computed(x, "float32", lambda v: tirx.Cast("float32", tirx.Cast("float16", v)), packed=False)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_bits_of_float16_go_there_and_back(computed: Callable[..., np.ndarray]) -> None:
    bits = HALVES[(HALVES & 0x7FFF) <= 0x7C00]  # all but NaN
    there = computed(
        bits, "float32", lambda v: tirx.Cast("float32", T.reinterpret("float16", v)), packed=True
    )
    np.testing.assert_array_equal(there, bits.view(np.float16).astype(np.float32))
    back = computed(
        bits, "uint16", lambda v: T.reinterpret("uint16", T.reinterpret("float16", v)), packed=True
    )
    np.testing.assert_array_equal(back, bits)


def test_constants_keep_all_their_digits(computed: Callable[..., np.ndarray]) -> None:
    """TVM writes seven of them: 12582912 would become 12582910."""
    values = [12582912.0, 0.1, 1.4426950408889634, 2.0**-24, -3.4028234663852886e38]
    for value in values:
        got = computed(
            np.zeros(3, np.float32),
            "float32",
            lambda v, c=value: v + tirx.FloatImm("float32", c),
            packed=False,
        )
        np.testing.assert_array_equal(got, np.full(3, value, np.float32))


def test_infinity_and_nan_are_written(computed: Callable[..., np.ndarray]) -> None:
    def value(x: Any) -> Any:
        inf, nan = (tirx.FloatImm("float32", float(v)) for v in ("-inf", "nan"))
        return tirx.Select(x > tirx.FloatImm("float32", 0), inf, nan)

    got = computed(np.array([1, -1], np.float32), "float32", value, packed=False)
    np.testing.assert_array_equal(got, [-np.inf, np.nan])


def test_what_has_no_32_bits_is_refused() -> None:
    with pytest.raises(TargetError, match="float64") as caught:
        storage.wide("float64")
    assert caught.value.code == "PORT-0452"
    assert caught.value.exit_code == 4


def test_an_expression_s_variables_are_replaced() -> None:
    a, b = tirx.Var("a", "int64"), tirx.Var("b", "int64")
    found = replaced((a + 7) // 8, {a: b * 2})
    assert str(found).replace("T.int64", "") == "(b * (2) + (7)) // (8)"
