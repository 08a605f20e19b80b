"""What a model's weights and activations are quantized by, in words."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from porter.match import attribute

_WEIGHTS = {  # operator -> the input that holds its codes
    "DequantizeLinear": 0,
    "DynamicQuantizeMatMul": 1,
    "GatherBlockQuantized": 0,
    "MatMulBlockQuantizedFp8Weight": 1,
    "MatMulBnb4": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "MatMulNBits": 1,
    "QLinearMatMul": 3,
}
_ACTIVATIONS = ("QuantizeLinear", "DynamicQuantizeLinear")
_NAMED = {0: "fp4", 1: "nf4"}


def quantized_by(model: ir.Model) -> list[str]:
    """`MatMulNBits 4-bit block 32, 28 weights` and the like, the most frequent first; empty without any."""
    weights: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        if node.op_type in _ACTIVATIONS:
            activations[f"{node.op_type} to {_type_made(node)}"] += 1
        index = _WEIGHTS.get(node.op_type)
        if index is not None and index < len(node.inputs):
            tensor = _stored(node.inputs[index])
            if tensor is not None:
                weights[f"{node.op_type} {_kind(node, tensor)}"] += 1
    lines = [_counted(name, n, "weight") for name, n in weights.most_common()]
    return lines + [_counted(name, n, "activation") for name, n in activations.most_common()]


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that a value is, perhaps after a Reshape."""
    while value is not None and value.producer() is not None and value.producer().op_type in ("Reshape",):
        value = value.producer().inputs[0]
    return None if value is None else ir.convenience.get_const_tensor(value)


def _kind(node: ir.Node, codes: ir.TensorProtocol) -> str:
    bits, block = attribute(node, "bits", None), attribute(node, "block_size", 0)
    name = codes.dtype.name.lower()
    if node.op_type == "MatMulNBits" or (node.op_type == "GatherBlockQuantized" and name == "uint8"):
        name = f"{4 if bits is None else bits}-bit"
    if node.op_type == "MatMulBnb4":
        name = _NAMED.get(int(attribute(node, "quant_type", 0)), "4-bit")
    if block:
        return f"{name} block {block}"
    if node.op_type == "DequantizeLinear":
        scale = _stored(node.inputs[1])
        return f"{name} per {'tensor' if scale is not None and scale.size == 1 else 'channel'}"
    return name


def _type_made(node: ir.Node) -> str:
    if node.op_type == "DynamicQuantizeLinear":
        return "uint8"
    made = node.outputs[0].dtype
    asked = attribute(node, "output_dtype", 0)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    found = zero.dtype if zero is not None and zero.dtype is not None else made
    if asked:
        found = ir.DataType(int(asked))
    return (found or ir.DataType.UINT8).name.lower()


def _counted(name: str, count: int, noun: str) -> str:
    return f"{name}, {count} {noun}{'s' if count > 1 else ''}"
