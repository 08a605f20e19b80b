"""How far attention over a cache with an exact copy (`Scheme.copy`) can be from attention over that copy.

Keys have one step s_t for each token, values one for each of their groups; nothing is clipped. For a query q,
softmax scale tau, exact weights p and values v, and p^, v^ as computed over the codes:

    |logit error|   <=  delta = tau ||q||_1 max_t s_t (1/2 + slack)          over the tokens that q sees
    TV(p, p^)       <=  tanh(delta / 2)
    ||v_t - v^_t||  <=  eps_t = sqrt(sum over groups of n_g s_tg^2) (1/2 + slack)
    ||y - y^||      <=  2 TV max_t (||v^_t|| + eps_t) + sum_t p^_t eps_t + rest

Why. A code is within half a step, so a logit is off by at most tau s_t/2 sum_c |q_c|; a soft cap has slope at
most 1 and does not add. With every logit off by at most delta, the worst case moves a set of weight a up and
the rest down; a = 1 / (1 + e^delta) moves the most, tanh(delta/2). The output is off by
sum (p - p^) v + sum p^ (v - v^). With groups of keys the largest step of a token takes s_t's place.

These are of reals. The slack makes them hold for a cache and a kernel of float32, unit roundoff u = 2^-24,
and for bounds that are themselves computed in float32:

- x / s is rounded before it is rounded to a code, and code * s after: 2 * 128 u = 2^-16 steps;
- q.k^ over D products, in any order, and times tau: (D + 4) u sum |q k^| with |k^| <= 127 s, that is
  (D + 4) 2^-17 steps for ||q||_1 (not for values, where it is in `rest`); a soft cap c: 16 u c more;
- exp is right to 8 u, and a logit less the largest is rounded (both below, for what weighs anything: beyond
  -104 exp is 0); the sum of weights and the sum of weighted values have T terms:
  rest = 4 (T + 256) u max_t (||v^_t|| + eps_t);
- sums of D or T terms in the bound itself: everything is enlarged by 1 + (D + T + 16) 2^-23;
- what float32 cannot square: steps of values are taken as at least 2^-60, and delta has 2^-60 more. A bound
  that overflows is infinite or NaN, so ask whether it is within the tolerance, not whether it is beyond.

After the idea of Runtime-Certified Bounded-Error Quantized Attention (2605.20868), whose own formulas these
are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from porter.kv.attention import seen_by
from porter.kv.cache import Cache

ROUNDOFF = 2.0**-24
ROUNDING = 256 * ROUNDOFF
LEAST = 2.0**-60


class Bounds(NamedTuple):
    """What each query's attention cannot exceed, float32 [Hq,S] each."""

    logits: np.ndarray  # max |change of a logit|
    variation: np.ndarray  # total variation of the weights
    output: np.ndarray  # Euclidean norm of the change of the output of a head


def logit_bound(
    queries: np.ndarray, key_steps: np.ndarray, seen: np.ndarray, scale: float, softcap: float = 0.0
) -> np.ndarray:
    """delta [Hq,S] of float32 queries [Hq,S,D] over tokens with steps [H,T]; `seen` bool [S,T]."""
    size, tokens = queries.shape[-1], seen.shape[-1]
    shared = np.repeat(key_steps, len(queries) // len(key_steps), axis=0)[:, None]
    largest = np.where(seen, shared, np.float32(0)).max(axis=-1)
    half = np.float32((0.5 + ROUNDING + (size + 4) * 128 * ROUNDOFF) * enlarged(size, tokens) * scale)
    delta = np.abs(queries).sum(axis=-1, dtype=np.float32) * largest * half
    return delta + np.float32(16 * ROUNDOFF * softcap + LEAST)


def variation_bound(delta: np.ndarray) -> np.ndarray:
    """The most that weights change in total variation when each logit changes by at most delta."""
    return np.minimum(np.tanh(delta / 2) * np.float32(1 + 8 * ROUNDOFF), np.float32(1))


def value_errors(value_steps: np.ndarray, head_size: int, group: int) -> np.ndarray:
    """eps [H,T] of steps float32 [H,T,G] of groups of `group` channels (0: all)."""
    sizes = np.diff([*range(0, head_size, group or head_size), head_size]).astype(np.float32)
    half = np.float32((0.5 + ROUNDING) * enlarged(head_size, 0))
    return np.sqrt((np.square(np.maximum(value_steps, np.float32(LEAST))) * sizes).sum(axis=-1)) * half


def output_bound(
    variation: np.ndarray, weights: np.ndarray, norms: np.ndarray, errors: np.ndarray, head_size: int
) -> np.ndarray:
    """The bound of the output [Hq,S]: of weights p^ [Hq,S,T] (0 where not seen), and for each of the tokens'
    values the norm ||v^|| and eps, [H,T]."""
    tokens = weights.shape[-1]
    shared = len(weights) // len(norms)
    errors = np.repeat(errors, shared, axis=0)[:, None]
    # Tokens that are not seen, or weigh nothing, count too: they can only make the bound larger.
    largest = (np.repeat(norms, shared, axis=0)[:, None] + errors).max(axis=-1)
    moved = (2 * variation + np.float32(4 * (tokens + 256) * ROUNDOFF)) * largest
    return (moved + (weights * errors).sum(axis=-1)) * np.float32(enlarged(head_size, tokens))


def bounds(
    cache: Cache,
    row: int,
    queries: np.ndarray,
    weights: np.ndarray,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Bounds:
    """The bounds of a row's last S queries, float32 [Hq,S,D], with the weights [Hq,S,T] that attention over
    the cache gave them; the rest as in `porter.kv.attention.attend`. Raises ValueError when the scheme has no
    exact copy."""
    scheme, size = cache.scheme, cache.head_size
    if not scheme.copy:
        raise ValueError("only a scheme with an exact copy has bounds")
    seen = seen_by(queries.shape[1], weights.shape[-1], window)
    scale = size**-0.5 if scale is None else scale
    steps = cache.steps("key", row).max(axis=-1)
    delta = logit_bound(cache.query(queries), steps, seen, scale, softcap)
    variation = variation_bound(delta)
    norms = np.linalg.norm(cache.stored("value", row), axis=-1).astype(np.float32)
    errors = value_errors(cache.steps("value", row), size, scheme.value.group)
    return Bounds(delta, variation, output_bound(variation, weights.astype(np.float32), norms, errors, size))


def enlarged(head_size: int, tokens: int) -> float:
    """What a term of the bound is multiplied by for the rounding of its own sums."""
    return 1 + (head_size + tokens + 16) * 2 * ROUNDOFF


def allowed(tolerance: float, head_size: int) -> float:
    """What the norm of an output, summed in float32, is multiplied by to be compared with the bound: the
    tolerance, less what the sum may be too large."""
    return tolerance * (1 - (head_size + 16) * 2 * ROUNDOFF)
