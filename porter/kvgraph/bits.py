"""Codes as bytes and back, in nodes: the twin of `porter.formats.packing`, and of e4m3fn's bit patterns."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from porter.kvgraph import body
from porter.kvgraph.body import Body


def pack(b: Body, codes: str, bits: int, count: int) -> str:
    """int64 [B,H,N,count] of codes, signed or not -> uint8 [B,H,N,ceil(count * bits / 8)].

    A word is as few bytes as hold whole codes: the sum of their digits in base 2^bits, then its own digits in
    base 256.
    """
    word, each = _word(bits)
    digits = b.op("Mod", codes, b.integer(1 << bits))  # an integer's Mod has the divisor's sign
    if count % each:
        pads = b.ints(0, -(-count // each) * each - count)
        digits = b.op("Pad", digits, pads, b.integer(0), b.ints(-1))
    placed = b.op("Mul", b.reshape(digits, 0, 0, 0, -1, each), _powers(b, 1 << bits, each))
    words = b.op("ReduceSum", placed, b.ints(-1), keepdims=1)
    apart = b.op("Mod", b.op("Div", words, _powers(b, 256, word)), b.integer(256))
    return b.part(b.cast(b.reshape(apart, 0, 0, 0, -1), body.UINT8), 0, -(-count * bits // 8))


def unpack(b: Body, packed: str, bits: int, count: int, signed: bool = False) -> str:
    """uint8 [B,H,N,ceil(count * bits / 8)] -> int64 [B,H,N,count]."""
    word, each = _word(bits)
    size = -(-count * bits // 8)
    wide = b.cast(packed, body.INT64)
    if size % word:
        wide = b.op("Pad", wide, b.ints(0, -size % word), b.integer(0), b.ints(-1))
    placed = b.op("Mul", b.reshape(wide, 0, 0, 0, -1, word), _powers(b, 256, word))
    words = b.op("ReduceSum", placed, b.ints(-1), keepdims=1)
    digits = b.op("Mod", b.op("Div", words, _powers(b, 1 << bits, each)), b.integer(1 << bits))
    codes = b.part(b.reshape(digits, 0, 0, 0, -1), 0, count)
    if not signed:
        return codes
    half = b.integer(1 << (bits - 1))
    return b.op("Sub", b.op("Mod", b.op("Add", codes, half), b.integer(1 << bits)), half)


def to_e4m3fn(b: Body, x: str) -> str:
    """float32 -> the bytes of e4m3fn, uint8; to nearest, saturating.

    ONNX Runtime casts to the type but has few kernels for it, so the rounded number is taken apart: with
    exponents e from the smallest normal's, |x| = 2^(max(e,1)-10) * (mantissa + 8 where normal).
    """
    rounded = b.cast(b.op("Cast", x, to=body.FP8, saturate=1), body.FLOAT)
    size = b.op("Abs", rounded)
    above = b.op("GreaterOrEqual", b.op("Unsqueeze", size, b.ints(-1)),
                 b.constant(2.0 ** np.arange(-6, 9), np.float32))  # fmt: skip
    exponent = b.op("ReduceSum", b.cast(above, body.INT64), b.ints(-1), keepdims=0)
    units = 2.0 ** (10 - np.maximum(np.arange(16), 1))
    steps = b.op("Mul", size, b.op("Gather", b.constant(units, np.float32), exponent))
    normal = b.op("Mul", b.op("Min", exponent, b.integer(1)), b.integer(8))
    mantissa = b.op("Sub", b.cast(steps, body.INT64), normal)
    # 1 / -0 is negative: that is how it is told from 0.
    sign = b.cast(b.op("Less", b.op("Div", b.number(1), rounded), b.number(0)), body.INT64)
    high = b.op("Add", b.op("Mul", exponent, b.integer(8)), b.op("Mul", sign, b.integer(128)))
    return b.cast(b.op("Add", high, mantissa), body.UINT8)


def from_e4m3fn(b: Body, codes: str) -> str:
    """Bytes of e4m3fn -> float32."""
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return b.op("Gather", b.constant(table, np.float32), b.cast(codes, body.INT64))


def _word(bits: int) -> tuple[int, int]:
    """(bytes, codes) of a word."""
    size = math.lcm(bits, 8)
    return size // 8, size // bits


def _powers(b: Body, base: int, count: int) -> str:
    return b.ints(*(base**i for i in range(count)))
