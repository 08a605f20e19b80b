"""HQQ: zero points that make the absolute error sparse, by half-quadratic splitting; no activations.

With s and z the inverse scale and zero point of a group, W ~ (q - z)/s and q = clip(round(W s + z)). s stays
what the group's range gives; to lessen sum|W - (q - z)/s|^p, p = 0.7, an auxiliary error e takes turns with z
(Badri & Shaji, "Half-Quadratic Quantization", 2023, and its reference code):

    e = shrink(W - (q - z)/s),  shrink(t) = sign(t) max(|t| - |t|^(p-1)/beta, 0)
    z = mean(q - (W - e) s)     beta: 10, then times 1.01

The reference stops when the mean error of the whole matrix grows; here each group stops by itself and keeps
the zero point of its smallest mean error, so a group's result depends on nothing but the group. And errors
count in steps (s = 1), not in the weights' own unit, in which beta = 10 would mean something else for each
matrix: at the usual size of weights, 0.02, it lets no error through the shrinkage at all.
"""

from __future__ import annotations

import numpy as np

from porter.formats import Encoded, Format
from porter.methods import grid

NORM, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20


def quantize(weight: np.ndarray, form: Format) -> Encoded:
    """Fit `weight` [N,K] or [E,N,K]; its format is `grid.asymmetric(form)`: int4 and uint4 mean the same.

    Raises PassError PORT-0282 for a format that has no free scales.
    """
    return grid.fitted(weight, grid.asymmetric(form), _fit)


def _fit(form: Format, x: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, span = x.min(axis=1), np.ptp(x, axis=1)
    step = grid.stored(form, np.where(span > 0, span / form.elements.largest, 1))
    found = -low / step
    x, share = x / step[:, None], counts / counts.sum(axis=1, keepdims=True)  # from here in steps
    zero, smallest, live, beta = found.copy(), np.full(len(x), np.inf), np.arange(len(x)), BETA
    for _ in range(ROUNDS):
        codes = np.clip(np.rint(x + zero[:, None]), 0, form.elements.largest)
        error = x - (codes - zero[:, None])
        size = np.einsum("mg,mg->m", np.abs(error), share)
        better = size < smallest
        live, x, share, zero = live[better], x[better], share[better], zero[better]
        if not len(live):
            break
        found[live], smallest = zero, size[better]
        sparse = shrink(error[better], beta)
        zero = np.einsum("mg,mg->m", codes[better] - x + sparse, share)
        beta *= GROWTH
    return step, found


def shrink(error: np.ndarray, beta: float) -> np.ndarray:
    """argmin over e of |e|^p + beta/2 (e - error)^2, to first order: HQQ's generalised soft threshold."""
    size = np.abs(error)
    threshold = np.maximum(size, np.finfo(np.float32).tiny) ** np.float32(NORM - 1) / np.float32(beta)
    return np.sign(error) * np.maximum(size - threshold, 0)
