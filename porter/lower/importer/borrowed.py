"""Operators for which TVM's own ONNX frontend is right: its converters, called one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from porter.lower.importer.precision import in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Value

NAMES = (
    "LayerNormalization",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Softplus",
    "LogSoftmax",
    "Clip",
    "ArgMax",
    "ArgMin",
    "Pad",
    "Conv",
)


def _borrow(name: str) -> Callable[..., Value]:
    def run(imp: Importer, node: ir.Node, *inputs: Value | None) -> Value:
        args = onnx_frontend.onnx_input()
        args.extend(None if v is None else imp.tensor(v) for v in inputs)
        attributes: dict[str, Any] = {a.name: a.value for a in node.attributes.values()}
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.outputs)}
        convert = onnx_frontend._get_convert_map()[name].get_converter(imp.opset)
        result = convert(imp.builder, args, attributes, ({}, {}))
        first = result.fields[0] if isinstance(result, relax.Tuple) else result
        return imp.emit(first)

    return in_float32(run)


TABLE: dict[str, Callable[..., Value]] = {name: _borrow(name) for name in NAMES}
