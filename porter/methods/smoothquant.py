"""SmoothQuant: move part of the activations' spread over channels into the weights.

    W x  =  (W diag(s)) (diag(s)^-1 x)          s_k = max|x_k|^alpha / max_n|W_nk|^(1 - alpha)

Both x/s and W s then round well with one scale for a whole token or row (Xiao et al., 2211.10438). Matrices
that read one x share s: the largest of their weights counts. Nothing is rounded here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def scales(weights: Sequence[np.ndarray], max_abs: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """s, float32 [K] > 0, for matrices [N_i,K] of one input with max|x| [K]; alpha in 0...1.

    A channel that is 0 in the activations or in every weight keeps 1: there is nothing to move.
    """
    inputs = np.asarray(max_abs, np.float64)
    columns = np.max([np.abs(w).max(axis=0) for w in weights], axis=0).astype(np.float64)
    live = (inputs > 0) & (columns > 0)
    inputs, columns = np.where(live, inputs, 1), np.where(live, columns, 1)
    return (inputs**alpha / columns ** (1 - alpha)).astype(np.float32)
