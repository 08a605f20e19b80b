"""Round weights to a format, each to nearest.

    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose(DequantizeLinear(Q[N,K], scale)))
    MatMul(x, W[K,N])             ->  MatMul(x, Transpose(DequantizeLinear(Q[N,K], scale)))
    Gemm(x, W[N,K], transB=1)     ->  Gemm(x, DequantizeLinear(Q[N,K], scale), transB=1)
    Gemm(x, W[K,N])               ->  Gemm(x, DequantizeLinear(Q[N,K], scale), transB=1)
    Gather(W[N,K], ids)           ->  Gather(DequantizeLinear(Q[N,K], scale), ids)

W ~ (Q - zero) * scale, with a scale for each row or group of a row. How codes and scales are chosen:
`porter.formats.rounding`. Which weights: `porter.weights.select`. What stands in the graph for formats
that DequantizeLinear does not know: `porter.weights.store`. Codes and scales are computed when somebody reads
them, a weight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from porter.formats import Encoded, Format
from porter.weights.base import WeightPass


@dataclass(frozen=True)
class RoundToNearest(WeightPass):
    """Every weight to the nearest code (RTN)."""

    def encode(self, form: Format, values: np.ndarray, name: str) -> Encoded:
        """`porter.formats.encode`, as kernels compute it."""
        from porter.lower.casting import encode  # TVM takes a second to import

        return encode(form, values)
