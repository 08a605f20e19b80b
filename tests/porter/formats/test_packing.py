import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.formats import packing

ONNX = ["INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1"]


@pytest.mark.parametrize("name", ONNX)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 33])
def test_two_and_four_bits_are_in_onnx_order(name, count):
    kind = ir.DataType[name]
    signed, bits = name.startswith("INT"), int(kind.bitwidth)
    codes = np.random.default_rng(count).integers(0, 1 << bits, count).astype(np.uint8)
    if name == "FLOAT4E2M1":
        array = codes.view(ml_dtypes.float4_e2m1fn)
    else:
        array = ((codes << (8 - bits)).view(np.int8) >> (8 - bits) if signed else codes).astype(kind.numpy())
    wanted = ir.Tensor(array, dtype=kind).tobytes()
    assert packing.pack(codes, bits).tobytes() == wanted
    back = packing.unpack(np.frombuffer(wanted, np.uint8), bits, count, signed)
    np.testing.assert_array_equal(back, codes if name == "FLOAT4E2M1" else array.astype(np.int8))


@pytest.mark.parametrize("bits", range(1, 9))
@given(data=st.data())
def test_a_row_is_one_little_endian_number(bits, data):
    row = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=40))
    packed = packing.pack(np.array(row, np.uint8), bits)
    assert len(packed) == -(-len(row) * bits // 8)
    assert int.from_bytes(packed.tobytes(), "little") == sum(code << (i * bits) for i, code in enumerate(row))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 17), (4, 1), (2, 0), (0, 3)])
def test_unpacking_gives_the_codes_back(bits, signed, shape):
    low = -(1 << (bits - 1)) if signed else 0
    codes = np.random.default_rng(bits).integers(low, low + (1 << bits), shape)
    codes = codes.astype(np.int8 if signed else np.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    back = packing.unpack(packed, bits, shape[-1], signed)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


def test_rows_are_padded_with_zeros_and_a_turned_matrix_packs_too():
    codes = np.arange(-8, 7, dtype=np.int8).reshape(3, 5)
    packed = packing.pack(codes, 4)
    assert packed.shape == (3, 3)
    assert packed[0, 0] == 0x98  # -8 is nibble 8 (low), -7 is nibble 9 (high)
    assert packed[0, 2] == 0x0C  # -4 is nibble 12, then the pad
    np.testing.assert_array_equal(packing.pack(np.asfortranarray(codes), 4), packed)


def test_three_bits():
    assert packing.pack(np.array([1, 2, 7], np.uint8), 3).tolist() == [1 | 2 << 3 | 3 << 6, 1]
