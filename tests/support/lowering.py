"""Lower small models in memory and run them beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from porter import target
from porter.lower import build
from porter.lower.importer.program import Imported, Importer
from porter.lower.kernels.define import tvm

BOUNDS = {"b": 4, "s": 8, "n": 16, "m": 16, "past": 32, "t": 40}
Feeds = dict[str, np.ndarray]


def model(text: str, opset: int = 24) -> ir.Model:
    """A model of ONNX text; a header is added to a text without one."""
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 10, opset_import: ["" : {opset}, "porter" : 1]>\n{text}'
    return ir.from_proto(onnx.parser.parse_model(text))


def with_weights(source: ir.Model, **arrays: np.ndarray) -> ir.Model:
    """The model with some of its inputs made constants."""
    graph = source.graph
    for value in [v for v in graph.inputs if v.name in arrays]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[value.name], name=value.name)
        graph.initializers.add(value)
    return source


def imported(source: ir.Model, bounds: dict[str, int] | None = None) -> Imported:
    """What the importer makes of a model."""
    return Importer(source, BOUNDS if bounds is None else bounds).run()


def compiled(source: ir.Model, bounds: dict[str, int] | None = None) -> Callable[[Feeds], list[np.ndarray]]:
    """A function from feeds to outputs, in the model's order; its attribute `plan` is what was built."""
    found = imported(source, bounds)
    spec = build.tvm_target(target.load("host"))
    planned = build.planned(found.module, spec, found.sources)
    machine = tvm.relax.VirtualMachine(build.compiled(planned.module, spec), tvm.cpu())
    weights = [tvm.runtime.tensor(np.require(p.make(), requirements="C")) for p in found.parameters]
    names = [v.name for v in source.graph.inputs if not v.is_initializer()]

    def run(feeds: Feeds) -> list[np.ndarray]:
        return [r.numpy() for r in machine["main"](*[tvm.runtime.tensor(feeds[n]) for n in names], *weights)]

    run.imported, run.planned = found, planned  # type: ignore[attr-defined]
    return run


def reference(source: ir.Model) -> Callable[[Feeds], list[np.ndarray]]:
    """The same from ONNX Runtime, operator by operator."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(source).SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)
