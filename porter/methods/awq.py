"""AWQ: scale the input channels that matter up before rounding, then clip each group where that helps.

    W x  ->  Q(W diag(s)) diag(s)^-1 x          s_k = mean|x_k|^alpha, over sqrt(max s * min s)

A channel that is large on average is rounded relatively finer; alpha in 0, 0.05, ..., 0.95 is the one with
the smallest error of the outputs (Lin et al., 2306.00978, and its reference code's auto_scale, which takes
the error after a whole block). Several matrices that read one x share s, and the sum of their errors decides.
Of the activations only mean|x| and H = E[x x^T] are needed, never themselves: with D = Q(W s)/s - W the error
E|D x|^2 is tr(D H D^T).

Then (auto_clip) each group of a row tries magnitudes clipped at 1, 0.95, ..., 0.5 of its largest and keeps
what makes the smallest error of its own share of the output, d H_gg d^T with H_gg the group's block of H.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from porter import formats
from porter.formats import Format, blocks
from porter.methods import grid

ALPHAS = np.arange(20) / 20
SHRINKS = 1 - np.arange(11) / 20
ROWS = 1024


def scales(
    weights: Sequence[np.ndarray], mean_abs: np.ndarray, hessian: np.ndarray, form: Format
) -> np.ndarray:
    """The best s, float32 [K] > 0, for matrices [N_i,K] of one input with mean|x| [K] and E[x x^T] [K,K].

    s is all ones when no alpha beats rounding as it is. Of a matrix with more than `ROWS` rows, as many
    spread evenly stand for all.
    """
    weights = [_sample(np.asarray(w, np.float32)) for w in weights]
    hessian = np.asarray(hessian, np.float32)
    tried = [candidate(mean_abs, alpha) for alpha in ALPHAS]
    errors = [sum(scaled_error(w, s, hessian, form) for w in weights) for s in tried]
    return tried[int(np.argmin(errors))]


def candidate(mean_abs: np.ndarray, alpha: float) -> np.ndarray:
    """s for one alpha, float32 [K]; a channel that is always 0 counts as 1e-4, as in the reference code."""
    s = np.maximum(np.asarray(mean_abs, np.float64) ** alpha, 1e-4)
    return (s / np.sqrt(s.max() * s.min())).astype(np.float32)


def scaled_error(weight: np.ndarray, s: np.ndarray, hessian: np.ndarray, form: Format) -> float:
    """The mean squared error of the outputs of Q(W s)/s, summed over the rows of W [N,K]."""
    rounded = formats.decode(formats.encode(form, weight * s)) / s
    return grid.output_error(rounded - weight, hessian)


def clip(weight: np.ndarray, hessian: np.ndarray, form: Format) -> np.ndarray:
    """`weight` [N,K] with each group of each row clipped at its best magnitude, float32 [N,K].

    `hessian` [K,K] belongs to the weight's own input: E[x x^T] over s_j s_k when the weight is scaled by s.
    A row whose whole error the clipping of its groups does not lessen stays as it is: groups whose inputs go
    together may make up for each other. (That clipping moves NVFP4's factor, which all rows share, is not
    counted.) So does a matrix whose rows share scales.
    """
    weight = np.asarray(weight, np.float32)
    if form.rows != 1 or not form.scale:
        return weight
    hessian = np.asarray(hessian, np.float32)
    largest = blocks.absmax(weight, form.group)
    best, kept = np.full(largest.shape, np.inf), largest
    for shrink in SHRINKS:
        limit = largest * np.float32(shrink)
        found = _shares(_change(weight, clip_at(weight, limit, form.group), form), hessian, form.group)
        better = found < best
        best, kept = np.where(better, found, best), np.where(better, limit, kept)
    clipped = clip_at(weight, kept, form.group)
    before, after = (_shares(_change(weight, w, form), hessian, 0) for w in (weight, clipped))
    return np.where(after < before, clipped, weight)


def _change(weight: np.ndarray, instead: np.ndarray, form: Format) -> np.ndarray:
    """What rounding another matrix instead changes of the weight."""
    return formats.decode(formats.encode(form, instead)) - weight


def clip_at(weight: np.ndarray, limit: np.ndarray, group: int) -> np.ndarray:
    """`weight` [N,K] with magnitudes at most `limit` [N,G]."""
    bound = blocks.spread(limit, weight.shape[-1], group)
    return np.clip(weight, -bound, bound)


def _shares(error: np.ndarray, hessian: np.ndarray, group: int) -> np.ndarray:
    """d H_gg d^T of each group of each row of `error` [N,K] -> [N,G]."""
    edges = [*blocks.starts(len(hessian), group), len(hessian)]
    parts = [slice(*pair) for pair in itertools.pairwise(edges)]
    found = [np.einsum("ng,ng->n", error[:, p] @ hessian[p, p], error[:, p]) for p in parts]
    return np.stack(found, axis=1)


def _sample(weight: np.ndarray) -> np.ndarray:
    return weight[np.linspace(0, len(weight) - 1, ROWS).astype(int)] if len(weight) > ROWS else weight
