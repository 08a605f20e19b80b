"""k-quants: the scale and minimum of each group by weighted least squares, from several starts.

No activations: elements count w = rms + |x|, large ones more. With zero points, as llama.cpp's
make_qkx2_quants (Q4_K) has it: 21 inverse scales (top - 1 + 0.1 i) / (max - min), i = 0...20, each give codes
q; scale and minimum m are then

    argmin sum w (scale q + m - x)^2        a 2 x 2 linear system, for each group and start

and the start of least weighted squared error wins; each next start takes its codes from the best minimum so
far. Without (`int4`), as make_qx_quants has it: 19 inverse scales -(n + 0.1 i) / x_max, i = -9...9, where -n
is the smallest code and x_max the element of largest magnitude with its sign; scale = sum w x q / sum w q^2.
Unlike llama.cpp's, a minimum may be positive, and both are kept in full: `zero = -m / scale` need be no code.
"""

from __future__ import annotations

import numpy as np

from porter.formats import Encoded, Format
from porter.methods import grid


def quantize(weight: np.ndarray, form: Format) -> Encoded:
    """Fit `weight` [N,K] or [E,N,K] to the format: to `grid.asymmetric(form)` where it has zero points.

    Raises PassError PORT-0282 for a format that has no free scales.
    """
    if form.zero:
        return grid.fitted(weight, grid.asymmetric(form), _with_minimum)
    grid.check_fits(form)
    return grid.fitted(weight, form, _without)


def importance(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How much each element counts, [M,g]: rms of its group + its magnitude; 0 for filling."""
    mean = np.einsum("mg,mg,mg->m", x, x, counts) / counts.sum(axis=1)
    return (np.sqrt(mean)[:, None] + np.abs(x)) * counts


def _with_minimum(form: Format, x: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From here on a group's values lie in 0...1: sums neither overflow nor cancel."""
    top = form.elements.largest
    low, span = x.min(axis=1), np.ptp(x, axis=1)
    unit = np.where(span > 0, span, 1)
    weight = importance(x / np.maximum(np.abs(x).max(axis=1), np.finfo(np.float32).tiny)[:, None], counts)
    x = (x - low[:, None]) / unit[:, None]
    scale, least = np.where(span > 0, np.float32(1 / top), np.float32(1)), np.zeros_like(low)
    smallest = _error(x, weight, scale, least, np.clip(np.rint(x * top), 0, top))
    for i in range(21):
        codes = np.clip(np.rint((x - least[:, None]) * np.float32(top - 1 + 0.1 * i)), 0, top)
        tried = _least_squares(x, weight, codes)
        error = _error(x, weight, *tried, codes)
        better = error < smallest  # never for NaN: codes that are all the same fit no line
        scale, least = np.where(better, tried[0], scale), np.where(better, tried[1], least)
        smallest = np.where(better, error, smallest)
    step = grid.stored(form, scale * unit)
    return step, -(low + least * unit) / step


def _least_squares(x: np.ndarray, weight: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, minimum) [M] of the line through (code, x); NaN where all codes are the same."""
    total = weight.sum(axis=1)
    weighted = weight * codes
    q, qq = weighted.sum(axis=1), np.einsum("mg,mg->m", weighted, codes)
    s, sq = np.einsum("mg,mg->m", weight, x), np.einsum("mg,mg->m", weighted, x)
    determinant = total * qq - q * q
    determinant = np.where(determinant > 0, determinant, np.nan)
    return (total * sq - s * q) / determinant, (qq * s - q * sq) / determinant


def _error(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, least: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    difference = scale[:, None] * codes + least[:, None] - x
    return np.einsum("mg,mg,mg->m", weight, difference, difference)


def _without(form: Format, x: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = form.elements.smallest, form.elements.largest
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    unit = np.where(peak == 0, 1, peak)
    x = x / unit[:, None]  # now -1...1, and the peak 1
    weight = importance(x, counts)
    scale, most = np.full(len(x), 1 / low, np.float32), np.full(len(x), -np.inf)
    for i in (0, *range(-9, 0), *range(1, 10)):
        codes = np.clip(np.rint(x * np.float32(low - 0.1 * i)), low, high)
        cross = np.einsum("mg,mg,mg->m", weight, x, codes)
        square = np.einsum("mg,mg,mg->m", weight, codes, codes)
        # The scale cross/square leaves the error sum w x^2 - cross^2/square.
        square = np.where(square > 0, square, np.nan)
        better = cross * cross / square > most
        scale, most = np.where(better, cross / square, scale), np.where(better, cross * cross / square, most)
    step = grid.stored(form, scale * unit)
    return step, np.zeros_like(step)
