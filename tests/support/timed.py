"""Decoders put into a chip's program as a conversion does, without machine code or weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import tvm
from decoders import FLOAT, Builder

from porter import convert, decoder
from porter.context import Context
from porter.estimate.lowered import Lowered
from porter.lower import build, plan, scheduled
from porter.lower.blocks.profile import Profile
from porter.lower.blocks.templates import Chip
from porter.lower.importer.program import Importer
from porter.lower.lower import _interface
from porter.lower.tile import schedule as tile
from porter.options import Options, pipeline_text
from porter.pipeline import Pipeline
from porter.target import TargetSpec


class Unmade(Builder):
    """Makes decoders whose large weights have a shape and no numbers, so that they may be of any size."""

    def noise(self, name: str, *shape: int, scale: float | None = None) -> ir.Value:
        """A weight that cannot be read."""
        if name not in self.weights:
            sizes = ir.Shape(shape)
            tensor = ir.LazyTensor(self._unread, dtype=FLOAT, shape=sizes, name=name)
            self.weights[name] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(FLOAT), shape=sizes
            )
        return self.weights[name]

    @staticmethod
    def _unread() -> ir.Tensor:
        raise AssertionError("a weight was read")


@dataclass(frozen=True)
class Made:
    """The scheduled module, what a bundle would keep of it, and how many launches the plan has."""

    module: tvm.IRModule
    lowered: Lowered
    launches: int


def made(model: ir.Model, spec: TargetSpec) -> Made:
    """`model` after the target's own passes, scheduled."""
    pipeline = Pipeline.parse(pipeline_text(spec, Options(target=spec.name)))
    pipeline.run(model, Context(spec, {}, 0))
    found = decoder.recognise(model)
    return program(model, found, spec, convert._bounds(model, found))


def program(model: ir.Model, found: decoder.Decoder, spec: TargetSpec, bounds: dict[str, int]) -> Made:
    """A model that has been through its passes, scheduled."""
    imported = Importer(model, bounds, Chip(Profile(spec))).run()
    planned = build.planned(imported.module, build.tvm_target(spec), imported.sources)
    inputs = [_interface(v) for v in model.graph.inputs if not v.is_initializer()]
    outputs = [_interface(v) for v in model.graph.outputs]
    described = plan.Plan(imported.bounds, inputs, outputs, imported.in_place)
    plan.extract(planned.module, described, imported.parameters, planned.nodes)
    chips = tile.program(planned.module, spec, imported.bounds)
    step = scheduled.step(chips.module, spec, chips.control)
    told = {"inputs": described.inputs, "bounds": described.bounds}
    return Made(chips.module, Lowered(found, spec, told, step), len(described.launches))
