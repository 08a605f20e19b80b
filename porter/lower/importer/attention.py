"""The operators with kernels of their own: Attention, RotaryEmbedding, RMSNormalization, TensorScatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.broadcast import agreed
from porter.lower.importer.parts import joined
from porter.lower.importer.precision import cast, in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.quantized import shape_of
from porter.lower.importer.residual import extended, joined_halves, source
from porter.lower.importer.templates import Multiplied
from porter.lower.importer.values import Quantized, StoredCache, Value
from porter.lower.kernels import attention as kernels
from porter.lower.kernels.naming import format_of
from porter.lower.kernels.residual import Residual
from porter.lower.kernels.stored import Source

op = relax.op


@in_float32
def _attention(
    imp: Importer,
    node: ir.Node,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    lengths: Value | None = None,
) -> tuple[Value, ...]:
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise TargetError(
            "PORT-0415", "an Attention that returns its scores has no lowering", where=imp.current
        )
    query, folded = _four_d(imp, node, imp.tensor(q), "q_num_heads")
    key, value = (_cached(imp, node, *pair) for pair in ((k, past_key), (v, past_value)))
    total = None if lengths is None else imp.tensor(lengths)
    (keys, k_args, k_dims), (values, v_args, _) = (_reading(imp, x, total) for x in (key, value))
    batch, heads, steps, width = imp.shape(query)
    given = attribute(node, "scale")
    spec = kernels.Attention(
        query_heads=heads,
        heads=int(k_dims[1]),
        key=keys,
        value=values,
        length=k_dims[2] if isinstance(k_dims[2], int) else "t",
        scale=width**-0.5 if given is None else float(given),
        causal=bool(attribute(node, "is_causal", 0)),
        offset="lengths" if lengths is not None else "end" if past_key is not None else "start",
        softcap=float(attribute(node, "softcap", 0.0)),
    )
    args = [extended(imp, query, keys), *k_args, *v_args]
    if lengths is not None:
        args.append(cast(imp, imp.tensor(lengths), "int64"))
    if mask is not None:
        tensor, spec = masking(imp, mask, spec, [batch, heads, steps, k_dims[2]])
        args.append(tensor)
    for name, side, read in (("keys", key, keys), ("values", value, values)):
        imp.multiplied[imp.current, name] = Multiplied("cache", _stored_as(side, read))
    kernel = imp.kernel(("attention", spec), lambda: imp.templates.attention(spec))
    y = imp.call(kernel, args, [batch, heads, steps, values.width], "float32")
    y = joined_halves(imp, y) if isinstance(values, Residual) else y
    return _folded(imp, y) if folded else y, key, value


def _folded(imp: Importer, y: relax.Expr) -> relax.Expr:
    """[b, h, s, d] -> [b, s, h*d]."""
    batch, heads, steps, width = imp.shape(y)
    turned = imp.emit(op.permute_dims(y, [0, 2, 1, 3]))
    return imp.emit(op.reshape(turned, [imp.dim(d) for d in (batch, steps, heads * width)]))


def _four_d(imp: Importer, node: ir.Node, x: relax.Expr, heads: str) -> tuple[relax.Expr, bool]:
    """[b, s, h*d] -> [b, h, s, d] where the node says how many heads; 4-D passes."""
    dims = imp.shape(x)
    if len(dims) == 4:
        return x, False
    count = int(attribute(node, heads))
    split = [imp.dim(d) for d in (dims[0], dims[1], count, dims[2] // count)]
    return imp.emit(op.permute_dims(imp.emit(op.reshape(x, split)), [0, 2, 1, 3])), True


def _cached(imp: Importer, node: ir.Node, new: Value, past: Value | None) -> Value:
    """Keys or values, those of the past before them."""
    if not isinstance(new, Quantized | StoredCache):
        new = _four_d(imp, node, imp.tensor(new), "kv_num_heads")[0]
    return new if past is None else joined(imp, [imp.tensor(past), imp.tensor(new)], 2)


def _reading(
    imp: Importer, value: Value, total: relax.Expr | None
) -> tuple[Source, list[relax.Expr], list[Any]]:
    """How the kernel reads keys or values, its arguments, and their dimensions as floats. A stored cache is
    read as it is where its rows are as long as the attention's."""
    if isinstance(value, StoredCache) and value.total is total:
        return source(value), list(value.args), list(value.shape)
    if isinstance(value, Quantized):
        dims = shape_of(imp, value)
        one_scale_per_token = len(dims) == 4 and value.axis == 3 and value.block == dims[3]
        known = value.codec in ("int8", "int4", "e4m3fn", "e5m2") and value.zeros is None
        known = known and not value.constant and not value.raw
        if one_scale_per_token and known and imp.dtype(value.scales) == "float32":
            return kernels.Cache(value.codec, dims[3]), [value.codes, value.scales], dims
    tensor = imp.tensor(value)
    narrow = _narrow(imp, tensor)
    codec = {"float16": "fp16", "bfloat16": "bf16"}.get(str(narrow.ty.dtype), "fp32")
    return kernels.Cache(codec, imp.shape(tensor)[3]), [narrow], imp.shape(tensor)


def _stored_as(value: Value, read: Source) -> str:
    """The format of a cache, also of one that was widened before attention reads it."""
    if isinstance(value, StoredCache):
        return format_of(value.spec.label)
    return format_of(value.codec if isinstance(value, Quantized) else read.label)


def _narrow(imp: Importer, tensor: relax.Expr) -> relax.Expr:
    """What a tensor was widened from, if it was: the kernel widens what it reads."""
    made = imp.builder.lookup_binding(tensor) if isinstance(tensor, relax.DataflowVar) else None
    if isinstance(made, relax.Call) and getattr(made.op, "name", "") == "relax.astype":
        source = made.args[0]
        if str(source.ty.dtype) in ("float16", "bfloat16"):
            return source
    return tensor


def masking(
    imp: Importer, mask: Value, spec: kernels.Attention, whole: list[Any]
) -> tuple[relax.Expr, kernels.Attention]:
    """The mask in four dimensions, each 1 or that of `whole` (batch, heads, steps, keys), and its kernel."""
    tensor = imp.tensor(mask)
    missing = 4 - len(imp.shape(tensor))
    tensor = imp.emit(op.expand_dims(tensor, list(range(missing)))) if missing else tensor
    dims, dtype = imp.shape(tensor), str(tensor.ty.dtype)
    if isinstance(dims[3], int) and isinstance(whole[3], int) and dims[3] != whole[3]:
        raise TargetError("PORT-0415", "a mask shorter than the keys has no lowering", where=imp.current)
    if dtype not in ("bool", "float32"):
        raise TargetError("PORT-0415", f"a mask of type {dtype} has no lowering", where=imp.current)
    kept = [a if imp.same(a, 1) else b for a, b in zip(dims, whole, strict=True)]
    names = ("b", whole[1], "s", spec.length)
    shape = tuple(1 if imp.same(d, 1) else name for d, name in zip(dims, names, strict=True))
    return agreed(imp, tensor, kept), kernels.with_mask(spec, shape, dtype)


@in_float32
def _rms_norm(imp: Importer, node: ir.Node, x: Value, scale: Value) -> Value:
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    axis = axis_of(node, len(dims), -1)
    rows, width = imp.product(dims[:axis]), imp.product(dims[axis:])
    if not isinstance(width, int):
        raise TargetError(
            "PORT-0415", "an RMSNormalization over a symbolic axis has no lowering", where=imp.current
        )
    epsilon = float(attribute(node, "epsilon", 1e-5))
    kernel = imp.kernel(("rms_norm", width, epsilon), lambda: imp.templates.rms_norm(width, epsilon))
    flat = imp.emit(op.reshape(tensor, [imp.dim(rows), imp.dim(width)]))
    y = imp.call(kernel, [flat, _spread(imp, scale, dims[axis:], width)], [rows, width], "float32")
    return imp.emit(op.reshape(y, [imp.dim(d) for d in dims]))


def _spread(imp: Importer, value: Value, dims: list[Any], width: int) -> relax.Expr:
    """A [width] tensor of one that broadcasts to `dims`."""
    tensor = imp.tensor(value)
    if imp.shape(tensor) == [width]:
        return tensor
    whole = imp.emit(op.broadcast_to(tensor, [imp.dim(d) for d in dims]))
    return imp.emit(op.reshape(whole, [imp.dim(width)]))


@in_float32
def _rotary(
    imp: Importer, node: ir.Node, x: Value, cos: Value, sin: Value, positions: Value | None = None
) -> Value:
    query, folded = _four_d(imp, node, imp.tensor(x), "num_heads")
    batch, heads, steps, width = imp.shape(query)
    rotated = int(attribute(node, "rotary_embedding_dim", 0)) or width
    interleaved = bool(attribute(node, "interleaved", 0))
    c, s = imp.tensor(cos), imp.tensor(sin)
    rows = imp.shape(c)[0]
    table = None if positions is None else rows if isinstance(rows, int) else "rows"
    cos_batch = 1 if positions is None and imp.same(rows, 1) else "b"
    key = ("rotary", heads, width, rotated, interleaved, table, cos_batch)
    kernel = imp.kernel(
        key,
        lambda: imp.templates.rotary(
            heads, width, rotated, interleaved=interleaved, table=table, cos_batch=cos_batch
        ),
    )
    args = [query, c, s, *([cast(imp, imp.tensor(positions), "int64")] if positions is not None else [])]
    y = imp.call(kernel, args, [batch, heads, steps, width], "float32")
    return _folded(imp, y) if folded else y


def _scatter(imp: Importer, node: ir.Node, past: Value, update: Value, starts: Value | None = None) -> Value:
    """Writes into the caller's buffer where the cache is the graph's own input, else into a copy."""
    cache, new = imp.tensor(past), imp.tensor(update)
    dims = imp.shape(cache)
    fixed = len(dims) == 4 and all(isinstance(d, int) for d in dims[1:])
    if not fixed or axis_of(node, 4, -2) != 2:
        what = "only a TensorScatter on axis 2 of 4, all but the batch of fixed size, has a lowering"
        raise TargetError("PORT-0415", what, where=imp.current)
    batch, heads, capacity, width = dims
    circular = attribute(node, "mode", "linear") == "circular"
    dtype = str(cache.ty.dtype)
    lent = imp.lent(node)
    first = (
        cast(imp, imp.tensor(starts), "int64")
        if starts is not None
        else imp.emit(op.zeros([imp.dim(batch)], "int64"))
    )
    key = ("append", heads, capacity, width, dtype, circular)
    kernel = imp.kernel(key, lambda: imp.templates.append(heads, capacity, width, dtype, circular=circular))
    return imp.overwrite(
        kernel, [cache if lent else imp.copied(cache), new, first], node.inputs[0].name if lent else None
    )


TABLE: dict[str, Callable[..., Value]] = {
    "Attention": _attention,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _scatter,
}
