"""Rounding a matrix to a format, to nearest, and back. How scales are chosen: `porter.formats.scales`."""

from __future__ import annotations

import numpy as np

from porter.formats import blocks
from porter.formats import scales as choice
from porter.formats.format import Encoded, Format, Scales


def encode(form: Format, values: np.ndarray, factor: np.float32 | None = None) -> Encoded:
    """Finite floats [N, K] or [E, N, K], no axis empty -> codes and what they are multiplied by.

    The scales are chosen and stored first; each code is then the nearest under them, ties to even,
    saturating. Where two scales compete, the one with the smaller squared error in its group wins. `factor`
    is NVFP4's for the whole matrix (`scales.whole_factor`), where the values are only a part of it.
    """
    values = np.asarray(values, np.float32)
    if not form.scale:
        return Encoded(form, form.elements.encode(values))
    encoded, *others = (nearest(form, values, each) for each in choice.candidates(form, values, factor))
    for other in others:
        encoded = _better(values, encoded, other)
    return encoded


def nearest(form: Format, values: np.ndarray, scales: Scales) -> Encoded:
    """Floats [..., N, K] -> the nearest codes under the given scales.

    An integer zero point is added after rounding, as ONNX QuantizeLinear has it; a real one before.
    MXINT8's code -128 is never used, which the OCP specification allows for symmetry.
    """
    ratio = values / _multiplier(form, scales, values.shape)
    if scales.zeros is not None:
        zeros = blocks.spread_over(scales.zeros.astype(np.float32), values.shape, form.group, form.rows)
        ratio = np.rint(ratio) + zeros if form.zero == "code" else ratio + zeros
    codes = form.elements.encode(ratio)
    if form.fraction:
        codes = np.maximum(codes, np.int8(-form.elements.largest))
    return Encoded(form, codes, *scales)


def decode(encoded: Encoded) -> np.ndarray:
    """What the codes stand for, float32 [..., N, K], as ONNX DequantizeLinear has it."""
    form, scales = encoded.form, Scales(encoded.scales, encoded.zeros, encoded.shifts, encoded.factor)
    elements = form.elements.decode(encoded.codes)
    if not form.scale:
        return elements
    if scales.zeros is not None:
        zeros = scales.zeros.astype(np.float32)
        elements = elements - blocks.spread_over(zeros, elements.shape, form.group, form.rows)
    return elements * _multiplier(form, scales, elements.shape)


def _multiplier(form: Format, scales: Scales, shape: tuple[int, ...]) -> np.ndarray:
    """2^-shift * (scale * factor) of every element, float32; the power of two is exact."""
    per_group = scales.scales.astype(np.float32)
    if scales.factor is not None:
        per_group = per_group * scales.factor
    each = blocks.spread_over(per_group, shape, form.group, form.rows)
    if scales.shifts is None:
        return each
    return each * blocks.spread(
        np.ldexp(np.float32(1), -scales.shifts.astype(np.int32)), shape[-1], form.micro
    )


def _better(values: np.ndarray, first: Encoded, second: Encoded) -> Encoded:
    """Each group from the one with the smaller squared error; a tie keeps the first."""
    form = first.form
    use_second = _squared_error(values, second) < _squared_error(values, first)
    each = blocks.spread_over(use_second, values.shape, form.group, form.rows)
    scales = np.where(use_second, second.scales, first.scales)
    return Encoded(form, np.where(each, second.codes, first.codes), scales)


def _squared_error(values: np.ndarray, encoded: Encoded) -> np.ndarray:
    # Relative to the scale, so that neither huge nor tiny weights leave float32's range when squared.
    form = encoded.form
    error = decode(encoded) - values
    unit = np.maximum(blocks.absmax(values, form.group, form.rows), choice.TINY)
    relative = error / blocks.spread_over(unit, values.shape, form.group, form.rows)
    return blocks.total(relative**2, form.group, form.rows)
