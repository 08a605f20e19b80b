"""Attention over a cache in float64: what kernels and graphs are compared with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from porter.kv.cache import Cache


class Attended(NamedTuple):
    """What one row of queries [Hq,S,D] sees in T tokens."""

    output: np.ndarray  # [Hq,S,D]
    weights: np.ndarray  # [Hq,S,T], each row sums to 1
    logits: np.ndarray  # [Hq,S,T] after the soft cap, -inf where nothing is seen


def attend(
    keys: np.ndarray,
    values: np.ndarray,
    queries: np.ndarray,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Attended:
    """Causal attention of float [Hq,S,D] queries, the last S of the T tokens of [H,T,D] keys and values.

    Query head i reads KV head i // (Hq / H). `scale`: 1/sqrt(D) where None. `softcap` c: logits become
    c tanh(l / c). `window` w: each query sees its own token and the w - 1 before (0: all before).
    """
    keys, values, queries = (x.astype(np.float64) for x in (keys, values, queries))
    heads, tokens, size = keys.shape
    shared = queries.shape[0] // heads
    keys, values = np.repeat(keys, shared, axis=0), np.repeat(values, shared, axis=0)
    logits = queries @ keys.swapaxes(-1, -2) * (size**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen_by(queries.shape[1], tokens, window), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return Attended(weights @ values, weights, logits)


def seen_by(queries: int, tokens: int, window: int = 0) -> np.ndarray:
    """Which of T tokens each of the last S sees, bool [S,T]."""
    at = np.arange(tokens - queries, tokens)[:, None]
    seen = np.arange(tokens) <= at
    return seen & (np.arange(tokens) > at - window) if window else seen


def attend_cache(
    cache: Cache, queries: np.ndarray, scale: float | None = None, softcap: float = 0.0, window: int = 0
) -> np.ndarray:
    """Queries [B,Hq,S,D], those of each row's last S tokens -> float64 [B,Hq,S,D], reading the cache as it
    is now: also what these S tokens became in it."""
    rows = [
        attend(cache.keys(row), cache.values(row), queries[row], scale, softcap, window).output
        for row in range(len(queries))
    ]
    return np.stack(rows)
