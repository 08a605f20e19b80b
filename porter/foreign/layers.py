"""Norms, activations and products that com.microsoft fuses with what stands beside them, taken apart."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from porter.foreign.editor import Editor


def _simplified_layer_norm(edit: Editor) -> None:
    """The same formula as RMSNormalization."""
    x, scale = edit.inputs(2)
    edit.refuse_outputs(1)
    made = edit.op(
        "RMSNormalization", x, scale, axis=edit.attribute("axis", -1), epsilon=_epsilon(edit, 1e-5),
        stash_type=edit.attribute("stash_type", 1),
    )  # fmt: skip
    edit.replace(made)


def _epsilon(edit: Editor, default: float) -> float:
    return float(edit.attribute("epsilon", default))


def _skip_simplified_layer_norm(edit: Editor) -> None:
    x, skip, gamma, bias = edit.inputs(4)
    total = _skipped(edit, x, skip, bias)
    y = edit.op("RMSNormalization", total, gamma, axis=-1, epsilon=_epsilon(edit, 1e-12))
    edit.replace(y, None, None, total)


def _skip_layer_norm(edit: Editor) -> None:
    x, skip, gamma, beta, bias = edit.inputs(5)
    total = _skipped(edit, x, skip, bias)
    y = edit.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=_epsilon(edit, 1e-12))
    edit.replace(y, None, None, total)


def _skipped(edit: Editor, x: ir.Value, skip: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x + skip (+ bias); the statistics that a kernel leaves behind have no other use than in training."""
    if edit.wanted(1) or edit.wanted(2):
        raise edit.refusal("its mean or deviation is read, and porter's form does not compute it")
    total = edit.op("Add", x, skip)
    return total if bias is None else edit.op("Add", total, bias)


def _embed_layer_norm(edit: Editor) -> None:
    """Words, positions from 0 (or as given) and segments, added up and normalized."""
    ids, segments, words, places, kinds, gamma, beta, mask, positions = edit.inputs(9)
    total = edit.op("Gather", words, ids)
    if positions is None:
        rows = edit.op("Slice", places, edit.ints(0), edit.length(ids, 1), edit.ints(0))
        rows = edit.op("Unsqueeze", rows, edit.ints(0))
    else:
        rows = edit.op("Gather", places, positions)
    total = edit.op("Add", total, rows)
    if kinds is not None:
        total = edit.op("Add", total, edit.op("Gather", kinds, segments))
    y = edit.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=_epsilon(edit, 1e-12))
    counted = None
    if edit.wanted(1) and mask is not None:
        wide = edit.op("Cast", mask, to=ir.DataType.INT64)
        counted = edit.op("ReduceSum", wide, edit.ints(1), keepdims=0)
        counted = edit.op("Cast", counted, to=ir.DataType.INT32)
    elif edit.wanted(1):
        raise edit.refusal("its mask index is read, and there is no mask")
    edit.replace(y, counted, total)


def _gelu(approximate: str) -> Callable[[Editor], None]:
    def rewrite(edit: Editor) -> None:
        x, bias = edit.inputs(2)
        edit.replace(edit.op("Gelu", x if bias is None else edit.op("Add", x, bias), approximate=approximate))

    return rewrite


def _quick_gelu(edit: Editor) -> None:
    """x * sigmoid(alpha * x), written out: ONNX Runtime 1.31 has Swish in opset 24 only."""
    (x,) = edit.inputs(1)
    alpha = float(edit.attribute("alpha", 1.702))
    scaled = x if alpha == 1.0 else edit.op("Mul", x, edit.number(alpha, x))
    edit.replace(edit.op("Mul", x, edit.op("Sigmoid", scaled)))


def _fused_matmul(edit: Editor) -> None:
    """alpha * a' b', where ' swaps the last two axes."""
    a, b = edit.inputs(2)
    if edit.attribute("transBatchA", 0) or edit.attribute("transBatchB", 0):
        raise edit.refusal("batches that are transposed")
    sides = [_turned(edit, v) if edit.attribute(n, 0) else v for v, n in ((a, "transA"), (b, "transB"))]
    y, alpha = edit.op("MatMul", *sides), float(edit.attribute("alpha", 1.0))
    edit.replace(y if alpha == 1.0 else edit.op("Mul", y, edit.number(alpha, a)))


def _turned(edit: Editor, value: ir.Value) -> ir.Value:
    """With its last two axes swapped; a vector is left as it is."""
    rank = edit.rank(value)
    if rank < 2:
        return value
    return edit.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


ACTIVATIONS = frozenset({"Relu", "Tanh", "Sigmoid"})


def _fused_gemm(edit: Editor) -> None:
    kind = str(edit.attribute("activation", ""))
    if kind not in (*ACTIVATIONS, ""):
        raise edit.refusal(f"the activation {kind}")
    plain = {n: edit.attribute(n) for n in ("alpha", "beta", "transA", "transB")}
    y = edit.op("Gemm", *edit.inputs(3), **plain)
    edit.replace(edit.op(kind, y) if kind else y)


TABLE: dict[str, Callable[[Editor], None]] = {
    "SimplifiedLayerNormalization": _simplified_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "Gelu": _gelu("none"),
    "BiasGelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "QuickGelu": _quick_gelu,
    "FusedMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
}
