"""Models around a weight, for tests of what stores weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FORMATS = (
    "int8", "int4-r", "int3", "int2", "uint8", "uint4", "uint3", "uint2",
    "int8-g32", "int4-g32", "int4-g5", "int3-g32", "int2-g16", "uint4-g32", "uint3-g7", "uint2-g32",
    "int8-t", "uint4-t", "int3-t", "int4-b8", "int3-b8", "fp8-e4m3fn-b128", "fp8-e3m4-b16", "uint8-b8",
    "uint4-b8", "uint2-b3",
    "fp8-e4m3fn", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3fnuz", "fp8-e5m2fnuz", "fp8-e4m3b11fnuz", "fp8-e3m4",
    "fp8-e4m3fn-g16", "fp8-e4m3fn-t", "fp8-e3m4-t",
    "mxfp8", "mxfp8-e5m2", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp4", "mxint8", "nvfp4", "mx9", "mx6",
    "fp16", "bf16",
)  # fmt: skip
"""Every name of a format, and every way to share scales, in and out of ONNX's types."""


def model_of(text: str, opset: int = 24, **weights: np.ndarray) -> ir.Model:
    """A model from its ONNX text, where `weights` names the initializers."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    for name, array in weights.items():
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    return model


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
