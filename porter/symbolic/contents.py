"""Content rules: what a node's first output holds, as far as it follows from indices and dimensions alone."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import sympy

from porter.match import attribute, constant
from porter.symbolic.shapes import shape_span, slice_bounds
from porter.symbolic.symbols import AXES, ONE, ZERO, All, Choice, Content, Dim, Facts, Shape, substitute

Rule = Callable[[Facts, ir.Node], Content | None]
FALSE = All(frozenset({ONE}))  # 1 <= 0 never holds
_VECTOR = 64  # longest vector that is kept element by element
_TRIANGLE = 2**24  # most elements of a constant that is compared with a triangle


def infer(facts: Facts, node: ir.Node) -> Content | None:
    """The content of the first output, None when it does not follow."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Constant":
        return of_constant(node.outputs[0])
    rule = _RULES.get(node.op_type)
    return rule(facts, node) if rule else None


def of_constant(value: ir.Value) -> Content | None:
    """The content of an initializer or Constant: a short vector, one number, or a lower triangle."""
    array = constant(value, _TRIANGLE) if _worth_reading(value) else None
    if array is None or array.size == 0:
        return None
    if array.dtype.kind in "iu":
        return _of_integers(array)
    if array.dtype.kind not in "bf":
        return None
    first = array.flat[0]
    if (array == first).all():
        return (All() if first else FALSE) if array.dtype.kind == "b" else float(first)
    lower = np.tril(np.ones(array.shape[-2:], bool)) if array.ndim >= 2 else None
    if array.dtype.kind == "b" and lower is not None and (array == lower).all():
        return All(frozenset({AXES[0] - AXES[1]}))
    return None


def _worth_reading(value: ir.Value) -> bool:
    """Weights are not read: only booleans, and numbers that are few."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return False
    return tensor.dtype == ir.DataType.BOOL or tensor.size <= (_VECTOR if tensor.dtype.is_integer() else 1)


def _of_integers(array: np.ndarray) -> Content | None:
    numbers = [sympy.Integer(int(n)) for n in array.flat]
    if array.ndim == 0:
        return numbers[0]
    if array.ndim == 1:
        return tuple(numbers)
    return numbers[0] if len(set(numbers)) == 1 else None


def _shape(facts: Facts, node: ir.Node) -> Content | None:
    shape = facts.shape(node.inputs[0])
    part = () if shape is None else shape[shape_span(node, len(shape))]
    return None if not part or None in part else part  # type: ignore[return-value]


def _size(facts: Facts, node: ir.Node) -> Content | None:
    shape = facts.shape(node.inputs[0])
    return None if shape is None or None in shape else sympy.Mul(*shape)


def _same(facts: Facts, node: ir.Node) -> Content | None:
    return facts.content(node.inputs[0])


def _cast(facts: Facts, node: ir.Node) -> Content | None:
    content = facts.content(node.inputs[0])
    like = node.inputs[1].dtype if node.op_type == "CastLike" and node.inputs[1] is not None else None
    to = like or ir.DataType(attribute(node, "to", 0))
    if content == All() and to.is_integer():
        return ONE
    if isinstance(content, All) and to != ir.DataType.BOOL:
        return Choice(content, 1.0, 0.0)
    if isinstance(content, Choice) and to == ir.DataType.BOOL:
        return content.test if content.yes != 0 and content.no == 0 else None
    if isinstance(content, sympy.Integer | float) and to == ir.DataType.BOOL:
        return FALSE if content == 0 else All()
    if isinstance(content, sympy.Integer) and not to.is_integer():
        return float(content)
    if isinstance(content, float) and to.is_integer():
        return sympy.Integer(int(content)) if content == int(content) else None
    wide = to in (ir.DataType.INT64, ir.DataType.INT32) or not to.is_integer()
    exact = to.is_integer() or isinstance(content, All | Choice | float)
    return content if wide and exact else None


def _moved(facts: Facts, node: ir.Node) -> Content | None:
    """Reshape, Squeeze, Unsqueeze, Flatten: known when only axes of size one come or go."""
    content = facts.content(node.inputs[0])
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if isinstance(content, tuple) or (
        isinstance(content, sympy.Expr) and after is not None and len(after) < 2
    ):
        elements = facts.vector(node.inputs[0])
        if elements is None or after is None or len(after) > 1:
            return None
        return elements if after else (elements[0] if len(elements) == 1 else None)
    if content is None or before is None or after is None:
        return None
    old, new = _long_axes(before), _long_axes(after)
    if [d for _, d in old] != [d for _, d in new] or None in [d for _, d in new]:
        return None
    return substitute(content, {AXES[a]: AXES[b] for (a, _), (b, _) in zip(old, new, strict=True)})


def _long_axes(shape: Shape) -> list[tuple[int, Dim | None]]:
    """Axes (counted from the last) whose size is not one, with their sizes."""
    return [(k, d) for k, d in enumerate(reversed(shape)) if d != 1]


def _transpose(facts: Facts, node: ir.Node) -> Content | None:
    content, rank = facts.content(node.inputs[0]), facts.rank(node.inputs[0])
    if content is None or rank is None or isinstance(content, tuple):
        return content
    perm = attribute(node, "perm", range(rank)[::-1])
    return substitute(content, {AXES[rank - 1 - p]: AXES[rank - 1 - i] for i, p in enumerate(perm)})


def _expand(facts: Facts, node: ir.Node) -> Content | None:
    return None if facts.shape(node.outputs[0]) is None else facts.element(node.inputs[0])


def _slice(facts: Facts, node: ir.Node) -> Content | None:
    content, shape = facts.content(node.inputs[0]), facts.shape(node.inputs[0])
    bounds = slice_bounds(facts, node)
    if content is None or shape is None or bounds is None:
        return None
    if isinstance(content, tuple):
        start, end, step = bounds[0]
        fixed = start.is_Integer and end.is_Integer
        return content[int(start) : int(end) : step] or None if fixed else None
    rank = len(shape)
    return substitute(
        content, {AXES[rank - 1 - a]: s + k * AXES[rank - 1 - a] for a, (s, _, k) in bounds.items()}
    )


def _gather(facts: Facts, node: ir.Node) -> Content | None:
    elements, index = facts.vector(node.inputs[0]), constant(node.inputs[1])
    if elements is None or index is None or index.ndim > 1:
        return None
    picked = tuple(elements[int(i)] for i in index.flat)
    return picked[0] if index.ndim == 0 else picked or None


def _concat(facts: Facts, node: ir.Node) -> Content | None:
    parts = [facts.vector(v) for v in node.inputs]
    if any(p is None for p in parts) or facts.rank(node.inputs[0]) != 1:
        return None
    joined = tuple(d for p in parts for d in p)  # type: ignore[union-attr]
    return joined if len(joined) <= _VECTOR else None


def _range(facts: Facts, node: ir.Node) -> Content | None:
    start, _, step = (facts.number(v) for v in node.inputs)
    return None if start is None or step is None else start + step * AXES[0]


def _cumsum(facts: Facts, node: ir.Node) -> Content | None:
    """Sums of equal integers along an axis."""
    content, axis = facts.element(node.inputs[0]), facts.number(node.inputs[1])
    rank, other = facts.rank(node.inputs[0]), attribute(node, "exclusive", 0) or attribute(node, "reverse", 0)
    if not isinstance(content, sympy.Integer) or axis is None or rank is None or other:
        return None
    return content * (AXES[rank - 1 - int(axis) % rank] + 1) if axis.is_Integer else None


def _arithmetic(function: Callable[[object, object], object]) -> Rule:
    def rule(facts: Facts, node: ir.Node) -> Content | None:
        a, b = (facts.content(v) for v in node.inputs)
        if isinstance(a, tuple) or isinstance(b, tuple):
            return _by_element(function, facts, node)
        if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
            return _known(function(a, b))
        return None if a is None or b is None else _on_choice(function, a, b)

    return rule


def _by_element(function: Callable[[object, object], object], facts: Facts, node: ir.Node) -> Content | None:
    a, b = (facts.vector(v) for v in node.inputs)
    if a is None or b is None:
        return None
    count = max(len(a), len(b))
    if {len(a), len(b)} - {1, count}:
        return None
    a, b = a * (count // len(a)), b * (count // len(b))
    out = tuple(_known(function(x, y)) for x, y in zip(a, b, strict=True))
    return None if None in out else out  # type: ignore[return-value]


def _known(result: object) -> Dim | None:
    return sympy.expand(result) if isinstance(result, sympy.Expr) and result.is_integer else None


def _on_choice(function: Callable[[object, object], object], a: Content, b: Content) -> Content | None:
    """Arithmetic with floats and choices: applied to both branches; a product with 0 narrows."""
    if isinstance(a, All) or isinstance(b, All) or isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr):
        return None
    if isinstance(a, float) and isinstance(b, float):
        with np.errstate(all="ignore"):
            return float(function(np.float64(a), np.float64(b)))  # type: ignore[arg-type]
    if isinstance(a, Choice) and isinstance(b, Choice) and a.test != b.test:
        product = function is operator.mul and a.no == b.no == 0
        return Choice(All(a.test.atoms | b.test.atoms), a.yes * b.yes, 0.0) if product else None
    test = a.test if isinstance(a, Choice) else b.test  # type: ignore[union-attr]
    yes, no = (function(_branch(a, side), _branch(b, side)) for side in ("yes", "no"))
    return Choice(test, yes, no)  # type: ignore[arg-type]


def _branch(content: Content, side: str) -> float:
    return getattr(content, side) if isinstance(content, Choice) else content  # type: ignore[return-value]


def _divide(a: object, b: object) -> object:
    """Exact integer quotients, and float ones; anything else is unknown."""
    if isinstance(a, sympy.Expr):
        return sympy.cancel(a / b) if b != 0 else None
    return a / b if b != 0 else float("nan")  # type: ignore[operator]


def _compare(left_minus_right: bool, strict: bool) -> Rule:
    def rule(facts: Facts, node: ir.Node) -> Content | None:
        a, b = (facts.element(v) for v in node.inputs)
        if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
            return None
        difference = a - b if left_minus_right else b - a
        return All(frozenset({sympy.expand(difference + (1 if strict else 0))}))

    return rule


def _and(facts: Facts, node: ir.Node) -> Content | None:
    a, b = (facts.element(v) for v in node.inputs)
    return All(a.atoms | b.atoms) if isinstance(a, All) and isinstance(b, All) else None


def _not(facts: Facts, node: ir.Node) -> Content | None:
    test = facts.element(node.inputs[0])
    return _inverse(test) if isinstance(test, All) else None


def _inverse(test: All) -> All | None:
    """The negation of at most one atom: not (e <= 0) is 1 - e <= 0, for integers."""
    if not test.atoms:
        return FALSE
    return All(frozenset(1 - a for a in test.atoms)) if len(test.atoms) == 1 else None


def _where(facts: Facts, node: ir.Node) -> Content | None:
    test, a, b = (facts.element(v) for v in node.inputs)
    if not isinstance(test, All) or not isinstance(a, float) or not isinstance(b, float):
        return None
    return Choice(test, a, b)


def _trilu(facts: Facts, node: ir.Node) -> Content | None:
    content = facts.element(node.inputs[0])
    k = facts.number(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else ZERO
    if k is None:
        return None
    distance = AXES[0] - AXES[1] - k
    test = All(frozenset({-distance if attribute(node, "upper", 1) else distance}))
    if content == All():
        return test
    if isinstance(content, sympy.Integer):
        content = float(content)
    return Choice(test, content, 0.0) if isinstance(content, float) else None


def _filled(facts: Facts, node: ir.Node) -> Content | None:
    tensor = attribute(node, "value", None)
    value = np.float32(0) if tensor is None else tensor.numpy().flat[0]
    if value.dtype.kind in "iu":
        return sympy.Integer(int(value))
    return (All() if value else FALSE) if value.dtype.kind == "b" else float(value)


def equal(test: Content | None, number: float) -> bool:
    """Whether a content is this one number everywhere."""
    return not isinstance(test, tuple | All | Choice) and test is not None and test == number


_RULES: dict[str, Rule] = {
    "Add": _arithmetic(operator.add),
    "And": _and,
    "Cast": _cast,
    "CastLike": _cast,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "CumSum": _cumsum,
    "Div": _arithmetic(_divide),
    "Expand": _expand,
    "Flatten": _moved,
    "Gather": _gather,
    "Greater": _compare(left_minus_right=False, strict=True),
    "GreaterOrEqual": _compare(left_minus_right=False, strict=False),
    "Identity": _same,
    "Less": _compare(left_minus_right=True, strict=True),
    "LessOrEqual": _compare(left_minus_right=True, strict=False),
    "Mul": _arithmetic(operator.mul),
    "Not": _not,
    "Range": _range,
    "Reshape": _moved,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _moved,
    "Sub": _arithmetic(operator.sub),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _moved,
    "Where": _where,
}
