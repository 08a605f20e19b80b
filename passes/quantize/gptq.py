"""Round weights column by column, the columns not yet rounded making up for each error (GPTQ).

    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose(DequantizeLinear(Q[N,K], scale)))

Stored as `quantize.rtn` stores them; `porter.methods.gptq` chooses codes. It needs the second moments of each
x: the calibration feeds run through the model layer by layer, each layer seeing what the rounded layers
before it produce. Of x only the sum of x x^T is kept. Matrices that read one x share it; a stack of experts
has one for each expert where x comes apart by expert, else one for all. Tables are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter import formats
from porter.calibrate import Gram, Sweep
from porter.context import Context
from porter.formats import Encoded, Format
from porter.methods import gptq
from porter.weights import base, lazy
from porter.weights.layers import Layer, check_feeds, layers, products
from porter.weights.select import Matrix


@dataclass(frozen=True)
class Gptq(base.WeightPass):
    """Every weight by GPTQ, in the format's groups.

    `damp` is added to the diagonal of the second moments, as a share of its mean. `act_order` rounds the
    channels of largest moment first; it makes scales static, as `static_groups` does. Raises PassError
    PORT-0280 without calibration feeds, PORT-0281 when the moments have no inverse.
    """

    calibrates: ClassVar[bool] = True

    format: str = "int4-g128"
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def plan(self, model: ir.Model, form: Format, chosen: list[Matrix], context: Context) -> base.Plan:
        """The matrices in the order of the graph, each computed here and kept on disk."""
        check_feeds(context.calibration, str(self))
        found, tables = layers(model.graph, chosen)
        return self._layers(model, form, found, tables, context)

    def _layers(
        self, model: ir.Model, form: Format, found: list[Layer], tables: list[Matrix], context: Context
    ) -> base.Plan:
        sweep, spool = Sweep(model, context.calibration), lazy.Spool()
        for layer in found:
            moments = _Moments(layer)
            for x in sweep.advance(layer.input):
                moments.add(x)
            for matrix in layer.matrices:
                yield matrix, spool.keep(self._quantize(form, matrix, moments))
                matrix.forget()
        yield from super().plan(model, form, tables, context)

    def _quantize(self, form: Format, matrix: Matrix, moments: _Moments) -> Encoded:
        options = {"damp": self.damp, "act_order": self.act_order, "static_groups": self.static_groups}
        stack = len(matrix.shape) == 3
        hessian = [moments.of(matrix, e) for e in range(matrix.shape[0])] if stack else moments.of(matrix, 0)
        return gptq.quantize(matrix.read(), hessian, form, **options)

    def encode(self, form: Format, values: np.ndarray, name: str) -> Encoded:
        """Tables, which no activation multiplies: to nearest."""
        return formats.encode(form, values)


class _Moments:
    """The mean of x x^T for a layer; for each expert where the product is with the stack itself."""

    def __init__(self, layer: Layer) -> None:
        self._all = Gram(layer.channels)
        stacks = [m for m in layer.matrices if len(m.shape) == 3 and all(p.direct for p in products(m))]
        self._experts = [Gram(layer.channels) for _ in range(stacks[0].shape[0])] if stacks else []

    def add(self, x: np.ndarray) -> None:
        """Add one feed's x [..., K]."""
        self._all.add(x)
        if x.ndim > 2 and x.shape[-3] == len(self._experts):
            for e, gram in enumerate(self._experts):
                gram.add(x[..., e, :, :])

    def of(self, matrix: Matrix, expert: int) -> np.ndarray:
        """The moments [K,K] that one matrix, or one of a stack, is rounded under."""
        own = len(matrix.shape) == 3 and len(self._experts) == matrix.shape[0]
        gram = self._experts[expert] if own and self._experts[expert].count else self._all
        return gram.matrix / max(gram.count, 1)
