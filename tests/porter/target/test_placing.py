"""Which numbers a format holds: against `ml_dtypes`, code by code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from porter.target import placing

DTYPES = {
    "fp8-e4m3fn": ml_dtypes.float8_e4m3fn,
    "fp8-e4m3": ml_dtypes.float8_e4m3,
    "fp8-e5m2": ml_dtypes.float8_e5m2,
    "fp8-e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8-e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "fp8-e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "fp8-e3m4": ml_dtypes.float8_e3m4,
}
WIDE = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


def numbers(dtype: type) -> np.ndarray:
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("narrow", DTYPES)
@pytest.mark.parametrize("wide", [*WIDE, *DTYPES])
def test_floats(wide: str, narrow: str) -> None:
    values = numbers(DTYPES[narrow])
    with np.errstate(over="ignore"):
        back = values.astype((WIDE | DTYPES)[wide]).astype(np.float32)
    assert placing.holds(wide, narrow) == np.array_equal(back, values)


@pytest.mark.parametrize("narrow", ["int8", "int4", "int3", "int2", "uint8", "uint4", "uint3", "uint2"])
@pytest.mark.parametrize("wide", [*WIDE, "fp8-e4m3fn", "fp8-e3m4"])
def test_integers(wide: str, narrow: str) -> None:
    bits, signed = int(narrow[-1]), not narrow.startswith("u")
    values = np.arange(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed), dtype=np.float32)
    with np.errstate(over="ignore"):
        back = values.astype((WIDE | DTYPES)[wide]).astype(np.float32)
    assert placing.holds(wide, narrow) == np.array_equal(back, values)


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        ("mxfp8", "mxfp4", True),
        ("mxfp8", "mxfp6-e2m3", True),
        ("mxfp4", "mxfp8", False),
        ("mxfp8", "nvfp4", False),  # another group and scale
        ("mxfp8", "fp8-e4m3fn", False),  # it has no shared exponent
        ("int8", "int4", True),
        ("int4", "int8", False),
        ("int8", "uint8", False),
        ("tf32", "bf16", True),
        ("tf32", "fp16", True),
        ("tf32", "fp32", False),
        ("tf32", "int8", True),
        ("bf16", "fp16", False),
        ("fp16", "bf16", False),
        ("fp32", "fp16", True),
        ("bf16", "mxint8", True),
        ("bf16", "mx9", True),
        ("bf16", "nvfp4", True),
        ("fp8-e4m3fn", "mx9", False),
    ],
)
def test_others(wide: str, narrow: str, expected: bool) -> None:
    assert placing.holds(wide, narrow) == expected


def test_one_format_under_two_names_is_the_same() -> None:
    assert placing.same("mxfp8", "mxfp8-e4m3")
    assert not placing.same("mxfp8", "mxfp8-e5m2")
    assert not placing.same("int8", "uint8")
    assert not placing.same("tf32", "fp32")


@pytest.mark.parametrize(
    ("name", "base", "of"),
    [
        ("int4-g32", "int4", "int"),
        ("uint3-r", "uint3", "int"),
        ("fp8-e4m3fn-b128", "fp8-e4m3fn", "fp8"),
        ("mxfp8-e5m2", "mxfp8-e5m2", "mx"),
        ("mxint8", "mxint8", "mx"),
        ("nvfp4", "nvfp4", "mx"),
        ("bf16", "bf16", "float"),
        ("tf32", "tf32", "float"),
    ],
)
def test_names_without_suffix_and_their_class(name: str, base: str, of: str) -> None:
    assert placing.base(name) == base
    assert placing.class_of(base) == of
