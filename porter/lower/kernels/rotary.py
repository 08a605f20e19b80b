"""Rotary position embedding (Su et al. 2021) as ONNX opset 23 defines it, on x [b, h, s, d]."""

from __future__ import annotations

from porter.lower.kernels.define import Dim, Expr, Spec, check, define, i64, loop, store, tirx


def rotary(
    heads: int, width: int, rotated: int, *, interleaved: bool, table: Dim | None, cos_batch: Dim = "b"
) -> tirx.PrimFunc:
    """x, cos, sin (, positions [b, s] int64) -> y: each pair (x1, x2) becomes (x1 c - x2 s, x2 c + x1 s).

    Pairs are (i, i + rotated/2), or (2i, 2i+1) when `interleaved`; channels from `rotated` on pass through.
    cos and sin are [cos_batch, s, rotated/2], or with `table` rows of [table, rotated/2] picked by positions;
    a position outside of the table stops the program.
    """
    half = rotated // 2
    shape: tuple[Dim, ...] = (table, half) if table is not None else (cos_batch, "s", half)

    def body(x, cos, sin, *rest, b, s, **others):
        *positions, y = rest
        count = others[table] if isinstance(table, str) else i64(table or 0)

        def angle(buffer: tirx.Buffer, batch: Expr, step: Expr, i: Expr) -> Expr:
            if positions:
                return buffer[positions[0][batch, step], i]
            return buffer[i64(0) if cos_batch == 1 else batch, step, i]

        if positions:
            with loop(b) as n, loop(s) as t:
                at = positions[0][n, t]
                check(tirx.all(at >= i64(0), at < count), "a position lies outside of the rotary table")
        with loop(b) as n, loop(heads) as h, loop(s) as t:
            with loop(half) as i:
                first, second = (i * i64(2), i * i64(2) + i64(1)) if interleaved else (i, i + i64(half))
                c, d = angle(cos, n, t, i), angle(sin, n, t, i)
                x1, x2 = x[n, h, t, first], x[n, h, t, second]
                store(y, x1 * c - x2 * d, n, h, t, first)
                store(y, x2 * c + x1 * d, n, h, t, second)
            with loop(width - rotated) as i:
                store(y, x[n, h, t, i + i64(rotated)], n, h, t, i + i64(rotated))

    full = ("b", heads, "s", width)
    buffers: list[Spec] = [("x", full, "float32"), ("cos", shape, "float32"), ("sin", shape, "float32")]
    if table is not None:
        buffers.append(("positions", ("b", "s"), "int64"))
    return define(f"rotary_h{heads}_d{width}", [*buffers, ("y", full, "float32")], body)
