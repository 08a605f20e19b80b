"""An ONNX decoder or a bundle as a Model: the shapes and stored bytes of its own graph."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import onnx_ir as ir

from porter import decoder, graph, kv
from porter.bundle import Bundle
from porter.errors import ModelError
from porter.estimate.model import Attention, Between, Linear, Model, Side
from porter.estimate.work import WORD
from porter.kv import layout
from porter.kvgraph.graph import DONE
from porter.weights import select

_CODES = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "FLOAT8E4M3FN": "fp8-e4m3fn",
    "FLOAT8E5M2": "fp8-e5m2",
    "FLOAT8E4M3FNUZ": "fp8-e4m3fnuz",
    "FLOAT8E5M2FNUZ": "fp8-e5m2fnuz",
}


def read(path: Path) -> Model:
    """The decoder in an ONNX file or a bundle.

    Raises what opening them raises, and ModelError PORT-0335 for a model that does not read tokens with a
    cache, or whose shapes are not known.
    """
    pipeline = ""
    if path.is_dir():
        bundle = Bundle.open(path)
        pipeline, path = str(bundle.manifest["pipeline"]), bundle.model
    return of_model(graph.load(path), path.stem if path.parent == path else path.name, pipeline)


def of_model(model: ir.Model, name: str, pipeline: str = "") -> Model:
    """The decoder that a graph is, after the passes of `pipeline`. Raises what `read` does."""
    return _Reader(model, pipeline, name).model()


def _refused(what: str) -> ModelError:
    hint = "estimate a decoder with a KV cache, as porter export writes it, or give --config"
    return ModelError("PORT-0335", f"no estimate from this graph: {what}", hint=hint)


class _Reader:
    """One graph."""

    def __init__(self, model: ir.Model, pipeline: str, name: str) -> None:
        self.ir, self.name = model, name
        self.casts = list(_casts(pipeline))
        self.decoder = decoder.recognise(model)
        if not self.decoder.caches:
            raise _refused("it has no cache")
        scheme = model.metadata_props.get(DONE, "")
        self.scheme = kv.parse(scheme) if scheme else None
        self.kv = scheme or _float_cache(model)

    def model(self) -> Model:
        """All of it, from its products and caches."""
        nodes = [n for n in self.ir.graph if select.is_linear(n)]
        if not nodes:
            raise _refused("no product with a constant matrix is in it")
        heads = select.head_nodes(self.ir.graph)
        head = self._linear(next((n for n in nodes if n in heads), nodes[-1]), 0)
        hidden = head.k
        linears = Counter(self._linear(n, hidden) for n in nodes if n not in heads)
        attention = self._attention([w for w, n in linears.items() for _ in range(n)], hidden)
        counted = tuple(replace(w, count=n) for w, n in linears.items())
        layers = sum(a.count for a in attention)
        queries = sum(a.count * (a.heads + 2 * a.kv_heads) * a.size for a in attention)
        wide = sum((w.n + w.k) * w.count for w in counted if w.name == "mlp") - 2 * hidden * layers
        between = (
            Between("norm and residual", 2 * layers + 1, 4 * hidden, split=False),
            Between("rotate and cache", layers, 2 * queries // layers, split=True),
            Between("activation", layers, max(0, wide) // layers, split=True),
        )
        tied = not any(
            "head" not in m.roles and "embedding" in m.roles for m in select.matrices(self.ir.graph)
        )
        held = sum(w.stored * w.count for w in counted) + head.stored
        held += 0 if tied else head.n * hidden * WORD
        small = max(0, graph.weight_bytes(self.ir) - held) // WORD  # what is left, whatever its type
        tokens = min((n for n in (self.decoder.capacity, self.decoder.context) if n), default=0)
        return Model(
            self.name,
            hidden,
            head.n,
            counted,
            attention,
            between,
            head,
            tied,
            small,
            2 * layers,
            self.kv,
            tokens,
        )

    def _linear(self, node: ir.Node, hidden: int) -> Linear:
        """What a product multiplies by; `hidden` 0 for the head."""
        k, n = _sizes(node)
        codes, name_in_graph, stored = _stored(node)
        attention = bool(hidden) and select.reaches_attention(node)
        side: Side = "column" if not hidden or attention or n != hidden else "row"
        name = "logits" if not hidden else "attention" if attention else "mlp"
        quantizer = node.inputs[0].producer() if node.inputs[0] is not None else None
        activations = ""
        if quantizer is not None and quantizer.op_type == "DequantizeLinear":
            activations = _name(quantizer.inputs[0].dtype)
        name_of = _CODES.get(codes.name, "")
        cast = next((form for form, only in self.casts if _among(name_in_graph, only)), "")
        weights = name_of if name_of in ("fp32", "fp16", "bf16") else cast or name_of or _name(codes)
        return Linear(name, k, n, 1, side, weights=weights, activations=activations, stored=stored)

    def _attention(self, linears: list[Linear], hidden: int) -> tuple[Attention, ...]:
        """A layer for each key cache; query heads are the outputs of its products less the cached ones."""
        layers = sorted({c.layer for c in self.decoder.caches if c.kind.startswith("key")})
        inputs = {v.name: v for v in self.ir.graph.inputs}
        found = []
        for layer in layers:
            cache = next(c for c in self.decoder.caches if c.layer == layer and c.kind.startswith("key"))
            shape = inputs[cache.past].shape
            if shape is None or not all(isinstance(d, int) for d in (shape[1], shape[3])):
                raise _refused(f"the shape of {cache.past} is not known")
            size = self._size(cache.kind, int(shape[3]), len(found), len(layers))
            found.append((int(shape[1]), size))
        outputs = sum(w.n for w in linears if w.name == "attention")
        cached = sum(2 * heads * size for heads, size in found)
        queries = (outputs - cached) // max(1, sum(size for _, size in found))
        return tuple(
            Attention(n, max(heads, queries), heads, size, size)
            for (heads, size), n in Counter(found).items()
        )

    def _size(self, kind: str, width: int, index: int, layers: int) -> int:
        """Channels of a cached key of a layer, from the width of what stores it."""
        if self.scheme is None or kind in ("key", "key_window", "key_copy"):
            return width
        side = self.scheme.layer(index, layers).key
        return next(
            (d for d in range(1, 8 * width + 1) if layout.row_bytes(side, side.element, d) == width), width
        )


def _sizes(node: ir.Node) -> tuple[int, int]:
    """[k, n] of a product, from attributes or the shapes around it."""
    if node.op_type.startswith("MatMulNBits"):
        return node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    k, n = _last(node.inputs[0]), _last(node.outputs[0])
    weight = node.inputs[1].shape if node.inputs[1] is not None else None
    if weight is not None and len(weight) > 1 and all(isinstance(d, int) for d in weight[-2:]):
        k, n = int(weight[-2]), int(weight[-1])
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
            k, n = n, k
    if not k or not n:
        raise _refused(f"the shapes around {node.name or node.op_type} are not known")
    return k, n


def _last(value: ir.Value | None) -> int:
    shape = value.shape if value is not None else None
    return int(shape[-1]) if shape is not None and len(shape) and isinstance(shape[-1], int) else 0


def _casts(pipeline: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The formats that a pipeline casts weights to, and the names that each is for; () for all."""
    for options in re.findall(r"quantize\.\w+\{([^}]*)\}", pipeline):
        found = dict(word.partition("=")[::2] for word in options.split())
        if "format" in found:
            only = tuple(found.get("only", "").split("+"))
            yield found["format"], () if not only[0] or {*only} & {*select.ROLES, "linear"} else only


def _among(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(fnmatchcase(name, word) for word in only)


def _stored(node: ir.Node) -> tuple[ir.DataType, str, int]:
    """The type and name of a product's codes, and the bytes of all constants that its matrix is made of."""
    factors = node.inputs[1:] if node.op_type.startswith("MatMulNBits") else node.inputs[1:2]
    tensors = list({id(v): v for f in factors for v in _constants(f)}.values())
    if not tensors:
        raise _refused(f"the matrix of {node.name or node.op_type} is not a constant")
    codes = max(tensors, key=lambda v: math.prod(v.const_value.shape.numpy()))
    return codes.const_value.dtype, str(codes.name), sum(v.const_value.nbytes for v in tensors)


def _constants(value: ir.Value | None) -> Iterator[ir.Value]:
    """The initializers that a constant is computed from."""
    if value is None:
        return
    if value.producer() is None:
        if value.const_value is not None:
            yield value
        return
    for before in value.producer().inputs:
        yield from _constants(before)


def _name(dtype: ir.DataType | None) -> str:
    """The format that codes of a type are of."""
    name = dtype.name if dtype is not None else ""
    return _CODES.get(name, "") or (name.lower() if re.fullmatch(r"U?INT\d", name) else "int8")


def _float_cache(model: ir.Model) -> str:
    found = next((v.dtype for v in model.graph.inputs if decoder.place(v.name or "")), None)
    name = _name(found)
    return name if name in ("fp32", "fp16", "bf16") else "fp16"
