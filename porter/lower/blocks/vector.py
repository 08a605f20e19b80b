"""What the vector unit does in float32: norms, rotations, rows of tables, appending to a cache.

The same kernels as `porter.lower.kernels` has for the host, of blocks that a schedule may move.
"""

from __future__ import annotations

from porter.lower.blocks.define import (
    Expr,
    Spec,
    T,
    block,
    choose,
    define,
    f32,
    i64,
    loop,
    marked,
    scratch,
    store,
    tirx,
)
from porter.lower.blocks.packed import Packed
from porter.lower.kernels.define import Dim, check
from porter.lower.kernels.integers import OUTSIDE
from porter.lower.kernels.layout import Layout


def rms_norm(width: int, epsilon: float) -> tirx.PrimFunc:
    """x [m, width], weight [width] -> y = x / sqrt(mean(x²) + epsilon) * weight."""

    def body(x, weight, y, m):
        total = scratch("squares", [m])
        with block("square_sum", [m], [width]) as (i, d):
            with T.init():
                store(total, f32(0), i)
            store(total, total[i] + x[i, d] * x[i, d], i)
        with block("y_norm", [m, width]) as (i, d):
            root = f32(1) / T.sqrt(total[i] / f32(width) + f32(epsilon))
            store(y, x[i, d] * root * weight[d], i, d)

    full = ("m", width)
    buffers: list[Spec] = [("x", full, "float32"), ("weight", (width,), "float32"), ("y", full, "float32")]
    return define(f"rms_norm_d{width}", buffers, body).with_attr(marked("rms_norm"))


def rotary(
    heads: int, width: int, rotated: int, *, interleaved: bool, table: Dim | None, cos_batch: Dim = "b"
) -> tirx.PrimFunc:
    """x [b, h, s, d], cos, sin (, positions [b, s] int64) -> y, as `porter.lower.kernels.rotary` has it."""
    half = rotated // 2
    shape: tuple[Dim, ...] = (table, half) if table is not None else (cos_batch, "s", half)

    def body(x, cos, sin, *rest, b, s, **others):
        *positions, y = rest
        if positions:
            count = others[table] if isinstance(table, str) else i64(table or 0)
            with loop(b) as n, loop(s) as t:
                at = positions[0][n, t]
                check(tirx.all(at >= i64(0), at < count), "a position lies outside of the rotary table")

        def angle(buffer: tirx.Buffer, n: Expr, t: Expr, i: Expr) -> Expr:
            if positions:
                return buffer[positions[0][n, t], i]
            return buffer[i64(0) if cos_batch == 1 else n, t, i]

        with block("y_rotate", [b, heads, s, width]) as (n, h, t, d):
            if interleaved:
                i, second, other = d // i64(2), d % i64(2) == i64(1), d + i64(1) - d % i64(2) * i64(2)
            else:
                second = d >= i64(half)
                i = tirx.Select(second, d - i64(half), d)
                other = tirx.Select(second, d - i64(half), d + i64(half))
            inside = tirx.Select(d < i64(rotated), i, i64(0)), tirx.Select(d < i64(rotated), other, d)
            c, turn = angle(cos, n, t, inside[0]), angle(sin, n, t, inside[0])
            mine, its = x[n, h, t, d] * c, x[n, h, t, inside[1]] * turn
            value = tirx.Select(second, mine + its, mine - its)
            store(
                y, value if rotated == width else choose(d < i64(rotated), value, x[n, h, t, d]), n, h, t, d
            )

    full = ("b", heads, "s", width)
    buffers: list[Spec] = [("x", full, "float32"), ("cos", shape, "float32"), ("sin", shape, "float32")]
    if table is not None:
        buffers.append(("positions", ("b", "s"), "int64"))
    func = define(f"rotary_h{heads}_d{width}", [*buffers, ("y", full, "float32")], body)
    return func.with_attr(marked("rotary"))


def rows(layout: Layout) -> tirx.PrimFunc:
    """Row numbers [m] int64 and packed W -> rows [m, k] float32; a negative number counts from the end, and
    one outside of the table stops the program."""

    def body(numbers, *rest, m):
        *weight, out = rest
        _checked(numbers, m, layout.n)
        with block("row_decode", [m, layout.k]) as (i, k):
            row = (numbers[i] + i64(layout.n)) % i64(layout.n)
            store(out, _number(Packed(layout, tuple(weight), i64(0)), row, k), i, k)

    buffers: list[Spec] = [("rows", ("m",), "int64"), *layout.buffers(), ("out", ("m", layout.k), "float32")]
    return define(f"rows_{layout.name}", buffers, body).with_attr(marked("rows"))


def matrices(layout: Layout) -> tirx.PrimFunc:
    """Numbers [t] int64 and a packed stack -> matrices [t, n, k] float32; numbers as in `rows`."""

    def body(ids, *rest, t):
        *weight, out = rest
        _checked(ids, t, layout.stack)
        with block("matrix_decode", [t, layout.n, layout.k]) as (i, n, k):
            number = (ids[i] + i64(layout.stack)) % i64(layout.stack)
            store(out, _number(Packed(layout, tuple(weight), number), n, k), i, n, k)

    shape = ("t", layout.n, layout.k)
    buffers: list[Spec] = [("ids", ("t",), "int64"), *layout.buffers(), ("out", shape, "float32")]
    return define(f"matrices_{layout.name}", buffers, body).with_attr(marked("matrices"))


def append(heads: int, capacity: int, width: int, dtype: str, *, circular: bool = False) -> tirx.PrimFunc:
    """cache [b, heads, capacity, width], new [b, heads, s, width], starts [b] int64: written in place.

    A token past the capacity wraps around when `circular`, else it is dropped.
    """

    def body(cache, new, starts, b, s):
        with block("append", [b, heads, s, width]) as (n, h, t, d):
            at = starts[n] + t
            at = at % i64(capacity) if circular else at
            with T.If(tirx.all(at >= i64(0), at < i64(capacity))), T.Then():
                store(cache, new[n, h, t, d], n, h, at, d)

    buffers: list[Spec] = [
        ("cache", ("b", heads, capacity, width), dtype),
        ("new", ("b", heads, "s", width), dtype),
        ("starts", ("b",), "int64"),
    ]
    func = define(f"append_h{heads}_c{capacity}_w{width}_{dtype}", buffers, body)
    return func.with_attr(marked("append"))


def _checked(numbers: tirx.Buffer, count: Expr, size: int) -> None:
    with loop(count) as i:
        check(tirx.all(numbers[i] >= i64(-size), numbers[i] < i64(size)), OUTSIDE)


def _number(packed: Packed, n: Expr, k: Expr) -> Expr:
    """What an element stands for, each step rounded to float32."""
    layout, value = packed.layout, packed.element(n, k)
    if not layout.group:
        return value
    scale = packed.scale(n, k // i64(layout.group))
    return value * (scale * packed.factor() if layout.factor else scale)
