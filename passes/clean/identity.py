"""Remove nodes whose output is always their input, bit for bit.

    Identity(x), Cast<to=dtype of x>(x), Dropout(x)  -> x
    Reshape(x, shape of x), Expand(x, ones), Transpose<perm=[0,1,2]>(x), Slice(x, all of it)  -> x
    x * 1, x / 1, x - 0  -> x

Only the very numbers count: 1.00001 is not 1, and an epsilon of 1e-12 is not 0. `x + 0` stays for floats,
because -0.0 + 0.0 is +0.0; `x + -0.0` goes, and so does `x + 0` for integers. A number that would broadcast
or widen stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.match import attribute, bypass, constant, given, graphs, producer
from porter.pipeline import Pass, Promise
from porter.symbolic.shapes import slice_bounds
from porter.symbolic.symbols import Facts, same


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove nodes that change nothing."""

    promise: ClassVar[Promise] = Promise.EXACT
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "clean.shapes")

    def run(self, model: ir.Model, context: Context) -> int:
        """The number of nodes removed."""
        facts = Facts(model.graph)
        return sum(_remove(facts, node) for graph in graphs(model) for node in graph)


def _remove(facts: Facts, node: ir.Node) -> bool:
    value = _equal(facts, node)
    others = (o for o in node.outputs[1:] if o.uses() or o.is_graph_output())
    return value is not None and next(others, None) is None and bypass(node, value)


def _equal(facts: Facts, node: ir.Node) -> ir.Value | None:
    """The value that the node's first output always equals, None when there is none."""
    if node.domain not in ("", "ai.onnx"):
        return None
    rule = _RULES.get(node.op_type)
    return rule(facts, node) if rule else None


def _first(facts: Facts, node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _cast(facts: Facts, node: ir.Node) -> ir.Value | None:
    like = given(node, 1)
    to = attribute(node, "to", None) if like is None else like.dtype
    source = node.inputs[0]
    return source if to is not None and source is not None and source.dtype == to else None


def _dropout(facts: Facts, node: ir.Node) -> ir.Value | None:
    training = given(node, 2)
    off = training is None or ((flag := constant(training, 1)) is not None and not flag.any())
    return node.inputs[0] if off else None


def _same_shape(facts: Facts, node: ir.Node) -> ir.Value | None:
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if before is None or after is None or len(before) != len(after):
        return None
    return node.inputs[0] if all(map(same, before, after)) else None


def _transpose(facts: Facts, node: ir.Node) -> ir.Value | None:
    perm = attribute(node, "perm", None)
    if perm is None:
        return None
    if list(perm) == list(range(len(perm))):
        return node.inputs[0]
    inner = producer(node.inputs[0], "Transpose")
    before = attribute(inner, "perm", None) if inner else None
    if inner is None or before is None or [before[p] for p in perm] != list(range(len(perm))):
        return None
    return inner.inputs[0]


def _slice(facts: Facts, node: ir.Node) -> ir.Value | None:
    shape, bounds = facts.shape(node.inputs[0]), slice_bounds(facts, node)
    if shape is None or bounds is None:
        return None if not _takes_all(node) else node.inputs[0]
    whole = all(s == 0 and same(e, shape[axis]) and step == 1 for axis, (s, e, step) in bounds.items())
    return node.inputs[0] if whole else None


def _takes_all(node: ir.Node) -> bool:
    """Whether the numbers alone say so: from 0 to the largest integer by 1."""
    starts, ends, steps = constant(given(node, 1)), constant(given(node, 2)), constant(given(node, 4))
    if starts is None or ends is None or (steps is None and given(node, 4) is not None):
        return False
    return not starts.any() and (ends >= 2**31 - 1).all() and (steps is None or (steps == 1).all())


def _concat(facts: Facts, node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _neutral(number: float, *, left: bool) -> Callable[[Facts, ir.Node], ir.Value | None]:
    """`x op number` is x, and `number op x` too when `left`, unless the number widens the shape."""

    def rule(facts: Facts, node: ir.Node) -> ir.Value | None:
        for x, other in ((0, 1), (1, 0))[: 2 if left else 1]:
            value, array = node.inputs[x], constant(node.inputs[other])
            if array is None or value is None or array.size == 0 or not _all_are(array, number, node):
                continue
            before, after = facts.shape(value), facts.shape(node.outputs[0])
            keeps = before is not None and after is not None and len(before) == len(after)
            if keeps and (array.size == 1 or all(map(same, before, after))):  # type: ignore[arg-type]
                return value
        return None

    return rule


def _all_are(array: ir.ArrayCompatible, number: float, node: ir.Node) -> bool:
    """Exactly `number`; a float zero that is added must be -0.0, which changes no bit of any x."""
    if not (array == number).all():  # type: ignore[union-attr]
        return False
    if number != 0 or array.dtype.kind in "iub":  # type: ignore[union-attr]
        return True
    negative = all(math.copysign(1, float(n)) < 0 for n in array.flat)  # type: ignore[union-attr]
    return negative if node.op_type == "Add" else not negative


_RULES: dict[str, Callable[[Facts, ir.Node], ir.Value | None]] = {
    "Add": _neutral(0, left=True),
    "Cast": _cast,
    "CastLike": _cast,
    "Concat": _concat,
    "Div": _neutral(1, left=False),
    "Dropout": _dropout,
    "Expand": _same_shape,
    "Identity": _first,
    "Mul": _neutral(1, left=True),
    "Reshape": _same_shape,
    "Slice": _slice,
    "Sub": _neutral(0, left=False),
    "Transpose": _transpose,
}
