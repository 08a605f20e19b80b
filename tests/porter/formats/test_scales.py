import math
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.capi import _pybind_state

from porter import formats
from porter.formats import blocks, packing, scales

MX = {"mxfp8": (8, 448), "mxfp8-e5m2": (15, 57344), "mxfp6-e2m3": (2, 7.5), "mxfp6-e3m2": (4, 28)}
MX |= {"mxfp4": (2, 6), "mxint8": (0, 127 / 64)}  # emax and largest of OCP MX 1.0, tables 1 to 5
every_mx = pytest.mark.parametrize(("name", "emax", "largest"), [(n, *v) for n, v in MX.items()])
normal = st.floats(2.0**-100, 2.0**126, width=32)  # e8m0's range is not reached


def matrix(shape: tuple[int, ...] = (5, 45), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mx_scale(name: str, rounding: str, peak: float) -> Fraction:
    form = replace(formats.parse(name), mx=rounding)
    return Fraction(float(formats.encode(form, np.array([[peak, 0]], np.float32)).scales[0, 0]))


@every_mx
@given(peak=normal)
def test_floor_puts_the_peak_in_the_topmost_binade(name, emax, largest, peak):
    scale = mx_scale(name, "floor", peak)
    assert scale * 2**emax <= Fraction(peak) < scale * 2 ** (emax + 1)


@every_mx
@given(peak=normal)
def test_ceil_is_the_smallest_power_that_does_not_saturate(name, emax, largest, peak):
    scale = mx_scale(name, "ceil", peak)
    assert scale / 2 * Fraction(largest) < Fraction(peak) <= scale * Fraction(largest)


@every_mx
@given(peak=normal)
def test_larger_is_twice_floor(name, emax, largest, peak):
    assert mx_scale(name, "larger", peak) == 2 * mx_scale(name, "floor", peak)


@every_mx
def test_the_edges_of_a_binade(name, emax, largest):
    top = np.float32(largest)
    just_above, just_below = np.nextafter(top, np.float32(1e9)), np.nextafter(np.float32(4), np.float32(0))
    assert [mx_scale(name, r, top) for r in ("floor", "ceil", "larger")] == [1, 1, 2]
    assert [mx_scale(name, r, just_above) for r in ("floor", "ceil", "larger")] == [1, 2, 2]
    assert mx_scale(name, "floor", 4) == 2 * mx_scale(name, "floor", just_below)


@every_mx
@pytest.mark.parametrize("rounding", ["floor", "ceil", "larger"])
def test_exponents_stay_in_e8m0(name, emax, largest, rounding):
    form = replace(formats.parse(name), mx=rounding)
    huge, tiny = np.finfo(np.float32).max, np.float32(1e-45)
    bytes_ = formats.encode(form, np.array([[huge], [tiny], [0]], np.float32)).scales.view(np.uint8)[:, 0]
    up = {"floor": 0, "ceil": int(huge / np.float32(2.0 ** (127 - emax)) > largest), "larger": 1}[rounding]
    assert bytes_.tolist() == [min(254, 254 - emax + up), 0, 127]


@given(st.integers(0, 2**32 - 1))
def test_nvfp4_by_hand(seed):
    w = matrix((2, 37), seed) * np.float32(10.0 ** (seed % 9 - 4))
    w[1, 16:32] = 0
    encoded = formats.encode(formats.parse("nvfp4"), w)
    factor = np.float32(np.abs(w).max() / np.float32(6 * 448))
    assert encoded.factor == factor
    for row, start in np.ndindex(2, 3):
        block = w[row, 16 * start : 16 * start + 16]
        stored = (np.abs(block).max() / np.float32(6) / factor).astype(ml_dtypes.float8_e4m3fn)
        stored = stored if block.any() else ml_dtypes.float8_e4m3fn(1)
        assert encoded.scales[row, start] == stored
        codes = (block / (np.float32(stored) * factor)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        np.testing.assert_array_equal(encoded.codes[row, 16 * start : 16 * start + 16], codes)


def test_nvfp4_scales_never_round_to_nothing():
    w = np.zeros((1, 48), np.float32)
    w[0, 0], w[0, 16] = 1, 1e-7  # 6 * 448 * 2^-10 times smaller would be the last that rounds up by itself
    encoded = formats.encode(formats.parse("nvfp4"), w)
    assert encoded.scales.astype(np.float32).tolist() == [[448, 2.0**-9, 1]]
    assert formats.encode(formats.parse("nvfp4"), 0 * w).factor == 1


def test_a_part_of_an_nvfp4_matrix_takes_the_factor_of_the_whole():
    form, w = formats.parse("nvfp4"), matrix((6, 40))
    whole, factor = formats.encode(form, w), scales.whole_factor(form, np.abs(w).max())
    part = formats.encode(form, w[2:4], factor)
    np.testing.assert_array_equal(part.codes, whole.codes[2:4])
    np.testing.assert_array_equal(part.scales, whole.scales[2:4])
    assert part.factor == whole.factor == factor


@pytest.mark.parametrize(("name", "magnitude_bits"), [("mx9", 7), ("mx6", 4)])
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 40))
def test_micro_exponents_by_the_paper(name, magnitude_bits, seed, columns):
    """2302.08007, section 3: exact fractions, an element at a time."""
    w = matrix((1, columns), seed) * np.float32(2.0) ** np.random.default_rng(seed).integers(-4, 5, columns)
    w[0, columns // 2] = 0
    encoded = formats.encode(formats.parse(name), w)
    exponents = [math.frexp(v)[1] - 1 if v else -999 for v in w[0].tolist()]
    for i, value in enumerate(w[0].tolist()):
        first = i // 16 * 16
        shared = max(exponents[first : first + 16])
        shared = shared if shared > -999 else 0  # a block of zeros: scale 1
        shift = int(max(exponents[i // 2 * 2 : i // 2 * 2 + 2]) < shared)
        step = Fraction(2) ** (shared - shift - (magnitude_bits - 1))
        magnitude = min(round(abs(Fraction(value)) / step), 2**magnitude_bits - 1)
        sign = (value < 0) << magnitude_bits
        assert float(encoded.scales[0, i // 16]) == 2.0**shared
        assert encoded.shifts[0, i // 2] == shift
        assert encoded.codes[0, i] == sign | magnitude
        assert formats.decode(encoded)[0, i] == float(magnitude * step) * (-1 if value < 0 else 1)


@pytest.mark.parametrize("name", ["mx9", "mx6"])
def test_a_pair_that_reaches_half_of_the_range_is_not_shifted(name):
    below = np.nextafter(np.float32(1), np.float32(0))
    w = np.array([[1.5, 0, 0, -1, below, below, 0, 0]], np.float32)
    assert formats.encode(formats.parse(name), w).shifts.tolist() == [[0, 0, 1, 1]]


def test_micro_exponents_do_not_ask_how_mx_rounds():
    w = matrix()
    floor, larger = (formats.encode(replace(formats.parse("mx9"), mx=mx), w) for mx in ("floor", "larger"))
    np.testing.assert_array_equal(floor.scales, larger.scales)


def from_onnx_runtime(w: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Codes, scales and zeros of ONNX Runtime's own quantizer for MatMulNBits; w [N,K], K divides."""
    rows, groups = w.shape[0], w.shape[1] // group
    codes, found = np.zeros((rows, groups, group * bits // 8), np.uint8), np.zeros(rows * groups, np.float32)
    zeros = np.zeros((rows, -(-groups * bits // 8)), np.uint8)
    quantize = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    quantize(codes, np.ascontiguousarray(w.T), found, zeros.reshape(-1), group, *w.shape, symmetric)
    codes = packing.unpack(codes.reshape(rows, -1), bits, w.shape[1])
    return codes, found.reshape(rows, groups), packing.unpack(zeros, bits, groups)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_asymmetric_is_onnx_runtimes_quantizer(bits, group):
    w = matrix((24, 384)) + matrix((24, 1), 1)  # ranges on both sides of zero, and around it
    w[0], w[1] = np.abs(w[0]), -np.abs(w[1])
    codes, found, zeros = from_onnx_runtime(w, bits, group, False)
    encoded = formats.encode(formats.parse(f"uint{bits}-g{group}"), w)
    np.testing.assert_array_equal(encoded.scales, found)
    np.testing.assert_array_equal(encoded.zeros, zeros)
    ratio = w / blocks.spread(found, 384, group)
    tie = ratio - np.floor(ratio) == 0.5  # its C rounds halves away from zero, QuantizeLinear to even
    assert tie.mean() < 1e-3
    np.testing.assert_array_equal(encoded.codes[~tie], codes[~tie])


@pytest.mark.parametrize("bits", [2, 4])
def test_one_of_the_competing_scales_is_onnx_runtimes(bits):
    w = matrix((24, 384))
    codes, found, _ = from_onnx_runtime(w, bits, 32, True)
    form = formats.parse(f"int{bits}-g32")
    below = scales.candidates(form, w)[1]
    np.testing.assert_array_equal(below.scales, found)
    signed = formats.nearest(form, w, below).codes
    np.testing.assert_array_equal(signed + (1 << (bits - 1)), codes)


@pytest.mark.parametrize(
    ("name", "above", "below", "worth"),
    [("int4", 7, -8, 0.99), ("int3", 3, -4, 0.996), ("int2", 1, -2, 1)],  # with 2 bits the second always wins
)
def test_the_better_of_two_scales_wins_in_each_group(name, above, below, worth):
    w = matrix((64, 172), 1)
    encoded = formats.encode(formats.parse(f"{name}-g32"), w)
    assert (encoded.scales < 0).any()  # the price of reaching the lowest code on the positive side
    assert (encoded.scales > 0).any()
    ours = blocks.total((formats.decode(encoded) - w) ** 2, 32)
    for code, peak in ((above, blocks.absmax(w, 32)), (below, blocks.signed_absmax(w, 32))):
        s = blocks.spread(peak / np.float32(code), 172, 32)
        theirs = blocks.total((np.clip(np.rint(w / s), below, above) * s - w) ** 2, 32)
        assert (ours <= theirs * (1 + 1e-5)).all()  # float32 sums of 32 squares, in another order
        assert ours.sum() <= worth * theirs.sum() * (1 + 1e-6)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "uint4-g32", "fp8-e4m3fn-b8"])
@pytest.mark.parametrize("scale", ["fp16", "bf16"])
def test_codes_are_nearest_under_the_scale_as_stored(name, scale):
    form, w = replace(formats.parse(name), scale=scale), matrix((16, 64)) * np.float32(1e-3)
    encoded = formats.encode(form, w)
    assert encoded.scales.dtype == formats.format.SCALES[scale]
    exact = replace(form, scale="fp32")
    plain = formats.Scales(encoded.scales.astype(np.float32), encoded.zeros)
    np.testing.assert_array_equal(encoded.codes, formats.nearest(exact, w, plain).codes)
    assert (encoded.scales.astype(np.float32) != formats.encode(exact, w).scales).any()  # it did round


def test_small_rows_use_half_precisions_subnormals():
    form, w = replace(formats.parse("int8"), scale="fp16"), matrix((4, 64)) * np.float32(1e-4)
    encoded = formats.encode(form, w)
    assert (encoded.scales < np.finfo(np.float16).smallest_normal).all()
    # A scale near 2^-20 of 16 steps is at most 1/32 off: the codes still reach 127 / (1 + 1/32) or more.
    assert (np.abs(encoded.codes.astype(int)).max(-1) >= 123).all()


@pytest.mark.parametrize("name", ["int8", "int4-g32", "uint4-g32", "fp8-e5m2"])
@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16"])
def test_no_stored_scale_leaves_its_type_or_float32(name, scale):
    huge = np.finfo(np.float32).max
    peaks = (huge * 2.0 ** np.arange(0, -276, -0.5)).astype(np.float32)  # down to float32's smallest
    form = replace(formats.parse(name), scale=scale)
    for sign in (1, -1):
        encoded = formats.encode(form, sign * peaks[:, None])
        stored = encoded.scales.astype(np.float32)
        assert np.isfinite(stored).all()
        assert (stored != 0).all()
        assert np.isfinite(formats.decode(encoded)).all()
