"""Attention written out, or with its cache and mask outside, becomes one Attention.

    Softmax(q @ k^T * scale + mask) @ v                      -> Attention<scale>(q, k, v, mask)
    Attention(q, repeat(k), repeat(v))                       -> Attention(q, k, v)          grouped heads
    Attention(q, Concat(past_k, k), Concat(past_v, v))       -> Attention(q, k, v, , past_k, past_v), present
    Attention(q, k, v, causal mask)                          -> Attention<is_causal=1>(q, k, v)
    Attention(q, k, v, causal mask and padding)              -> Attention<is_causal=1>(q, k, v, padding)

A mask is causal when what it holds follows from indices to be `key <= query + past` (porter.symbols),
whichever operators built it; a mask that cannot be proven so stays. Masked scores of -1e9 or less count as
-inf: after the softmax they are zero in every row that sees any key, as each row of a causal mask does. The
guard Where(IsNaN(softmax), 0, softmax) goes, for Attention gives zero for a row that sees no key.

With K keys, head size D: the D products of a score and the K of an output may be summed in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase

from porter.match import attribute, constant, given, producer, scalar, shared_initializer
from porter.pipeline import Promise
from porter.rewrite import Mismatch, Rewrite
from porter.shapes import axes_of
from porter.symbols import ONE, All, Choice, Facts, Shape, is_causal, reduced, same

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


class WrittenOut(RewriteRuleClassBase):
    """Two products and a softmax."""

    def __init__(self, facts: Facts, *, guarded: bool) -> None:
        super().__init__("guarded softmax" if guarded else "softmax")
        self.facts, self.guarded = facts, guarded

    def pattern(self, op, scores, v, zero):
        """From the softmax on; what is before it has many forms and is read by `check`."""
        softmax = op.Softmax(scores, _allow_other_attributes=True, _outputs=["weights"])
        return op.MatMul(op.Where(op.IsNaN(softmax), zero, softmax) if self.guarded else softmax, v)

    def check(
        self, context, scores: ir.Value, v: ir.Value, weights: ir.Value, zero: ir.Value | None = None
    ) -> MatchResult:
        """Four axes each, and as many queries, keys and values as the operator wants."""
        fail = MatchResult().fail
        if self.facts.opset < 23:
            return fail("Attention needs opset 23", weights)
        if attribute(weights.producer(), "axis", -1) not in (-1, 3):
            return fail("the softmax is not over the last axis", weights.producer())
        if self.guarded and scalar(zero) != 0:
            return fail("what replaces NaN is not 0", zero)
        read = read_scores(self.facts, scores)
        shapes = [self.facts.shape(x) for x in (read.q, read.k, v)]
        if any(s is None or len(s) != 4 for s in shapes):
            return fail("query, key and value do not all have four axes", read.q)
        q, k, values = shapes
        if not same(q[0], k[0]) or not same(k[0], values[0]):  # type: ignore[index]
            return fail("query, key and value are not known to have one batch size", read.k)
        if not same(k[1], values[1]) or not (same(q[1], k[1]) or k[1] == 1):  # type: ignore[index]
            return fail("query, key and value are not known to have the same heads", read.k)
        mask = read.additive if read.boolean is None else read.boolean
        if mask is not None and self.facts.rank(mask) not in (2, 3, 4):
            return fail("the mask does not have two to four axes", mask)
        return MatchResult()

    def rewrite(self, op, scores: ir.Value, v: ir.Value, **rest: ir.Value):
        """One Attention with the mask as it was."""
        read = read_scores(self.facts, scores)
        mask = read.additive if read.boolean is None else read.boolean
        inputs = [read.q, read.k, v] + ([] if mask is None else [_four_axes(self.facts, op, mask)])
        return op.Attention(*inputs, scale=float(read.scale), softcap=float(read.softcap))


def _four_axes(facts: Facts, op: object, mask: ir.Value) -> ir.Value:
    """A mask of two or three axes broadcasts from the left like any other tensor: say so in the shape."""
    missing = 4 - (facts.rank(mask) or 4)
    if not missing:
        return mask
    axes = shared_initializer(facts.graph, f"axes_first_{missing}", np.arange(missing, dtype=np.int64))
    return op.Unsqueeze(mask, axes)  # type: ignore[attr-defined]


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


def _needed(facts: Facts, mask: ir.Value | None) -> ir.Value | None:
    """A boolean mask without the parts that are true everywhere; None when nothing is left."""
    content, shape = facts.element(mask), facts.shape(mask)
    if isinstance(content, All) and shape is not None and not reduced(content, shape):
        return None
    node = producer(mask, "And")
    sides = [_needed(facts, side) for side in node.inputs] if node else []
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


def _depends(value: ir.Value | None, on: set[ir.Value]) -> bool:
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


@dataclass(frozen=True)
class Plan:
    """One Attention as it will be: its inputs, and which Concat it takes over."""

    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    causal: bool
    past: tuple[Appended, Appended] | None


class Absorb(RewriteRuleClassBase):
    """Take repeated heads, the cache and the causal mask into an Attention."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("take in heads, cache and mask", remove_nodes=False)  # its present may be read
        self.facts = facts

    def pattern(self, op, q, k, v):
        """Any Attention; what feeds it is read by `check`."""
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context, q: ir.Value, k: ir.Value, v: ir.Value, out: ir.Value) -> MatchResult:
        """Something can be taken in."""
        self._plan(out.producer(), q, k, v)
        return MatchResult()

    def _plan(self, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value) -> Plan:
        facts = self.facts
        if given(node, 4) is not None or given(node, 6) is not None or facts.rank(q) != 4:
            return self._masked_only(node, q, k, v)
        if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            raise Mismatch("its present or its scores are used", node)
        (key, times), (value, times_v) = ungrouped(facts, k), ungrouped(facts, v)
        if times != times_v:
            raise Mismatch("keys and values are repeated differently", node)
        cache = appended(facts, key), appended(facts, value)
        past = None if None in cache else cache
        queries, keys = facts.shape(q), facts.shape(key)
        if queries is None or keys is None:
            raise Mismatch("the shapes of query and key are unknown", node)
        start = facts.shape(past[0].past)[2] if past and facts.shape(past[0].past) else None  # type: ignore[union-attr,index]
        found, mask = self._mask(node, (queries[2], keys[2]), aligned=past is not None and start is not None)
        if past:
            self._check_order(node, past, (q, mask))  # type: ignore[arg-type]
            return Plan(past[0].new, past[1].new, mask, found, past)  # type: ignore[union-attr,arg-type]
        if times == 1 and not found and mask is given(node, 3):
            raise Mismatch("nothing to take in: no repeated heads, no cache, no causal mask", node)
        return Plan(key, value, mask, found, None)

    def _masked_only(self, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value) -> Plan:
        """An Attention that has its cache already: only the mask may go."""
        queries, keys, past = (self.facts.shape(x) for x in (q, k, given(node, 4)))
        if given(node, 6) is not None or queries is None or keys is None or past is None or len(queries) != 4:
            raise Mismatch("the cache is outside, or the shapes are unknown", node)
        total = None if past[2] is None or keys[2] is None else past[2] + keys[2]
        found, mask = self._mask(node, (queries[2], total), aligned=True)
        if not found:
            raise Mismatch(
                "the mask is not known to be causal" if mask else "nothing to take in", mask or node
            )
        return Plan(k, v, mask, found, None)

    def _mask(self, node: ir.Node, want: Shape, *, aligned: bool) -> tuple[bool, ir.Value | None]:
        """Whether a causal part can go, and the mask that is left; without a past, S must equal T."""
        mask = _needed(self.facts, given(node, 3))
        if mask is None or attribute(node, "is_causal", 0):
            return False, mask
        if not aligned and not same(*want):
            return False, mask
        return without_causal(self.facts, mask, want)

    def _check_order(
        self, node: ir.Node, past: tuple[Appended, Appended], inputs: Sequence[ir.Value | None]
    ) -> None:
        """The present comes out of this node, so what goes into it must not need the present."""
        presents = {p.node.outputs[0] for p in past}
        parts = [x for p in past for x in (p.past, p.new)]
        for value in (*inputs, *parts):
            if _depends(value, presents):
                raise Mismatch("an input is computed from the present itself", value)

    def rewrite(self, op, q: ir.Value, k: ir.Value, v: ir.Value, out: ir.Value):
        """The new node; users of the present move over to it."""
        node = out.producer()
        plan = self._plan(node, q, k, v)
        options = {n: a.value for n, a in node.attributes.items()}
        options["is_causal"] = int(plan.causal or attribute(node, "is_causal", 0))
        cache = (plan.past[0].past, plan.past[1].past) if plan.past else (given(node, 4), given(node, 5))
        inputs = [q, plan.k, plan.v, plan.mask, *cache]
        while inputs[-1] is None:
            inputs.pop()
        if not plan.past:
            made = op.Attention(*inputs, **options, _outputs=len(node.outputs))
            for old, new in zip(node.outputs[1:], made[1:] if len(node.outputs) > 1 else (), strict=True):
                take_over(self.facts, old, new)
            return made[0] if len(node.outputs) > 1 else made
        result, *presents = op.Attention(*inputs, **options, _outputs=3)
        for part, new in zip(plan.past, presents, strict=True):
            take_over(self.facts, part.node.outputs[0], new)
        return result


def take_over(facts: Facts, old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand where `old` stood, as an output of the graph too, with its name."""
    new.name, old.name = old.name, None
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


class MaskRows(RewriteRuleClassBase):
    """A mask with one row for all queries is written out for each: ONNX Runtime does not broadcast it."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("a mask row for each query", remove_nodes=False)  # its present may be read
        self.facts = facts

    def pattern(self, op, q, k, v, mask):
        """An Attention with a mask."""
        return op.Attention(
            q, k, v, mask, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"]
        )

    def check(
        self, context, q: ir.Value, mask: ir.Value | None, out: ir.Value, **rest: ir.Value
    ) -> MatchResult:
        """The mask has one row, the queries may have more."""
        queries, shape = self.facts.shape(q), self.facts.shape(mask)
        if mask is None or shape is None or len(shape) < 2 or shape[-2] != ONE:
            return MatchResult().fail("the mask does not have exactly one row", mask or out)
        if queries is None or len(queries) != 4 or queries[2] == ONE:
            return MatchResult().fail("there is one query, or it is not known how many", q)
        return MatchResult()

    def rewrite(self, op, q: ir.Value, mask: ir.Value, out: ir.Value, **rest: ir.Value):
        """The same node on the expanded mask."""
        node = out.producer()
        one = shared_initializer(self.facts.graph, "axes_1", np.array([1], np.int64))
        wide = op.Expand(mask, op.Concat(op.Shape(q, start=2, end=3), one, axis=0))
        options = {n: a.value for n, a in node.attributes.items()}
        made = op.Attention(*node.inputs[:3], wide, *node.inputs[4:], **options, _outputs=len(node.outputs))
        if len(node.outputs) == 1:
            return made
        for old, new in zip(node.outputs[1:], made[1:], strict=True):
            take_over(self.facts, old, new)
        return made[0]


@dataclass(frozen=True)
class FuseAttention(Rewrite):
    """Fuse attention with its scale, softcap, mask, repeated heads and cache."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "clean.shapes", "clean.identity")

    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        """From written out to the operator, then what surrounds the operator."""
        written = [WrittenOut.rule(facts, guarded=flag) for flag in (False, True)]
        return [*written, Absorb.rule(facts), MaskRows.rule(facts)]
