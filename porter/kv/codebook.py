"""Lloyd-Max codebooks for the normal distribution, and TurboQuant's rounding of rotated vectors with them.

    step = ||x|| / sqrt(n)      code_j = nearest centroid to x_j / step      x_j ~ centroid[code_j] * step

A rotated vector's channels are nearly N(0, step^2). The rotation itself is `porter.kv.rotation`: vectors here
are already turned. Zandieh et al., TurboQuant, 2504.19874; Lloyd 1982, Max 1960.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from porter.kv.steps import stored


@functools.cache
def centroids(bits: int) -> np.ndarray:
    """The 2^bits centroids with the least mean squared error for N(0,1), ascending, float64; read only.

    Lloyd's iteration, with the cells' means in closed form: (phi(a) - phi(b)) / (Phi(b) - Phi(a)).
    """
    levels = _start(1 << bits)
    while True:
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff([math.erf(e / math.sqrt(2)) / 2 for e in edges])
        means = -np.diff(np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)) / mass
        means = (means - means[::-1]) / 2  # the symmetry that rounding would lose
        if np.abs(means - levels).max() < 1e-14:
            means.flags.writeable = False
            return means
        levels = means


def _start(count: int) -> np.ndarray:
    return np.linspace(-1, 1, count) * math.sqrt(2 * math.log(count) + 1) / 1.5


@functools.cache
def table(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(centroids, the midpoints between them) in float32, as kernels have them."""
    levels = centroids(bits)
    return levels.astype(np.float32), ((levels[1:] + levels[:-1]) / 2).astype(np.float32)


def encode(values: np.ndarray, bits: int, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Rotated finite floats [..., n] -> uint8 codes [..., n] and steps [..., 1] in the type `scale`.

    A value on a midpoint has the lower code. Norms are summed in float64 here; in float32 a step, and with it
    a code on an edge, may come out as the neighbour.
    """
    square = np.square(values.astype(np.float64)).sum(axis=-1, keepdims=True)
    step = stored(np.sqrt(square / values.shape[-1]).astype(np.float32), scale)
    codes = np.searchsorted(table(bits)[1], values / step.astype(np.float32))
    return codes.astype(np.uint8), step


def decode(codes: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., n] and steps [..., 1] -> float32 [..., n]."""
    return table(bits)[0][codes] * step.astype(np.float32)
