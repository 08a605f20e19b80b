"""Symmetric integer elements: rounding to codes, and two 4-bit codes in a byte."""

from __future__ import annotations

import numpy as np


def limits(bits: int) -> tuple[int, int]:
    """The smallest and largest two's complement code of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def encode(values: np.ndarray, bits: int) -> np.ndarray:
    """Values already divided by their scale -> int8 codes: to nearest, ties to even, saturating."""
    low, high = limits(bits)
    return np.clip(np.rint(values), low, high).astype(np.int8)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """int8 [..., K] of codes in -8…7 -> uint8 [..., ceil(K/2)]: the first of a pair is the low nibble.

    An odd K is padded with a zero. ONNX packs a whole int4 tensor so: pass it flattened.
    """
    nibbles = codes.astype(np.uint8) & np.uint8(15)
    if codes.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `pack_nibbles`: uint8 [..., ceil(count/2)] -> int8 [..., count] with its sign."""
    pairs = np.stack([packed << np.uint8(4), packed & np.uint8(240)], axis=-1)
    codes = pairs.reshape(*packed.shape[:-1], -1)[..., :count]
    return codes.view(np.int8) >> np.int8(4)  # the arithmetic shift brings the sign down
