"""Codecs: how a kernel turns stored codes into float32 in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from porter.lower.kernels.define import Expr, T, f32, tirx

# The magnitude bits of an 8-bit float, shifted to where float32 keeps its exponent and mantissa, are its value times
# 2^-(127 - bias), subnormals included; one multiplication by the opposite power of two is then exact. (A cast of
# TVM's own FP8 types gives wrong values for zero, subnormals and NaN under LLVM.)
_FP8 = {"fp8-e4m3fn": (3, 7), "fp8-e5m2": (2, 15)}  # mantissa bits, exponent bias


@dataclass(frozen=True)
class Codec:
    """One storage form of a weight or cache: `storage` is a TIR dtype, `per_word` the codes in one element of it."""

    name: str
    storage: str
    per_word: int
    decode: Callable[[Expr, Expr], Expr]  # (word, which code of it, int32) -> float32

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return {"float32": 32, "int8": 8, "uint8": 8}[self.storage] // self.per_word


def _const(value: int) -> tirx.IntImm:
    return tirx.IntImm("int32", value)


def _decode_fp8(name: str) -> Callable[[Expr, Expr], Expr]:
    mantissa, bias = _FP8[name]
    exponent_max = 127 >> mantissa << mantissa  # magnitude bits with the exponent all ones

    def decode(word: Expr, _: Expr) -> Expr:
        code = tirx.Cast("int32", word)
        magnitude = code & _const(127)
        bits = ((code & _const(128)) << _const(24)) | (magnitude << _const(23 - mantissa))
        value = T.reinterpret("float32", bits) * f32(2.0 ** (127 - bias))
        nan = f32(float("nan"))
        if name == "fp8-e4m3fn":
            return tirx.Select(magnitude == _const(127), nan, value)
        infinity = T.reinterpret("float32", ((code & _const(128)) << _const(24)) | _const(0x7F800000))
        special = tirx.Select(magnitude == _const(exponent_max), infinity, nan)
        return tirx.Select(magnitude >= _const(exponent_max), special, value)

    return decode


def _decode_int4(word: Expr, which: Expr) -> Expr:
    """Two's complement nibbles; the first code stands in the low one (the order of ONNX)."""
    shifted = tirx.Cast("int32", word) << (_const(28) - _const(4) * which)
    return tirx.Cast("float32", shifted >> _const(28))


CODECS = {
    "fp32": Codec("fp32", "float32", 1, lambda word, _: word),
    "int8": Codec("int8", "int8", 1, lambda word, _: tirx.Cast("float32", word)),
    "int4": Codec("int4", "uint8", 2, _decode_int4),
    **{name: Codec(name, "uint8", 1, _decode_fp8(name)) for name in _FP8},
}


def pack_pairs(codes: np.ndarray, axis: int) -> np.ndarray:
    """int4 codes (int8, -8..7) -> uint8 along `axis`, first code in the low nibble, an odd count padded by 0."""
    codes = np.moveaxis(codes, axis, -1)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    nibbles = codes.astype(np.uint8) & 15
    return np.moveaxis(nibbles[..., ::2] | nibbles[..., 1::2] << 4, -1, axis)
