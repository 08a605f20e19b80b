"""Fit weights by weighted least squares, as llama.cpp's k-quants do.

    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose((Q - zero) * scale))       uint4-g32 and the like
                                  ->  MatMul(x, Transpose(Q * scale))                int4-g32 and the like

As `quantize.rtn`, but `porter.methods.kquant` chooses scales, and zero points that need be no code. Needs no
activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from porter.context import Context
from porter.formats import Encoded, Format
from porter.methods import grid, kquant
from porter.weights.base import WeightPass


@dataclass(frozen=True)
class KQuant(WeightPass):
    """Every weight by the k-quant fit. Raises PassError PORT-0282 for a format without free scales."""

    format: str = "uint4-g32"

    def form(self, context: Context) -> Format:
        """With real zero points where the format has zero points."""
        form = super().form(context)
        grid.check_fits(form)
        return grid.asymmetric(form) if form.zero else form

    def encode(self, form: Format, values: np.ndarray, name: str) -> Encoded:
        """`porter.methods.kquant.quantize`."""
        return kquant.quantize(values, form)
