"""Sums and peaks of activations, gathered a batch at a time; the activations themselves are never kept.

Every class is told the number of channels K and takes arrays [..., K] in `add`, each vector of the last axis
being one observation. Padding must be left out by who adds. Sums are float64.
"""

from __future__ import annotations

import numpy as np

ROWS = 256  # multiplied at a time: bounds the copies, and the length of a float32 sum in Gram


class Gram:
    """The sum of x x^T over all observations x: X^T X, half the Hessian of a linear layer's squared error.

    `products` is float64, or float32: then products of 256 observations are summed in float32, within
    256 * 2^-24 of the sum of their magnitudes, and those sums in float64.
    """

    def __init__(self, channels: int, products: type[np.floating] = np.float64) -> None:
        self.matrix = np.zeros((channels, channels))  # float64 [K, K]
        self.count = 0
        self._products = products

    def add(self, x: np.ndarray) -> None:
        """Add the observations of x [..., K]."""
        for part in _parts(x, len(self.matrix)):
            part = part.astype(self._products)
            self.matrix += part.T @ part
            self.count += len(part)


class MeanMagnitude:
    """The mean of |x| in each channel."""

    def __init__(self, channels: int) -> None:
        self.sum = np.zeros(channels)
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        """Add the observations of x [..., K]."""
        for part in _parts(x, len(self.sum)):
            self.sum += np.abs(part).sum(axis=0, dtype=np.float64)
            self.count += len(part)

    @property
    def value(self) -> np.ndarray:
        """float64 [K]; zeros when there were no observations (an expert that no token was sent to)."""
        return self.sum / max(self.count, 1)


class MaxMagnitude:
    """The largest |x| in each channel, `value` float64 [K]; zeros when there were no observations."""

    def __init__(self, channels: int) -> None:
        self.value = np.zeros(channels)
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        """Add the observations of x [..., K]."""
        for part in _parts(x, len(self.value)):
            np.maximum(self.value, np.abs(part).max(axis=0), out=self.value)
            self.count += len(part)


def _parts(x: np.ndarray, channels: int) -> list[np.ndarray]:
    """x [..., K] as pieces [at most ROWS, K]."""
    if x.shape[-1] != channels:
        raise ValueError(f"{x.shape[-1]} channels, where {channels} are counted")
    flat = x.reshape(-1, channels)
    return [flat[at : at + ROWS] for at in range(0, len(flat), ROWS)]
