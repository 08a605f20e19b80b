"""Rewrite and explain: where a rule nearly matched, and which condition failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from porter.context import Context
from porter.errors import PassError
from porter.registry import find
from porter.rewrite import NearMiss, Rewrite, explain
from porter.symbolic.symbols import Facts

HEAD = '<ir_version: 12, opset_import: ["" : 24]> '


def model(body: str, initializers: str = "") -> ir.Model:
    types = "(float[batch, seq, 4] x) => (float[batch, seq, 4] y)"
    return ir.from_onnx_text(f"{HEAD} g {types} {initializers} {{ {body} }}")


def closest(name: str, subject: ir.Model) -> NearMiss:
    return explain(find(name)(), subject)[0]


def test_wanted_sigmoid_found_tanh() -> None:
    found = explain(find("fuse.swiglu")(), model("[gate] t = Tanh (x) [product] y = Mul (x, t)"))
    assert NearMiss("x * Sigmoid(x)", "product", "Mul", 1, "gate", "wanted Sigmoid, found Tanh") in found
    assert NearMiss("gate first", "product", "Mul", 1, "gate", "wanted Swish, found Tanh") in found


NORM = """[square] s = Pow (x, {power}) [mean] m = ReduceMean (s, {axis}) [shift] a = Add (m, {eps})
          [root] r = Sqrt (a) [inverse] i = {inverse} (r) [out] y = Mul (x, i)"""
NUMBERS = (
    "<float two = {2}, float three = {3}, int64[1] last = {-1}, int64[1] first = {1}, float eps = {1e-6}>"
)


@pytest.mark.parametrize(
    ("changed", "failed", "reason", "matched"),
    [
        ({"power": "three"}, "three", "wanted the constant 2, found 3.0", 6),
        ({"axis": "first"}, "mean", "the mean is not over the last axis with keepdims", 6),
        ({"eps": "x"}, "x", "epsilon is not a constant of at least 0", 6),
        ({"inverse": "Exp"}, "inverse", "wanted Reciprocal, found Exp", 1),
    ],
)
def test_each_condition_of_a_norm(changed: dict[str, str], failed: str, reason: str, matched: int) -> None:
    parts = {"power": "two", "axis": "last", "eps": "eps", "inverse": "Reciprocal"} | changed
    found = [
        m
        for m in explain(find("fuse.rms_norm")(), model(NORM.format(**parts), NUMBERS))
        if "reciprocal" in m.rule
    ]
    assert (found[0].node, found[0].failed, found[0].reason, found[0].matched) == (
        "out",
        failed,
        reason,
        matched,
    )


def test_a_value_that_is_used_elsewhere() -> None:
    body = "[gate] s = Sigmoid (x) [product] p = Mul (x, s) [more] y = Add (p, s)"
    found = closest("fuse.swiglu", model(body))
    assert (found.node, found.reason) == ("product", "an inner value is used elsewhere")
    assert found.matched == 2


def test_attention_says_what_its_mask_lacks() -> None:
    text = (
        HEAD
        + """g (float[b, 2, s, 8] q, float[b, 2, p, 8] k, float[b, 2, p, 8] v, bool[s, p] m)
                  => (float[b, 2, s, 8] y)
                  { [att] y = Attention (q, k, v, m) }"""
    )
    found = explain(find("fuse.attention")(), ir.from_onnx_text(text))
    reasons = {m.rule: m.reason for m in found}
    assert reasons["take in heads, cache and mask"].startswith("nothing to take in")


def test_explain_leaves_the_model_alone_and_skips_what_matches() -> None:
    subject = model("[gate] s = Sigmoid (x) [product] y = Mul (x, s)")
    before = onnx.printer.to_text(ir.to_proto(subject))
    assert explain(find("fuse.swiglu")(), subject) == []
    assert onnx.printer.to_text(ir.to_proto(subject)) == before


def test_a_pass_without_rules() -> None:
    with pytest.raises(PassError, match="PORT-0211"):
        explain(find("clean.dead")(), model("y = Neg (x)"))


class Swap(RewriteRuleClassBase):
    """a + b -> b + a, for ever."""

    def pattern(self, op, a, b):
        return op.Add(a, b)

    def rewrite(self, op, a, b):
        return op.Add(b, a)


@dataclass(frozen=True)
class Endless(Rewrite):
    """A rule that undoes itself."""

    name = "endless"

    def rules(self, facts: Facts) -> Sequence[RewriteRule]:
        return [Swap.rule("swap")]


def test_rules_that_chase_each_other_are_named() -> None:
    with pytest.raises(PassError, match=r"PORT-0210.*endless.*swap"):
        Endless().run(model("y = Add (x, x)"), Context())


def test_functions_are_left_alone() -> None:
    """Rules make initializers, which a function's body cannot see."""
    text = (
        '<ir_version: 12, opset_import: ["" : 24, "own" : 1]>'
        "g (float[2] x) => (float[2] y) { y = own.silu (x) }"
        '<domain: "own", opset_import: ["" : 24]> silu (x) => (y) { s = Sigmoid (x) y = Mul (x, s) }'
    )
    subject = ir.from_onnx_text(text)
    assert find("fuse.swiglu")().run(subject, Context()) == 0
    (function,) = subject.functions.values()
    assert [n.op_type for n in function] == ["Sigmoid", "Mul"]
