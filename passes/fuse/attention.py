"""Attention written out, or with its cache and mask outside, becomes one Attention.

    Softmax(q @ k^T * scale + mask) @ v                      -> Attention<scale>(q, k, v, mask)
    Attention(q, repeat(k), repeat(v))                       -> Attention(q, k, v)          grouped heads
    Attention(q, Concat(past_k, k), Concat(past_v, v))       -> Attention(q, k, v, , past_k, past_v), present
    Attention(q, k, v, causal mask)                          -> Attention<is_causal=1>(q, k, v)
    Attention(q, k, v, causal mask and padding)              -> Attention<is_causal=1>(q, k, v, padding)

A mask is causal when what it holds follows from indices to be `key <= query + past`
(porter.symbolic.symbols),
whichever operators built it; a mask that cannot be proven so stays. Masked scores of -1e9 or less count as
-inf: after the softmax they are zero in every row that sees any key, as each row of a causal mask does. The
guard Where(IsNaN(softmax), 0, softmax) goes, for Attention gives zero for a row that sees no key.

With K keys, head size D: the D products of a score and the K of an output may be summed in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase

from porter.match import attribute, given, scalar, shared_initializer, take_over
from porter.pipeline import Promise
from porter.rewrite import Mismatch, Rewrite
from porter.symbolic.attention import (
    Appended,
    appended,
    depends,
    needed,
    read_scores,
    ungrouped,
    without_causal,
)
from porter.symbolic.symbols import ONE, Facts, Shape, same


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
        total = self.facts.shape(scores)
        if total is None or not all(map(same, total, (*q[:3], k[2]))):  # type: ignore[index]
            return fail("the scores are not known to be [batch, heads, queries, keys]", scores)
        mask = read.additive if read.boolean is None else read.boolean
        shape = self.facts.shape(mask)
        if mask is None or (shape is not None and len(shape) in (2, 3, 4) and same(shape[-1], k[2])):  # type: ignore[index]
            return MatchResult()
        return fail("the mask is not known to have two to four axes, the last one the keys", mask)

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
        new = facts.shape(past[0].new) if past else None  # type: ignore[union-attr]
        found, mask = self._mask(node, (queries[2], keys[2]), new)
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
        found, mask = self._mask(node, (queries[2], total), keys)
        if not found:
            raise Mismatch(
                "the mask is not known to be causal" if mask else "nothing to take in", mask or node
            )
        return Plan(k, v, mask, found, None)

    def _mask(self, node: ir.Node, want: Shape, new: Shape | None) -> tuple[bool, ir.Value | None]:
        """Whether a causal part can go, and the mask that is left.

        The operator aligns query i with key past + i. That is T - S + i, where the mask's frontier is, when
        there are as many queries as keys: as new ones in shape `new` with a past, as all of them without.
        """
        mask = needed(self.facts, given(node, 3))
        if mask is None or attribute(node, "is_causal", 0):
            return False, mask
        if not same(want[0], want[1] if new is None else new[2]):
            return False, mask
        return without_causal(self.facts, mask, want)

    def _check_order(
        self, node: ir.Node, past: tuple[Appended, Appended], inputs: Sequence[ir.Value | None]
    ) -> None:
        """The present comes out of this node, so what goes into it must not need the present."""
        presents = {p.node.outputs[0] for p in past}
        parts = [x for p in past for x in (p.past, p.new)]
        for value in (*inputs, *parts):
            if depends(value, presents):
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
                take_over(old, new)
            return made[0] if len(node.outputs) > 1 else made
        result, *presents = op.Attention(*inputs, **options, _outputs=3)
        for part, new in zip(plan.past, presents, strict=True):
            take_over(part.node.outputs[0], new)
        return result


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
            take_over(old, new)
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
