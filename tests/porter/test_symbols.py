"""Symbolic shapes and contents against what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.symbolic.symbols import AXES, Choice, Facts, declared, dim, is_causal, same, symbol

SIZES = {"batch": 2, "sequence": 3, "past": 4}
HEAD = '<ir_version: 12, opset_import: ["" : 24]> '
INPUTS = "(int64[batch, sequence] tokens, float[batch, 2, past, 8] cache)"
COUNTS = """
   s1 = Shape <start: int = 1, end: int = 2> (tokens)  s = Squeeze (s1)
   p1 = Shape <start: int = 2, end: int = 3> (cache)   p = Squeeze (p1)
   t = Add (s, p)
   i = Range (zero, s, one)   q0 = Add (i, p)   q = Unsqueeze (q0, {last})   k = Range (zero, t, one)
"""
CONSTANTS = (
    "<int64 zero = {0}, int64 one = {1}, int64[1] last = {-1}, int64[1] first = {0}, int64 shift = {%d}>"
)


def masked(body: str, shift: int = 0) -> ir.Model:
    counts = COUNTS.replace("{last}", "last")
    return ir.from_onnx_text(
        f"{HEAD} g {INPUTS} => (bool[a, b] mask) {CONSTANTS % shift} {{ {counts} {body} }}"
    )


# Each compares keys with queries moved by `shift`: `allowed(i, j, shift)` is the truth for query i, key j.
COMPARISONS = [
    ("n = Add (q, shift) mask = LessOrEqual (k, n)", lambda i, j, d: j <= i + d),
    ("n = Add (q, shift) mask = Less (k, n)", lambda i, j, d: j < i + d),
    ("n = Add (q, shift) mask = GreaterOrEqual (n, k)", lambda i, j, d: i + d >= j),
    ("n = Sub (k, shift) m = Greater (n, q) mask = Not (m)", lambda i, j, d: j - d <= i),
    ("n = Sub (k, q) mask = LessOrEqual (n, shift)", lambda i, j, d: j - i <= d),
    (
        "n = Add (q, shift) m = LessOrEqual (k, n) o = GreaterOrEqual (k, zero) mask = And (m, o)",
        lambda i, j, d: j <= i + d,
    ),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(COMPARISONS), st.integers(-2, 2))
def test_a_mask_is_called_causal_just_when_it_is(comparison: tuple[str, Callable], shift: int) -> None:
    """The truth is counted out for all sizes up to 3, past 0 among them."""
    body, allowed = comparison
    model = masked(body, shift)
    facts = Facts(model.graph)
    mask = model.graph.outputs[0]
    claimed = is_causal(facts.element(mask), facts.shape(mask))
    truth = all(
        allowed(p + i, j, shift) == (j <= p + i)
        for s in (1, 2, 3)
        for p in range(4)
        for i in range(s)
        for j in range(p + s)
    )
    assert claimed == truth


@pytest.mark.parametrize("body", [c[0] for c in COMPARISONS])
def test_contents_are_what_onnx_runtime_computes(body: str, run_onnx: Callable) -> None:
    model = masked(body, 1)
    feeds = {"tokens": np.zeros((2, 3), np.int64), "cache": np.zeros((2, 2, 4, 8), np.float32)}
    facts = Facts(model.graph)
    mask = model.graph.outputs[0]
    found = run_onnx(model, feeds)["mask"]
    test = facts.element(mask)
    axis, other = AXES[:2]
    sizes = {symbol(k): v for k, v in SIZES.items()}
    for i, j in np.ndindex(found.shape):
        values = [a.subs(sizes).subs({axis: j, other: i}) for a in test.atoms]
        assert found[i, j] == all(v <= 0 for v in values)


def test_shapes_are_what_onnx_runtime_computes(
    decoder: Callable, run_onnx: Callable, make_feeds: Callable
) -> None:
    """Every shape inferred in a whole decoder, put in numbers, is the shape of the value."""
    from porter.context import Context
    from porter.pipeline import Pipeline

    model = decoder("llama_eager_23")
    for step in Pipeline.parse("clean.opset,clean.constants,clean.shapes").passes:
        step.run(model, Context())
    facts = Facts(model.graph)
    values = [v for n in model.graph for v in n.outputs if not v.is_graph_output()]
    wanted = {v.name: facts.shape(v) for v in values}
    assert sum(s is not None and None not in s for s in wanted.values()) == len(values)
    model.graph.outputs.extend(values)
    found = run_onnx(model, make_feeds(model, 0, **SIZES))
    sizes = {symbol(k): v for k, v in SIZES.items()}
    for name, shape in wanted.items():
        assert tuple(int(d.subs(sizes)) for d in shape) == found[name].shape, name


def test_an_additive_triangle() -> None:
    text = f"""{HEAD} g (float[sequence, 4] x) => (float[a, b] mask)
    <float low = {{-3e38}}, int64 one = {{1}}>
    {{ s = Shape <start: int = 0, end: int = 1> (x) n = Concat <axis: int = 0> (s, s)
      full = Expand (low, n) mask = Trilu <upper: int = 1> (full, one) }}"""
    model = ir.from_onnx_text(text)
    content = Facts(model.graph).element(model.graph.outputs[0])
    assert isinstance(content, Choice)
    assert (content.no, content.yes < -1e38) == (0.0, True)


def test_a_constant_triangle_that_is_sliced() -> None:
    """GPT-2 cuts rows past to past + sequence out of a buffer: whether it is long enough is not known."""
    lower = ", ".join(str(int(j <= i)) for i in range(6) for j in range(6))
    text = f"""{HEAD} g {INPUTS} => (bool[a, b] mask)
    <bool[6, 6] buffer = {{{lower}}}, int64[2] axes = {{0, 1}}, int64[1] zero = {{0}}>
    {{ s = Shape <start: int = 1, end: int = 2> (tokens) p = Shape <start: int = 2, end: int = 3> (cache)
      t = Add (s, p) starts = Concat <axis: int = 0> (p, zero) ends = Concat <axis: int = 0> (t, t)
      mask = Slice (buffer, starts, ends, axes) }}"""
    model = ir.from_onnx_text(text)
    facts = Facts(model.graph)
    content = facts.element(model.graph.outputs[0])
    assert content is None or not is_causal(content, facts.shape(model.graph.outputs[0]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (3, sympy.Integer(3)),
        ("past", symbol("past")),
        ("past + sequence", symbol("sequence") + symbol("past")),
        ("2*batch - 1", 2 * symbol("batch") - 1),
        ("a.b", symbol("a.b")),
        ("Min(512, sequence)", symbol("Min(512, sequence)")),
        ("not a dim!", symbol("not a dim!")),
    ],
)
def test_dimensions_as_files_write_them(text: int | str, wanted: sympy.Expr) -> None:
    assert dim(text) == wanted


def test_unknown_dimensions_equal_nothing() -> None:
    value = ir.Value(name="v", shape=ir.Shape([None, "batch"]))
    unknown, named = declared(value)
    assert not same(unknown, unknown)
    assert same(named, symbol("batch"))
