"""Reading attention in a graph: scores down to queries and keys, masks, repeated heads, appended tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from porter.match import attribute, constant, producer, scalar
from porter.rewrite import Mismatch
from porter.symbolic.shapes import axes_of
from porter.symbolic.symbols import All, Choice, Facts, Shape, is_causal, reduced, same

MASKED = -1e9  # a score this low is as good as -inf


@dataclass(frozen=True)
class Scores:
    """What was read from the softmax inwards."""

    q: ir.Value
    k: ir.Value
    scale: float = 1.0
    softcap: float = 0.0
    additive: ir.Value | None = None
    boolean: ir.Value | None = None


def read_scores(facts: Facts, value: ir.Value) -> Scores:
    """Read mask, softcap and scale down to the product of queries and keys. Raises Mismatch."""
    node = value.producer()
    if node is None or node.domain != "":
        raise Mismatch("wanted scores, found an input", value)
    if node.op_type == "MatMul":
        return _product(facts, node)
    if node.op_type == "Add":
        return _masked_by_sum(facts, node)
    if node.op_type == "Where":
        return _masked_by_choice(facts, node)
    if node.op_type in ("Mul", "Div"):
        return _scaled(facts, node)
    raise Mismatch(f"wanted a mask, a scale or a MatMul, found {node.op_type}", node)


def _masked_by_sum(facts: Facts, node: ir.Node) -> Scores:
    reasons = []
    for side in (0, 1):
        try:
            inner = read_scores(facts, node.inputs[side])
        except Mismatch as reason:
            reasons.append(reason)
            continue
        if inner.additive is not None or inner.boolean is not None:
            raise Mismatch("two masks are applied one after the other", node)
        return replace(inner, additive=node.inputs[1 - side])
    raise reasons[0]


def _masked_by_choice(facts: Facts, node: ir.Node) -> Scores:
    low = scalar(node.inputs[2])
    if low is None or low > MASKED:
        raise Mismatch(f"a masked score is {low}, not -1e9 or less", node)
    inner = read_scores(facts, node.inputs[1])
    if inner.additive is not None or inner.boolean is not None:
        raise Mismatch("two masks are applied one after the other", node)
    return replace(inner, boolean=node.inputs[0])


def _scaled(facts: Facts, node: ir.Node) -> Scores:
    """A constant factor on the scores: the scale, or the outer half of a softcap."""
    value, factor = _factor(node)
    tanh = producer(value, "Tanh")
    if tanh is None:
        inner = read_scores(facts, value)
        if inner.softcap or inner.additive is not None or inner.boolean is not None:
            raise Mismatch("the scores are scaled after the mask or the softcap", node)
        return replace(inner, scale=inner.scale * factor)
    capped = producer(tanh.inputs[0], "Div", "Mul")
    inside, inverse = _factor(capped) if capped else (None, 0.0)
    if inside is None or not math.isclose(inverse * factor, 1.0, rel_tol=1e-6):
        raise Mismatch("the Tanh is not a softcap: what goes in is not divided by what comes out", tanh)
    return replace(read_scores(facts, inside), softcap=factor)


def _factor(node: ir.Node) -> tuple[ir.Value, float]:
    """The value and the number it is multiplied by."""
    second, first = scalar(node.inputs[1]), scalar(node.inputs[0])
    if second is not None:
        return node.inputs[0], 1 / second if node.op_type == "Div" else second  # type: ignore[return-value]
    if first is not None and node.op_type == "Mul":
        return node.inputs[1], first  # type: ignore[return-value]
    raise Mismatch("the factor is not one constant", node)


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """A query or key without the constant factors that were applied to it."""
    node, total = producer(value, "Mul", "Div"), 1.0
    while node is not None:
        try:
            value, factor = _factor(node)
        except Mismatch:
            break
        total, node = total * factor, producer(value, "Mul", "Div")
    return value, total


def _product(facts: Facts, node: ir.Node) -> Scores:
    q, of_q = _unscaled(node.inputs[0])  # type: ignore[arg-type]
    turned, outside = _unscaled(node.inputs[1])  # type: ignore[arg-type]
    k, inside = _unscaled(_turned_back(facts, turned))
    return Scores(q, k, scale=of_q * outside * inside)


def _turned_back(facts: Facts, value: ir.Value) -> ir.Value:
    """The keys [batch, heads, keys, size] whose last two axes `value` has swapped."""
    node = producer(value, "Transpose")
    if node is not None and list(attribute(node, "perm", ())) == [0, 1, 3, 2]:
        return node.inputs[0]  # type: ignore[return-value]
    outer = producer(value, "Reshape")
    node = producer(outer.inputs[0], "Transpose") if outer else None
    inner = producer(node.inputs[0], "Reshape") if node else None
    if inner is None or list(attribute(node, "perm", ())) != [0, 2, 1]:
        raise Mismatch("the keys are not transposed", value)
    before, after = facts.shape(inner.inputs[0]), facts.shape(value)
    if before is None or after is None or len(before) != 4 or len(after) != 4:
        raise Mismatch("the keys do not have four axes", inner)
    if not all(map(same, (*before[:2], before[3], before[2]), after)):
        raise Mismatch("the keys are not transposed head by head", inner)
    if not same((facts.shape(inner.outputs[0]) or (None,))[-1], before[3]):
        raise Mismatch("the keys are flattened along another axis", inner)
    return inner.inputs[0]  # type: ignore[return-value]


def is_causal_mask(facts: Facts, mask: ir.Value) -> bool:
    """Whether a boolean or additive mask [..., S, T] lets query i see key j just when j <= i + T - S."""
    shape, content = facts.shape(mask), facts.element(mask)
    if shape is None or len(shape) < 2:
        return False
    if isinstance(content, Choice) and content.yes == 0 and content.no <= MASKED:
        content = content.test
    elif (
        isinstance(content, Choice)
        and content.no == 0
        and content.yes <= MASKED
        and len(content.test.atoms) == 1
    ):
        content = All(frozenset(1 - a for a in content.test.atoms))
    return isinstance(content, All) and is_causal(content, shape)


def without_causal(facts: Facts, mask: ir.Value, want: Shape) -> tuple[bool, ir.Value | None]:
    """Whether a mask is causal over [S, T] = `want`, alone or together with something, and that something.

    (True, None): exactly causal. (True, rest): causal and `rest`. (False, mask): not known to be.
    """
    if is_causal_mask(facts, mask) and all(map(same, facts.shape(mask)[-2:], want)):  # type: ignore[index]
        return True, None
    node = producer(mask, "And", "Add", "Expand", "Where")
    if node is None:
        return False, mask
    if node.op_type in ("And", "Add"):
        for side in (0, 1):
            found, rest = without_causal(facts, node.inputs[side], want)  # type: ignore[arg-type]
            if found and rest is None:
                return True, node.inputs[1 - side]
        return False, mask
    if node.op_type == "Where" and (scalar(node.inputs[1]) != 0 or (scalar(node.inputs[2]) or 0) > MASKED):
        return False, mask
    found, rest = without_causal(facts, node.inputs[0], want)  # type: ignore[arg-type]
    return (True, rest) if found else (False, mask)


def needed(facts: Facts, mask: ir.Value | None) -> ir.Value | None:
    """A boolean mask without the parts that are true everywhere; None when nothing is left."""
    content, shape = facts.element(mask), facts.shape(mask)
    if isinstance(content, All) and shape is not None and not reduced(content, shape):
        return None
    node = producer(mask, "And")
    sides = [needed(facts, side) for side in node.inputs] if node else []
    return next(s for s in sides if s is not None) if None in sides else mask


def ungrouped(facts: Facts, value: ir.Value) -> tuple[ir.Value, int]:
    """The heads before each was repeated r times in a row, and r (1 when they were not).

    Repeated by Unsqueeze, Expand (or Tile, or Concat with itself) and Reshape, or by Gather of [0, 0, 1, 1,
    ...].
    """
    after = facts.shape(value)
    gather = producer(value, "Gather")
    if gather is not None:
        return _gathered(facts, gather)
    reshape = producer(value, "Reshape")
    wide = None if reshape is None else producer(reshape.inputs[0], "Expand", "Tile", "Concat")
    unsqueeze = None if wide is None else producer(wide.inputs[0], "Unsqueeze")
    if unsqueeze is None or axes_of(facts, unsqueeze, 5) != [2]:
        return value, 1
    if wide.op_type == "Concat" and any(x is not wide.inputs[0] for x in wide.inputs):
        return value, 1
    source = unsqueeze.inputs[0]
    before, spread = facts.shape(source), facts.shape(wide.outputs[0])
    if (
        before is None
        or spread is None
        or after is None
        or (len(before), len(spread), len(after)) != (4, 5, 4)
    ):
        return value, 1
    kept = all(map(same, before, (*spread[:2], *spread[3:])))
    times = spread[2]
    if not kept or times is None or not times.is_Integer or before[1] is None:
        return value, 1
    joined = all(map(same, after, (before[0], before[1] * times, *before[2:])))
    return (source, int(times)) if joined else (value, 1)  # type: ignore[return-value]


def _gathered(facts: Facts, node: ir.Node) -> tuple[ir.Value, int]:
    shape, index = facts.shape(node.inputs[0]), constant(node.inputs[1])
    if (
        shape is None
        or len(shape) != 4
        or index is None
        or index.ndim != 1
        or attribute(node, "axis", 0) not in (1, -3)
    ):
        return node.outputs[0], 1
    heads = shape[1]
    if heads is None or not heads.is_Integer or index.size % int(heads):
        return node.outputs[0], 1
    times = index.size // int(heads)
    grouped = np.array_equal(index, np.arange(index.size) // times)
    return (node.inputs[0], times) if grouped else (node.outputs[0], 1)  # type: ignore[return-value]


@dataclass(frozen=True)
class Appended:
    """New tokens after past ones: the Concat and its two parts."""

    node: ir.Node
    past: ir.Value
    new: ir.Value


def appended(facts: Facts, value: ir.Value) -> Appended | None:
    """The Concat along the tokens that computes `value`, None when there is none."""
    node = producer(value, "Concat")
    if (
        node is None
        or len(node.inputs) != 2
        or attribute(node, "axis", 0) not in (2, -2)
        or facts.rank(value) != 4
    ):
        return None
    return Appended(node, *node.inputs)  # type: ignore[arg-type]


def depends(value: ir.Value | None, on: set[ir.Value]) -> bool:
    """Whether a value is computed from one of `on`."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        if current in on:
            return True
        seen.add(current)
        if current.producer() is not None:
            stack.extend(current.producer().inputs)  # type: ignore[union-attr]
    return False
