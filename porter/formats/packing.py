"""Codes of fewer than 8 bits as bytes: a little-endian bit stream.

Code i of a row is bits [i*b, i*b+b) of the row's bytes, counted from the least significant bit of byte 0; the
last byte is filled with zeros. For 2 and 4 bits this is ONNX's order (`x0 | x1 << 4`), which packs a whole
tensor as one row: pass it flattened. Three bits: byte 0 is `x0 | x1 << 3 | (x2 & 3) << 6`.
"""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 or uint8 [..., K], the low `bits` of each -> uint8 [..., ceil(K * bits / 8)]."""
    apart = np.unpackbits(codes.view(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(apart.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """uint8 [..., ceil(count * bits / 8)] -> [..., count]: uint8 codes, or int8 where they have a sign."""
    apart = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    codes = np.packbits(apart.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
    if not signed:
        return codes
    return (codes << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)  # the shift brings the sign down
