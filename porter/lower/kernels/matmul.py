"""y = x Wᵀ for a constant weight W, or matrices picked from a stack of them, decoded in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porter.lower.kernels.define import Expr, Spec, check, define, f32, i64, local, loop, store, tirx
from porter.lower.kernels.integers import OUTSIDE
from porter.lower.kernels.layout import LANES, Layout
from porter.lower.kernels.reading import Reader

ROWS = 4  # rows of x that share one decoded weight vector: 4 x 16 accumulators fill half the AVX2 registers
PARALLEL_WORK = 1 << 15  # below this many multiplications starting threads costs more than it saves

Tile = Callable[[Expr, int, Expr, int], None]  # (block, columns of it, first row, rows)


def matmul(layout: Layout) -> tirx.PrimFunc:
    """x [m, k] float32, packed W -> y [m, n] float32, accumulated in float32 in order of k."""

    def body(x, *rest, m):
        *weight, y = rest
        tile = _Tile(Reader(layout, tuple(weight), i64(0)), x, y, ()).emit
        each_block(layout, layout.n * layout.k, lambda block, width: each_tile(m, tile, block, width))

    buffers: list[Spec] = [
        ("x", ("m", layout.k), "float32"),
        *layout.buffers(),
        ("y", ("m", layout.n), "float32"),
    ]
    return define(f"matmul_{layout.name}", buffers, body)


def stacked(layout: Layout, *, picked: bool, shared: bool) -> tirx.PrimFunc:
    """x [t, m, k] float32 ([1, m, k] if `shared`), packed stack W -> y [t, m, n] float32.

    Product i is with matrix i mod stack, or if `picked` with that of number ids[i], int64, the first
    argument; a negative number counts from the end, and one outside of the stack stops the program.
    """

    def body(*arguments, t, m):
        *ids, x = arguments[: 1 + picked]
        *weight, y = arguments[1 + picked :]
        if picked:
            with loop(t) as i:
                check(tirx.all(ids[0][i] >= i64(-layout.stack), ids[0][i] < i64(layout.stack)), OUTSIDE)

        def column(block: Expr, width: int) -> None:
            with loop(t) as i:
                number = (ids[0][i] if picked else i) + i64(layout.stack)
                reader = Reader(layout, tuple(weight), number % i64(layout.stack))
                tile = _Tile(reader, x, y, (i64(0) if shared else i,), (i,)).emit
                each_tile(m, tile, block, width)

        each_block(layout, layout.n * layout.k, column)

    buffers: list[Spec] = [
        *([("ids", ("t",), "int64")] if picked else []),
        ("x", (1 if shared else "t", "m", layout.k), "float32"),
        *layout.buffers(),
        ("y", ("t", "m", layout.n), "float32"),
    ]
    kind = ("picked" if picked else "stacked") + "_shared" * shared
    return define(f"matmul_{kind}_{layout.name}", buffers, body)


def each_block(layout: Layout, work: int, emit: Callable[[Expr, int], None]) -> None:
    """`emit(block, columns)` for every block of rows of W, in parallel where the work pays for it."""
    whole, tail = divmod(layout.n, LANES)
    if whole:
        with loop(whole, "parallel" if work >= PARALLEL_WORK else "serial") as block:
            emit(block, LANES)
    if tail:
        emit(i64(whole), tail)


def each_tile(m: Expr, tile: Tile, block: Expr, width: int) -> None:
    """Tiles of ROWS rows of x, then the rows that are left one by one."""
    with loop(m // i64(ROWS)) as i:
        tile(block, width, i * i64(ROWS), ROWS)
    with loop(m % i64(ROWS)) as row:
        tile(block, width, m // i64(ROWS) * i64(ROWS) + row, 1)


def each_unit(
    layout: Layout, start: Callable[[Expr], object], emit: Callable[[Expr, Expr, int, object], None]
) -> None:
    """For every group, `start(group)`, then for each of its units `emit(group, unit, codes, started)`."""
    for first, groups, codes in layout.spans():
        with loop(groups) as i:
            group, unit = i + i64(first), layout.unit
            started = start(group)
            if codes // unit:
                with loop(codes // unit) as number:
                    emit(group, number, unit, started)
            if codes % unit:  # the pad of the last word is no code: 0 * inf would be NaN
                emit(group, i64(codes // unit), codes % unit, started)


@dataclass(frozen=True)
class Scaling:
    """The scales and zero points of one group, LANES of each, or None."""

    scale: tirx.Buffer | None
    zero: tirx.Buffer | None


def scaling(reader: Reader, block: Expr, group: Expr) -> Scaling:
    """Load and decode them once for the group."""
    scale = zero = None
    if reader.layout.group:
        scale = local(LANES)
        with loop(LANES, "vectorized") as v:
            store(scale, reader.scale(block, group, v), v)
    if reader.layout.zero:
        zero = local(LANES)
        with loop(LANES, "vectorized") as v:
            store(zero, reader.zero(block, group, v), v)
    return Scaling(scale, zero)


@dataclass(frozen=True)
class _Tile:
    """y[out, row:row+rows, block*LANES:+width]: every weight vector is decoded once for all the rows."""

    reader: Reader
    x: tirx.Buffer
    y: tirx.Buffer
    lead: tuple[Expr, ...]  # of x
    out: tuple[Expr, ...] = ()

    def emit(self, block: Expr, width: int, row: Expr, rows: int) -> None:
        acc = local(rows * LANES)
        with loop(rows * LANES, "vectorized") as v:
            store(acc, f32(0), v)

        def unit(group: Expr, number: Expr, codes: int, given: Scaling) -> None:
            for which in range(codes):
                self._accumulate(acc, given, block, group, number, which, row, rows)

        each_unit(self.reader.layout, lambda group: scaling(self.reader, block, group), unit)
        for r in range(rows):
            with loop(width, "vectorized") as v:
                store(self.y, acc[i64(r * LANES) + v], *self.out, row + i64(r), block * i64(LANES) + v)

    def _accumulate(
        self,
        acc: tirx.Buffer,
        given: Scaling,
        block: Expr,
        group: Expr,
        unit: Expr,
        which: int,
        row: Expr,
        rows: int,
    ) -> None:
        """acc[r, :] += x[row + r, k] * W[:, k]."""
        decoded = local(LANES)
        with loop(LANES, "vectorized") as v:
            zero = given.zero[v] if given.zero is not None else None
            value = self.reader.element(block, group, unit, which, v, zero)
            store(decoded, value * given.scale[v] if given.scale is not None else value, v)
        k = self.reader.k(group, unit, which)
        for r in range(rows):
            with loop(LANES, "vectorized") as v:
                at = i64(r * LANES) + v
                store(acc, acc[at] + self.x[(*self.lead, row + i64(r), k)] * decoded[v], at)
