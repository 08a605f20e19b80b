"""clean.contrib beside ONNX Runtime running the operators that it rewrites: what tests of both share."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper

from porter.context import Context
from porter.registry import find

KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int16): TensorProto.INT16,
    np.dtype(np.uint16): TensorProto.UINT16,
    np.dtype(ml_dtypes.float8_e4m3fn): TensorProto.FLOAT8E4M3FN,
    np.dtype(ml_dtypes.int4): TensorProto.INT4,
    np.dtype(ml_dtypes.uint4): TensorProto.UINT4,
}
Arrays = Mapping[str, np.ndarray]


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    proto = ir.to_proto(ir.Tensor(array, dtype=ir.DataType(KINDS[array.dtype]), name=name))
    proto.name = name
    return proto


def model_of(
    nodes: list[onnx.NodeProto], feeds: Arrays, weights: Arrays, outputs: Mapping[str, int], opset: int = 24
) -> ir.Model:
    """A model of `nodes` with inputs like `feeds`, of which the last of three axes or more is fixed.

    `outputs` are names and types: their shapes stay open.
    """
    inputs = []
    for name, array in feeds.items():
        shape = [f"{name}_{i}" for i in range(array.ndim)]
        shape[-1:] = [array.shape[-1]] if array.ndim > 2 else shape[-1:]
        inputs.append(helper.make_tensor_value_info(name, KINDS[array.dtype], shape))
    made = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "g", inputs, made, [tensor(n, a) for n, a in weights.items()])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=11))


def run(model: ir.Model, feeds: Arrays) -> dict[str, np.ndarray]:
    """ONNX Runtime, nothing merged; feeds that the model no longer has are left out."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    results = session.run(None, {n: a for n, a in feeds.items() if n in names})
    return dict(zip((o.name for o in session.get_outputs()), results, strict=True))


def compared(
    op: str,
    feeds: Arrays,
    weights: Arrays | None = None,
    inputs: list[str] | None = None,
    outputs: Mapping[str, int] | None = None,
    domain: str = "com.microsoft",
    opset: int = 24,
    **attributes: object,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], ir.Model]:
    """What the operator computes, what its rewriting does, and the rewritten model: no such node is left."""
    weights = weights or {}
    outputs = outputs or {"y": TensorProto.FLOAT}
    node = helper.make_node(op, inputs or [*feeds, *weights], [*outputs], "node", domain=domain, **attributes)
    model = model_of([node], feeds, weights, outputs, opset)
    wanted = run(model, feeds)
    step = find("clean.contrib")()
    assert step.run(model, Context()) == 1
    assert all(n.domain in ("", "porter") for n in model.graph)
    assert step.run(model, Context()) == 0
    onnx.checker.check_model(ir.to_proto(model))
    return wanted, run(model, feeds), model


def close(found: Arrays, wanted: Arrays, terms: int, size: float = 0.0) -> None:
    """Within what summing `terms` products in another order moves: n roundings of at most 2^-24 each (2^-11
    in half precision) of the largest sum of magnitudes, for which `size` stands, or the largest result."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].shape == wanted[name].shape
        unit = 2.0**-11 if wanted[name].dtype == np.float16 else 2.0**-24
        top = max(size, float(np.abs(wanted[name].astype(np.float64)).max(initial=0)))
        difference = np.abs(found[name].astype(np.float64) - wanted[name].astype(np.float64)).max(initial=0)
        assert difference <= (terms + 8) * unit * top, name


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., n] in bytes, the first in the low bits: an independent spelling of the layout."""
    per_byte = 8 // bits
    padded = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, -codes.shape[-1] % per_byte)])
    parts = padded.reshape(*codes.shape[:-1], -1, per_byte).astype(np.uint32)
    return (parts << (np.arange(per_byte) * bits)).sum(-1).astype(np.uint8)
