"""Codecs: every code of every element decodes to the value that numpy has for it, and 8-bit floats encode."""

import numpy as np
import pytest
from kernels import built

from porter.formats import packing
from porter.formats.elements import ELEMENTS, FP8
from porter.lower.kernels.codecs import CODECS, encode_float
from porter.lower.kernels.define import define, loop, store
from porter.lower.kernels.gather import gather
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.matmul import matmul

WIDE = {"fp16": np.uint16, "bf16": np.uint16}
NARROW = {"int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16}
NAMES = [n for n in CODECS if n not in ("fp32", "int32", "e8m0", "halving")]


def every_code(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All codes as a layout takes them, and the float32 that each stands for."""
    if name in WIDE:
        codes = np.arange(1 << 16).astype(np.uint16).view(ELEMENTS[name].dtype)
        return codes, codes.astype(np.float32)
    if name in NARROW:
        info = np.iinfo(NARROW[name])
        codes = np.arange(info.min, info.max + 1).astype(NARROW[name])
        return codes, codes.astype(np.float32)
    element = ELEMENTS[name]
    codes = np.arange(1 << element.bits).astype(np.uint8)
    if name.startswith("int"):
        codes = packing.unpack(codes[:, None], element.bits, 1, signed=True)[:, 0]
    return codes, element.decode(codes)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes_exactly(name: str) -> None:
    codes, wanted = every_code(name)
    layout = Layout(name, len(codes), 1, 1)
    scale = layout.pack_scales(np.ones((len(codes), 1), np.float32))
    by_matmul, by_gather = built([matmul(layout), gather(layout)])
    packed = layout.pack_codes(codes[:, None])
    # One term, 0 + 1 * w: nothing is rounded (only -0 becomes 0, which compares equal).
    product = by_matmul(np.ones((1, 1), np.float32), packed, scale, shape=(1, len(codes)))[0]
    np.testing.assert_array_equal(product, wanted)
    rows = by_gather(np.arange(len(codes)), packed, scale, shape=(len(codes), 1))[:, 0]
    same_bits(rows, wanted)


@pytest.mark.parametrize("name", [n for n in NAMES if CODECS[n].bits < 8])
def test_every_code_decodes_at_every_place_of_its_unit(name: str) -> None:
    """Row i holds the code i, then i + 1, …: every code meets every place, and neighbours of other bits."""
    codes, values = every_code(name)
    unit, count = CODECS[name].unit, len(codes)
    turned = (np.arange(count)[:, None] + np.arange(2 * unit)) % count
    layout = Layout(name, count, 2 * unit, 2 * unit)
    by_matmul, by_gather = built([matmul(layout), gather(layout)])
    buffers = layout.pack_codes(codes[turned]), layout.pack_scales(np.ones((count, 1), np.float32))
    rows = by_gather(np.arange(count), *buffers, shape=(count, 2 * unit))
    same_bits(rows, values[turned])
    got = by_matmul(np.eye(2 * unit, dtype=np.float32), *buffers, shape=(2 * unit, count))
    np.testing.assert_array_equal(got, values[turned].T)  # w plus zeros: these codes are all finite


SCALES = {
    "fp16": np.arange(1 << 16).astype(np.uint16).view(np.float16),
    "bf16": np.arange(1 << 16).astype(np.uint16).view(ELEMENTS["bf16"].dtype),
    "e8m0": np.arange(256).astype(np.uint8),
    "e4m3fn": np.arange(256).astype(np.uint8),
}


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_decodes_exactly(name: str) -> None:
    scales = SCALES[name]
    layout = Layout("int8", len(scales), 1, 1, scale=name)
    by_matmul, by_gather = built([matmul(layout), gather(layout)])
    buffers = layout.pack_codes(np.ones((len(scales), 1), np.int8)), layout.pack_scales(scales[:, None])
    wanted = ELEMENTS[name].decode(scales)
    got = by_matmul(np.ones((1, 1), np.float32), *buffers, shape=(1, len(scales)))[0]
    np.testing.assert_array_equal(got, wanted)
    same_bits(by_gather(np.arange(len(scales)), *buffers, shape=(len(scales), 1))[:, 0], wanted)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """-0.0 counts; of NaN, that it is one."""
    nan = np.isnan(b)
    assert np.array_equal(np.isnan(a), nan)
    assert np.array_equal(a[~nan].view(np.uint32), b[~nan].view(np.uint32))


@pytest.mark.parametrize("name", FP8)
def test_encoding_to_an_8_bit_float(name: str) -> None:
    """Every value, every midpoint, their neighbours on both sides, what saturates, infinities and NaN."""
    form = FP8[name]
    finite = np.sort(form.values[np.isfinite(form.values)])
    middle = (finite[:-1] + finite[1:]) / np.float32(2)
    places = np.concatenate([finite, middle, finite * np.float32(1.5)])
    sides = [np.nextafter(places, np.float32(side)) for side in (-np.inf, np.inf)]
    odd = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e38, -1e38, 1e-45, -1e-45, 1e-39])
    noise = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * np.float32(form.largest / 2)
    x = np.concatenate([places, *sides, odd, noise]).astype(np.float32)

    def body(values, codes, n):
        with loop(n) as i:
            store(codes, encode_float(form, values[i]), i)

    (kernel,) = built([define("encode", [("x", ("n",), "float32"), ("y", ("n",), "uint8")], body)])
    got, wanted = kernel(x, shape=x.shape, dtype="uint8"), form.encode(x)
    np.testing.assert_array_equal(got[~np.isnan(x)], wanted[~np.isnan(x)])
    assert np.isnan(form.decode(got[np.isnan(x)])).all()
