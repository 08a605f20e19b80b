import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.formats.elements import ELEMENTS, FLOATS, FP8, INTEGERS, WIDE, Float

FIXED = ("mx9", "mx6")  # no library has them
KNOWN = [f for f in FLOATS.values() if f.name not in FIXED]
SIGNED = [f for f in KNOWN if f.signed]
every_float = pytest.mark.parametrize("element", FLOATS.values(), ids=lambda f: f.name)
every_known = pytest.mark.parametrize("element", KNOWN, ids=lambda f: f.name)
every_signed = pytest.mark.parametrize("element", SIGNED, ids=lambda f: f.name)
either_way = pytest.mark.parametrize("saturate", [True, False], ids=["saturate", "overflow"])


def codes_of(element: Float) -> np.ndarray:
    return np.arange(1 << element.bits, dtype=np.uint8)


def oracle_type(element: Float) -> type:
    names = {"e2m1": "float4_e2m1fn", "e8m0": "float8_e8m0fnu"}
    names |= {"e2m3": "float6_e2m3fn", "e3m2": "float6_e3m2fn"}
    return getattr(ml_dtypes, names.get(element.name, f"float8_{element.name}"))


def oracle_encode(element: Float, values: np.ndarray, saturate: bool = False) -> np.ndarray:
    """ml_dtypes' codes; saturation is a clip before, which leaves NaN as it is."""
    values = np.asarray(values, np.float32)
    if saturate:
        low = -element.largest if element.signed else np.where(values == 0, element.values[0], -np.inf)
        values = np.clip(values, low, np.float32(element.largest)).astype(np.float32)
    return values.astype(oracle_type(element)).view(np.uint8)


def neighbours(values: np.ndarray) -> np.ndarray:
    """Each value with the float32 below and above it."""
    infinity = np.float32(np.inf)
    return np.concatenate([values, np.nextafter(values, -infinity), np.nextafter(values, infinity)])


def every_bfloat16() -> np.ndarray:
    """All 65536 float32 values of 16 significant bits, without NaN: every exponent, 128 fractions of each."""
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return values[~np.isnan(values)]


@every_known
def test_every_code_decodes_to_what_ml_dtypes_says(element):
    wanted = codes_of(element).view(oracle_type(element)).astype(np.float32)
    got = element.decode(codes_of(element))
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(wanted)]))
    assert element.largest == float(ml_dtypes.finfo(oracle_type(element)).max)


@pytest.mark.parametrize(("name", "bits", "unit"), [("mx9", 7, 64), ("mx6", 4, 8)])
def test_fixed_point_elements_are_a_sign_and_a_magnitude(name, bits, unit):
    magnitudes = [code / unit for code in range(2**bits)]
    wanted = np.array(magnitudes + [-m for m in magnitudes], np.float32)
    np.testing.assert_array_equal(ELEMENTS[name].decode(codes_of(ELEMENTS[name])), wanted)


@every_float
@either_way
def test_every_finite_code_survives_a_round_trip(element, saturate):
    codes = codes_of(element)[np.isfinite(element.values)]
    np.testing.assert_array_equal(element.encode(element.decode(codes), saturate), codes)


@every_known
@either_way
def test_every_bfloat16_rounds_as_ml_dtypes_does(element, saturate):
    values = every_bfloat16()
    np.testing.assert_array_equal(element.encode(values, saturate), oracle_encode(element, values, saturate))


@every_known
@either_way
def test_every_midpoint_and_its_neighbours_round_as_ml_dtypes_does(element, saturate):
    finite = np.sort(element.values[np.isfinite(element.values)])
    beyond = np.float32(element.largest) * np.linspace(1, 1.25, 65, dtype=np.float32)
    points = neighbours(np.concatenate([finite, (finite[:-1] + finite[1:]) / 2, beyond, -beyond]))
    np.testing.assert_array_equal(element.encode(points, saturate), oracle_encode(element, points, saturate))


@every_known
@either_way
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_any_float32_rounds_as_ml_dtypes_does(element, saturate, values):
    got = element.encode(np.array(values), saturate)
    np.testing.assert_array_equal(got, oracle_encode(element, np.array(values), saturate))


@pytest.mark.parametrize(("name", "unit", "top"), [("mx9", 64, 127), ("mx6", 8, 15)])
@given(value=st.floats(-3, 3, width=32))
def test_fixed_point_rounds_half_to_even_and_saturates(name, unit, top, value):
    code = int(ELEMENTS[name].encode(np.float32(value)))
    assert code & top == min(round(Fraction(abs(value)) * unit), top)
    assert code & ~top == (top + 1 if math.copysign(1, value) < 0 else 0)


@every_signed
def test_overflow(element):
    values = np.array([1e9, np.inf, -1e9, -np.inf], np.float32)
    top = np.float32(element.largest)
    np.testing.assert_array_equal(element.decode(element.encode(values)), [top, top, -top, -top])
    over = element.decode(element.encode(values, saturate=False))
    wanted = {"ieee": [np.inf, np.inf, -np.inf, -np.inf], "finite": [top, top, -top, -top]}
    np.testing.assert_array_equal(over, wanted.get(element.special, [np.nan] * 4))


@every_signed
@either_way
def test_nan_and_zeros(element, saturate):
    values = np.array([np.nan, -np.nan, 0.0, -0.0])
    codes = element.encode(values, saturate)
    if element.special == "finite":  # ONNX: NaN becomes the largest value; ml_dtypes makes it zero
        np.testing.assert_array_equal(element.decode(codes[:2]), [element.largest] * 2)
        codes, values = codes[2:], values[2:]
    np.testing.assert_array_equal(codes, oracle_encode(element, values))


def test_e8m0_has_no_sign_and_no_zero():
    e8m0 = ELEMENTS["e8m0"]
    values = np.array([0.0, -0.0, -1.0, -np.inf, np.nan, 1e-45, np.inf], np.float32)
    assert e8m0.encode(values).tolist() == [0, 0, 255, 255, 255, 0, 254]
    assert e8m0.encode(values, saturate=False).tolist() == [255, 255, 255, 255, 255, 0, 255]


def test_half_precision_decodes_every_code_and_takes_it_back():
    codes = np.arange(1 << 16, dtype=np.uint16)
    number = ~np.isnan(codes.view(np.float16))
    wanted = np.array([struct.unpack("<e", struct.pack("<H", c))[0] for c in codes], np.float32)
    got = WIDE["fp16"].decode(codes.view(np.float16))
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(
        WIDE["fp16"].encode(got, saturate=False).view(np.uint16)[number], codes[number]
    )


@given(value=st.floats(-65504, 65504, width=32))
def test_half_precision_rounds_as_python_does(value):
    assert WIDE["fp16"].encode(np.float32(value)).tobytes() == struct.pack("<e", value)


@given(value=st.floats(-(2.0**127), 2.0**127, width=32))
def test_bfloat16_is_the_upper_half_rounded_to_even(value):
    word = int(np.float32(value).view(np.uint32))
    upper = round(
        Fraction(word, 1 << 16)
    )  # Python rounds halves to even; magnitudes are ordered as words are
    assert int(WIDE["bf16"].encode(np.float32(value)).view(np.uint16)) == upper
    assert int(WIDE["bf16"].decode(WIDE["bf16"].encode(np.float32(value))).view(np.uint32)) == upper << 16


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_wide_floats_saturate_or_not(name):
    wide, huge = WIDE[name], np.finfo(np.float32).max
    values = np.array([huge, -huge, np.inf, np.nan], np.float32)
    top = np.float32(wide.largest)
    np.testing.assert_array_equal(wide.decode(wide.encode(values)), [top, -top, top, np.nan])
    with np.errstate(over="ignore"):
        over = wide.decode(wide.encode(values, saturate=False))
    np.testing.assert_array_equal(over, [np.inf, -np.inf, np.inf, np.nan])


def test_the_table_has_every_element_under_its_name():
    names = "e4m3fn e4m3 e5m2 e4m3fnuz e5m2fnuz e4m3b11fnuz e3m4 e2m1 e2m3 e3m2 e8m0 mx9 mx6"
    names += " int2 int3 int4 int8 uint2 uint3 uint4 uint8 fp32 fp16 bf16"
    assert set(ELEMENTS) == set(names.split())
    assert all(element.name == name for name, element in ELEMENTS.items())
    assert {f.bits for f in FP8.values()} == {8}
    assert [(i.bits, i.signed) for i in INTEGERS.values()] == [
        (bits, signed) for bits in (2, 3, 4, 8) for signed in (True, False)
    ]


def test_shapes_are_kept():
    element = FP8["e4m3fn"]
    assert element.encode(np.zeros((2, 0, 3))).shape == (2, 0, 3)
    assert element.encode(np.float32(1.0)).shape == ()
    assert element.decode(np.zeros((4, 5), np.uint8)).dtype == np.float32
