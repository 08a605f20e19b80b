"""A codebook's side with a 1-bit residual (`porter.kv.rounding`): a token is k + gamma Rᵀ s, s its signs.

Nothing is turned back token by token. What attention reads has 2 D channels, k and gamma s: a score is
q·k + (R q)·(gamma s), so the query has R q behind it; the output for values is y + Rᵀ z, of both halves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from porter.kv.rotation import rotation
from porter.lower.kernels.define import Dim, Expr, Spec, f32, i64, local, loop, store, tirx
from porter.lower.kernels.steps import stored_step
from porter.lower.kernels.stored import Buffers, Stored, Tile


@dataclass(frozen=True)
class Residual:
    """A Source: the side's decoded tokens, and behind them their signs times gamma."""

    stored: Stored

    @property
    def width(self) -> int:
        """Twice the head size."""
        return 2 * self.stored.width

    @property
    def capacity(self) -> int:
        """Tokens."""
        return self.stored.capacity

    @property
    def name(self) -> str:
        """`key` or `value`."""
        return self.stored.name

    @property
    def label(self) -> str:
        """The element, and that its residual is there."""
        return f"{self.stored.label}_residual"

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """Those of the side."""
        return self.stored.buffers(name, heads, length)

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source. Tokens in the window are exact: their second half is 0."""
        self.stored.fill(at, name, tile, row, span, total)
        width, sink = self.stored.width, i64(self.stored.scheme.sink)
        done = self.stored.rounded(total)
        with loop(span[1] - span[0]) as i:
            if f"{name}_signs" not in at:
                with loop(width) as d:
                    store(tile.rows, f32(0), tile.at(i, i64(width) + d, 1))
                return
            token, gamma = span[0] + i - sink, local(1)
            coded = tirx.all(token >= i64(0), token < done)
            # Read from inside the buffer whatever the token is.
            where = (*row, tirx.max(tirx.min(token, done - i64(1)), i64(0)))
            held = tirx.Cast("float32", at[f"{name}_gamma"][(*where, 0)])
            store(gamma, tirx.Select(coded, held, f32(0)), 0)
            with loop(width) as d:
                byte = tirx.Cast("int32", at[f"{name}_signs"][(*where, d // i64(8))])
                bit = (byte >> tirx.Cast("int32", d % i64(8))) & tirx.IntImm("int32", 1)
                value = tirx.Select(bit == tirx.IntImm("int32", 0), gamma[0], f32(0) - gamma[0])
                store(tile.rows, value, tile.at(i, i64(width) + d, 1))


def projection(size: int) -> np.ndarray:
    """What signs are those of, float64 [D, D]: R, or where D is a power of two R sqrt(D), which is all 1 and
    -1, so that products are exact."""
    matrix = rotation(size)
    return np.sign(matrix) if size & (size - 1) == 0 else matrix


def write_residual(
    state: Buffers, where: tuple[Expr, ...], rest: tirx.Buffer, matrix: tirx.Buffer, signs: tirx.Buffer
) -> None:
    """Gamma of a token's rest, float32 [D], at (row, head, token); its signs, 1 for negative, int32 [D]."""
    size, gamma, total = int(matrix.shape[0]), state["_gamma"], local(1, "float64")
    store(total, tirx.FloatImm("float64", 0.0), 0)
    with loop(size) as d:
        value = tirx.Cast("float64", rest[d])
        store(total, total[0] + value * value, 0)
    norm = tirx.sqrt(total[0]) * tirx.FloatImm("float64", math.sqrt(math.pi / 2 / size))
    store(gamma, stored_step(tirx.Cast("float32", norm), str(gamma.dtype)), *where, 0)
    with loop(size) as d:
        store(total, tirx.FloatImm("float64", 0.0), 0)
        with loop(size) as c:
            store(total, total[0] + tirx.Cast("float64", rest[c]) * matrix[d, c], 0)
        store(signs, tirx.Cast("int32", total[0] < tirx.FloatImm("float64", 0.0)), d)
