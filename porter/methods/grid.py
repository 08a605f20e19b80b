"""What the methods share: rounding under given scales, fitting groups one by one, and the outputs' error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from porter.errors import PassError
from porter.formats import Encoded, Format
from porter.formats.format import SCALES, Scales
from porter.formats.integers import Integer
from porter.formats.rounding import nearest

FREE = ("fp32", "fp16", "bf16")
"""The types of scales that may have any value."""

Fit = Callable[[Format, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(format, groups [M,g], how often each element counts [M,g]: 0 or 1) -> [M] each: steps as stored, and zero
points."""


def asymmetric(form: Format) -> Format:
    """The format with unsigned codes and float32 zero points that need be no code: `int4` reads as `uint4`.

    Raises PassError PORT-0282 for a format whose scales or elements are not free: a float element, a scale
    that is a power of two or e4m3fn, one that rows share.
    """
    check_fits(form)
    return dataclasses.replace(form, element="u" + form.element.lstrip("u"), zero="real")


def check_fits(form: Format) -> None:
    """Raise PORT-0282 unless a scale (and a zero point) can be fitted to each group by itself."""
    if not isinstance(form.elements, Integer) or form.scale not in FREE or form.rows != 1:
        what = f"{form.name} leaves nothing to fit: it has no integers with a free scale for each group"
        raise PassError("PORT-0282", what, hint="take int4-g32, uint4-g64 or the like, or quantize.gptq")


def fitted(weight: np.ndarray, form: Format, fit: Fit, rows: int = 256) -> Encoded:
    """Round `weight` [..., N,K] to scales and zero points that `fit` chooses for each group by itself."""
    weight = np.asarray(weight, np.float32)
    flat = weight.reshape(-1, weight.shape[-1])
    parts = [_fitted(flat[i : i + rows], form, fit) for i in range(0, len(flat), rows)]
    scales, zeros = (
        np.concatenate(each).reshape(*weight.shape[:-1], -1) for each in zip(*parts, strict=True)
    )
    return nearest(form, weight, Scales(scales.astype(SCALES[form.scale]), zeros if form.zero else None))


def _fitted(weight: np.ndarray, form: Format, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    columns = weight.shape[1]
    group = min(form.group or columns, columns)
    short = -columns % group
    # A ragged last group is filled with its last element, which moves no extreme, and counts 0 times.
    filled = np.pad(weight, [(0, 0), (0, short)], mode="edge").reshape(-1, group)
    counts = np.broadcast_to(np.pad(np.ones(columns, np.float32), (0, short)), (len(weight), columns + short))
    step, zero = fit(form, filled, counts.reshape(-1, group))
    return step.reshape(len(weight), -1), zero.astype(np.float32).reshape(len(weight), -1)


def stored(form: Format, step: np.ndarray) -> np.ndarray:
    """Steps [M] as their type stores them, float32 again: never 0, never so large that the largest code times
    it is infinite."""
    info = ml_dtypes.finfo(SCALES[form.scale])
    low = np.float32(info.smallest_normal)
    high = np.nextafter(np.float32(info.max) / np.float32(1 << form.bits), np.float32(0))
    bounded = np.copysign(np.clip(np.abs(step), low, high), step)
    return bounded.astype(SCALES[form.scale]).astype(np.float32)


def output_error(error: np.ndarray, hessian: np.ndarray) -> float:
    """What a change of weights does to the outputs: sum over rows of d H d^T, for `error` [N,K].

    With H = mean of x x^T over tokens this is the mean squared change of W x, summed over the outputs: no
    activation needs to be kept, only H.
    """
    return float(np.einsum("nk,nk->", error @ hessian, error, optimize=True))
