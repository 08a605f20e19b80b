"""Codes of fewer than 8 bits as bytes: a little-endian bit stream.

Code i of a row is bits [i*b, i*b+b) of the row's bytes, counted from the least significant bit of byte 0; the
last byte is filled with zeros. For 2 and 4 bits this is ONNX's order (`x0 | x1 << 4`), which packs a whole
tensor as one row: pass it flattened. Three bits: byte 0 is `x0 | x1 << 3 | (x2 & 3) << 6`.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 1 << 18  # codes that are packed at a time: bits take a byte each on the way


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 or uint8 [..., K], the low `bits` of each -> uint8 [..., ceil(K * bits / 8)]."""
    *lead, count = codes.shape
    packed = np.empty((*lead, -(-count * bits // 8)), np.uint8)
    rows = codes.reshape(math.prod(lead), count).view(np.uint8)
    into = packed.reshape(len(rows), packed.shape[-1])
    if len(rows) == 1 and count % 8 == 0:  # whole bytes: a row may be cut as well
        rows, into = rows.reshape(-1, 8), into.reshape(-1, bits)
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        into[at : at + step] = _pairs(part) if bits == 4 and count % 2 == 0 else _bits(part, bits)
    return packed


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes of four bits a byte, as `_bits` has it; several times faster."""
    both = np.ascontiguousarray(codes).view("<u2")
    return ((both & 15) | ((both >> 4) & 0xF0)).astype(np.uint8)


def _bits(codes: np.ndarray, bits: int) -> np.ndarray:
    apart = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(apart.reshape(len(codes), -1), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """uint8 [..., ceil(count * bits / 8)] -> [..., count]: uint8 codes, or int8 where they have a sign."""
    apart = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    codes = np.packbits(apart.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
    if not signed:
        return codes
    return (codes << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)  # the shift brings the sign down
