"""A model ported to a target as `porter convert` does it, without measuring what that costs."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from porter import convert, decoder
from porter.context import Context
from porter.decoder import Decoder
from porter.lower.lower import lower
from porter.lower.plan import Plan
from porter.options import Options, pipeline_text
from porter.pipeline import Pipeline
from porter.target import TargetSpec


def ported(
    model: ir.Model, spec: TargetSpec, folder: Path, weights: str = "", activations: str = "", kv: str = ""
) -> tuple[Plan, Decoder]:
    """The plan of what is written into `folder`, and what the model's inputs and outputs mean."""
    options = Options(target=spec.name, weights=weights, activations=activations, kv=kv)
    pipeline = Pipeline.parse(pipeline_text(spec, options))
    pipeline.run(model, Context(spec, {}, 0))
    known = decoder.recognise(model)
    return lower(model, spec, folder, convert._bounds(model, known)), known
