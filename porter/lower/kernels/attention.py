"""Attention over a float or quantized cache in one pass over the keys; codes are decoded in registers.

    y = softmax(softcap(scale * q kᵀ) + mask) v

with running maximum and sum (online softmax: Milakov & Gimelshein 2018; Dao 2022).

Layouts are ONNX's: q [b, hq, s, d], k [b, hk, t, d], v [b, hk, t, dv]; hq is a multiple of hk (grouped
queries).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import (
    Dim,
    Expr,
    Spec,
    define,
    exp_below_zero,
    f32,
    i64,
    local,
    loop,
    store,
    tanh,
    tirx,
)

TILE = 8  # keys between two rescalings of the accumulator
# A finite "minus infinity": exp(-inf - LOWEST) is 0, exp(-inf - -inf) would be NaN. It is the lowest float32
# because that is what exporters put into masks: a row in which every key has it is spread evenly, as by
# softmax.
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Cache:
    """How keys or values are stored: a codec, and for codes one float32 scale per token and head."""

    codec: str = "fp32"
    width: int = 0  # head size

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """Codes [b, heads, length, words], then scales [b, heads, length, 1] where the codec needs them."""
        codec = CODECS[self.codec]
        codes: Spec = (name, ("b", heads, length, codec.words(self.width)), codec.storage)
        return (
            [codes]
            if self.codec == "fp32"
            else [codes, (f"{name}_scale", ("b", heads, length, 1), "float32")]
        )


@dataclass(frozen=True)
class Attention:
    """One attention kernel. `length` is the axis of k and v: a symbol, or the capacity of a static cache.

    `offset` says where query i stands among the keys when `causal`: `start` at key i, `end` at length - s +
    i, `lengths` at lengths[b] - s + i with the extra input lengths [b] int64, which also hides later keys.
    `mask` is its shape with 1 where it broadcasts (batch, heads, s, t), or () for none; `mask_dtype` bool or
    float32.
    """

    query_heads: int
    heads: int
    key: Cache
    value: Cache
    length: Dim
    scale: float
    causal: bool = False
    offset: str = "start"
    softcap: float = 0.0
    mask: tuple[Dim, ...] = ()
    mask_dtype: str = "bool"

    @property
    def name(self) -> str:
        """The kernel's name, readable in a plan; the module makes it unique."""
        heads, codecs = f"h{self.query_heads}_{self.heads}", f"{self.key.codec}_{self.value.codec}"
        return f"attention_{heads}_d{self.key.width}_{codecs}"


def with_mask(spec: Attention, shape: tuple[Dim, ...], dtype: str) -> Attention:
    """The same kernel with a mask."""
    return replace(spec, mask=shape, mask_dtype=dtype)


def attention(spec: Attention) -> tirx.PrimFunc:
    """q, k (, k_scale), v (, v_scale) (, lengths) (, mask) -> y [b, hq, s, dv]; no key seen gives zeros."""
    key = spec.key.buffers("k", spec.heads, spec.length)
    value = spec.value.buffers("v", spec.heads, spec.length)
    buffers: list[Spec] = [("q", ("b", spec.query_heads, "s", spec.key.width), "float32"), *key, *value]
    if spec.offset == "lengths":
        buffers.append(("lengths", ("b",), "int64"))
    if spec.mask:
        buffers.append(("mask", spec.mask, spec.mask_dtype))
    buffers.append(("y", ("b", spec.query_heads, "s", spec.value.width), "float32"))
    names = [n for n, _, _ in buffers]

    def body(*args, **dims):
        _rows(spec, dict(zip(names, args, strict=True)), dims)

    return define(spec.name, buffers, body)


def _rows(spec: Attention, at: dict[str, tirx.Buffer], dims: dict[str, tirx.Var]) -> None:
    """One softmax row per (batch, query head, query), batch and heads in parallel."""
    total = dims[spec.length] if isinstance(spec.length, str) else i64(spec.length)
    with loop(dims["b"] * i64(spec.query_heads), "parallel") as bh:
        b, h = bh // i64(spec.query_heads), bh % i64(spec.query_heads)
        with loop(dims["s"]) as i:
            seen = at["lengths"][b] if spec.offset == "lengths" else total
            if spec.causal:
                first = {"start": i64(0), "end": total - dims["s"], "lengths": seen - dims["s"]}[spec.offset]
                seen = tirx.min(seen, first + i + i64(1))
            # A wrong length must not read what lies beside the cache.
            _row(spec, at, b, h, i, tirx.max(tirx.min(seen, total), i64(0)))


def _row(spec: Attention, at: dict[str, tirx.Buffer], b: Expr, h: Expr, i: Expr, seen: Expr) -> None:
    query, out, score = local(spec.key.width), local(spec.value.width), local(TILE)
    top, new_top, total, fade = local(1), local(1), local(1), local(1)
    head = h // i64(spec.query_heads // spec.heads)
    with loop(spec.key.width, "vectorized") as d:
        store(query, at["q"][b, h, i, d], d)
    with loop(spec.value.width, "vectorized") as d:
        store(out, f32(0), d)
    store(top, f32(LOWEST), 0)
    store(total, f32(0), 0)
    with loop((seen + i64(TILE - 1)) // i64(TILE)) as tile:
        first = tile * i64(TILE)
        store(new_top, top[0], 0)
        with loop(TILE) as j:
            index = tirx.min(first + j, seen - i64(1))
            dot = _dot(spec.key, at, query, b, head, index) * f32(spec.scale)
            value = _masked(spec, at, _softcap(spec, dot), b, h, i, index)
            store(score, tirx.Select(first + j < seen, value, f32(float("-inf"))), j)
            store(new_top, tirx.max(new_top[0], score[j]), 0)
        store(fade, exp_below_zero(top[0] - new_top[0]), 0)
        store(top, new_top[0], 0)
        with loop(TILE, "vectorized") as j:
            store(score, exp_below_zero(score[j] - new_top[0]), j)
        store(total, total[0] * fade[0], 0)
        with loop(spec.value.width, "vectorized") as d:
            store(out, out[d] * fade[0], d)
        with loop(TILE) as j:
            store(total, total[0] + score[j], 0)
            index = tirx.min(first + j, seen - i64(1))
            _add_value(spec.value, at, out, score[j], b, head, index)
    with loop(spec.value.width, "vectorized") as d:
        store(at["y"], tirx.Select(total[0] > f32(0), out[d] / total[0], f32(0)), b, h, i, d)


def _softcap(spec: Attention, value: Expr) -> Expr:
    return tanh(value / f32(spec.softcap)) * f32(spec.softcap) if spec.softcap else value


def _masked(
    spec: Attention,
    at: dict[str, tirx.Buffer],
    value: Expr,
    b: Expr,
    h: Expr,
    i: Expr,
    j: Expr,
) -> Expr:
    if not spec.mask:
        return value
    index = [i64(0) if dim == 1 else where for dim, where in zip(spec.mask, (b, h, i, j), strict=True)]
    mask = at["mask"][tuple(index)]
    return tirx.Select(mask, value, f32(float("-inf"))) if spec.mask_dtype == "bool" else value + mask


def _dot(cache: Cache, at: dict[str, tirx.Buffer], query: tirx.Buffer, b: Expr, head: Expr, j: Expr) -> Expr:
    """Emit q · k[j] and return it; the partial sums stand in lanes, so the loop is one vector operation."""
    codec = CODECS[cache.codec]
    words = codec.words(cache.width)
    lanes = next(n for n in (16, 8, 4, 2, 1) if words % n == 0)
    partial = local(lanes)
    with loop(lanes, "vectorized") as v:
        store(partial, f32(0), v)
    with loop(words // lanes) as chunk:
        for which in range(codec.unit):
            with loop(lanes, "vectorized") as v:
                word = chunk * i64(lanes) + v
                key = codec.decode(lambda _, word=word: at["k"][b, head, j, word], which)
                store(partial, partial[v] + query[word * i64(codec.unit) + i64(which)] * key, v)
    while lanes > 1:  # halves are added: lane by lane each addition would wait for the one before
        lanes //= 2
        with loop(lanes, "vectorized") as v:
            store(partial, partial[v] + partial[v + i64(lanes)], v)
    return partial[0] if cache.codec == "fp32" else partial[0] * at["k_scale"][b, head, j, 0]


def _add_value(
    cache: Cache,
    at: dict[str, tirx.Buffer],
    out: tirx.Buffer,
    weight: Expr,
    b: Expr,
    head: Expr,
    j: Expr,
) -> None:
    """out += weight * v[j]."""
    codec = CODECS[cache.codec]
    weight = weight if cache.codec == "fp32" else weight * at["v_scale"][b, head, j, 0]
    for which in range(codec.unit):
        with loop(codec.words(cache.width), "vectorized") as word:
            d = word * i64(codec.unit) + i64(which)
            value = codec.decode(lambda _, word=word: at["v"][b, head, j, word], which)
            store(out, out[d] + weight * value, d)
