"""Move part of the activations' spread over channels into the weights, so that both round well (SmoothQuant).

    Norm(h, g)                    ->  Norm(h, g / s)
    MatMul(x, Transpose(W[N,K]))  ->  MatMul(x, Transpose((W * s)[N,K]))

Nothing is rounded: `quantize.rtn` and `quantize.activations` come after. `porter.methods.smoothquant` chooses
s from the largest |x| of each channel over the calibration feeds, which run through the model once; nothing
else is kept of x. Matrices that read x share s, chosen or not. s is folded into what produces x where
`porter.weights.fold` can do so exactly, else the layer stays as it is; the model's metadata
(`porter.quantize.smoothquant`) says which and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter.calibrate import MaxMagnitude, Sweep
from porter.context import Context
from porter.methods import smoothquant
from porter.pipeline import Pass, Promise
from porter.weights import fold, select
from porter.weights.layers import check_feeds, layers


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """`alpha` is how much of the spread moves: 0 none of the activations', 1 all of it.

    `skip` lists roles and patterns of names, as in `quantize.rtn`.
    """

    promise: ClassVar[Promise] = Promise.LOSSY  # g / s and W * s are rounded
    calibrates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "fuse.matmul")

    alpha: float = 0.5
    skip: tuple[str, ...] = ("embedding", "head")

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(word for word in self.skip if word))
        if self.alpha < 0:
            raise ValueError(f"alpha is a share of the spread, not {self.alpha}")

    def run(self, model: ir.Model, context: Context) -> int:
        """Fold; the count is of layers. Raises PassError PORT-0256, PORT-0280."""
        check_feeds(context.calibration, str(self))
        found, _ = layers(model.graph, select.choose(model.graph, self.skip, where=str(self)))
        ways = fold.folds(model.graph, [each for each in found if len(each.matrices[0].shape) == 2])
        sweep = Sweep(model, context.calibration)
        scales = [None if way.why else self._scales(way, sweep) for way in ways]
        for way, s in zip(ways, scales, strict=True):
            if s is not None:
                way.apply(s)
        notes = (f"{way.layer.input.name}: {way.why or 'folded'}" for way in ways)
        model.metadata_props[f"porter.{self.name}"] = "; ".join(notes)
        return sum(not way.why for way in ways)

    def _scales(self, way: fold.Fold, sweep: Sweep) -> np.ndarray:
        largest = MaxMagnitude(way.layer.channels)
        for x in sweep.advance(way.layer.input):
            largest.add(x)
        return smoothquant.scales([m.read() for m in way.readers], largest.value, self.alpha)
