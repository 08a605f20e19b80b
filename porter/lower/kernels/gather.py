"""Rows, or whole matrices, of a packed weight by number."""

from __future__ import annotations

from porter.lower.kernels.define import Expr, Spec, check, define, i64, loop, store, tirx
from porter.lower.kernels.integers import OUTSIDE
from porter.lower.kernels.layout import LANES, Layout
from porter.lower.kernels.matmul import each_unit
from porter.lower.kernels.reading import Reader


def gather(layout: Layout) -> tirx.PrimFunc:
    """Row numbers [m] int64 and packed W -> rows [m, k] float32; a negative number counts from the end.

    A number outside of the table stops the program: it must not read what lies beside it.
    """

    def body(rows, *rest, m):
        *weight, out = rest
        with loop(m) as i:
            row = _counted(rows[i], layout.n)
            _row(Reader(layout, tuple(weight), i64(0)), row, out, (i,))

    buffers: list[Spec] = [("rows", ("m",), "int64"), *layout.buffers(), ("out", ("m", layout.k), "float32")]
    return define(f"gather_{layout.name}", buffers, body)


def matrices(layout: Layout) -> tirx.PrimFunc:
    """Numbers [t] int64 and a packed stack -> matrices [t, n, k] float32; numbers as in `gather`."""

    def body(ids, *rest, t):
        *weight, out = rest
        with loop(t) as i:
            reader = Reader(layout, tuple(weight), _counted(ids[i], layout.stack))
            with loop(layout.n) as row:
                _row(reader, row, out, (i, row))

    shape = ("t", layout.n, layout.k)
    buffers: list[Spec] = [("ids", ("t",), "int64"), *layout.buffers(), ("out", shape, "float32")]
    return define(f"matrices_{layout.name}", buffers, body)


def _counted(number: Expr, size: int) -> Expr:
    check(tirx.all(number >= i64(-size), number < i64(size)), OUTSIDE)
    return tirx.Select(number < i64(0), number + i64(size), number)


def _row(reader: Reader, row: Expr, out: tirx.Buffer, index: tuple[Expr, ...]) -> None:
    block, lane = row // i64(LANES), row % i64(LANES)
    layout = reader.layout

    def unit(group: Expr, number: Expr, codes: int, _: object) -> None:
        zero = reader.zero(block, group, lane) if layout.zero else None
        for which in range(codes):
            value = reader.element(block, group, number, which, lane, zero)
            value = value * reader.scale(block, group, lane) if layout.group else value
            store(out, value, *index, reader.k(group, number, which))

    each_unit(layout, lambda group: None, unit)
