"""Tokens to the contents of a scheme's buffers, and back: one side, float32 [H,T,D].

What is returned is what `porter.kv.layout` plans, by suffix: `codes`, `scale`, `min`, `signs`, `gamma`, each
with the leading axis H. Along tokens T is a multiple of the group. Values are finite.
"""

from __future__ import annotations

import math

import numpy as np

from porter.formats import blocks
from porter.formats.elements import ELEMENTS
from porter.formats.packing import pack, unpack
from porter.kv import codebook
from porter.kv.layout import code_type
from porter.kv.rotation import rotation, turn
from porter.kv.scheme import ASYMMETRIC, CODEBOOK, Side
from porter.kv.steps import stored, stored_minimum

Parts = dict[str, np.ndarray]


def encode(side: Side, element: str, values: np.ndarray, static: np.ndarray | None = None) -> Parts:
    """Round tokens to `element` (the side's, or its `more`); `static`: steps float32 [1 or H, 1, 1 or D]."""
    if element in CODEBOOK:
        return _encode_codebook(side, values)
    if static is not None:
        return {"codes": _packed(ELEMENTS[element].encode(values / static), element)}
    if side.along == "channels":
        return _stored(_rounded(side, element, values), element)
    parts = _rounded(side, element, values.swapaxes(-1, -2))
    return _stored({name: part.swapaxes(-1, -2) for name, part in parts.items()}, element)


def decode(
    side: Side, element: str, parts: Parts, head_size: int, static: np.ndarray | None = None
) -> np.ndarray:
    """What the parts stand for, float32 [H,T,D]: code * step, then + minimum, each rounded."""
    if element in CODEBOOK:
        return _decode_codebook(side, parts, head_size)
    scale, minimum = parts.get("scale"), parts.get("min")
    length, axis = (head_size, -1) if side.along == "channels" else (parts["codes"].shape[-2], -2)
    step = static if static is not None else _spread(scale.astype(np.float32), length, side.group, axis)
    codes = _unpacked(parts["codes"], element, head_size, step)
    if minimum is None:
        return codes * np.abs(step)
    return codes * np.abs(step) + _spread(minimum.astype(np.float32), length, side.group, axis)


def _rounded(side: Side, element: str, values: np.ndarray) -> Parts:
    """Codes, scale and min of groups along the last axis."""
    if element in ASYMMETRIC:
        return _asymmetric(side, ELEMENTS[element].largest, values)
    largest = np.float32(ELEMENTS[element].largest)
    scale = stored(blocks.absmax(values, side.group) / largest, side.scale)
    codes = ELEMENTS[element].encode(values / _spread(scale.astype(np.float32), values.shape[-1], side.group))
    parts = {"codes": codes, "scale": scale}
    return _hybrid(side, 2 * int(largest) + 1, values, parts) if side.hybrid else parts


def _asymmetric(side: Side, largest: int, values: np.ndarray) -> Parts:
    low, high = blocks.smallest(values, side.group), blocks.largest(values, side.group)
    with np.errstate(over="ignore"):  # a range beyond float32 has the largest step
        scale = stored((high - low) / np.float32(largest), side.scale)
    minimum = stored_minimum(low, side.scale)
    step, base = (_spread(x.astype(np.float32), values.shape[-1], side.group) for x in (scale, minimum))
    codes = np.clip(np.rint((values - base) / step), 0, largest).astype(np.uint8)
    return {"codes": codes, "scale": scale, "min": minimum}


def _hybrid(side: Side, largest: int, values: np.ndarray, symmetric: Parts) -> Parts:
    """Each group in the mode with the smaller L1 error; an asymmetric one has a negative scale, a symmetric
    one the minimum 0."""
    other = _asymmetric(side, largest, values)
    length = values.shape[-1]

    def read(parts: Parts) -> np.ndarray:
        scale, low = parts["scale"], parts.get("min", np.zeros_like(parts["scale"]))
        step, base = (_spread(x.astype(np.float32), length, side.group) for x in (scale, low))
        return parts["codes"] * step + base

    errors = [blocks.total(np.abs(read(parts) - values), side.group) for parts in (symmetric, other)]
    use = errors[1] < errors[0]
    bits = np.where(_spread(use, length, side.group), other["codes"], symmetric["codes"].view(np.uint8))
    return {
        "codes": bits,
        "scale": np.where(use, -other["scale"], symmetric["scale"]),
        "min": np.where(use, other["min"], np.zeros_like(other["min"])),
    }


def _stored(parts: Parts, element: str) -> Parts:
    return {
        name: _packed(part, element) if name == "codes" else np.ascontiguousarray(part)
        for name, part in parts.items()
    }


def _packed(codes: np.ndarray, element: str) -> np.ndarray:
    codes = np.ascontiguousarray(codes)
    whole = element in ("int8", "e4m3fn")
    return codes.view(code_type(element)) if whole else pack(codes, int(element[-1]))


def _unpacked(packed: np.ndarray, element: str, head_size: int, step: np.ndarray) -> np.ndarray:
    """Codes as float32 [H,T,D]; under a negative step they have no sign."""
    if element in ("int8", "e4m3fn"):
        return packed.astype(np.float32)
    bits, signed = int(element[-1]), element.startswith("int")
    codes = unpack(packed, bits, head_size, signed).astype(np.float32)
    return np.where((step < 0) & (codes < 0), codes + np.float32(1 << bits), codes)


def _spread(per_group: np.ndarray, length: int, group: int, axis: int = -1) -> np.ndarray:
    if axis == -1:
        return blocks.spread(per_group, length, group)
    return _spread(per_group.swapaxes(-1, -2), length, group).swapaxes(-1, -2)


def _encode_codebook(side: Side, values: np.ndarray) -> Parts:
    packed, steps, start = [], [], 0
    for size, bits in side.sets(values.shape[-1]):
        codes, step = codebook.encode(values[..., start : start + size], bits, side.scale)
        packed.append(pack(codes, bits))
        steps.append(step)
        start += size
    parts = {"codes": np.concatenate(packed, axis=-1), "scale": np.concatenate(steps, axis=-1)}
    return parts | _residual(side, values, parts) if side.residual else parts


def _residual(side: Side, values: np.ndarray, parts: Parts) -> Parts:
    """The signs of the rotated rest, and sqrt(pi/2) / sqrt(D) times its norm (QJL, 2406.03482).

    The projection is the orthogonal rotation, not a Gaussian matrix: what is read back points along the rest
    as without bias (up to how normal its channels are), with less variance than Gaussian rows give.
    """
    size = values.shape[-1]
    rest = values - _without_residual(side, parts, size)
    norm = np.sqrt(np.square(rest.astype(np.float64)).sum(axis=-1, keepdims=True))
    negative = turn(rest, rotation(size)[None]) < 0
    gamma = stored((norm * math.sqrt(math.pi / 2 / size)).astype(np.float32), side.scale)
    return {"signs": pack(negative.astype(np.uint8), 1), "gamma": gamma}


def _decode_codebook(side: Side, parts: Parts, head_size: int) -> np.ndarray:
    values = _without_residual(side, parts, head_size)
    if not side.residual:
        return values
    flat = 1.0 - 2.0 * unpack(parts["signs"], 1, head_size)
    back = turn(flat, rotation(head_size).T[None]).astype(np.float32)
    return values + back * parts["gamma"].astype(np.float32)


def _without_residual(side: Side, parts: Parts, head_size: int) -> np.ndarray:
    found, byte = [], 0
    for i, (size, bits) in enumerate(side.sets(head_size)):
        after = byte + -(-size * bits // 8)
        codes = unpack(parts["codes"][..., byte:after], bits, size)
        found.append(codebook.decode(codes, parts["scale"][..., i : i + 1], bits))
        byte = after
    return np.concatenate(found, axis=-1)
