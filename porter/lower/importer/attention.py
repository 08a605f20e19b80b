"""Attention, RotaryEmbedding, RMSNormalization and TensorScatter: the operators that have kernels of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Quantized, Value, Weight
from porter.lower.kernels import attention as kernels
from porter.lower.kernels.cache import append
from porter.lower.kernels.norm import rms_norm
from porter.lower.kernels.rotary import rotary

op = relax.op


def _attention(imp: Importer, node: ir.Node, q: Value, k: Value, v: Value, mask: Value | None = None,
               past_key: Value | None = None, past_value: Value | None = None,
               lengths: Value | None = None) -> tuple[Value | None, ...]:  # fmt: skip
    if attribute(node, "qk_matmul_output_mode", 0) and len(node.outputs) > 3:
        raise TargetError(
            "PORT-0415", "an Attention that returns its scores has no lowering", where=imp.current
        )
    query, folded = _four_d(imp, node, imp.tensor(q), "q_num_heads")
    key, value = (
        t if isinstance(t, Quantized) else _four_d(imp, node, imp.tensor(t), "kv_num_heads")[0]
        for t in (k, v)
    )
    if past_key is not None:
        key = imp.emit(op.concat([imp.tensor(past_key), key], axis=2))
        value = imp.emit(op.concat([imp.tensor(past_value), value], axis=2))
    (keys, k_args, k_dims), (values, v_args, _) = _cache(imp, key), _cache(imp, value)
    batch, heads, steps, width = imp.shape(query)
    causal = bool(attribute(node, "is_causal", 0))
    offset = "lengths" if lengths is not None else ("end" if past_key is not None else "start")
    spec = kernels.Attention(
        query_heads=heads,
        heads=int(k_dims[1]),
        key=keys,
        value=values,
        length=k_dims[2] if isinstance(k_dims[2], int) else "t",
        scale=float(attribute(node, "scale") or width**-0.5),
        causal=causal,
        offset=offset,
        softcap=float(attribute(node, "softcap", 0.0)),
        **_mask(imp, mask, k_dims[2]),
    )
    args = [query, *k_args, *v_args, *([imp.tensor(lengths)] if lengths is not None else [])]
    args += [_mask_tensor(imp, mask)] if mask is not None else []
    kernel = imp.kernel(("attention", spec), lambda: kernels.attention(spec))
    y = imp.call(kernel, args, [batch, heads, steps, values.width], "float32")
    if folded:
        turned = imp.emit(op.permute_dims(y, [0, 2, 1, 3]))
        y = imp.emit(op.reshape(turned, [batch, steps, heads * values.width]))
    return y, key if past_key is not None else None, value if past_key is not None else None


def _four_d(imp: Importer, node: ir.Node, x: relax.Expr, heads: str) -> tuple[relax.Expr, bool]:
    """[b, s, h*d] -> [b, h, s, d] where the node says how many heads; 4-D passes."""
    dims = imp.shape(x)
    if len(dims) == 4:
        return x, False
    count = int(attribute(node, heads))
    split = imp.emit(op.reshape(x, [dims[0], dims[1], count, dims[2] // count]))
    return imp.emit(op.permute_dims(split, [0, 2, 1, 3])), True


def _cache(imp: Importer, value: Value) -> tuple[kernels.Cache, list[relax.Expr], list[Any]]:
    """How the kernel reads keys or values, its arguments, and their dimensions as floats."""
    if isinstance(value, Quantized):
        dims = imp.shape(value.codes)
        width = dims[3] * (2 if value.codec == "int4" else 1)
        if value.axis == 3 and value.block == width:
            return kernels.Cache(value.codec, width), [value.codes, imp.tensor(value.scales)], dims
    tensor = imp.tensor(value)
    return kernels.Cache("fp32", imp.shape(tensor)[3]), [tensor], imp.shape(tensor)


def _mask(imp: Importer, mask: Value | None, length: Any) -> dict[str, Any]:
    if mask is None:
        return {}
    tensor = _mask_tensor(imp, mask)
    dims = imp.shape(tensor)
    if not imp.same(dims[3], length):
        raise TargetError("PORT-0415", "a mask shorter than the keys has no lowering", where=imp.current)
    names = ("b", dims[1], "s", length if isinstance(length, int) else "t")
    shape = tuple(1 if d == 1 else name for d, name in zip(dims, names, strict=True))
    return {"mask": shape, "mask_dtype": str(tensor.ty.dtype)}


def _mask_tensor(imp: Importer, mask: Value) -> relax.Expr:
    tensor = imp.tensor(mask)
    missing = 4 - len(tensor.ty.shape)
    return imp.emit(op.expand_dims(tensor, list(range(missing)))) if missing else tensor


def _rms_norm(imp: Importer, node: ir.Node, x: Value, scale: Value) -> Value:
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    axis = int(attribute(node, "axis", -1))
    if axis not in (-1, len(dims) - 1) or not isinstance(dims[-1], int):
        raise TargetError(
            "PORT-0415", "an RMSNormalization over several axes has no lowering", where=imp.current
        )
    epsilon = float(attribute(node, "epsilon", 1e-5))
    weight = _vector(imp, scale, dims[-1])
    rows: Any = 1
    for dim in dims[:-1]:
        rows = rows * dim
    kernel = imp.kernel(("rms_norm", dims[-1], epsilon), lambda: rms_norm(dims[-1], epsilon))
    flat = imp.emit(op.reshape(tensor, [rows, dims[-1]]))
    return imp.emit(op.reshape(imp.call(kernel, [flat, weight], [rows, dims[-1]], "float32"), dims))


def _vector(imp: Importer, value: Value, width: int) -> relax.Expr:
    """A [width] tensor; a scale of one element is spread."""
    if imp.shape(value) == [width] and isinstance(value, Weight):
        return imp.tensor(value)
    return imp.emit(op.broadcast_to(imp.tensor(value), [width]))


def _rotary(
    imp: Importer, node: ir.Node, x: Value, cos: Value, sin: Value, positions: Value | None = None
) -> Value:
    query, folded = _four_d(imp, node, imp.tensor(x), "num_heads")
    batch, heads, steps, width = imp.shape(query)
    rotated = int(attribute(node, "rotary_embedding_dim", 0)) or width
    interleaved = bool(attribute(node, "interleaved", 0))
    c, s = imp.tensor(cos), imp.tensor(sin)
    table = None if positions is None else _static(imp.shape(c)[0])
    cos_batch = 1 if positions is None and imp.shape(c)[0] == 1 else "b"
    key = ("rotary", heads, width, rotated, interleaved, table, cos_batch)
    kernel = imp.kernel(
        key, lambda: rotary(heads, width, rotated, interleaved=interleaved, table=table, cos_batch=cos_batch)
    )
    args = [query, c, s, *([imp.tensor(positions)] if positions is not None else [])]
    y = imp.call(kernel, args, [batch, heads, steps, width], "float32")
    if not folded:
        return y
    return imp.emit(op.reshape(op.permute_dims(y, [0, 2, 1, 3]), [batch, steps, heads * width]))


def _static(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else "rows"


def _scatter(imp: Importer, node: ir.Node, past: Value, update: Value, starts: Value | None = None) -> Value:
    """Writes into the caller's buffer where the cache is the graph's own input, else into a copy."""
    cache, new = imp.tensor(past), imp.tensor(update)
    batch, heads, capacity, width = imp.shape(cache)
    if int(attribute(node, "axis", -2)) not in (-2, 2) or not isinstance(capacity, int):
        raise TargetError(
            "PORT-0415", "a TensorScatter on another axis than 2 has no lowering", where=imp.current
        )
    circular = attribute(node, "mode", "linear") == "circular"
    dtype = str(cache.ty.dtype)
    if not imp.is_input(cache):
        cache = imp.emit(op.add(cache, relax.const(0, dtype)))
    first = imp.tensor(starts) if starts is not None else imp.emit(op.zeros([batch], "int64"))
    key = ("append", heads, capacity, width, dtype, circular)
    kernel = imp.kernel(key, lambda: append(heads, capacity, width, dtype, circular=circular))
    return imp.call_in_place(kernel, [cache, new, first])


TABLE: dict[str, Callable[..., Value]] = {
    "Attention": _attention,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _scatter,
}
