"""Codecs: how a kernel turns stored codes into float32 in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from porter.lower.kernels.define import Expr, T, f32, tirx

# An 8-bit float shifted into a float16 is its value times a power of two, subnormals included, and float16
# widens exactly, in one instruction that also heeds no flush-to-zero mode. (A cast of TVM's own FP8 types
# gives wrong values for zero, subnormals and NaN under LLVM.)


@dataclass(frozen=True)
class Codec:
    """A storage form: `storage` is a TIR dtype, `per_word` the codes in one element of it."""

    name: str
    storage: str
    per_word: int
    decode: Callable[[Expr, Expr], Expr]  # (word, which code of it, int32) -> float32


def _const(value: int, dtype: str = "int32") -> tirx.IntImm:
    return tirx.IntImm(dtype, value)


def _widened(bits: Expr) -> Expr:
    return tirx.Cast("float32", T.reinterpret("float16", bits))


def _decode_e5m2(word: Expr, _: Expr) -> Expr:
    """The upper byte of a float16, infinities and NaN included."""
    return _widened(tirx.Cast("uint16", word) << _const(8, "uint16"))


def _decode_e4m3fn(word: Expr, _: Expr) -> Expr:
    """One exponent bit less than float16, a bias of 7 for 15, all ones the only NaN, and no infinity."""
    code = tirx.Cast("uint16", word)
    magnitude = code & _const(127, "uint16")
    bits = ((code & _const(128, "uint16")) << _const(8, "uint16")) | (magnitude << _const(7, "uint16"))
    return tirx.Select(magnitude == _const(127, "uint16"), f32(float("nan")), _widened(bits) * f32(2.0**8))


def _decode_bf16(word: Expr, _: Expr) -> Expr:
    """The upper half of a float32."""
    return T.reinterpret("float32", tirx.Cast("uint32", word) << _const(16, "uint32"))


def _decode_int4(word: Expr, which: Expr) -> Expr:
    """Two's complement nibbles; the first code stands in the low one (the order of ONNX)."""
    shifted = tirx.Cast("int32", word) << (_const(28) - _const(4) * which)
    return tirx.Cast("float32", shifted >> _const(28))


CODECS = {
    c.name: c
    for c in (
        Codec("fp32", "float32", 1, lambda word, _: word),
        Codec("fp16", "float16", 1, lambda word, _: tirx.Cast("float32", word)),
        Codec("bf16", "uint16", 1, _decode_bf16),
        Codec("fp8-e4m3fn", "uint8", 1, _decode_e4m3fn),
        Codec("fp8-e5m2", "uint8", 1, _decode_e5m2),
        Codec("int8", "int8", 1, lambda word, _: tirx.Cast("float32", word)),
        Codec("int4", "uint8", 2, _decode_int4),
    )
}


def pack_pairs(codes: np.ndarray, axis: int) -> np.ndarray:
    """int4 codes (int8, -8..7) -> uint8 along `axis`, the first code in the low nibble, an odd end padded."""
    codes = np.moveaxis(codes, axis, -1)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    nibbles = codes.astype(np.uint8) & 15
    return np.moveaxis(nibbles[..., ::2] | nibbles[..., 1::2] << 4, -1, axis)
