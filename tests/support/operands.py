"""What operands of a matrix unit are, in numpy and ml_dtypes: the oracle of `porter.lower.blocks`."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BITS = {"fp32": (24, -126), "tf32": (11, -126), "bf16": (8, -126), "fp16": (11, -14)}
LARGEST = {
    "fp32": float(np.finfo(np.float32).max),
    "tf32": (2 - 2.0**-10) * 2.0**127,
    "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max),
    "fp16": 65504.0,
}


def rounded(form: str, x: np.ndarray, *, saturates: bool = True, flush: bool = False) -> np.ndarray:
    """float32 -> the nearest numbers of a form, ties to even, float64: by their definition, significant bits
    and the smallest exponent, so without any cast."""
    digits, least = BITS[form]
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = np.asarray(x, np.float32).astype(np.float64)
    _, exponent = np.frexp(wide)  # wide = f * 2^exponent, f in [1/2, 1)
    quantum = np.ldexp(1.0, np.maximum(exponent, least + 1) - digits)
    with np.errstate(invalid="ignore"):
        value = np.where(np.isfinite(wide), np.rint(wide / quantum) * quantum, wide)
    beyond = np.abs(value) > LARGEST[form]
    top = LARGEST[form] if saturates and form != "fp32" else np.inf
    value = np.where(beyond, np.copysign(top, value), value)
    return np.where(np.abs(value) < 2.0**least, 0.0, value) if flush else value
