"""Sizes as data: what is evaluated is what TVM's expression is."""

import pytest
from tvm import tirx

from porter.lower.simt.trees import Trees, tree
from porter.run.trees import evaluate

B, S = tirx.Var("b", "int64"), tirx.Var("s", "int64")
CASES = {
    "groups": ((B * S * 3 + 63) // 64, lambda b, s: (b * s * 3 + 63) // 64),
    "rest": ((B + S) % 7 - 3, lambda b, s: (b + s) % 7 - 3),
    "negative": ((B - S) // 4, lambda b, s: (b - s) // 4),
    "choice": (tirx.Select(tirx.all(B < S, S >= 2), B, S * 2), lambda b, s: b if b < s and s >= 2 else s * 2),
    "extremes": (tirx.max(tirx.min(B, S), 2), lambda b, s: max(min(b, s), 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tree_is_the_expression(name: str) -> None:
    expression, want = CASES[name]
    found = Trees({"b": 8, "s": 512}).of(expression)
    for b in range(5):
        for s in range(12):
            assert evaluate(found, {"b": b, "s": s}) == want(b, s), (found, b, s)


def test_what_has_no_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="TensorLoad"):
        tree(tirx.BufferLoad(tirx.decl_buffer((3,), "int32", "x", layout=None), [0]))
