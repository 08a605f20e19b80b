"""Attention kernels to test, and what they should give in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from kernels import UNIT

from porter.formats.packing import pack
from porter.lower.kernels.attention import Attention, Cache

BATCH, STEPS, LENGTH = 3, 5, 21  # a length that is no multiple of the kernel's tile


def spec(
    width: int = 8, codec: str = "fp32", heads: tuple[int, int] = (4, 2), **options: object
) -> Attention:
    values: dict[str, object] = {
        "length": LENGTH if options.get("offset") == "lengths" else "t",
        "scale": width**-0.5,
        "causal": True,
        "offset": "end",
        **options,
    }
    return Attention(*heads, Cache(codec, width), Cache(codec, width), **values)


BOOL, ADDED = {"mask": ("b", 1, "s", "t")}, {"mask": ("b", 1, "s", "t"), "mask_dtype": "float32"}
SPECS = {
    **{
        f"{c} {o}": spec(codec=c, offset=o)
        for c in ("fp32", "int8", "int4")
        for o in ("start", "end", "lengths")
    },
    **{f"{c} sees all": spec(codec=c, offset="start", causal=False) for c in ("fp32", "int8", "int4")},
    "lengths alone": spec(offset="lengths", causal=False),
    **{f"head size {d}": spec(d) for d in (1, 2, 12, 64, 80, 128, 256)},
    **{f"int8 head size {d}": spec(d, "int8") for d in (1, 12, 256)},
    **{f"int4 head size {d}": spec(d, "int4") for d in (2, 12, 80, 256)},
    "one head for all": spec(heads=(6, 1)),
    "every head its own": spec(heads=(3, 3)),
    "values of another size": replace(spec(12), value=Cache("fp32", 5)),
    "keys and values of two kinds": replace(spec(12, "int8"), value=Cache("int4", 6)),
    "softcap": spec(softcap=5.0),
    "bool mask": spec(causal=False, offset="start", **BOOL),
    "bool mask, causal": spec(**BOOL),
    "float mask": spec(causal=False, offset="start", **ADDED),
    "float mask and softcap": spec(causal=False, offset="start", softcap=3.0, **ADDED),
    "mask of every head": spec(causal=False, offset="start", mask=(1, 4, "s", "t"), mask_dtype="float32"),
    "mask of keys alone": spec(causal=False, offset="start", mask=("b", 1, 1, "t")),
    "mask of a static cache": spec(offset="lengths", mask=("b", 1, "s", LENGTH), mask_dtype="float32"),
}


def stored(
    cache: Cache, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """The buffers of a cache, and what they stand for in float64."""
    shape = (*shape, cache.width)
    if cache.codec == "fp32":
        values = rng.standard_normal(shape).astype(np.float32)
        return [values], values.astype(np.float64)
    top = 127 if cache.codec == "int8" else 7
    codes = rng.integers(-top - 1, top + 1, shape).astype(np.int8)
    scales = (rng.random((*shape[:-1], 1)) / top).astype(np.float32)
    packed = pack(codes, 4) if cache.codec == "int4" else codes
    return [packed, scales], codes.astype(np.float64) * scales


def mask_of(s: Attention, rng: np.random.Generator) -> list[np.ndarray]:
    sizes = {"b": BATCH, "s": STEPS, "t": LENGTH}
    shape = tuple(sizes[d] if isinstance(d, str) else d for d in s.mask)
    if not shape:
        return []
    return [
        rng.random(shape) < 0.7 if s.mask_dtype == "bool" else rng.standard_normal(shape).astype(np.float32)
    ]


def last_seen(s: Attention, lengths: np.ndarray, steps: int, length: int) -> np.ndarray:
    """How many keys each query sees, [batch, steps]."""
    total = {"lengths": lengths}.get(s.offset, np.full(len(lengths), length))
    first = np.zeros(len(lengths), np.int64) if s.offset == "start" else total - steps
    seen = first[:, None] + np.arange(steps) + 1 if s.causal else total[:, None] + np.zeros(steps, np.int64)
    return np.clip(np.minimum(seen, total[:, None]), 0, length)


def expected(
    s: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, mask: list[np.ndarray]
) -> tuple[np.ndarray, float]:
    """The result in float64, and how far float32 may stray from it."""
    k, v = (np.repeat(x, s.query_heads // s.heads, 1) for x in (k, v))
    score = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) * s.scale
    size = np.abs(q).astype(np.float64) @ np.abs(k).transpose(0, 1, 3, 2) * s.scale
    if s.softcap:
        score = np.tanh(score / s.softcap) * s.softcap
    if mask:
        score = np.where(mask[0], score, -np.inf) if s.mask_dtype == "bool" else score + mask[0]
    score = np.where(np.arange(k.shape[2]) < seen[:, None, :, None], score, -np.inf)
    top = score.max(-1, keepdims=True, initial=-np.inf)
    weight = np.exp(score - np.where(np.isfinite(top), top, 0))
    total = weight.sum(-1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    # A score is a sum of `width` products (and a scale, a mask, a maximum taken off): (width + 4) roundings
    # of its terms' size; tanh adds 4 units of the cap. A weight's relative error is that, once above and once
    # below the fraction, and 2 units for exp. The sums over keys and their rescalings add 2 roundings for
    # each key, of a result no larger than the largest value.
    off = (
        (s.key.width + 4)
        * UNIT
        * (size.max(initial=0) + np.abs(mask[0]).max(initial=0) if mask else size.max(initial=0))
    )
    off += 4 * UNIT * s.softcap
    return share @ v, (2 * off + (2 * k.shape[2] + 8) * UNIT) * np.abs(v).max(initial=0)
