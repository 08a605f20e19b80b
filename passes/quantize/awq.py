"""Scale the input channels that matter before rounding to nearest, and clip groups where that helps (AWQ).

    Norm(h, g)                    ->  Norm(h, g / s)
    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose(DequantizeLinear(Q(clip(W * s)), scale)))

`porter.methods.awq` chooses s (one for all matrices that read x) and where to clip. s is folded into what
produces x, where `porter.weights.fold` can do so exactly; else it is 1. Which layers were folded, and why
others were not, is written into the model's metadata (`porter.quantize.awq`).

Two sweeps over the calibration feeds. The first, through the float model, gathers mean|x| and the sum of
x x^T for each layer; folding changes no layer's output, so the scales hold for the model with all of them
folded. The second goes through what rounding makes of that model, layer by layer, and clips and rounds each
for what the rounded layers before it produce. Query, key and value are not clipped. No activations are kept.
Tables and stacks of experts are rounded to nearest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter import formats
from porter.calibrate import Gram, MeanMagnitude, Sweep
from porter.context import Context
from porter.formats import Encoded, Format
from porter.methods import awq
from porter.weights import base, fold, lazy
from porter.weights.layers import Layer, check_feeds, feeds_attention, layers
from porter.weights.select import Matrix


@dataclass(frozen=True)
class Awq(base.WeightPass):
    """Every weight by AWQ; `scale` and `clip` are its two halves.

    Raises PassError PORT-0280 without calibration feeds.
    """

    calibrates: ClassVar[bool] = True

    format: str = "int4-g128"
    scale: bool = True
    clip: bool = True

    def plan(self, model: ir.Model, form: Format, chosen: list[Matrix], context: Context) -> base.Plan:
        """The matrices in the order of the graph, each computed here and kept on disk."""
        check_feeds(context.calibration, str(self))
        found, rest = layers(model.graph, [m for m in chosen if len(m.shape) == 2])
        rest += [m for m in chosen if len(m.shape) == 3]
        if self.scale:
            self._fold(model, form, found, context)
        return self._layers(model, form, found, [_anew(m) for m in rest], context)

    def _fold(self, model: ir.Model, form: Format, found: list[Layer], context: Context) -> None:
        """Choose and fold the scales of every layer that can be folded."""
        sweep, scales, notes = Sweep(model, context.calibration), {}, []
        ways = fold.folds(model.graph, found)
        for way in ways:
            if not way.why:
                scales[way.layer.input] = _scales(way.layer, form, sweep)
            notes.append(f"{way.layer.input.name}: {way.why or 'folded'}")
        for way in ways:
            if not way.why:
                way.apply(scales[way.layer.input])
        model.metadata_props[f"porter.{self.name}"] = "; ".join(notes)

    def _layers(
        self, model: ir.Model, form: Format, found: list[Layer], rest: list[Matrix], context: Context
    ) -> base.Plan:
        sweep, spool = Sweep(model, context.calibration), lazy.Spool()
        for layer in found:
            gram = Gram(layer.channels)
            for x in sweep.advance(layer.input):
                gram.add(x)
            for matrix in map(_anew, layer.matrices):
                values = matrix.read()
                if self.clip and not feeds_attention(matrix):
                    values = awq.clip(values, gram.matrix / max(gram.count, 1), form)
                yield matrix, spool.keep(formats.encode(form, values))
                matrix.forget()
        yield from super().plan(model, form, rest, context)

    def encode(self, form: Format, values: np.ndarray, name: str) -> Encoded:
        """What is not scaled: to nearest."""
        return formats.encode(form, values)


def _anew(matrix: Matrix) -> Matrix:
    """The matrix as folding left it."""
    return dataclasses.replace(matrix, tensor=matrix.value.const_value)


def _scales(layer: Layer, form: Format, sweep: Sweep) -> np.ndarray:
    gram, mean = Gram(layer.channels), MeanMagnitude(layer.channels)
    for x in sweep.advance(layer.input):
        gram.add(x)
        mean.add(x)
    return awq.scales([m.read() for m in layer.matrices], mean.value, gram.matrix / max(gram.count, 1), form)
