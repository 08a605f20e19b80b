"""Swish for a chip without an exponential: x * sigmoid(x) becomes x * clip(x / 6 + 1/2, 0, 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase

from porter.match import attribute
from porter.pipeline import Promise
from porter.rewrite import Rewrite
from porter.symbolic.symbols import Facts


class Harden(RewriteRuleClassBase):
    """One Swish becomes four nodes that only multiply, add and clip."""

    def pattern(self, op, x):
        return op.Swish(x, _allow_other_attributes=True, _outputs=["swish"])

    def check(self, context, swish: ir.Value, **rest: ir.Value) -> MatchResult:
        if attribute(swish.producer(), "alpha", 1.0) != 1.0:
            return MatchResult().fail("the sigmoid is scaled", swish.producer())
        return MatchResult()

    def rewrite(self, op, x: ir.Value, **rest: ir.Value):
        sixth, half, zero, one = (op.Constant(value_float=v) for v in (1 / 6, 0.5, 0.0, 1.0))
        return op.Mul(x, op.Clip(op.Add(op.Mul(x, sixth), half), zero, one))


@dataclass(frozen=True)
class HardSwish(Rewrite):
    """A pass is a frozen dataclass; its fields would be its options. This one has none."""

    promise: ClassVar[Promise] = Promise.LOSSY
    after: ClassVar[tuple[str, ...]] = ("fuse.swiglu",)

    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        return [Harden.rule()]
