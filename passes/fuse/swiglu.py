"""SiLU becomes Swish, and a gated product has its gate first.

    x * Sigmoid(x)       -> Swish(x)
    x * Sigmoid(c * x)   -> Swish<alpha=c>(x)
    up * Swish(gate)     -> Swish(gate) * up

Swish may evaluate the sigmoid by another formula: a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase

from porter.match import attribute, producer, scalar
from porter.pipeline import Promise
from porter.rewrite import Rewrite
from porter.symbolic.symbols import Facts


class Silu(RewriteRuleClassBase):
    """x times the sigmoid of x, which may be scaled."""

    def __init__(self, facts: Facts, *, scaled: bool) -> None:
        super().__init__("x * Sigmoid(c * x)" if scaled else "x * Sigmoid(x)")
        self.facts, self.scaled = facts, scaled

    def pattern(self, op, x, alpha):
        """The product."""
        return op.Mul(x, op.Sigmoid(op.Mul(x, alpha) if self.scaled else x))

    def check(self, context, x: ir.Value, alpha: ir.Value | None = None) -> MatchResult:
        """The operator exists, and the factor is one number."""
        if self.facts.opset != 24:  # ONNX Runtime 1.31 has it in no later one
            return MatchResult().fail("Swish needs opset 24, and no other", x)
        if self.scaled and scalar(alpha) is None:
            return MatchResult().fail("the factor is not one constant", alpha)
        return MatchResult()

    def rewrite(self, op, x: ir.Value, alpha: ir.Value | None = None):
        """One node."""
        return op.Swish(x, alpha=scalar(alpha)) if self.scaled else op.Swish(x)


class GateFirst(RewriteRuleClassBase):
    """The gate is the first factor."""

    def __init__(self) -> None:
        super().__init__("gate first")

    def pattern(self, op, up, gate):
        """Anything times a Swish."""
        return op.Mul(up, op.Swish(gate, _allow_other_attributes=True, _outputs=["swish"]))

    def check(self, context, up: ir.Value, **rest: ir.Value) -> MatchResult:
        """The first factor is not a gate itself."""
        other = producer(up, "Swish")
        return MatchResult().fail("both factors are gates", other) if other else MatchResult()

    def rewrite(self, op, up: ir.Value, gate: ir.Value, swish: ir.Value):
        """The factors change places; a product does not notice."""
        return op.Mul(op.Swish(gate, alpha=attribute(swish.producer(), "alpha", 1.0)), up)


@dataclass(frozen=True)
class FuseSwiglu(Rewrite):
    """Fuse SiLU and order SwiGLU."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.identity")

    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        """Both ways round."""
        silu = [Silu.rule(facts, scaled=False), Silu.rule(facts, scaled=True)]
        return [turned for rule in silu for turned in rule.commute()] + [GateFirst.rule()]
