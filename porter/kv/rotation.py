"""Orthogonal matrices that spread a vector's energy over its channels.

    R(2^k) = H_k diag(s) / sqrt(2^k)          H_k: the Walsh-Hadamard matrix; s: the Rudin-Shapiro signs
    R(2^k m) = R(2^k) (x) hartley(m)          m odd; (x): the Kronecker product

Without signs H turns a constant vector, or any Walsh function, into a single spike, which is the worst that
can be rounded. The Rudin-Shapiro sequence has a flat Walsh spectrum where k is even (and none above sqrt(2)
times flat where it is odd), so with it single spikes and Walsh functions alike become flat. No seed and no
library decides what the matrix is. For an odd factor the Hartley matrix, cos + sin of 2 pi i j / m over
sqrt(m), is orthogonal, and mixes all channels, which blocks of Hadamard matrices would not: TurboQuant's
codebook wants every channel to have the vector's mean energy.

Keys and queries are turned alike, so that scores stay: (R q).(R k) = q.k. Values are turned, and the output
is turned back by the transpose. QuaRot 2404.00456; TurboQuant 2504.19874; llama.cpp pull request 21038.
"""

from __future__ import annotations

import functools

import numpy as np


def hadamard(size: int) -> np.ndarray:
    """The Walsh-Hadamard matrix in Sylvester's order, float64 of -1 and 1; `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def signs(size: int) -> np.ndarray:
    """The Rudin-Shapiro signs: -1 where the binary digits of i have an odd number of adjacent ones."""
    i = np.arange(size)
    return 1.0 - 2.0 * (np.bitwise_count(i & (i >> 1)) & 1)


def hartley(size: int) -> np.ndarray:
    """The orthogonal Hartley matrix, float64; symmetric."""
    angle = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)


@functools.cache
def rotation(size: int) -> np.ndarray:
    """R(size), float64 [size, size]; read only. A vector x becomes R x."""
    power = size & -size
    matrix = np.kron(hadamard(power) * signs(power) / np.sqrt(power), hartley(size // power))
    matrix.flags.writeable = False
    return matrix


def of_sets(sizes: list[int], first: np.ndarray | None = None) -> np.ndarray:
    """Each set of channels turned by itself, float64 [1 or H, D, D].

    `first` int [H, sizes[0]]: the channels of the first set for each head, the rest in order; None: in order.
    """
    total = sum(sizes)
    blocks = np.zeros((total, total))
    start = 0
    for size in sizes:
        blocks[start : start + size, start : start + size] = rotation(size)
        start += size
    if first is None:
        return blocks[None]
    orders = [[*row, *(c for c in range(total) if c not in set(row))] for row in first.tolist()]
    # Row i of blocks reads set channel j, which is channel order[j]: column order[j] of the whole.
    return np.stack([blocks[:, np.argsort(order)] for order in orders])


def turn(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """x [..., H, T, D] -> R x by `matrix` [1 or H, D, D], summed in float64 in the order of the channels.

    The order does not depend on how many vectors there are, as it may in a library's matrix product.
    """
    total = np.zeros(vectors.shape, np.float64)
    for channel in range(vectors.shape[-1]):
        total += vectors[..., channel, None].astype(np.float64) * matrix[:, None, :, channel]
    return total
