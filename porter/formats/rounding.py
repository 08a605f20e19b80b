"""Rounding a matrix to a format: nearest codes under symmetric scales, and back.

A scale is chosen per row or group so that the largest magnitude meets the largest code: `absmax / 448` for
e4m3fn, `absmax / 127` for int8. int4 has one code more below zero than above, so two scales compete in each
group and the one with the smaller squared error wins: `absmax / 7`, and `m / -8` where m is the value of
largest magnitude with its sign (llama.cpp's Q4_0); that scale is negative when m is positive.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from porter.formats import blocks, integers
from porter.formats.format import Encoded, Format


def encode(form: Format, values: np.ndarray, scale_dtype: np.dtype | type = np.float32) -> Encoded:
    """Finite floats [..., K] -> codes [..., K] (int8, or uint8 for a float8) and their scales [..., G].

    G is ceil(K / group), or 1 when a scale holds for the row. A group of zeros gets scale 1. The codes are
    nearest under the scale as stored, in `scale_dtype`. `fp32` has no codes: ValueError.
    """
    values = np.asarray(values, np.float32)
    if form.element == "int4":
        return Encoded(form, *_better(form, values, scale_dtype))
    top = form.float8.largest if form.float8 else integers.limits(form.bits)[1]
    scale = _scale(blocks.absmax(values, form.group), top, scale_dtype)
    return Encoded(form, _codes(form, values, scale), scale)


def decode(encoded: Encoded) -> np.ndarray:
    """What the codes stand for, float32 [..., K], as ONNX DequantizeLinear has it."""
    return _decode(encoded.form, encoded.codes, encoded.scales)


def _decode(form: Format, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    elements = form.float8.decode(codes) if form.float8 else codes.astype(np.float32)
    return elements * blocks.spread(scale.astype(np.float32), codes.shape[-1], form.group)


def _codes(form: Format, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if form.element == "fp32":
        raise ValueError("fp32 has no codes")
    ratio = values / blocks.spread(scale.astype(np.float32), values.shape[-1], form.group)
    return form.float8.encode(ratio) if form.float8 else integers.encode(ratio, form.bits)


def _better(form: Format, values: np.ndarray, scale_dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray]:
    """int4: the scale with the smaller squared error in each group; a tie keeps absmax / 7."""
    seven = _scale(blocks.absmax(values, form.group), 7, scale_dtype)
    eight = _scale(blocks.signed_absmax(values, form.group), -8, scale_dtype)
    use_eight = _squared_error(form, values, eight) < _squared_error(form, values, seven)
    scale = np.where(use_eight, eight, seven)
    return _codes(form, values, scale), scale


def _squared_error(form: Format, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # Relative to the scale, so that neither huge nor tiny weights leave float32's range when squared.
    error = _decode(form, _codes(form, values, scale), scale) - values
    unit = np.maximum(blocks.absmax(values, form.group), np.finfo(np.float32).tiny)
    return blocks.total((error / blocks.spread(unit, values.shape[-1], form.group)) ** 2, form.group)


def _scale(peak: np.ndarray, code: float, dtype: np.dtype | type) -> np.ndarray:
    """`peak / code` as stored: 1 for zeros; never so small that dividing by it overflows, nor so large that
    multiplying `code` by it does."""
    info = ml_dtypes.finfo(dtype)  # numpy's does not know bfloat16
    low = np.float32(info.smallest_normal)
    high = np.nextafter(np.float32(info.max) / np.float32(abs(code)), np.float32(0))
    scale = peak / np.float32(code)
    bounded = np.copysign(np.clip(np.abs(scale), low, high), scale)
    return np.where(peak == 0, np.float32(1), bounded).astype(dtype)
