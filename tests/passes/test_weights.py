"""No pass reads a weight that it does not have to: lazy tensors stay lazy, and joined weights are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.fuse.matmul import joined_name

from porter.context import Context
from porter.pipeline import Pipeline

PASSES = (
    "clean.opset,clean.constants,clean.shapes,clean.constants,clean.identity,"
    "fuse.rms_norm,fuse.rotary,fuse.attention,fuse.swiglu,fuse.matmul"
)


def make_lazy(model: ir.Model, read: list[str]) -> dict[str, np.ndarray]:
    """Every matrix becomes a tensor that notes when it is read."""
    arrays = {}
    for name, value in model.graph.initializers.items():
        if value.const_value.size <= 1000:  # onnx_ir hands what is smaller to ONNX's shape inference
            continue
        tensor = value.const_value
        arrays[name] = tensor.numpy()

        def look(tensor: ir.TensorProtocol = tensor, name: str = name) -> ir.TensorProtocol:
            read.append(name)
            return tensor

        value.const_value = ir.LazyTensor(look, dtype=tensor.dtype, shape=tensor.shape, name=name)
    return arrays


@pytest.mark.parametrize("name", ["llama_sdpa_23", "llama_sdpa_23_opt"])
def test_matrices_are_not_read(name: str, decoder: Callable[[str], ir.Model]) -> None:
    model, read = decoder(name), []
    make_lazy(model, read)
    for step in Pipeline.parse(PASSES).passes:
        step.run(model, Context())
    assert read == []


def test_joined_weights_hold_the_parts_in_order(decoder: Callable[[str], ir.Model]) -> None:
    model, read = decoder("llama_sdpa_23"), []
    arrays = make_lazy(model, read)
    for step in Pipeline.parse(PASSES).passes:
        step.run(model, Context())
    prefix = "m.model.layers.1.self_attn."
    joined = model.graph.initializers[f"{prefix}qkv_proj.weight"].const_value
    small = {n: v.const_value.numpy() for n, v in decoder("llama_sdpa_23").graph.initializers.items()}
    parts = [(small | arrays)[f"{prefix}{k}_proj.weight"] for k in "qkv"]
    assert np.array_equal(joined.numpy(), np.concatenate(parts))
    assert read == [f"{prefix}q_proj.weight"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.0.q_proj.weight", "a.0.k_proj.weight", "a.0.v_proj.weight"], "a.0.qkv_proj.weight"),
        (["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.gate_up_proj.weight"),
        (["self.query.bias", "self.key.bias", "self.value.bias"], "self.query_key_value.bias"),
        (["wq", "wk"], "wq_wk"),
        (["val_67", "val_74"], "val_67_74"),
    ],
)
def test_names(names: list[str], wanted: str) -> None:
    assert joined_name(names) == wanted


def test_a_tied_embedding_is_left_alone() -> None:
    """The head shares its matrix with the embedding, so a second reader of the same x does not pull it in."""
    model = ir.from_onnx_text(
        """<ir_version: 12, opset_import: ["" : 24]>
        g (int64[n] t, float[n, 2] x) => (float[n, 2] e, float[n, 3] y, float[n, 1] z)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[1, 2] w = {1, 2}>
        { e = Gather (table, t) a = Transpose <perm: ints = [1, 0]> (table) y = MatMul (x, a)
          b = Transpose <perm: ints = [1, 0]> (w) z = MatMul (x, b) }"""
    )
    assert Pipeline.parse("fuse.matmul").passes[0].run(model, Context()) == 0
