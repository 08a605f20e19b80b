"""Rotation and key normalization as nodes around an Attention, which leave what it computes as it is.

    Y = Attention(Q, K, V)
    ->
    Y = Attention((Q * n) Rk^T, (K / n) Rk^T, V Rv^T) Rv

since (Rk (q n)) . (Rk (k / n)) = q . k, and the output is a sum of the values with weights that stay. Where
both are wanted the normalizer is in the matrix. Vectors are rows here; of a matrix for each KV head, query
heads take that of the KV head that they read. A normalizer that folds into the constants before (see
`porter.kvgraph.folding`) leaves no node.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.kv.constants import Constants, matrix
from porter.kv.scheme import Scheme
from porter.kvgraph.folding import Fold
from porter.kvgraph.graph import Before, Layer, constant


def turn(layer: Layer, scheme: Scheme, constants: Constants, fold: Fold | None) -> None:
    """Put the nodes around one layer, for the sides of `scheme` that want them; a normalizer goes where
    `fold` says. Raises PassError PORT-0264 when the number of query heads is not known and differs within a
    matrix."""
    size, value_size = (layer.scatter(s).inputs[0].shape[3] for s in ("key", "value"))
    normalizer = constants.normalizer if scheme.normalize else None
    if fold is not None and normalizer is not None:
        fold.apply(normalizer)
        normalizer = None
    rotation = matrix(scheme.key, size, constants.key_first) if scheme.key.rotate else None
    if rotation is not None or normalizer is not None:
        _turn_input(layer.key, 1, rotation, None if normalizer is None else 1 / normalizer.astype(np.float64))
        _turn_input(layer.attention, 0, *(_for_queries(layer, x) for x in (rotation, normalizer)))
    if scheme.value.rotate:
        rotation = matrix(scheme.value, value_size, constants.value_first)
        _turn_input(layer.value, 1, rotation, None)
        _turn_back(layer.attention, _for_queries(layer, rotation))


def _turn_input(node: ir.Node, index: int, rotation: np.ndarray | None, factor: np.ndarray | None) -> None:
    """Multiply an input [B,H,S,D] of a node by `factor` [H,D], and turn it by `rotation` [1 or H, D, D]."""
    x = node.inputs[index]
    before = Before(node, f"{node.outputs[0].name}.new")
    if rotation is None:
        scale = constant(node.graph, "normalizer", factor[:, None].astype(x.dtype.numpy()))
        turned = before.op("Mul", [x, scale], "normalized", x.dtype, x.shape)
    else:
        whole = rotation.swapaxes(-1, -2)
        if factor is not None:
            whole = factor[:, :, None] * whole
        turned = before.op("MatMul", [x, _matrix(node.graph, whole, x)], "turned", x.dtype, x.shape)
    node.replace_input_with(index, turned)


def _turn_back(attention: ir.Node, rotation: np.ndarray) -> None:
    out = attention.outputs[0]
    readers = list(out.uses())
    node = ir.node("MatMul", [out, _matrix(attention.graph, rotation, out)])
    back = node.outputs[0]
    back.name, back.type, back.shape = f"{out.name}.turned_back", out.type, out.shape
    attention.graph.insert_after(attention, node)
    for reader, index in readers:
        reader.replace_input_with(index, back)
    outputs = attention.graph.outputs
    for i in [i for i, value in enumerate(outputs) if value is out]:
        outputs[i] = back
        back.name, out.name = out.name, f"{out.name}.turned"


def _matrix(graph: ir.Graph, rotation: np.ndarray, like: ir.Value) -> ir.Value:
    array = rotation[0] if len(rotation) == 1 else rotation
    return constant(graph, "rotation", array.astype(like.dtype.numpy()))


def _for_queries(layer: Layer, per_head: np.ndarray | None) -> np.ndarray | None:
    """[1 or H, …] -> [1 or Hq, …]."""
    if per_head is None or len(per_head) == 1:
        return per_head
    query, heads = layer.attention.inputs[0], layer.key.inputs[0].shape[1]
    count = query.shape[1] if query.shape is not None else None
    if not isinstance(count, int):
        what = f"the number of query heads must be known, and is {count}"
        raise PassError("PORT-0264", what, where=query.name, hint="let clean.shapes stand before")
    return np.repeat(per_head, count // heads, axis=0)
