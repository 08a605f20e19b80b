"""Random contents of packed weights, for tests of the kernels that read them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from porter.formats.elements import ELEMENTS
from porter.lower.kernels.layout import Layout

FLOATS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def drawn(layout: Layout, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Packed buffers, and the weight [stack, n, k] they stand for: in float32, with each step of
    (element - zero) * 2^-shift * (scale * factor) rounded, and in float64."""
    shape = (layout.stack, layout.n, layout.k)
    raw, values = elements(layout.codec_name, shape, rng)
    buffers, stored, exact = [layout.pack_codes(raw)], values.astype(np.float32), values.astype(np.float64)
    rows = layout.n if layout.rows == 1 else layout.row_groups
    each = (layout.stack, rows, layout.groups)

    def spread(array: np.ndarray) -> np.ndarray:
        array = np.repeat(array.astype(np.float32), 1 if layout.rows == 1 else layout.rows or layout.n, 1)
        return np.repeat(array[:, : layout.n], layout.group, 2)[..., : layout.k]

    if layout.group:
        raw, scales = elements(layout.scale, each, rng)
        buffers.append(layout.pack_scales(raw))
        scale = spread(scales)
    if layout.zero:
        raw, zeros = elements(layout.zero, each, rng)
        buffers.append(layout.pack_zeros(raw))
        stored, exact = stored - spread(zeros), exact - spread(zeros)
    if layout.micro:
        bits = rng.integers(0, 2, (*shape[:2], -(-layout.k // layout.micro))).astype(np.uint8)
        buffers.append(layout.pack_shifts(bits))
        half = np.repeat(np.float32(0.5) ** bits, layout.micro, 2)[..., : layout.k].astype(np.float32)
        stored, exact = stored * half, exact * half
    if layout.factor:
        buffers.append(np.float32([0.3]))
        scale = scale * np.float32(0.3)
    if layout.group:
        stored, exact = stored * scale, exact * scale
    return buffers, stored, exact


def elements(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Finite codes of an element, of any value where that is one of 8 bits or fewer, and their values."""
    if name in FLOATS:
        values = rng.standard_normal(shape).astype(FLOATS[name])
        return values, values.astype(np.float32)
    if name == "e8m0":
        codes = rng.integers(120, 135, shape).astype(np.uint8)
        return codes, ELEMENTS[name].decode(codes)
    if "int" in name:
        element = ELEMENTS[name]
        codes = rng.integers(element.smallest, element.largest + 1, shape)
        return codes.astype(np.int8 if element.signed else np.uint8), codes.astype(np.float32)
    codes = rng.integers(0, 1 << ELEMENTS[name].bits, shape).astype(np.uint8)
    codes[~np.isfinite(ELEMENTS[name].decode(codes))] = 1
    return codes, ELEMENTS[name].decode(codes)
