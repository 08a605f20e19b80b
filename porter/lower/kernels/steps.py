"""Steps and minimums of stored caches: as float32 vectors, and in their stored type."""

from __future__ import annotations

import numpy as np

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.define import Expr, f32, i64, tirx
from porter.lower.kernels.packed import TILE, Codes
from porter.lower.kernels.rows import LANES, Buffers


def float_steps(buffer: tirx.Buffer, where: tuple[Expr, Expr, Expr], channel: int) -> Expr:
    """Those of eight channels from `channel` on, where each has its own."""
    return tirx.Cast("float32x8", vec.load(buffer, where, channel, LANES))


def prefetch_steps(codes: Codes, at: Buffers, name: str, row: tuple[Expr, Expr], token: Expr) -> None:
    """Ask for those of the tile after the one from `token` on."""
    for suffix in ("_scale", "_min"):
        if name + suffix in at:
            after = token + i64(TILE)
            place = after // i64(codes.stored.side.group) if codes.along_tokens else after
            vec.prefetch(at[name + suffix], (*row, place), 1 if codes.along_tokens else TILE)


def steps_of_tokens(buffer: tirx.Buffer, row: tuple[Expr, Expr], token: Expr) -> list[Expr]:
    """Of eight tokens from `token` on: a vector for each group of their channels."""
    groups = int(buffer.shape[3])
    if groups == 1:
        each = [buffer[(*row, token + i64(i), 0)] for i in range(LANES)]
        return [vec.held(tirx.Cast("float32x8", vec.picked(each, range(LANES))))]
    each = [vec.held(vec.load(buffer, (*row, token + i64(i)), 0, groups)) for i in range(LANES)]
    if groups == 4 and str(buffer.dtype) == "float16":
        return _of_four(each)
    orders = [[i * groups + g for i in range(LANES)] for g in range(groups)]
    return [vec.held(tirx.Cast("float32x8", vec.picked(each, order))) for order in orders]


def _of_four(each: list[Expr]) -> list[Expr]:
    """Eight tokens' four float16 each, turned. (LLVM finds no such way by itself.)"""
    pairs = [vec.held(vec.picked(each[i : i + 2], [0, 4, 1, 5, 2, 6, 3, 7])) for i in range(0, 8, 2)]
    a, b, c, d = (vec.as_type(p, "int32x4") for p in pairs)
    fours = [vec.held(vec.picked(x, o)) for x in ((a, b), (c, d)) for o in ((0, 4, 1, 5), (2, 6, 3, 7))]
    turned = [vec.picked((fours[i], fours[i + 2]), o) for i in (0, 1) for o in ((0, 1, 4, 5), (2, 3, 6, 7))]
    return [vec.held(tirx.Cast("float32x8", vec.as_type(t, "float16x8"))) for t in turned]


def stored_step(value: Expr, dtype: str) -> Expr:
    """A float32 step in its stored type, within its normal numbers (`porter.kv.steps`)."""
    info = np.finfo(dtype)
    normal, largest = f32(float(info.smallest_normal)), f32(float(info.max))
    return tirx.Cast(dtype, tirx.min(tirx.max(value, normal), largest))
