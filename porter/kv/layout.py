"""The buffers that a scheme plans for a layer, and what they cost in bits per value.

Q is how many tokens become codes when the cache is full (`Scheme.rounded`), W the window's slots: the sinks,
then a ring of the newest, in which token t has slot sink + (t - sink) mod ring. For each side, `key` or
`value`, of batch B and H KV heads:

    key          [B,H,C,D]         what is kept as floats: all of the cache then
    key_codes    [B,H,Q,bytes]     codes of a token, whatever groups are along: int8 and e4m3fn as they are,
                                   fewer bits as a little-endian stream (`porter.formats.packing`), the sets
                                   of mixed rates one after the other, each in whole bytes
    key_scale    [B,H,Q,G]         along channels, G = ceil(D / group) (a codebook: its sets);
                 [B,H,Q/group,D]   along tokens; none where scales are static
    key_min      as key_scale      uint elements and hybrid groups
    key_signs    [B,H,Q,ceil(D/8)] of the residual, one bit for each rotated channel; 1 is negative
    key_gamma    [B,H,Q,1]         sqrt(pi/2) / sqrt(D) times the norm of the residual
    key_window   [B,H,W,D]         in high precision
    key_copy     [B,H,C,D]         the exact copy

Tokens with more bits have `key_more_codes`, `_scale` and `_min` of their own, floor(share * Q) tokens of
them, and the others the rest of Q; `slots`, int32 [B,1,C-sink,1], says where each token after the sinks is:
at s >= 0 of the others, or at ~s of those with more. Layers agree on it, so that a model has one.

Constants are no part of the cache: static scales, normalizers and rotations belong to the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from porter.formats.format import SCALES
from porter.formats.wide import WIDE
from porter.kv.scheme import Scheme, Side

SLOTS = "slots"
Sizes = tuple[int, int, int]  # of a layer: KV heads, head size of keys, head size of values


@dataclass(frozen=True)
class Buffer:
    """One planned array of a layer's cache."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def buffers(scheme: Scheme, head_size: int, heads: int, capacity: int, batch: int = 1) -> list[Buffer]:
    """What one layer plans for `capacity` tokens of `heads` KV heads; buffers without elements are left
    out. The layer is one that is not kept (`Scheme.layer`)."""
    found = []
    for name in ("key", "value"):
        side = scheme.side(name)
        for suffix, tokens_and_width, dtype in _side(scheme, side, head_size, capacity):
            found.append(Buffer(name + suffix, (batch, heads, *tokens_and_width), np.dtype(dtype)))
    if scheme.tagged:
        found.append(Buffer(SLOTS, (batch, 1, max(0, capacity - scheme.sink), 1), np.dtype(np.int32)))
    return [b for b in found if b.nbytes]


def model_bytes(scheme: Scheme, layers: Sequence[Sizes], capacity: int) -> int:
    """Bytes of the caches of a model's layers, in order, one row: `slots` once."""
    total = slots = 0
    for i, (heads, key, value) in enumerate(layers):
        mine = scheme.layer(i, len(layers))
        for name, size in (("key", key), ("value", value)):
            planned = buffers(mine, size, heads, capacity)
            total += sum(b.nbytes for b in planned if b.name.split("_")[0] == name)
            slots = max(slots, sum(b.nbytes for b in planned if b.name == SLOTS))
    return total + slots


def bytes_of(scheme: Scheme, head_size: int, heads: int, capacity: int, batch: int = 1) -> int:
    """Bytes of one layer's cache, all of its buffers."""
    return sum(b.nbytes for b in buffers(scheme, head_size, heads, capacity, batch))


def bits_per_value(
    scheme: Scheme, head_size: int, heads: int, capacity: int, layers: int = 1, copy: bool = True
) -> float:
    """Bits per cached number over all layers, scales, windows, kept layers and padding included; `copy`: the
    exact copy too, which is held but only read where the bound fails."""
    total = slots = 0
    for i in range(layers):
        planned = buffers(scheme.layer(i, layers), head_size, heads, capacity)
        slots = max(slots, sum(b.nbytes for b in planned if b.name == SLOTS))
        total += sum(b.nbytes for b in planned if b.name != SLOTS and (copy or not b.name.endswith("_copy")))
    total += slots
    return 8 * total / (2 * layers * heads * capacity * head_size)


def row_bytes(side: Side, element: str, head_size: int) -> int:
    """Bytes of one token's codes."""
    if element.startswith("lloyd"):
        return sum(-(-n * b // 8) for n, b in side.sets(head_size))
    bits = 8 if element == "e4m3fn" else int(element[-1])
    return -(-head_size * bits // 8)


def code_type(element: str) -> np.dtype:
    """The stored type of codes; bytes that several share are uint8."""
    return np.dtype({"int8": np.int8, "e4m3fn": ml_dtypes.float8_e4m3fn}.get(element, np.uint8))


def groups(side: Side, head_size: int) -> int:
    """How many steps a token has along channels."""
    if side.element.startswith("lloyd"):
        return len(side.sets(head_size))
    return -(-head_size // (side.group or head_size))


def pools(scheme: Scheme, capacity: int) -> tuple[int, int]:
    """(tokens with the usual bits, tokens with more) that a tagged cache has room for."""
    most = scheme.rounded(scheme.key, capacity)
    more = int(scheme.share * most)
    return most - more, more


_Entry = tuple[str, tuple[int, int], object]


def _side(scheme: Scheme, side: Side, size: int, capacity: int) -> list[_Entry]:
    if not side.coded:
        return [("", (capacity, size), WIDE[side.element].dtype)]
    tokens = scheme.rounded(side, capacity)
    if side.more:
        usual, more = pools(scheme, capacity)
        found = _coded(side, side.element, "", usual, size) + _coded(side, side.more, "_more", more, size)
    else:
        found = _coded(side, side.element, "", tokens, size)
    window = min(capacity, scheme.sink + scheme.ring(side))
    found.append(("_window", (window, size), WIDE[scheme.high].dtype))
    if scheme.copy:
        found.append(("_copy", (capacity, size), WIDE[scheme.copy].dtype))
    return found


def _coded(side: Side, element: str, suffix: str, tokens: int, size: int) -> list[_Entry]:
    scale = SCALES[side.scale]
    along_tokens = side.along == "tokens"
    steps = (tokens // side.flush, size) if along_tokens else (tokens, groups(side, size))
    found: list[_Entry] = [(f"{suffix}_codes", (tokens, row_bytes(side, element, size)), code_type(element))]
    if not side.static:
        found.append((f"{suffix}_scale", steps, scale))
    if side.hybrid or element.startswith("uint"):
        found.append((f"{suffix}_min", steps, scale))
    if side.residual:
        found += [("_signs", (tokens, -(-size // 8)), np.uint8), ("_gamma", (tokens, 1), scale)]
    return found
