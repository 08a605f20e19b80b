"""Hand-written RMS norms become RMSNormalization.

    x * (1 / sqrt(mean(x^2) + eps))         -> RMSNormalization(x, ones)
    w * RMSNormalization(x, ones)           -> RMSNormalization(x, w)
    Cast(RMSNormalization(Cast(x), ones))   -> RMSNormalization(x, ones)      half precision in, float inside

The square is Pow(x, 2) or x * x; the root is Sqrt then Div, Sqrt then Reciprocal, 1 / Sqrt, or Pow(-0.5);
epsilon is taken as it is, however small. The mean of n squares may be summed in another order: a relative
error of at most n * 2^-24 in the mean, half of that in the result, plus a few roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase
from onnxscript.rewriter.pattern import OrValue

from porter.match import attribute, constant, given, scalar, shared_initializer
from porter.pipeline import Promise
from porter.rewrite import Rewrite
from porter.symbolic.symbols import Facts

ROOTS = ("divide", "reciprocal", "quotient", "power")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Normalize(RewriteRuleClassBase):
    """x divided by its root mean square, in one of four ways to write the root."""

    def __init__(self, facts: Facts, root: str) -> None:
        super().__init__(f"normalize by {root}")
        self.facts, self.root = facts, root

    def pattern(self, op, x, two, eps, one, half):
        """The whole of it."""
        square = OrValue([op.Pow(x, two), op.Mul(x, x)])
        mean = op.ReduceMean(
            square, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["mean"]
        )
        shifted = op.Add(mean, eps)
        if self.root == "divide":
            return op.Div(x, op.Sqrt(shifted))
        if self.root == "reciprocal":
            return op.Mul(x, op.Reciprocal(op.Sqrt(shifted)))
        if self.root == "quotient":
            return op.Mul(x, op.Div(one, op.Sqrt(shifted)))
        return op.Mul(x, op.Pow(shifted, half))

    def check(self, context, x: ir.Value, mean: ir.Value, eps: ir.Value, **numbers: ir.Value) -> MatchResult:
        """The numbers are the right ones, and the mean is over a last axis of fixed size."""
        fail = MatchResult().fail
        for name, wanted in (("two", 2.0), ("one", 1.0), ("half", -0.5)):
            value = numbers.get(name)
            if value is not None and scalar(value) != wanted:
                return fail(f"wanted the constant {wanted:g}, found {scalar(value)}", value)
        reduce = mean.producer()
        shape = self.facts.shape(x)
        if shape is None or shape[-1] is None or not shape[-1].is_Integer:
            return fail("the last dimension has no fixed size", x)
        if _axes(reduce) not in ([-1], [len(shape) - 1]) or not attribute(reduce, "keepdims", 1):
            return fail("the mean is not over the last axis with keepdims", reduce)
        if scalar(eps) is None or scalar(eps) < 0:
            return fail("epsilon is not a constant of at least 0", eps)
        if x.dtype not in FLOATS:
            return fail(f"RMSNormalization computes in float, not in {x.dtype}", x)
        return MatchResult() if self.facts.opset >= 23 else fail("RMSNormalization needs opset 23", x)

    def rewrite(self, op, x: ir.Value, eps: ir.Value, **rest: ir.Value):
        """One node; its weight is all ones until a product with one is found."""
        ones = _ones(self.facts, int(self.facts.shape(x)[-1]), x.dtype)
        return op.RMSNormalization(x, ones, axis=-1, epsilon=scalar(eps))


def _axes(reduce: ir.Node) -> list[int]:
    found = constant(given(reduce, 1))
    return [int(a) for a in (attribute(reduce, "axes", ()) if found is None else found.reshape(-1))]


def _ones(facts: Facts, size: int, dtype: ir.DataType) -> ir.Value:
    array = np.ones(size, dtype.numpy())
    return shared_initializer(facts.graph, f"ones_{size}_{dtype.name.lower()}", array)


def _is_ones(value: ir.Value | None) -> bool:
    array = constant(value, limit=2**16)
    return array is not None and bool((array == 1).all())


class Scale(RewriteRuleClassBase):
    """A product of a weightless norm with a weight is a norm with that weight."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("take the weight in")
        self.facts = facts

    def pattern(self, op, x, ones, weight):
        """The norm times anything."""
        return op.Mul(op.RMSNormalization(x, ones, _allow_other_attributes=True, _outputs=["norm"]), weight)

    def check(
        self, context, norm: ir.Value, ones: ir.Value, weight: ir.Value, **rest: ir.Value
    ) -> MatchResult:
        """The norm has no weight yet, and the factor is a constant with one number for each channel."""
        if not _is_ones(ones):
            return MatchResult().fail("the norm has a weight already", norm)
        if ir.convenience.get_const_tensor(weight) is None or weight.is_graph_input():
            return MatchResult().fail("the factor is not a constant", weight)
        if self.facts.shape(weight) != self.facts.shape(ones):
            return MatchResult().fail(f"wanted a weight of shape {ones.shape}, found {weight.shape}", weight)
        return MatchResult()

    def rewrite(self, op, x: ir.Value, norm: ir.Value, weight: ir.Value, **rest: ir.Value):
        """The same norm with the weight."""
        return op.RMSNormalization(x, weight, **_attributes(norm))


def _attributes(norm: ir.Value) -> dict[str, object]:
    node = norm.producer()
    return {"axis": attribute(node, "axis", -1), "epsilon": attribute(node, "epsilon", 1e-5)}


class Narrow(RewriteRuleClassBase):
    """A norm computed in float between casts from and to half precision: so the operator does itself."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("take the casts in")
        self.facts = facts

    def pattern(self, op, x, ones):
        """Cast, norm, cast."""
        wide = op.Cast(x, _allow_other_attributes=True, _outputs=["wide"])
        norm = op.RMSNormalization(wide, ones, _allow_other_attributes=True, _outputs=["norm"])
        return op.Cast(norm, _allow_other_attributes=True, _outputs=["narrow"])

    def check(
        self, context, x: ir.Value, wide: ir.Value, ones: ir.Value, narrow: ir.Value, **rest: ir.Value
    ) -> MatchResult:
        """From half to float and back to the same half, and no weight inside."""
        half = attribute(narrow.producer(), "to", 0)
        if x.dtype != half or half not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return MatchResult().fail(f"the casts go from {x.dtype} to {ir.DataType(half)}", narrow)
        if attribute(wide.producer(), "to", 0) != ir.DataType.FLOAT:
            return MatchResult().fail("the norm is not computed in float", wide)
        return (
            MatchResult()
            if _is_ones(ones)
            else MatchResult().fail("the weight is applied before the cast", ones)
        )

    def rewrite(self, op, x: ir.Value, norm: ir.Value, ones: ir.Value, **rest: ir.Value):
        """The norm in half precision; it still computes in float (stash_type 1)."""
        weight = _ones(self.facts, int(ones.const_value.size), x.dtype)  # type: ignore[union-attr]
        return op.RMSNormalization(x, weight, **_attributes(norm))


@dataclass(frozen=True)
class FuseRmsNorm(Rewrite):
    """Fuse RMS norms."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.constants", "clean.shapes", "clean.identity")

    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        """Each way to write the root, then the weight, then the casts."""
        rules = [Normalize.rule(facts, root) for root in ROOTS] + [Scale.rule(facts)]
        return [turned for rule in rules for turned in rule.commute()] + [Narrow.rule(facts)]
