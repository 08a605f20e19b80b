import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.formats.elements import FLOAT8, Float8

FLAVOURS = pytest.mark.parametrize("flavour", FLOAT8.values(), ids=lambda f: f.name)
EVERY_CODE = np.arange(256, dtype=np.uint8)


def oracle_type(flavour: Float8) -> type:
    return getattr(ml_dtypes, f"float8_{flavour.name}")


def oracle_encode(flavour: Float8, values: np.ndarray) -> np.ndarray:
    """ml_dtypes' codes; the caller keeps to the range where it does not overflow."""
    return np.asarray(values, np.float32).astype(oracle_type(flavour)).view(np.uint8)


def neighbours(values: np.ndarray) -> np.ndarray:
    """Each value with the float32 below and above it."""
    return np.concatenate(
        [values, np.nextafter(values, np.float32(-1e9)), np.nextafter(values, np.float32(1e9))]
    )


@FLAVOURS
def test_every_code_decodes_to_what_ml_dtypes_says(flavour):
    wanted = EVERY_CODE.view(oracle_type(flavour)).astype(np.float32)
    got = flavour.decode(EVERY_CODE)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(wanted)]))
    assert flavour.largest == float(ml_dtypes.finfo(oracle_type(flavour)).max)


@FLAVOURS
def test_every_finite_code_survives_a_round_trip(flavour):
    codes = EVERY_CODE[np.isfinite(flavour.values)]
    np.testing.assert_array_equal(flavour.encode(flavour.decode(codes)), codes)


@FLAVOURS
def test_every_midpoint_and_its_neighbours_round_as_ml_dtypes_does(flavour):
    finite = np.sort(flavour.values[np.isfinite(flavour.values)])
    points = neighbours(np.concatenate([finite, (finite[:-1] + finite[1:]) / 2]))
    points = points[np.abs(points) <= flavour.largest]
    np.testing.assert_array_equal(flavour.encode(points), oracle_encode(flavour, points))


@FLAVOURS
@given(value=st.floats(width=32, allow_nan=False))
def test_any_float32_rounds_as_ml_dtypes_does_once_clipped(flavour, value):
    clipped = np.clip(np.float32(value), -flavour.largest, flavour.largest)
    assert flavour.encode(np.array([value])) == oracle_encode(flavour, np.array([clipped]))


@FLAVOURS
def test_overflow_saturates_where_ml_dtypes_makes_it_nan_or_infinite(flavour):
    values = np.array([1e9, np.inf, -1e9, -np.inf], np.float32)
    top = np.float32(flavour.largest)
    np.testing.assert_array_equal(flavour.decode(flavour.encode(values)), [top, top, -top, -top])
    assert not np.isfinite(values.astype(oracle_type(flavour)).astype(np.float32)).any()


@FLAVOURS
def test_nan_and_zeros(flavour):
    codes = flavour.encode(np.array([np.nan, -np.nan, 0.0, -0.0]))
    assert np.isnan(flavour.decode(codes[:2])).all()
    np.testing.assert_array_equal(codes, oracle_encode(flavour, np.array([np.nan, -np.nan, 0.0, -0.0])))


def test_shapes_are_kept():
    flavour = FLOAT8["e4m3fn"]
    assert flavour.encode(np.zeros((2, 0, 3))).shape == (2, 0, 3)
    assert flavour.encode(np.float32(1.0)).shape == ()
    assert flavour.decode(np.zeros((4, 5), np.uint8)).dtype == np.float32
