"""Say how the sizes of a decoder's inputs hang together, where its exporter named them one by one.

    attention_mask [batch, s53], input_ids [batch, sequence], past [batch, 2, past, 8]
        -> attention_mask [batch, past + sequence]

A mask has a column for each cached and each new token, and every input as many rows: what calls the model
keeps to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.decoder import recognise
from porter.errors import ModelError
from porter.pipeline import Pass, Promise


@dataclass(frozen=True)
class NameDimensions(Pass):
    """Give a decoder's inputs the dimensions that their meaning implies."""

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, model: ir.Model, context: Context) -> int:
        """The number of inputs whose shape says more than before."""
        try:
            decoder = recognise(model)
        except ModelError:
            return 0  # not a decoder: nothing is known of its inputs
        inputs = {v.name: v for v in model.graph.inputs}
        tokens = inputs[decoder.tokens].shape
        past = next((inputs[c.past].shape for c in decoder.caches), None)
        mask = inputs.get(decoder.mask)
        if mask is None or mask.shape is None or tokens is None or len(tokens) != 2 or len(mask.shape) != 2:
            return 0
        width = tokens[1] if past is None else _sum(past[2], tokens[1])
        shape = ir.Shape([tokens[0], width])
        if decoder.cache == "static" or mask.shape == shape:
            return 0
        mask.shape = shape
        return 1


def _sum(past: int | ir.SymbolicDim, new: int | ir.SymbolicDim) -> int | str:
    if isinstance(past, int) and isinstance(new, int):
        return past + new
    return " + ".join(str(d if isinstance(d, int) else d.value) for d in (past, new))
