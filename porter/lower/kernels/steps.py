"""Steps and minimums of stored caches as float32 vectors."""

from __future__ import annotations

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.define import Expr, i64, tirx
from porter.lower.kernels.stored import LANES


def float_steps(buffer: tirx.Buffer, where: tuple[Expr, Expr, Expr], channel: int) -> Expr:
    """Those of eight channels from `channel` on, where each has its own."""
    return tirx.Cast("float32x8", vec.load(buffer, where, channel, LANES))


def steps_of_tokens(buffer: tirx.Buffer, row: tuple[Expr, Expr], token: Expr) -> list[Expr]:
    """Of eight tokens from `token` on: a vector for each group of their channels."""
    groups = int(buffer.shape[3])
    if groups == 1:
        each = [buffer[(*row, token + i64(i), 0)] for i in range(LANES)]
        return [vec.held(tirx.Cast("float32x8", vec.picked(each, range(LANES))))]
    each = [vec.held(vec.load(buffer, (*row, token + i64(i)), 0, groups)) for i in range(LANES)]
    orders = [[i * groups + g for i in range(LANES)] for g in range(groups)]
    return [vec.held(tirx.Cast("float32x8", vec.picked(each, order))) for order in orders]
