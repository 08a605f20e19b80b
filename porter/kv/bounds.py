"""How far attention over a cache with an exact copy (`Scheme.copy`) can be from attention over that copy.

Keys have one step s_t for each token, values one for each of their groups; nothing is clipped. For a query q,
softmax scale tau, exact weights p and values v, and p^, v^, y^ as computed over the codes:

    |logit error|   <=  delta = tau ||q||_1 max_t s_t (1/2 + slack)          over the tokens that q sees
    ||v_t - v^_t||  <=  eps_t = sqrt(sum over groups of n_g s_tg^2) (1/2 + slack)
    ||y - y^||      <=  m + sinh(delta) (sqrt(V) + sqrt(W)) + rest

    m = sum_t p^_t eps_t,  V = sum_t p^_t ||v^_t||^2 - ||y^||^2,  W = sum_t p^_t eps_t^2 - m^2

Why. A code is within half a step, so a logit is off by at most tau s_t/2 sum_c |q_c|; a soft cap has slope
at most 1 and does not add. Let numbers d_t have the mean 0 and the variance V under p^. If every logit may be
off by at most delta, their mean under p is largest when those of a set of weight a go up by delta and the
rest down: with c = sum of p^ d over the set, 2 c sinh(delta) / (a e^delta + (1-a) e^-delta). By Cauchy and
Schwarz c^2 <= a (1-a) V, and the largest of what that leaves, at a = 1 / (1 + e^(2 delta)), is
sinh(delta) sqrt(V): it is met by two tokens. Then y - y^ = sum p (v^ - y^) + sum p (v - v^): the first, in
its own direction, has at most the variance V; the second is at most sum p eps = m + sum p (eps - m). With
groups of keys the largest step of a token takes s_t's place. V is that of the values around their mean:
values that are alike, and those that weigh nothing, cost nothing.

These are of reals. The slack makes them hold for a cache and a kernel of float32, unit roundoff u = 2^-24,
and for bounds that are themselves computed in float32:

- x / s is rounded before it is rounded to a code, and code * s after: 2 * 128 u = 2^-16 steps;
- q.k^ over D products, in any order, and times tau: (D + 4) u sum |q k^| with |k^| <= 127 s, that is
  (D + 4) 2^-17 steps for ||q||_1; a soft cap c: 16 u c more;
- exp is right to 8 u, a logit less the largest is rounded (104 u for what weighs anything: beyond -104 exp is
  0), and so are the factors by which a running sum fades, one for some tokens each: weights are those of
  logits that are off by (T + 256) u more;
- weights that exp lets vanish are below 2^-120 of the largest: 2 T 2^-120 e^(2 delta) max_t (||v_t||), where
  ||v_t|| <= (2 L + 1) eps_t with L the largest code;
- the sum of weights and the sum of weighted values have T terms: rest = 4 (T + 256) u sqrt(sum p^ ||v^||^2);
- V and W are differences: (D + T + 16) 2^-21 of what is taken from is added;
- sums of D or T terms in the bound itself: everything is enlarged by 1 + (D + T + 16) 2^-23;
- what float32 cannot square: steps of values are taken as at least 2^-60, and delta has 2^-60 more. A bound
  that overflows is infinite or NaN, so ask whether it is within the tolerance, not whether it is beyond.

sinh(delta) is taken as delta e^(delta^2 / 6), which is no less (Euler's product) and loses no digits.

After the idea of Runtime-Certified Bounded-Error Quantized Attention (2605.20868), whose own formulas these
are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from porter.formats.elements import ELEMENTS
from porter.kv.attention import seen_by
from porter.kv.cache import Cache

ROUNDOFF = 2.0**-24
ROUNDING = 256 * ROUNDOFF
LEAST = 2.0**-60
VANISHED = 2.0**-119


class Bounds(NamedTuple):
    """What each query's attention cannot exceed, float32 [Hq,S] each."""

    logits: np.ndarray  # max |change of a logit|
    output: np.ndarray  # Euclidean norm of the change of the output of a head


class Moments(NamedTuple):
    """What weights p^ make of a query's values, float32 [Hq,S] each."""

    error: np.ndarray  # sum p^ eps
    error_square: np.ndarray  # sum p^ eps^2
    square: np.ndarray  # sum p^ ||v^||^2
    norm: np.ndarray  # ||sum p^ v^||


def logit_bound(
    queries: np.ndarray, key_steps: np.ndarray, seen: np.ndarray, scale: float, softcap: float = 0.0
) -> np.ndarray:
    """delta [Hq,S] of float32 queries [Hq,S,D] over tokens with steps [H,T]; `seen` bool [S,T]."""
    size, tokens = queries.shape[-1], seen.shape[-1]
    shared = np.repeat(key_steps, len(queries) // len(key_steps), axis=0)[:, None]
    largest = np.where(seen, shared, np.float32(0)).max(axis=-1)
    factor = np.float32(key_half(size) * abs(scale) * enlarged(size, tokens))
    delta = np.abs(queries).sum(axis=-1, dtype=np.float32) * largest * factor
    return delta + np.float32((tokens + 256) * ROUNDOFF + 16 * ROUNDOFF * softcap + LEAST)


def moved_bound(delta: np.ndarray) -> np.ndarray:
    """At least sinh(delta): by how many standard deviations a mean moves when each logit does by delta."""
    with np.errstate(over="ignore"):
        return delta * np.exp(delta * delta / np.float32(6)) * np.float32(1 + 16 * ROUNDOFF)


def value_errors(value_steps: np.ndarray, head_size: int, group: int) -> np.ndarray:
    """eps [H,T] of steps float32 [H,T,G] of groups of `group` channels (0: all)."""
    sizes = np.diff([*range(0, head_size, group or head_size), head_size]).astype(np.float32)
    squares = np.square(np.maximum(value_steps, np.float32(LEAST))) * sizes
    return np.sqrt(squares.sum(axis=-1)) * np.float32(value_half(head_size))


def output_bound(
    delta: np.ndarray, moments: Moments, largest: np.ndarray, head_size: int, tokens: int, element: str
) -> np.ndarray:
    """The bound of the output [Hq,S]: of delta, and of `largest`, the largest eps of a token, [Hq,1]."""
    room = np.float32((head_size + tokens + 16) * 8 * ROUNDOFF)

    def deviation(square: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(square - mean * mean, np.float32(0)) + square * room)

    spread = deviation(moments.square, moments.norm) + deviation(moments.error_square, moments.error)
    rest = np.sqrt(moments.square) * np.float32(4 * (tokens + 256) * ROUNDOFF)
    with np.errstate(over="ignore", invalid="ignore"):
        vanished = np.exp(2 * delta) * largest * np.float32(tokens * VANISHED * longest(element))
        total = moments.error + moved_bound(delta) * spread + rest + vanished
        return total * np.float32(enlarged(head_size, tokens))


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
    tokens, shared = weights.shape[-1], len(queries) // cache.heads
    weights = weights.astype(np.float32)
    seen = seen_by(queries.shape[1], tokens, window)
    scale = size**-0.5 if scale is None else scale
    steps = cache.steps("key", row).max(axis=-1)
    delta = logit_bound(cache.query(queries), steps, seen, scale, softcap)
    values = np.repeat(cache.stored("value", row), shared, axis=0)
    errors = np.repeat(value_errors(cache.steps("value", row), size, scheme.value.group), shared, axis=0)
    columns = np.stack([errors, errors * errors, np.square(values).sum(axis=-1)], axis=-1)
    means = np.moveaxis(weights @ columns, -1, 0)
    moments = Moments(*means, np.linalg.norm(weights @ values, axis=-1))
    largest = errors.max(axis=-1, keepdims=True)
    return Bounds(delta, output_bound(delta, moments, largest, size, tokens, scheme.value.element))


def key_half(head_size: int) -> float:
    """Half a step of a key, and what rounding adds."""
    return 0.5 + ROUNDING + (head_size + 4) * 128 * ROUNDOFF


def value_half(head_size: int) -> float:
    """Half a step of a value, and what rounding adds."""
    return (0.5 + ROUNDING) * enlarged(head_size, 0)


def longest(element: str) -> float:
    """The length of a token's values is at most so many of its eps."""
    return 2 * float(ELEMENTS[element].largest) + 1


def enlarged(head_size: int, tokens: int) -> float:
    """What a term of the bound is multiplied by for the rounding of its own sums."""
    return 1 + (head_size + tokens + 16) * 2 * ROUNDOFF


def allowed(tolerance: float, head_size: int) -> float:
    """What the norm of an output, summed in float32, is multiplied by to be compared with the bound: the
    tolerance, less what the sum may be too large."""
    return tolerance * (1 - (head_size + 16) * 2 * ROUNDOFF)
