"""Key normalization in the constants that queries and keys come from, so that it costs nothing.

    Y = Attention(Q * n, K / n, V)    with  Q = rope(x Wq^T + bq),  K = rope(x Wk^T + bk)
    ->
    Y = Attention(Q', K', V)          with  Q' = rope(x (Wq n)^T + bq n),  K' = rope(x (Wk / n)^T + bk / n)

n is a number for each channel of each KV head; query heads take that of the KV head that they read. From the
Attention back, through RotaryEmbedding, Transpose, Reshape, Split and Cast, a channel is followed to

    MatMul(x, W), Gemm(x, W, c)                                       the rows of W that make it, and of c
    with DequantizeLinear(W, s) or ScaleBlocks(W, s) in W's place     those of s, where rows have their own
    RMSNormalization(h, g), LayerNormalization(h, g, b), Mul(h, g)    elements of g, and of b
    Add(h, b)                                                         elements of b, and on

A rotation turns pairs of channels, and commutes with n where n is the same within a pair; a norm whose g all
heads share wants one n for all heads. So calibration is told what has to be alike (`Fold.pairs`,
`Fold.shared`). Each constant is rounded once more, to its own type. Where a channel cannot be followed on
both sides, or a weight or what comes on the way has other readers, nothing is folded, and the products stay.
Source: InnerQ, 2602.23200; that n must be alike in rotary pairs is not said there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from porter.kvgraph.graph import Layer
from porter.match import attribute, given, producer, scalar
from porter.weights.fold import Source, is_constant, multiply, split_sizes

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Fold:
    """The constants of a layer's keys and queries. `pairs`: int [D], the channel that each one is rotated
    with, itself where it is not; `shared`: whether all heads need the same normalizer."""

    key: tuple[_Part, ...]
    query: tuple[_Part, ...]
    pairs: np.ndarray
    shared: bool
    groups: int  # query heads of a KV head

    def apply(self, normalizer: np.ndarray) -> None:
        """Divide keys by `normalizer`, float [H,D] > 0, and multiply queries with it."""
        wide = normalizer.astype(np.float64)
        for part in self.key:
            part.multiply(1 / wide)
        for part in self.query:
            part.multiply(np.repeat(wide, self.groups, axis=0))


def fold(layer: Layer) -> Fold | None:
    """How a layer's normalizer can be folded, or None where the products have to stay."""
    heads, _, size = list(layer.key.inputs[0].shape)[1:]
    key = _followed(layer.key.inputs[1], heads, size)
    shape = layer.attention.inputs[0].shape
    count = shape[1] if shape is not None and len(shape) == 4 else None
    if key is None or not isinstance(count, int) or count % heads:
        return None
    query = _followed(layer.attention.inputs[0], count, size)
    if query is None or not np.array_equal(key.pairs, query.pairs):
        return None
    shared = any(part.shared for part in (*key.parts, *query.parts))
    return Fold(tuple(key.parts), tuple(query.parts), key.pairs, shared, count // heads)


@dataclass(frozen=True)
class _Part:
    """A constant: heads and channels start at element `first` of its axis, flat; or, with `heads` known to be
    an axis of their own (or none: `shared`), at head `first` of that."""

    source: Source
    head_axis: int | None = None
    shared: bool = False

    def multiply(self, factor: np.ndarray) -> None:
        """By `factor`, float64 [heads, D]."""
        value, axis, first = self.source.value, self.source.axis, self.source.first
        sizes = value.const_value.shape.numpy()
        if self.shared:
            wide = factor[0]
        elif self.head_axis is None:
            vector = np.ones(sizes[axis])
            vector[first : first + factor.size] = factor.reshape(-1)
            wide = vector.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
        else:
            table = np.ones((sizes[self.head_axis], sizes[-1]))
            table[first : first + len(factor)] = factor
            wide = table.reshape([n if i in (self.head_axis, axis) else 1 for i, n in enumerate(sizes)])
        multiply(value, wide)


@dataclass
class _Walk:
    """Where the channels are: along the last axis, heads along `heads_at` (None: before them, flat), from
    head or element `first` on."""

    value: ir.Value
    heads: int
    size: int
    pairs: np.ndarray
    heads_at: int | None = 1
    first: int = 0
    parts: list[_Part] = field(default_factory=list)
    ended: bool = False


def _followed(value: ir.Value, heads: int, size: int) -> _Walk | None:
    walk = _Walk(value, heads, size, np.arange(size))
    while not walk.ended:
        node = walk.value.producer()
        step = _STEPS.get(node.op_type) if node is not None and not node.domain else None
        if not _is_read_once(walk.value) or step is None or not step(walk, node):
            return None
    return walk


def _cast(walk: _Walk, node: ir.Node) -> bool:
    walk.value = node.inputs[0]
    return walk.value.dtype in _FLOATS and node.outputs[0].dtype in _FLOATS


def _transpose(walk: _Walk, node: ir.Node) -> bool:
    perm = attribute(node, "perm", None)
    if perm is None or walk.heads_at is None or perm[-1] != len(perm) - 1:
        return False
    walk.heads_at, walk.value = perm[walk.heads_at], node.inputs[0]
    return True


def _reshape(walk: _Walk, node: ir.Node) -> bool:
    """Heads apart from one flat axis, or that axis left as it is."""
    before, after = (v.shape for v in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or not isinstance(before[-1], int):
        return False
    flat = before[-1]
    if walk.heads_at is not None:
        apart = [after[walk.heads_at], walk.size]
        if walk.heads_at != len(after) - 2 or list(after)[-2:] != apart or apart[0] * walk.size != flat:
            return False
        walk.heads_at, walk.first = None, walk.first * walk.size
    elif after[-1] != flat:
        return False
    walk.value = node.inputs[0]
    return True


def _split(walk: _Walk, node: ir.Node) -> bool:
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else 0
    axis = rank - 1 if walk.heads_at is None else walk.heads_at
    sizes = split_sizes(node, axis) if rank else None
    if sizes is None:
        return False
    walk.first += sum(sizes[: list(node.outputs).index(walk.value)])
    walk.value = node.inputs[0]
    return True


def _rotary(walk: _Walk, node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    flat = walk.heads_at is None
    if shape is None or len(shape) != (3 if flat else 4) or walk.heads_at not in (None, 1):
        return False
    if flat and (walk.first or attribute(node, "num_heads", 0) != walk.heads):
        return False
    width = int(attribute(node, "rotary_embedding_dim", 0)) or walk.size
    turned = np.arange(width)
    turned = turned ^ 1 if attribute(node, "interleaved", 0) else (turned + width // 2) % width
    if not np.array_equal(walk.pairs, np.arange(walk.size)):
        return False  # two rotations, of other pairs perhaps
    walk.pairs = np.concatenate([turned, np.arange(width, walk.size)])
    walk.value = node.inputs[0]
    return True


def _norm(walk: _Walk, node: ir.Node) -> bool:
    """What a norm divides by is of all that it norms, and is not touched."""
    shape, parts = node.outputs[0].shape, [v for v in node.inputs[1:] if v is not None]
    axis = attribute(node, "axis", -1)
    if shape is None or axis not in (-1, len(shape) - 1) or not parts or walk.value is not node.outputs[0]:
        return False
    walk.ended = True
    return all(_constant(walk, node, value) for value in parts)


def _add(walk: _Walk, node: ir.Node) -> bool:
    x, bias = _constant_last(node)
    walk.value = x
    return bias is not None and _constant(walk, node, bias)


def _mul(walk: _Walk, node: ir.Node) -> bool:
    x, factor = _constant_last(node)
    walk.value = x
    if factor is None or scalar(factor) is not None:
        return factor is not None
    walk.ended = True
    return _constant(walk, node, factor)


def _constant_last(node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    a, b = node.inputs
    a, b = (b, a) if is_constant(a) else (a, b)
    return a, b if is_constant(b) else None


def _constant(walk: _Walk, node: ir.Node, value: ir.Value) -> bool:
    """Note a constant that is added to the channels, or multiplies them."""
    shape = node.outputs[0].shape
    if not is_constant(value) or not _is_read_once(value) or shape is None:
        return False
    sizes = list(value.const_value.shape.numpy())
    source = Source(value, len(sizes) - 1, walk.first)
    if not sizes or sizes[-1] != shape[-1] or value.const_value.dtype not in _FLOATS:
        return False
    if walk.heads_at is None:
        walk.parts.append(_Part(source))
        return True
    at = walk.heads_at - (len(shape) - len(sizes))
    shared = at < 0 or (sizes[at] == 1 != shape[walk.heads_at])
    walk.parts.append(_Part(source, None if shared else at, shared))
    return True


def _linear(walk: _Walk, node: ir.Node) -> bool:
    """The matrix that makes the channels: it has no other reader."""
    walk.ended = True
    gemm = node.op_type == "Gemm"
    if walk.heads_at is not None or (gemm and attribute(node, "transA", 0)):
        return False
    bias = given(node, 2)
    if bias is not None and not _constant(walk, node, bias):
        return False
    rows, matrix = (0 if gemm and attribute(node, "transB", 0) else 1), node.inputs[1]
    while (turn := producer(matrix, "Transpose")) is not None:
        if list(attribute(turn, "perm", (1, 0))) != [1, 0] or not _is_read_once(matrix):
            return False
        rows, matrix = 1 - rows, turn.inputs[0]
    if not is_constant(matrix):
        matrix = _scale(matrix, rows)
    if matrix is None or not _is_read_once(matrix) or matrix.const_value.dtype not in _FLOATS:
        return False
    if len(matrix.const_value.shape) <= rows:
        rows = 0  # a scale for each row
    walk.parts.append(_Part(Source(matrix, rows, walk.first)))
    return True


def _scale(value: ir.Value, rows: int) -> ir.Value | None:
    """The constant that multiplies each row of a decoded matrix [N,K], or [K,N] where `rows` is 1."""
    node = value.producer()
    kind = None if node is None else (node.domain, node.op_type)
    shape = value.shape if value.shape is not None else None
    if kind not in (("", "DequantizeLinear"), ("porter", "ScaleBlocks")) or not _is_read_once(value):
        return None
    scale = node.inputs[1]
    if not is_constant(scale) or shape is None or len(shape) != 2 or not isinstance(shape[rows], int):
        return None
    sizes, axis = list(scale.const_value.shape.numpy()), int(attribute(node, "axis", 1)) % 2
    if kind[1] == "ScaleBlocks":
        own = rows == 0 and len(sizes) == 2
    else:
        own = axis == rows if len(sizes) == 1 else len(sizes) == 2 and axis != rows
    return scale if own and sizes[min(rows, len(sizes) - 1)] == shape[rows] else None


def _is_read_once(value: ir.Value) -> bool:
    """Whether one node reads what is in it; its shape anybody may."""
    readers = [node for node, _ in value.uses() if node.op_type != "Shape"]
    return len(readers) == 1 and not value.is_graph_output()


_STEPS = {
    "Add": _add,
    "Cast": _cast,
    "Gemm": _linear,
    "LayerNormalization": _norm,
    "MatMul": _linear,
    "Mul": _mul,
    "RMSNormalization": _norm,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Split": _split,
    "Transpose": _transpose,
}
