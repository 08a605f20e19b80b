"""Choosing scales: what the codes of each group will be multiplied by.

    symmetric     scale = absmax / largest element                    int8, fp8-…
    two compete   scale = absmax / 7, or m / -8                       int4 (int3, int2: 3 and -4, 1 and -2)
    asymmetric    scale = (max - min) / (2^b - 1), zero = round(-min / scale), 0 within the range    uint…
    MX            scale = 2^e, e = floor(log2 absmax) - emax, or one of two variants that saturate less
    NVFP4         factor = absmax of all / (6 * 448), scale = e4m3fn((absmax / 6) / factor)
    MX9, MX6      scale = 2^floor(log2 absmax), and a pair below half of the range is shifted by one bit

m is the value of largest magnitude with its sign: an integer has one code more below zero than above, so
llama.cpp's Q4_0 lets m meet -8, under a negative scale when m is positive. The asymmetric scale is that of
ONNX Runtime's MatMulNBits quantizer; MX: the OCP MX specification 1.0, section 6.3; NVFP4: NVIDIA's ModelOpt;
MX9 and MX6: Rouhani et al., 2302.08007.

A scale is rounded to the type it is stored in here, and codes are then rounded against what is stored. A
group of zeros has scale 1. Shapes: values [..., N, K], scales [..., R, G].
"""

from __future__ import annotations

import numpy as np

from porter.formats import blocks
from porter.formats.elements import ELEMENTS
from porter.formats.format import SCALES, Format, Scales
from porter.formats.integers import Integer

TINY = np.finfo(np.float32).tiny
HUGE = np.finfo(np.float32).max


def candidates(form: Format, values: np.ndarray, factor: np.float32 | None = None) -> list[Scales]:
    """The scales of finite float32 values; two sets where it takes the error to choose between them.

    `factor`: NVFP4's, where the values are a part of the matrix.
    """
    if form.micro:
        return [_micro(form, values)]
    high, low = (f(values, form.group, form.rows) for f in (blocks.largest, blocks.smallest))
    return of_extremes(form, high, low, factor)


def of_extremes(
    form: Format, high: np.ndarray, low: np.ndarray, factor: np.float32 | None = None
) -> list[Scales]:
    """The same, from the largest and the smallest value of each group [..., R, G]; not for MX9, MX6."""
    peak = np.maximum(high, -low)
    if form.scale == "e8m0":
        fixed = np.float32(2.0**-form.fraction) if form.fraction else None
        return [Scales(_power(peak, form.largest, form.mx), factor=fixed)]
    if form.scale == "e4m3fn":
        return [_two_level(form, peak, factor)]
    if form.zero:
        return [_asymmetric(form, high, low)]
    plain = Scales(stored(peak, form.largest, form.scale))
    if not isinstance(form.elements, Integer) or form.bits == 8:
        return [plain]
    signed = np.where(high >= -low, high, low)  # a tie is positive
    return [plain, Scales(stored(signed, form.elements.smallest, form.scale))]


def stored(peak: np.ndarray, code: float, scale: str) -> np.ndarray:
    """`peak / code` in the stored type: 1 for zeros; never so small that dividing by it overflows, nor so
    large that multiplying `code` by it does."""
    info = np.finfo(np.float16) if scale == "fp16" else np.finfo(np.float32)  # bfloat16: float32's range
    low = max(TINY, np.float32(info.smallest_subnormal))
    high = np.nextafter(min(np.float32(info.max), HUGE / np.float32(abs(code))), np.float32(0))
    ratio = peak / np.float32(code)
    bounded = np.copysign(np.clip(np.abs(ratio), low, high), ratio)
    return np.where(peak == 0, np.float32(1), bounded).astype(SCALES[scale])


def _asymmetric(form: Format, high: np.ndarray, low: np.ndarray) -> Scales:
    high, low = np.maximum(high, 0), np.minimum(low, 0)
    with np.errstate(over="ignore"):  # a range beyond float32 becomes the largest scale, and saturates
        scales = stored(high - low, form.elements.largest, form.scale)
    return Scales(scales, zeros=form.elements.encode(-low / scales.astype(np.float32)))


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


def _two_level(form: Format, peak: np.ndarray, factor: np.float32 | None) -> Scales:
    """NVFP4: a scale that would round to nothing becomes the smallest that e4m3fn has."""
    inner = ELEMENTS[form.scale]
    factor = whole_factor(form, peak.max()) if factor is None else factor
    ratio = np.maximum(peak / np.float32(form.largest) / factor, inner.values[1])
    ratio = np.where(peak == 0, np.float32(1), ratio)
    return Scales(inner.encode(ratio).view(SCALES[form.scale]), factor=factor)


def _micro(form: Format, values: np.ndarray) -> Scales:
    """MX9, MX6: the group's exponent is its largest element's, whatever `mx` says; a pair's shift is 1 when
    both are smaller than it."""
    scales = _power(blocks.absmax(values, form.group), form.largest, "floor")
    pairs = blocks.absmax(values, form.micro)
    per_pair = blocks.spread(scales.astype(np.float32), pairs.shape[-1], form.group // form.micro)
    return Scales(scales, shifts=(pairs < per_pair).astype(np.uint8))
