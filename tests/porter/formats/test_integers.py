import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.formats import integers

nibbles = st.lists(st.integers(-8, 7), min_size=1, max_size=33)


@given(nibbles)
def test_packing_is_onnx_byte_order(codes):
    codes = np.array(codes, np.int8)
    wanted = ir.Tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4).tobytes()
    assert integers.pack_nibbles(codes).tobytes() == wanted


@given(nibbles)
def test_unpacking_gives_the_codes_back(codes):
    codes = np.array(codes, np.int8)
    np.testing.assert_array_equal(integers.unpack_nibbles(integers.pack_nibbles(codes), len(codes)), codes)


def test_packing_works_on_the_last_axis_only():
    codes = np.arange(-8, 7, dtype=np.int8).reshape(3, 5)
    packed = integers.pack_nibbles(codes)
    assert packed.shape == (3, 3)
    assert packed[0, 0] == 0x98  # -8 is nibble 8 (low), -7 is nibble 9 (high)
    assert packed[0, 2] == 0x0C  # -4 is nibble 12, then the pad
    np.testing.assert_array_equal(integers.unpack_nibbles(packed, 5), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_halves_go_to_even_and_ends_saturate(bits):
    low, high = integers.limits(bits)
    values = np.array([0.5, -0.5, high + 0.4, low - 0.4, 1e9, -1e9, -np.inf])
    assert integers.encode(values, bits).tolist() == [0, 0, high, low, high, low, low]
    np.testing.assert_array_equal(integers.encode(np.arange(low, high + 1), bits), np.arange(low, high + 1))


def test_odd_halves():
    assert integers.encode(np.array([1.5, 2.5, -1.5, -2.5]), 8).tolist() == [2, 2, -2, -2]
