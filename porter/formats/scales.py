"""Choosing scales: what the codes of each group will be multiplied by.

    symmetric    scale = absmax / largest element
    competing    scale = absmax / 7, or m / -8 (3 bits: 3 and -4; 2 bits: 1 and -2)
    asymmetric   scale = (max - min) / (2^b - 1), zero = round(-min / scale); the range includes 0
    mx           scale = 2^e, e = floor(log2 absmax) - emax, or one of two variants that saturate less
    nvfp4        factor = absmax of all / (6 * 448), scale = e4m3fn((absmax / 6) / factor)
    micro        scale = 2^floor(log2 absmax); a pair below half of the range is shifted by one bit

m is the value of largest magnitude with its sign: an integer has one code more below zero than above, so
llama.cpp's Q4_0 lets m meet -8, under a negative scale when m is positive. The asymmetric scale is that of
ONNX Runtime's MatMulNBits quantizer; MX: the OCP MX specification 1.0, section 6.3; NVFP4: NVIDIA's ModelOpt;
MX9 and MX6: Rouhani et al., 2302.08007.

A scale is rounded to the type it is stored in here, and codes are then rounded against what is stored. A
group of zeros has scale 1. Shapes: values [..., N, K], scales [..., R, G].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from porter.formats import blocks
from porter.formats.elements import ELEMENTS
from porter.formats.format import SCALES, Format, Scales

TINY = np.finfo(np.float32).tiny
HUGE = np.finfo(np.float32).max


def candidates(form: Format, values: np.ndarray, factor: np.float32 | None = None) -> list[Scales]:
    """The scales of finite float32 values; two sets where it takes the error to choose between them.

    `factor`: NVFP4's, where the values are a part of the matrix.
    """
    if form.micro:
        return RULES[form.rule](form, values)
    high, low = (f(values, form.group, form.rows) for f in (blocks.largest, blocks.smallest))
    return of_extremes(form, high, low, factor)


def of_extremes(
    form: Format, high: np.ndarray, low: np.ndarray, factor: np.float32 | None = None
) -> list[Scales]:
    """The same, from the largest and the smallest value of each group [..., R, G]; not for MX9, MX6."""
    return RULES[form.rule](form, high, low, factor)


def stored(peak: np.ndarray, code: float, scale: str) -> np.ndarray:
    """`peak / code` in the stored type: 1 for zeros; never so small that dividing by it overflows, nor so
    large that multiplying `code` by it does."""
    dtype, code = SCALES[scale], np.float32(code)
    low = np.finfo(np.float16).smallest_subnormal if scale == "fp16" else TINY
    # A bfloat16 may be rounded down so far that an integer reaches the code after: -128 for -127.
    limits = {"fp32": HUGE / abs(code), "bf16": HUGE / (abs(code) + 1), "fp16": np.finfo(np.float16).max}
    # One below the limit in the stored type, so that rounding to that type does not pass it.
    high = np.nextafter(dtype.type(limits[scale]), dtype.type(0)).astype(np.float32)
    ratio = peak / code
    bounded = np.copysign(np.clip(np.abs(ratio), np.float32(low), high), ratio)
    return np.where(peak == 0, np.float32(1), bounded).astype(dtype)


def _symmetric(form: Format, high: np.ndarray, low: np.ndarray, _: object) -> list[Scales]:
    return [Scales(stored(np.maximum(high, -low), form.largest, form.scale))]


def _competing(form: Format, high: np.ndarray, low: np.ndarray, _: object) -> list[Scales]:
    signed = np.where(high >= -low, high, low)  # a tie is positive
    below = Scales(stored(signed, form.elements.smallest, form.scale))
    return [*_symmetric(form, high, low, _), below]


def _asymmetric(form: Format, high: np.ndarray, low: np.ndarray, _: object) -> list[Scales]:
    high, low = np.maximum(high, 0), np.minimum(low, 0)
    with np.errstate(over="ignore"):  # a range beyond float32 becomes the largest scale, and saturates
        scales = stored(high - low, form.elements.largest, form.scale)
    return [Scales(scales, zeros=form.elements.encode(-low / scales.astype(np.float32)))]


def _mx(form: Format, high: np.ndarray, low: np.ndarray, _: object) -> list[Scales]:
    fixed = np.float32(2.0**-form.fraction) if form.fraction else None
    return [Scales(_power(np.maximum(high, -low), form.largest, form.mx), factor=fixed)]


def _power(peak: np.ndarray, largest: float, rounding: str) -> np.ndarray:
    """The power of two, as e8m0, under which elements up to `largest` hold `peak`.

    `floor` (OCP): floor(log2 peak) - emax, emax being the exponent of `largest`; up to half of the topmost
    binade saturates. `ceil` (NVIDIA): the smallest with peak / scale <= largest, so nothing does. `larger`
    (AWS): one more than floor. All are kept to e8m0's range, 2^-127 to 2^127.
    """
    fraction, exponent = np.frexp(peak)  # peak = fraction * 2^exponent, 0.5 <= fraction < 1
    top, emax = np.frexp(np.float32(largest))
    up = {"floor": 0, "ceil": fraction > top, "larger": 1}[rounding]
    code = np.clip(exponent - emax + up + 127, 0, 254)
    return np.where(peak == 0, 127, code).astype(np.uint8).view(SCALES["e8m0"])


def whole_factor(form: Format, peak: float) -> np.float32:
    """NVFP4's factor for a matrix whose largest magnitude is `peak`."""
    largest = form.largest * ELEMENTS[form.scale].largest
    return np.float32(stored(np.float32(peak), largest, "fp32"))


def _two_level(form: Format, high: np.ndarray, low: np.ndarray, factor: np.float32 | None) -> list[Scales]:
    """NVFP4: a scale that would round to nothing becomes the smallest that e4m3fn has."""
    peak, inner = np.maximum(high, -low), ELEMENTS[form.scale]
    factor = whole_factor(form, peak.max()) if factor is None else factor
    ratio = np.maximum(peak / np.float32(form.largest) / factor, inner.values[1])
    ratio = np.where(peak == 0, np.float32(1), ratio)
    return [Scales(inner.encode(ratio).view(SCALES[form.scale]), factor=factor)]


def _micro(form: Format, values: np.ndarray) -> list[Scales]:
    """MX9, MX6: the group's exponent is its largest element's, whatever `mx` says; a pair's shift is 1 when
    both are smaller than it."""
    scales = _power(blocks.absmax(values, form.group), form.largest, "floor")
    pairs = blocks.absmax(values, form.micro)
    per_pair = blocks.spread(scales.astype(np.float32), pairs.shape[-1], form.group // form.micro)
    return [Scales(scales, shifts=(pairs < per_pair).astype(np.uint8))]


RULES: dict[str, Callable[..., list[Scales]]] = {
    "symmetric": _symmetric,
    "competing": _competing,
    "asymmetric": _asymmetric,
    "mx": _mx,
    "nvfp4": _two_level,
    "micro": _micro,
}
"""How scales are chosen, by `Format.rule`: from each group's extremes; `micro`, from the values."""
