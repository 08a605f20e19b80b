"""Attention over a cache, as products of rounded operands around a softmax in float32.

    y = softmax(softcap(scale * q kᵀ) + mask) v

Codes of a cache become numbers as they become operands (`porter.lower.blocks.caches`), so nothing but codes
comes out of the memory. Blocks: `q_cast`, `k_cast`, `product` (scores), `score` (scale, softcap, mask),
`score_max`, `weight` (exp), `weight_sum`, `p_cast`, `v_cast`, `product_1` (weighted values), `y_divide`.
Weights are rounded as operands before they are divided by their sum, which stays float32, as in
FlashAttention-2 (Dao 2023). What queries, masks and lengths mean is said by
`porter.lower.kernels.attention.Attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porter.lower.blocks.caches import Reader
from porter.lower.blocks.define import (
    Expr,
    T,
    block,
    choose,
    define,
    f32,
    i64,
    marked,
    scratch,
    store,
    tirx,
)
from porter.lower.blocks.unit import Unit, products
from porter.lower.kernels.attention import LOWEST, Attention
from porter.lower.kernels.define import exp_below_zero, tanh

NOT_SEEN = float("-inf")


def attention(spec: Attention, keys: Unit, values: Unit) -> tirx.PrimFunc:
    """q, k, v (, lengths) (, mask) -> y [b, hq, s, dv], as the host has them; no key seen gives zeros.

    `keys` multiplies q and k, `values` weights and v.
    """
    buffers = [
        ("q", ("b", spec.query_heads, "s", spec.key.width), "float32"),
        *spec.key.buffers("k", spec.heads, spec.length),
        *spec.value.buffers("v", spec.heads, spec.length),
    ]
    if spec.offset == "lengths":
        buffers.append(("lengths", ("b",), "int64"))
    if spec.mask:
        buffers.append(("mask", spec.mask, spec.mask_dtype))
    buffers.append(("y", ("b", spec.query_heads, "s", spec.value.width), "float32"))
    names = [n for n, _, _ in buffers]

    def body(*args, **dims):
        length = dims[spec.length] if isinstance(spec.length, str) else i64(spec.length)
        _Kernel(spec, keys, values, dict(zip(names, args, strict=True)), dims["b"], dims["s"], length).emit()

    name = f"{spec.name}_{keys.label}"
    return define(name, buffers, body).with_attr(marked("attention", keys.name))


@dataclass(frozen=True)
class _Kernel:
    spec: Attention
    keys: Unit
    values: Unit
    at: dict[str, tirx.Buffer]
    batch: Expr
    steps: Expr
    length: Expr

    def emit(self) -> None:
        spec = self.spec
        rows = [self.batch, spec.query_heads, self.steps]
        scores = self._scores(rows)
        top = scratch("top", rows)
        with block("score_max", rows, [self.length]) as (*at, t):
            with T.init():
                store(top, f32(LOWEST), *at)
            store(top, tirx.max(top[tuple(at)], scores[(*at, t)]), *at)
        weights, total = scratch("weights", [*rows, self.length]), scratch("total", rows)
        with block("weight", [*rows, self.length]) as (*at, t):
            store(weights, exp_below_zero(scores[(*at, t)] - top[tuple(at)]), *at, t)
        with block("weight_sum", rows, [self.length]) as (*at, t):
            with T.init():
                store(total, f32(0), *at)
            store(total, total[tuple(at)] + weights[(*at, t)], *at)
        out = self._weighted(rows, weights)
        with block("y_divide", [*rows, spec.value.width]) as (*at, d):
            seen = tirx.all(self.length > i64(0), total[tuple(at)] > f32(0))
            found = tirx.Select(seen, out[(*at, d)] / total[tuple(at)], f32(0))
            store(self.at["y"], found, *at, d)

    def _scores(self, rows: list[Expr | int]) -> tirx.Buffer:
        """[b, hq, s, t], minus infinity where a query does not look."""
        spec, unit = self.spec, self.keys
        width = unit.padded(spec.key.width)
        q = scratch("q_operand", [*rows, width], unit.x.storage)
        with block("q_cast", [*rows, width]) as (*at, d):
            read = self._within(spec.key.width, width, d, lambda d: self.at["q"][(*at, d)])
            store(q, unit.x.rounded(read), *at, d)
        shape = [self.batch, spec.heads, self.length, width]
        k = scratch("k_operand", shape, unit.w.storage)
        with block("k_cast", shape) as (*at, d):
            keys = Reader(spec.key, self.at, "k")
            T.reads(*keys.regions((*at, tirx.min(d, i64(spec.key.width - 1)))))
            read = self._within(spec.key.width, width, d, lambda d: keys.number((*at, d)))
            store(k, unit.w.rounded(read, once=True), *at, d)
        raw = scratch("raw", [*rows, self.length])
        shared = i64(spec.query_heads // spec.heads)
        products(
            unit,
            [*rows, self.length],
            unit.steps(spec.key.width),
            lambda b, h, s, t, d: q[b, h, s, d],
            lambda b, h, s, t, d: k[b, h // shared, t, d],
            raw,
        )
        scores = scratch("scores", [*rows, self.length])
        with block("score", [*rows, self.length]) as at:
            store(scores, self._masked(raw[tuple(at)] * f32(spec.scale), at), *at)
        return scores

    def _masked(self, score: Expr, at: list[Expr]) -> Expr:
        spec = self.spec
        b, _, s, t = at
        if spec.softcap:
            score = tanh(score / f32(spec.softcap)) * f32(spec.softcap)
        if spec.mask:
            index = [i64(0) if dim == 1 else i for dim, i in zip(spec.mask, at, strict=True)]
            mask = self.at["mask"][tuple(index)]
            seen = spec.mask_dtype == "bool"
            score = tirx.Select(mask, score, f32(NOT_SEEN)) if seen else score + mask
        if not spec.causal and spec.offset != "lengths":
            return score
        total = self.at["lengths"][b] if spec.offset == "lengths" else self.length
        last = total
        if spec.causal:
            first = {"start": i64(0), "end": self.length - self.steps, "lengths": total - self.steps}
            last = tirx.min(total, first[spec.offset] + s + i64(1))
        return tirx.Select(t < last, score, f32(NOT_SEEN))

    def _weighted(self, rows: list[Expr | int], weights: tirx.Buffer) -> tirx.Buffer:
        """[b, hq, s, dv]: the sum of values, weighted. Tokens past a row's length count as zeros: a cache may
        hold anything there, and 0 * NaN is NaN."""
        spec, unit = self.spec, self.values
        padded = unit.padded(self.length)
        p = scratch("p_operand", [*rows, padded], unit.x.storage)
        with block("p_cast", [*rows, padded]) as (*at, t):
            read = self._within(self.length, padded, t, lambda t: weights[(*at, t)])
            store(p, unit.x.rounded(read), *at, t)
        shape = [self.batch, spec.heads, spec.value.width, padded]
        v = scratch("v_operand", shape, unit.w.storage)
        with block("v_cast", shape) as (b, h, d, t):
            values, end = Reader(spec.value, self.at, "v"), self.length
            T.reads(*values.regions((b, h, t, d), lengths=spec.offset == "lengths"))
            if spec.offset == "lengths":
                end = tirx.min(end, self.at["lengths"][b])
            last = tirx.min(t, self.length - i64(1))
            read = choose(t < end, values.number((b, h, last, d)), f32(0))
            store(v, unit.w.rounded(read, once=True), b, h, d, t)
        out = scratch("out", [*rows, spec.value.width])
        shared = i64(spec.query_heads // spec.heads)
        products(
            unit,
            [*rows, spec.value.width],
            unit.steps(self.length),
            lambda b, h, s, d, t: p[b, h, s, t],
            lambda b, h, s, d, t: v[b, h // shared, d, t],
            out,
        )
        return out

    @staticmethod
    def _within(size: Expr | int, padded: Expr | int, i: Expr, read: Callable[[Expr], Expr]) -> Expr:
        """What is read at i, or zero beyond the size."""
        if isinstance(size, int) and size == padded:
            return read(i)
        size = i64(size) if isinstance(size, int) else size
        return choose(i < size, read(tirx.min(i, size - i64(1))), f32(0))
