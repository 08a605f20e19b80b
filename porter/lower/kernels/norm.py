"""RMS normalization of rows: y = x / sqrt(mean(x²) + epsilon) * weight (Zhang & Sennrich 2019)."""

from __future__ import annotations

from porter.lower.kernels.define import T, define, f32, i64, local, loop, store, tirx


def rms_norm(width: int, epsilon: float) -> tirx.PrimFunc:
    """x [m, width], weight [width] -> y [m, width]; squares are summed in at most 16 lanes, then across."""
    lanes = next(n for n in (16, 8, 4, 2, 1) if width % n == 0)

    def body(x, weight, y, m):
        with loop(m) as i:
            partial, total = local(lanes), local(1)
            with loop(lanes, "vectorized") as v:
                store(partial, f32(0), v)
            with loop(width // lanes) as chunk, loop(lanes, "vectorized") as v:
                value = x[i, chunk * i64(lanes) + v]
                store(partial, partial[v] + value * value, v)
            store(total, f32(0), 0)
            with loop(lanes, "unroll") as v:
                store(total, total[0] + partial[v], 0)
            store(total, f32(1) / T.sqrt(total[0] / f32(width) + f32(epsilon)), 0)
            with loop(width, "vectorized") as d:
                store(y, x[i, d] * total[0] * weight[d], i, d)

    buffers = [
        ("x", ("m", width), "float32"),
        ("weight", (width,), "float32"),
        ("y", ("m", width), "float32"),
    ]
    return define(f"rms_norm_d{width}", buffers, body)
