"""Fit weights with zero points that need be no code, by half-quadratic splitting (HQQ).

    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose((Q - zero) * scale))

As `quantize.rtn`, but with unsigned codes and a float32 zero point for each group, which `porter.methods.hqq`
chooses; `int4-g32` and `uint4-g32` mean the same. Needs no activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from porter.context import Context
from porter.formats import Encoded, Format
from porter.methods import grid, hqq
from porter.weights.base import WeightPass


@dataclass(frozen=True)
class HalfQuadratic(WeightPass):
    """Every weight by HQQ. Raises PassError PORT-0282 for a format without free scales."""

    format: str = "uint4-g64"

    def form(self, context: Context) -> Format:
        """Unsigned codes with real zero points."""
        return grid.asymmetric(super().form(context))

    def encode(self, form: Format, values: np.ndarray, name: str) -> Encoded:
        """`porter.methods.hqq.quantize`."""
        return hqq.quantize(values, form)
