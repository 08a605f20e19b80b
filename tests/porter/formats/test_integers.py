import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.formats.elements import INTEGERS

every_integer = pytest.mark.parametrize("element", INTEGERS.values(), ids=lambda i: i.name)


@every_integer
def test_range_is_that_of_the_type(element):
    if element.bits == 3:  # no library has it
        assert (element.smallest, element.largest) == ((-4, 3) if element.signed else (0, 7))
        return
    info = ml_dtypes.iinfo(getattr(ml_dtypes, element.name, None) or element.name)
    assert (element.smallest, element.largest, element.bits) == (info.min, info.max, info.bits)


@every_integer
def test_every_code_decodes_to_itself_and_comes_back(element):
    codes = np.arange(element.smallest, element.largest + 1)
    np.testing.assert_array_equal(element.encode(codes), codes)
    np.testing.assert_array_equal(element.decode(element.encode(codes)), codes.astype(np.float32))
    assert element.encode(codes).dtype == (np.int8 if element.signed else np.uint8)


@every_integer
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_value_goes_to_the_nearest_code_and_halves_to_even(element, value):
    assert int(element.encode(np.float32(value))) == min(max(round(value), element.smallest), element.largest)


@every_integer
def test_halves_go_to_even_and_ends_saturate(element):
    low, high = element.smallest, element.largest
    values = np.array([0.5, -0.5, high + 0.4, low - 0.4, 1e9, -1e9, -np.inf])
    assert element.encode(values).tolist() == [0, 0, high, low, high, low, low]


def test_odd_halves():
    assert INTEGERS["int8"].encode(np.array([1.5, 2.5, -1.5, -2.5])).tolist() == [2, 2, -2, -2]
