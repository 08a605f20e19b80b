"""Rotary position embeddings written out become RotaryEmbedding.

    x * cos + Concat(-x2, x1) * sin                        -> RotaryEmbedding(x, cos', sin')
    Concat(x1 * cos' - x2 * sin', x2 * cos' + x1 * sin')   -> RotaryEmbedding(x, cos', sin')
    the same with x1 = x[..., ::2], x2 = x[..., 1::2]      -> RotaryEmbedding<interleaved=1>(x, cos', sin')
    RotaryEmbedding(x, cos', sin') with one row of cos' for all of the batch   -> one row for each

x is [batch, heads, sequence, size], x1 and x2 its halves. In the first form cos and sin are as wide as x, and
must be two equal halves: they are followed back to where a half was doubled, Concat(f, f), and computed from
f instead. ONNX Runtime wants as many rows of cos' [batch, sequence, size / 2] as x has, so one row is
expanded. Products and sums keep their order; an implementation may only contract them (fused multiply-add).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase

from porter.match import add_initializer, attribute, constant, producer, scalar, shared_initializer, words
from porter.pipeline import Promise
from porter.rewrite import Mismatch, Rewrite
from porter.symbolic.shapes import axes_of, slice_bounds
from porter.symbolic.symbols import Facts, declared, same

Build = Callable[[object], ir.Value]  # from a rewrite's op builder to the new value

_ELEMENTWISE = words("Cast Cos Exp Identity Neg Reciprocal Sin Sqrt")
_SCALED = frozenset(["Add", "Div", "Mul", "Sub"])
_TABLE = 2**26  # most elements of a table of cosines that is compared half with half


def half(facts: Facts, value: ir.Value) -> Build:
    """How to compute the first half (along the last axis) of a value whose two halves are equal.

    Raises Mismatch where the halves cannot be seen to be equal.
    """
    node = value.producer()
    if node is None or node.op_type == "Constant":
        return _half_table(facts, value)
    if node.op_type == "Concat":
        return _half_concat(facts, node)
    if node.op_type in _ELEMENTWISE:
        inner = half(facts, node.inputs[0])
        return lambda op: _again(op, node, [inner(op)])
    if node.op_type in _SCALED:
        return _half_scaled(facts, node)
    if node.op_type in ("Unsqueeze", "Squeeze", "Slice", "Gather"):
        return _half_elsewhere(facts, node)
    raise Mismatch(f"cannot see that both halves are equal through {node.op_type}", node)


def _again(op: object, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
    """The same operator with the same attributes on other inputs."""
    return getattr(op, node.op_type)(*inputs, **{n: a.value for n, a in node.attributes.items()})


def _half_concat(facts: Facts, node: ir.Node) -> Build:
    rank, axis = facts.rank(node.outputs[0]), attribute(node, "axis", 0)
    if axis != -1 and axis != (rank or 0) - 1:
        raise Mismatch("the halves are not joined along the last axis", node)
    if len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        raise Mismatch("two different halves are joined", node)
    return lambda op: node.inputs[0]


def _half_scaled(facts: Facts, node: ir.Node) -> Build:
    for x, number in ((0, 1), (1, 0)):
        if scalar(node.inputs[number]) is not None:
            inner, factor = half(facts, node.inputs[x]), node.inputs[number]
            if x == 0:
                return lambda op, inner=inner, factor=factor: _again(op, node, [inner(op), factor])
            return lambda op, inner=inner, factor=factor: _again(op, node, [factor, inner(op)])
    raise Mismatch("a factor of the cosines is not one number", node)


def _half_elsewhere(facts: Facts, node: ir.Node) -> Build:
    """Operators on other axes than the last: done to the half as they were done to the whole."""
    data = node.inputs[0]
    rank, after = facts.rank(data), facts.rank(node.outputs[0])
    if rank is None or after is None:
        raise Mismatch("the rank is unknown", node)
    touched = {
        "Unsqueeze": lambda: axes_of(facts, node, after),
        "Squeeze": lambda: axes_of(facts, node, rank),
        "Slice": lambda: None if (b := slice_bounds(facts, node)) is None else list(b),
        "Gather": lambda: [int(attribute(node, "axis", 0)) % rank],
    }[node.op_type]()
    last = (after if node.op_type == "Unsqueeze" else rank) - 1
    if touched is None or last in touched:
        raise Mismatch("the last axis itself is changed", node)
    inner = half(facts, data)
    return lambda op: _again(op, node, [inner(op), *node.inputs[1:]])


def _half_table(facts: Facts, value: ir.Value) -> Build:
    array = constant(value, _TABLE)
    if array is None or array.ndim == 0 or array.shape[-1] % 2:
        raise Mismatch("the cosines are neither computed nor a constant table", value)
    size = array.shape[-1] // 2
    if not np.array_equal(array[..., :size], array[..., size:]):
        raise Mismatch("the two halves of the table differ", value)
    name = f"{value.name}_half"

    def build(op: object) -> ir.Value:
        known = facts.graph.initializers.get(name)
        return known or add_initializer(facts.graph, name, np.ascontiguousarray(array[..., :size]))

    return build


def rows(facts: Facts, table: ir.Value, x: ir.Value, heads: int, *, doubled: bool) -> Build:
    """cos' or sin' as [batch, sequence, size / 2], from a factor that broadcasts against the axes of `x`.

    `heads` is the axis of x that the table has one of; `doubled` says that the table holds two equal halves.
    Raises Mismatch when the table is of another form.
    """
    shape, wanted = facts.shape(table), facts.shape(x)
    if shape is None or wanted is None or not 2 <= len(shape) <= 4:
        raise Mismatch("the shape of the cosines is unknown", table)
    full = (*((1,) * (4 - len(shape))), *shape)
    one_each = full[0] == 1 or same(full[0], wanted[0])
    if full[heads] != 1 or not one_each or not same(full[3 - heads], wanted[3 - heads]):
        raise Mismatch("the cosines do not go by batch and position", table)
    inner = _without_heads(facts, table, heads)
    of = half(facts, inner or table) if doubled else (lambda op: inner or table)

    def build(op: object) -> ir.Value:
        value = of(op)
        if len(shape) == 2:
            value = op.Unsqueeze(value, _numbers(facts, [0]))  # type: ignore[attr-defined]
        elif inner is None and len(shape) == 4:
            value = op.Squeeze(value, _numbers(facts, [heads]))  # type: ignore[attr-defined]
        return spread(facts, op, value, x) if full[0] == 1 and wanted[0] != 1 else value

    return build


def _without_heads(facts: Facts, table: ir.Value, heads: int) -> ir.Value | None:
    """What the axis of the heads was added to, if that was done last."""
    node = producer(table, "Unsqueeze")
    return node.inputs[0] if node and axes_of(facts, node, 4) == [heads] and facts.rank(table) == 4 else None


def _numbers(facts: Facts, numbers: list[int]) -> ir.Value:
    return shared_initializer(facts.graph, "axes_" + "x".join(map(str, numbers)), np.array(numbers, np.int64))


def spread(facts: Facts, op: object, table: ir.Value, x: ir.Value) -> ir.Value:
    """One row of a table [1, sequence, n] for each row of x."""
    batch = _length(facts, op, x)
    ones = _numbers(facts, [1, 1])
    return op.Expand(table, op.Concat(batch, ones, axis=0))  # type: ignore[attr-defined]


def _length(facts: Facts, op: object, x: ir.Value) -> ir.Value:
    """The batch size of x as a vector, from an input of the graph if one has it: all layers share it."""
    wanted = facts.shape(x)
    for value in facts.graph.inputs:
        for axis, d in enumerate(declared(value) or ()):
            if wanted and same(wanted[0], d):
                return op.Shape(value, start=axis, end=axis + 1)  # type: ignore[attr-defined]
    return op.Shape(x, start=0, end=1)  # type: ignore[attr-defined]


def part(facts: Facts, value: ir.Value) -> tuple[ir.Value, str, int]:
    """Of which x, and which of its halves or of its even and odd elements, a value is.

    ("half", 0) is the first half, ("pair", 1) the odd elements. Raises Mismatch when it is neither.
    """
    node = producer(value, "Slice", "Split")
    shape = facts.shape(node.inputs[0]) if node else None
    if node is None or shape is None or shape[-1] is None or not shape[-1].is_Integer or shape[-1] % 2:
        raise Mismatch("wanted a half of an even number of channels", value)
    size, last = int(shape[-1]), len(shape) - 1
    if node.op_type == "Split":
        sizes = [facts.shape(o) for o in node.outputs]
        even = len(sizes) == 2 and all(s is not None and s[-1] == size // 2 for s in sizes)
        if even and attribute(node, "axis", 0) in (-1, last):
            return node.inputs[0], "half", value.index()  # type: ignore[return-value]
        raise Mismatch("the channels are not split in two equal halves", node)
    bounds = slice_bounds(facts, node) or {}
    cut = bounds.get(last) if len(bounds) == 1 else None
    cuts = {(0, size // 2, 1): ("half", 0), (size // 2, size, 1): ("half", 1), (0, size, 2): ("pair", 0)}
    cuts[(1, size, 2)] = ("pair", 1)
    if cut not in cuts:
        raise Mismatch("the slice is neither a half nor every second channel", node)
    return node.inputs[0], *cuts[cut]  # type: ignore[return-value]


def both(facts: Facts, first: ir.Value, second: ir.Value) -> tuple[ir.Value, str]:
    """The x that two values are the two parts of, and the kind of part."""
    x, kind, index = part(facts, first)
    other, other_kind, other_index = part(facts, second)
    if (other, other_kind, other_index - index) != (x, kind, 1):
        raise Mismatch("these are not the two parts of one value, in order", second)
    return x, kind


def _checked(facts: Facts, x: ir.Value) -> int:
    """The axis of the heads: 1 for [batch, heads, sequence, size]; 2 is told by the cosines."""
    if facts.rank(x) != 4:
        raise Mismatch("wanted four axes: batch, heads, sequence, size", x)
    if facts.opset < 23:
        raise Mismatch("RotaryEmbedding needs opset 23", x)
    return 1


def _heads(facts: Facts, x: ir.Value, table: ir.Value) -> int:
    """Which axis of x the heads are on: where the table has size one and x has not."""
    _checked(facts, x)
    shape = facts.shape(table) or ()
    return 2 if len(shape) == 4 and shape[2] == 1 and shape[1] != 1 else 1


def _embed(op: object, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int, interleaved: bool) -> ir.Value:
    """The operator, between two transpositions when the heads are the third axis."""
    swap = {"perm": [0, 2, 1, 3]}
    turned = x if heads == 1 else op.Transpose(x, **swap)  # type: ignore[attr-defined]
    out = op.RotaryEmbedding(turned, cos, sin, interleaved=int(interleaved))  # type: ignore[attr-defined]
    return out if heads == 1 else op.Transpose(out, **swap)  # type: ignore[attr-defined]


class RotateHalf(RewriteRuleClassBase):
    """x * cos + rotated(x) * sin, with cosines as wide as x."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("rotate half")
        self.facts = facts

    def pattern(self, op, x, x1, x2, cos, sin):
        """The sum of two products."""
        rotated = op.Concat(op.Neg(x2), x1, _allow_other_attributes=True, _outputs=["rotated"])
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def check(
        self, context, x: ir.Value, x1: ir.Value, x2: ir.Value, rotated: ir.Value, **tables: ir.Value
    ) -> MatchResult:
        """x1 and x2 are the halves of x, and each table is two equal halves."""
        heads = _heads(self.facts, x, tables["cos"])
        if attribute(rotated.producer(), "axis", 0) not in (-1, 3):
            return MatchResult().fail("the halves are not joined along the last axis", rotated.producer())
        whole, kind = both(self.facts, x1, x2)
        if whole is not x or kind != "half":
            return MatchResult().fail("what is rotated is not the two halves of x", rotated.producer())
        for table in tables.values():
            rows(self.facts, table, x, heads, doubled=True)
        return MatchResult()

    def rewrite(self, op, x: ir.Value, cos: ir.Value, sin: ir.Value, **rest: ir.Value):
        """One node, on the halves of the tables."""
        heads = _heads(self.facts, x, cos)
        tables = [rows(self.facts, t, x, heads, doubled=True)(op) for t in (cos, sin)]
        return _embed(op, x, *tables, heads, interleaved=False)


class RotateParts(RewriteRuleClassBase):
    """The two parts of x rotated one by one and joined: halves by Concat, pairs by Concat and Reshape."""

    def __init__(self, facts: Facts, *, interleaved: bool) -> None:
        super().__init__("rotate pairs" if interleaved else "rotate parts")
        self.facts, self.interleaved = facts, interleaved

    def pattern(self, op, x1, x2, cos, sin, axis1, axis2, shape):
        """A rotation by an angle, written as two sums."""
        real = op.Sub(op.Mul(x1, cos), op.Mul(x2, sin))
        imaginary = op.Add(op.Mul(x2, cos), op.Mul(x1, sin))
        if not self.interleaved:
            return op.Concat(real, imaginary, _allow_other_attributes=True, _outputs=["joined"])
        pair = (op.Unsqueeze(real, axis1), op.Unsqueeze(imaginary, axis2))
        joined = op.Concat(*pair, _allow_other_attributes=True, _outputs=["joined"])
        return op.Reshape(joined, shape, _allow_other_attributes=True, _outputs=["flat"])

    def check(
        self,
        context,
        x1: ir.Value,
        x2: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        joined: ir.Value,
        **rest: ir.Value,
    ) -> MatchResult:
        """x1 and x2 are the right parts of one value, joined the way they were parted."""
        x, kind = both(self.facts, x1, x2)
        heads = _heads(self.facts, x, cos)
        if kind != ("pair" if self.interleaved else "half"):
            return MatchResult().fail(
                "the parts are joined in another way than they were taken", joined.producer()
            )
        if attribute(joined.producer(), "axis", 0) not in (-1, 4 if self.interleaved else 3):
            return MatchResult().fail("the parts are not joined along the last axis", joined.producer())
        if self.interleaved:
            before, after = self.facts.shape(x), self.facts.shape(rest["flat"])
            axes = [constant(rest[k]) for k in ("axis1", "axis2")]
            if before is None or after is None or len(after) != 4 or not all(map(same, before, after)):
                return MatchResult().fail(
                    "the pairs are not flattened to the shape of x", rest["flat"].producer()
                )
            if any(a is None or a.reshape(-1).tolist() not in ([-1], [4]) for a in axes):
                return MatchResult().fail(
                    "the pairs are not stacked along a new last axis", joined.producer()
                )
        for table in (cos, sin):
            rows(self.facts, table, x, heads, doubled=False)
        return MatchResult()

    def rewrite(self, op, x1: ir.Value, cos: ir.Value, sin: ir.Value, **rest: ir.Value):
        """One node."""
        x, _, _ = part(self.facts, x1)
        heads = _heads(self.facts, x, cos)
        tables = [rows(self.facts, t, x, heads, doubled=False)(op) for t in (cos, sin)]
        return _embed(op, x, *tables, heads, self.interleaved)


class OneRowEach(RewriteRuleClassBase):
    """A RotaryEmbedding whose tables have one row for a batch of several."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("a row for each of the batch")
        self.facts = facts

    def pattern(self, op, x, cos, sin):
        """The operator without position ids."""
        return op.RotaryEmbedding(x, cos, sin, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context, x: ir.Value, cos: ir.Value, sin: ir.Value, **rest: ir.Value) -> MatchResult:
        """The tables have one row, x may have more."""
        batch = self.facts.shape(x)
        for table in (cos, sin):
            shape = self.facts.shape(table)
            if shape is None or len(shape) != 3 or shape[0] != 1:
                return MatchResult().fail("the table does not have exactly one row", table)
        return (
            MatchResult()
            if batch is not None and batch[0] != 1
            else MatchResult().fail("the batch is one", x)
        )

    def rewrite(self, op, x: ir.Value, cos: ir.Value, sin: ir.Value, out: ir.Value):
        """The same node with expanded tables."""
        options = {n: a.value for n, a in out.producer().attributes.items()}  # type: ignore[union-attr]
        return op.RotaryEmbedding(x, *(spread(self.facts, op, t, x) for t in (cos, sin)), **options)


@dataclass(frozen=True)
class FuseRotary(Rewrite):
    """Fuse rotary position embeddings."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "clean.shapes", "clean.identity")

    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        """Written out in three forms, then the operator itself."""
        forms = [RotateHalf.rule(facts)]
        forms += [RotateParts.rule(facts, interleaved=flag) for flag in (False, True)]
        return [turned for rule in forms for turned in rule.commute()] + [OneRowEach.rule(facts)]
