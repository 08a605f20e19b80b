"""Shape rules: from the shapes and contents of a node's inputs to the shapes of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import sympy

from porter.match import attribute, words
from porter.symbolic.symbols import ONE, ZERO, Dim, Facts, Shape, product, same, surely_nonnegative

Rule = Callable[[Facts, ir.Node], Sequence[Shape | None]]

_LIKE_FIRST = words(
    "Abs Cast CastLike Ceil Clip Cos CumSum DequantizeLinear Dropout Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax Mish Neg Not "
    "QuantizeLinear RMSNormalization Reciprocal Relu RotaryEmbedding Round ScatterElements ScatterND "
    "Sigmoid Sign Sin Softmax Softplus Sqrt Swish Tanh TensorScatter Trilu"
)
_BROADCAST = words(
    "Add And BitwiseAnd BitwiseOr Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or "
    "PRelu Pow Sub Where Xor"
)
_REDUCE = frozenset(
    f"Reduce{k}"
    for k in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
)


def infer(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    """Shapes of the outputs, as many as are known from the first on."""
    if node.domain not in ("", "ai.onnx"):
        return ()
    if node.op_type in _LIKE_FIRST:
        return (facts.shape(node.inputs[0]),)
    if node.op_type in _BROADCAST:
        return (broadcast([facts.shape(v) for v in node.inputs]),)
    if node.op_type in _REDUCE:
        return (_reduce(facts, node),)
    rule = _RULES.get(node.op_type)
    return rule(facts, node) if rule else ()


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape that several broadcast to; None entries where two different names meet."""
    if any(s is None for s in shapes):
        return None
    rank = max(map(len, shapes), default=0)  # type: ignore[arg-type]
    columns = zip(*((ONE,) * (rank - len(s)) + s for s in shapes), strict=True)  # type: ignore[arg-type,operator]
    return tuple(_together(column) for column in columns)


def _together(dims: Sequence[Dim | None]) -> Dim | None:
    others = [d for d in dims if d != 1]
    if not others:
        return ONE
    fixed = [d for d in others if d is not None and d.is_Integer]
    if fixed:
        return fixed[0]
    return others[0] if all(same(others[0], d) for d in others) else None


def _axis(node: ir.Node, rank: int, default: int = 0) -> int:
    return int(attribute(node, "axis", default)) % rank


def axes_of(facts: Facts, node: ir.Node, rank: int) -> list[int] | None:
    """The axes that a node names by second input or attribute, made non-negative; None if unknown."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = facts.vector(node.inputs[1])
        if found is None or not all(a.is_Integer for a in found):
            return None
        return [int(a) % rank for a in found]
    stated = attribute(node, "axes", None)
    return None if stated is None else [a % rank for a in stated]


def _reduce(facts: Facts, node: ir.Node) -> Shape | None:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return None
    axes = axes_of(facts, node, max(len(shape), 1))
    if axes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        axes = [] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(shape)))
    if attribute(node, "keepdims", 1):
        return tuple(ONE if i in axes else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in axes)


def _matmul(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    a, b = (facts.shape(v) for v in node.inputs)
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return (None,)
    batch = broadcast([a[:-2], b[:-2]])
    return (None if batch is None else (*batch, a[-2], b[-1]),)


def _gemm(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    a, b = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if a is None or b is None:
        return (None,)
    return ((a[1 if attribute(node, "transA", 0) else 0], b[0 if attribute(node, "transB", 0) else 1]),)


def _transpose(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return (None,)
    return (tuple(shape[p] for p in attribute(node, "perm", range(len(shape))[::-1])),)


def _reshape(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape, wanted = facts.shape(node.inputs[0]), facts.vector(node.inputs[1])
    if wanted is None:
        rank = facts.shape(node.inputs[1])
        known = rank is not None and len(rank) == 1 and rank[0] is not None and rank[0].is_Integer
        return ((None,) * int(rank[0]) if known else None,)  # type: ignore[index]
    out: list[Dim | None] = list(wanted)
    if not attribute(node, "allowzero", 0):
        out = [(shape[i] if shape and i < len(shape) else None) if d == 0 else d for i, d in enumerate(out)]
    if -1 in out:
        out[out.index(-1)] = _rest(shape, [d for d in out if d != -1])
    return (tuple(out),)


def _rest(shape: Shape | None, others: Sequence[Dim | None]) -> Dim | None:
    """What -1 stands for: all elements over the other dimensions."""
    if shape is None or None in shape or None in others or sympy.Integer(0) in others:
        return None
    rest = sympy.cancel(product(shape) / product(others))  # type: ignore[arg-type]
    return sympy.expand(rest) if rest.is_polynomial() and rest.is_integer else None


def _unsqueeze(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape = facts.shape(node.inputs[0])
    listed = facts.vector(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
    if shape is None or listed is None:
        return (None,)
    rank = len(shape) + len(listed)
    axes = {int(a) % rank for a in listed}
    rest = iter(shape)
    return (tuple(ONE if i in axes else next(rest) for i in range(rank)),)


def _squeeze(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return (None,)
    axes = axes_of(facts, node, max(len(shape), 1))
    if axes is None:
        if len(node.inputs) > 1 or any(d is None or not d.is_Integer for d in shape):
            return (None,)
        axes = [i for i, d in enumerate(shape) if d == 1]
    return (tuple(d for i, d in enumerate(shape) if i not in axes),)


def _concat(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shapes = [facts.shape(v) for v in node.inputs]
    if any(s is None for s in shapes) or len({len(s) for s in shapes}) != 1:  # type: ignore[arg-type]
        return (None,)
    axis = _axis(node, len(shapes[0]))  # type: ignore[arg-type]
    columns = list(zip(*shapes, strict=True))  # type: ignore[arg-type]
    out = [_together(c) for c in columns]
    out[axis] = None if None in columns[axis] else sympy.expand(sum(columns[axis], ZERO))
    return (tuple(out),)


def _split(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape, count = facts.shape(node.inputs[0]), len(node.outputs)
    if shape is None:
        return (None,) * count
    axis = _axis(node, len(shape))
    sizes: Sequence[Dim | None] | None = facts.vector(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is None:
        total = shape[axis]
        even = total is not None and total.is_Integer and len(node.inputs) == 1
        part = -(-int(total) // count) if even else None  # type: ignore[arg-type]
        sizes = [sympy.Integer(min(part, int(total) - i * part)) if even else None for i in range(count)]  # type: ignore[operator,arg-type,type-var]
    return [(*shape[:axis], s, *shape[axis + 1 :]) for s in sizes]


def slice_bounds(facts: Facts, node: ir.Node) -> dict[int, tuple[Dim, Dim, int]] | None:
    """For each sliced axis: start and end, both within the axis, and a constant step of one or more."""
    shape = facts.shape(node.inputs[0])
    starts, ends = facts.vector(node.inputs[1]), facts.vector(node.inputs[2])
    if shape is None or starts is None or ends is None:
        return None
    given = [node.inputs[k] if len(node.inputs) > k else None for k in (3, 4)]
    axes = facts.vector(given[0]) if given[0] else [sympy.Integer(i) for i in range(len(starts))]
    steps = facts.vector(given[1]) if given[1] else [ONE] * len(starts)
    if axes is None or steps is None or not all(v.is_Integer for v in (*axes, *steps)):
        return None
    bounds = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[int(axis) % len(shape)]
        first, last = _bounded(start, size), _bounded(end, size)
        if first is None or last is None or step < 1:
            return None
        bounds[int(axis) % len(shape)] = (first, last, int(step))
    return bounds


def _bounded(at: Dim, size: Dim | None) -> Dim | None:
    """A start or end with negative and overlong values resolved; None when it cannot be known."""
    if size is None:
        return at if at == 0 else None
    if at.is_Integer and at >= 2**31:
        return size
    if at.is_Integer and at < 0:
        at = ZERO if at <= -(2**31) else sympy.expand(size + at)
        return at if surely_nonnegative(at) else (ZERO if at.is_Integer else None)
    if surely_nonnegative(size - at):
        return at
    return size if surely_nonnegative(at - size) else None


def _slice(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape, bounds = facts.shape(node.inputs[0]), slice_bounds(facts, node)
    if shape is None or bounds is None:
        return (None if shape is None else _unsliced(facts, node, shape),)
    out = list(shape)
    for axis, (start, end, step) in bounds.items():
        span = sympy.expand(end - start)
        if span.is_Integer:
            out[axis] = sympy.Integer(max(0, -(-int(span) // step)))
        else:
            out[axis] = span if step == 1 and surely_nonnegative(span) else None
    return (tuple(out),)


def _unsliced(facts: Facts, node: ir.Node, shape: Shape) -> Shape:
    axes = facts.vector(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None or not all(a.is_Integer for a in axes):
        return (None,) * len(shape)
    cut = {int(a) % len(shape) for a in axes}
    return tuple(None if i in cut else d for i, d in enumerate(shape))


def _gather(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    data, index = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if data is None or index is None:
        return (None,)
    axis = _axis(node, len(data))
    return ((*data[:axis], *index, *data[axis + 1 :]),)


def _gather_nd(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    data, index = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if data is None or index is None or not index or index[-1] is None or attribute(node, "batch_dims", 0):
        return (None,)
    return ((*index[:-1], *data[int(index[-1]) :]) if index[-1].is_Integer else None,)


def _expand(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    wanted = facts.vector(node.inputs[1])
    return (None if wanted is None else broadcast([facts.shape(node.inputs[0]), wanted]),)


def _tile(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape, repeats = facts.shape(node.inputs[0]), facts.vector(node.inputs[1])
    if shape is None or repeats is None:
        return (None,)
    return (tuple(None if d is None else sympy.expand(d * r) for d, r in zip(shape, repeats, strict=True)),)


def _shape(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return ((None,),)
    return ((sympy.Integer(len(shape[shape_span(node, len(shape))])),),)


def shape_span(node: ir.Node, rank: int) -> slice:
    """The part of the input's shape that a Shape node returns."""
    return slice(*slice(attribute(node, "start", 0), attribute(node, "end", None)).indices(rank)[:2])


def _range(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    start, limit, step = (facts.number(v) for v in node.inputs)
    if start is None or limit is None or step != 1:
        return ((None,),)
    span = sympy.expand(limit - start)
    return ((span if surely_nonnegative(span) else None,),)


def _of_content(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    return (facts.vector(node.inputs[0]),)


def _attention(facts: Facts, node: ir.Node) -> Sequence[Shape | None]:
    q, k, v = (facts.shape(x) for x in node.inputs[:3])
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        return (None,)
    past = facts.shape(node.inputs[4]) if len(node.inputs) > 4 else (ZERO,) * 4
    total = None if past is None or past[2] is None or k[2] is None else sympy.expand(past[2] + k[2])
    return ((q[0], q[1], q[2], v[3]), (k[0], k[1], total, k[3]), (v[0], v[1], total, v[3]))


_RULES: dict[str, Rule] = {
    "Attention": _attention,
    "Concat": _concat,
    "ConstantOfShape": _of_content,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
