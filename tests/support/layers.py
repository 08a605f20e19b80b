"""Small layers with inputs whose channels depend on each other, and loud ones among them."""

from __future__ import annotations

import numpy as np


def layer(rows: int, columns: int, tokens: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 [rows, columns] and inputs float64 [tokens, columns]."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.05)
    mixed = random.standard_normal((tokens, columns)) @ random.standard_normal((columns, columns))
    return weight, mixed * np.exp(random.standard_normal(columns))


def moments(inputs: np.ndarray) -> np.ndarray:
    """The mean of x x^T over tokens, float64 [K,K]."""
    return inputs.T @ inputs / len(inputs)
