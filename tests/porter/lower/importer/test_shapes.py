"""Shape arithmetic stays symbolic: chains of Shape, Gather, Concat, Reshape and their kin beside ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from lowering import compiled, imported, model, reference

from porter.errors import PorterError, TargetError

SIZES = ({"b": 1, "s": 1, "past": 0}, {"b": 3, "s": 5, "past": 7})


@dataclass(frozen=True)
class Chain:
    body: str
    inputs: str = "float[b,s,6] x"
    outputs: str = "float y"
    weights: str = "int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] v2 = {2}, int64[1] m1 = {-1}, int64[1] v3 = {3}"  # noqa: E501
    sizes: tuple[dict[str, int], ...] = SIZES


CHAINS = {
    "Shape": Chain("y = Shape(x)", outputs="int64 y"),
    "Shape from to": Chain("y = Shape<start=-2, end=3>(x)", outputs="int64 y"),
    "Size": Chain("y = Size(x)", outputs="int64 y"),
    "a size as a tensor": Chain("h = Shape(x) n = Gather(h, i1) f = Cast<to=1>(n) y = Mul(x, f)"),
    "heads apart": Chain(
        "h = Shape(x) b = Gather(h, v0) s = Gather(h, v1) t = Concat<axis=0>(b, s, v2, v3) r = Reshape(x, t) "
        "y = Transpose<perm=[0,2,1,3]>(r)"
    ),
    "heads together": Chain(
        "h = Shape(x) b = Gather(h, i0) bv = Unsqueeze(b, v0) s = Slice(h, v1, v2, v0) t = Concat<axis=0>(bv, s, m1) "
        "y = Reshape(x, t)", "float[b,s,2,3] x"
    ),  # fmt: skip
    "Reshape copies with 0": Chain("y = Reshape(x, k)", weights="int64[4] k = {0, 0, 3, 2}"),
    "Reshape with 0 and -1": Chain("y = Reshape(x, k)", weights="int64[3] k = {0, -1, 2}"),
    "Reshape to a row": Chain("y = Reshape(x, k)", weights="int64[1] k = {-1}"),
    "Reshape of merged rows": Chain("y = Reshape(x, k)", weights="int64[2] k = {-1, 3}"),
    "Reshape allowing zero": Chain(
        "y = Reshape<allowzero=1>(x, k)", "float[0,3] x", weights="int64[2] k = {3, 0}", sizes=({},)
    ),
    "Reshape of a reshape": Chain(
        "r = Reshape(x, k) h = Shape(r) n = Gather(h, v0) t = Concat<axis=0>(m1, n) y = Reshape(r, t)",
        weights="int64[2] k = {-1, 2}, int64[1] v0 = {0}, int64[1] m1 = {-1}",
    ),
    "Reshape to a scalar": Chain("y = Reshape(x, k)", "float[1,1] x", weights="int64[0] k = {}", sizes=({},)),
    "Expand": Chain("h = Shape(z) y = Expand(x, h)", "float[1,s,1] x, float[b,s,4] z"),
    "Expand keeps what is wider": Chain("y = Expand(x, k)", weights="int64[3] k = {1, 1, 6}"),
    "Expand adds axes": Chain("h = Shape(z) y = Expand(x, h)", "float[s,1] x, float[b,2,s,3] z"),
    "Expand a number": Chain("h = Shape(x) y = Expand(c, h)", weights="float c = {2.5}"),
    "ConstantOfShape": Chain("h = Shape(x) c = ConstantOfShape<value = float[1] {3}>(h) y = Add(x, c)"),
    "ConstantOfShape of integers": Chain(
        "h = Shape<start=1>(x) y = ConstantOfShape<value = int64[1] {3}>(h)", outputs="int64 y"
    ),
    "ConstantOfShape by default": Chain("h = Shape(x) y = ConstantOfShape(h)"),
    "ConstantOfShape of bools": Chain("h = Shape(x) y = ConstantOfShape<value = bool[1] {1}>(h)", outputs="bool y"),
    "Where and Equal choose a shape": Chain(
        "h = Shape(x) q = Equal(k, m) o = ConstantOfShape<value = int64[1] {1}>(l) w = Where(q, o, k) y = Expand(x, w)",
        weights="int64[3] k = {-1, -1, 6}, int64[3] m = {-1, -1, -1}, int64[1] l = {3}",
    ),
    "positions": Chain(
        "h = Shape(x) s = Gather(h, i1) p = Shape(z) n = Gather(p, i1) t = Add(s, n) y = Range(n, t, i1)",
        "float[b,s,6] x, float[b,past,2] z", "int64 y",
    ),
    "positions from zero": Chain("h = Shape(x) s = Gather(h, i1) y = Range(i0, s, i1)", outputs="int64 y"),
    "int32 positions": Chain(
        "h = Shape(x) s = Gather(h, i1) t = Cast<to=6>(s) y = Range(z, t, o)", outputs="int32 y",
        weights="int64 i1 = {1}, int32 z = {0}, int32 o = {1}",
    ),  # fmt: skip
    "a Range that may be empty": Chain(
        "h = Shape(x) s = Gather(h, i1) y = Range(i2, s, i1)", outputs="int64 y",
        sizes=({"b": 1, "s": 1}, {"b": 1, "s": 2}, {"b": 2, "s": 5}),
    ),  # fmt: skip
    "a constant Range": Chain("r = Range(i0, n, i2) y = Gather<axis=2>(x, r)", weights="int64 i0 = {0}, int64 i2 = {2}, int64 n = {6}"),
    "a Range of floats": Chain("r = Range(a, e, d) y = Add(x, r)", weights="float a = {0}, float e = {3}, float d = {0.5}"),
    "a causal mask": Chain(
        "h = Shape(x) s = Gather(h, i1) r = Range(i0, s, i1) c = Unsqueeze(r, v1) l = LessOrEqual(r, c) "
        "y = Where(l, zero, low)", outputs="float y",
        weights="int64 i0 = {0}, int64 i1 = {1}, int64[1] v1 = {1}, float zero = {0}, float low = {-3.4e38}",
    ),  # fmt: skip
    "division and remainder": Chain(
        "h = Shape(x) n = Gather(h, i2) a = Div(n, i2) c = Mod(n, k) d = Mul(a, c) y = Unsqueeze(d, v0)", outputs="int64 y",
        weights="int64 i2 = {2}, int64 k = {4}, int64[1] v0 = {0}",
    ),  # fmt: skip
    "division rounds toward zero": Chain(
        "h = Shape(x) n = Gather(h, v1) a = Sub(n, k) y = Div(a, v2)", outputs="int64 y",
        weights="int64[1] v1 = {1}, int64[1] v2 = {2}, int64[1] k = {4}",
    ),  # fmt: skip
    "half of a symbolic size": Chain(
        "h = Shape(x) n = Gather(h, v1) e = Div(n, v2) y = Slice(x, v0, e, v1)",
        sizes=({"b": 1, "s": 1}, {"b": 1, "s": 4}, {"b": 3, "s": 7}),
    ),
    "Min and Max of sizes": Chain(
        "h = Shape(x) n = Gather(h, v1) a = Min(n, v3) c = Max(a, v2) y = Identity(c)", outputs="int64 y",
        sizes=({"b": 1, "s": 1}, {"b": 1, "s": 3}, {"b": 1, "s": 7}),
    ),  # fmt: skip
    "a Slice by sizes": Chain(
        "h = Shape(z) n = Gather(h, v1) y = Slice(x, n, big, v1)", "float[b,past,6] x, float[b,s,1] z",
        weights="int64[1] v1 = {1}, int64[1] big = {9223372036854775807}",
        sizes=({"b": 1, "past": 3, "s": 1}, {"b": 2, "past": 3, "s": 5}),
    ),  # fmt: skip
    "the last tokens": Chain("y = Slice(x, m1, big, v1)", weights="int64[1] m1 = {-1}, int64[1] v1 = {1}, int64[1] big = {9223372036854775807}"),
    "Slice of a shape": Chain("h = Shape(x) y = Slice(h, m1, big)", outputs="int64 y",
                              weights="int64[1] m1 = {-1}, int64[1] big = {9223372036854775807}"),
    "Slice of a shape backwards": Chain("h = Shape(x) y = Slice(h, m1, low, v0, m1)", outputs="int64 y",
                                        weights="int64[1] m1 = {-1}, int64[1] v0 = {0}, int64[1] low = {-9223372036854775808}"),
    "Split of a shape": Chain("h = Shape(x) p, q = Split<axis=0>(h, k) y = Reshape(x, t) t2 = Identity(q)",
                              outputs="float y, int64 t2", weights="int64[2] k = {1, 2}, int64[3] t = {0, 0, -1}"),
    "product of a shape": Chain("h = Shape(x) y = ReduceProd<keepdims=0>(h)", outputs="int64 y"),
    "a product of sizes shapes": Chain("h = Shape<end=2>(x) n = ReduceProd(h) t = Concat<axis=0>(n, m1) y = Reshape(x, t)"),
    "Tile by sizes": Chain("h = Shape<end=1>(z) t = Concat<axis=0>(h, v1) y = Tile(x, t)", "float[s,2] x, float[b,1] z"),
    "Trilu above the past": Chain("h = Shape<start=1, end=2>(z) k = Squeeze(h) n = Add(k, i1) y = Trilu<upper=1>(x, n)",
                                  "float[s,9] x, float[b,past] z"),
    "Squeeze of a size": Chain("h = Shape<end=1>(x) q = Squeeze(h, v0) y = Unsqueeze(q, v0)", outputs="int64 y"),
    "comparisons of sizes": Chain("h = Shape(x) n = Gather(h, i2) g = Greater(n, i2) w = Where(g, i1, i0) y = Gather<axis=2>(x, w)"),
    "a condition that sizes decide": Chain(
        "h = Shape(x) n = Gather(h, i1) g = Greater(n, i2) f = Cast<to=1>(g) y = Mul(x, f)",
        sizes=({"b": 1, "s": 2}, {"b": 1, "s": 3}),
    ),
    "Not and And of known answers": Chain(
        "h = Shape(x) n = Gather(h, i2) g = Greater(n, i2) e = Equal(n, i2) o = Not(e) a = And(g, o) w = Where(a, i1, i0) "
        "y = Gather<axis=2>(x, w)"
    ),
    "a shape in int32": Chain("h = Shape(x) c = Cast<to=6>(h) n = Gather(c, i1) d = Add(n, k) y = Cast<to=7>(d)", outputs="int64 y",
                              weights="int64 i1 = {1}, int32 k = {5}"),
    "a Gather of sizes by data": Chain("h = Shape(x) y = Gather(h, i)", "float[b,s,6] x, int64[n] i", "int64 y",
                                       sizes=({"b": 1, "s": 2, "n": 3},)),
    "sizes as data": Chain("h = Shape(x) a = Unsqueeze(h, v0) c = Concat<axis=0>(a, i) y = ReduceSum(c, v0)",
                           "float[b,s,6] x, int64[1,3] i", "int64 y"),
    "Gather from a past of any size": Chain("y = Gather<axis=1>(x, m1)", "float[b,s,6] x"),
    "broadcast of sizes that may differ": Chain("y = Add(x, z)", "float[b,s,6] x, float[b,t,6] z",
                                                sizes=({"b": 1, "s": 2, "t": 2}, {"b": 3, "s": 5, "t": 5})),
    "Where of sizes that may differ": Chain("y = Where(c, x, z)", "bool[b,t,1] c, float[b,s,6] x, float[1,n,6] z",
                                            sizes=({"b": 2, "s": 3, "t": 3, "n": 3},)),
    "MatMul of sizes that may differ": Chain("y = MatMul(x, z)", "float[b,2,s] x, float[n,t,4] z",
                                             sizes=({"b": 2, "s": 3, "t": 3, "n": 2},)),
    "Concat of sizes that may differ": Chain("y = Concat<axis=1>(x, z)", "float[b,s,6] x, float[n,t,6] z",
                                             sizes=({"b": 2, "n": 2, "s": 3, "t": 4},)),
    "Expand to a size that may differ": Chain("h = Shape(z) y = Expand(x, h)", "float[s,1] x, float[t,4] z",
                                              sizes=({"s": 3, "t": 3},)),
    "Squeeze of a size that may differ": Chain("y = Squeeze(x, v1)", "float[b,s,6] x", sizes=({"b": 2, "s": 1},)),
    "a sum of named sizes": Chain("y = Add(x, z)", 'float[b,"past + s"] x, float[b,past] p, float[b,s] q, float[b,1] z',
                                  sizes=({"b": 2, "past": 3, "s": 2, "past + s": 5},)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str) -> None:
    chain, rng = CHAINS[name], np.random.default_rng(0)
    source = model(f"g ({chain.inputs}) => ({chain.outputs}) <{chain.weights}> {{ {chain.body} }}")
    ours, theirs = compiled(source), reference(source)
    for sizes in chain.sizes:
        feeds = {}
        for value in (v for v in source.graph.inputs if not v.is_initializer()):
            shape = [d if isinstance(d, int) else sizes[d.value] for d in value.shape]
            feeds[value.name] = np.asarray(rng.integers(0, 3, shape), value.dtype.numpy())
        for got, wanted in zip(ours(feeds), theirs(feeds), strict=True):
            # Copies and sums of small whole numbers.
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            np.testing.assert_array_equal(got, wanted)


X = "float[b,4] x"
REFUSED = {
    "an unknown operator": ("PORT-0410", "y = Celu(x)", X, ""),
    "another domain": ("PORT-0410", "y = com.acme.Add(x, x)", X, ""),
    "sizes that cannot be": ("PORT-0411", "y = Add(x, z)", X + ", float[b,3] z", ""),
    "a Split that does not add up": ("PORT-0411", "y, z = Split<axis=1>(x, k)", X, "int64[2] k = {1, 2}"),
    "a Reshape that does not add up": (
        "PORT-0411",
        "y = Reshape(x, k)",
        "float[3,4] x",
        "int64[2] k = {5, 5}",
    ),
    "an index outside": ("PORT-0411", "y = Gather<axis=1>(x, k)", X, "int64[1] k = {4}"),
    "a second result": ("PORT-0412", "a, m = LayerNormalization(x, g) y = Add(m, m)", X + ", float[4] g", ""),
    "complex numbers": ("PORT-0413", "y = Add(x, x)", "complex64[b,4] x", ""),
    "a double in a float32 kernel": ("PORT-0413", "y = Softmax(x)", "double[b,4] x", ""),
    "a cast to a format of bytes": ("PORT-0413", "y = Cast<to=17>(x)", X, ""),
    "Reshape by data": ("PORT-0414", "y = Reshape(x, k)", X + ", int64[2] k", ""),
    "Expand by data": ("PORT-0414", "y = Expand(x, k)", X + ", int64[2] k", ""),
    "Slice by data": ("PORT-0414", "y = Slice(x, k, k)", X + ", int64[2] k", ""),
    "Range by data": ("PORT-0414", "y = Range(k, k, k)", "int64 k", ""),
    "TopK by data": ("PORT-0414", "y, i = TopK(x, k)", X + ", int64[1] k", ""),
    "a norm over a symbolic axis": (
        "PORT-0415",
        "y = RMSNormalization<axis=0>(x, w)",
        X + ", float[b,4] w",
        "",
    ),
    "a size without a bound": ("PORT-0419", "y = Add(x, x)", "float[strange,4] x", ""),
}


@pytest.mark.parametrize(("code", "body", "inputs", "weights"), REFUSED.values(), ids=REFUSED)
def test_refused(code: str, body: str, inputs: str, weights: str) -> None:
    """The code, and the name of the node or tensor that is the reason."""
    header = '<ir_version: 10, opset_import: ["" : 24, "com.acme" : 1]>'
    with pytest.raises(PorterError) as caught:
        imported(model(f"{header}\ng ({inputs}) => (float y) <{weights}> {{ {body} }}"))
    assert caught.value.code == code
    assert caught.value.where


def test_the_node_is_named() -> None:
    source = model("g (float[b,4] x) => (float[b,4] y) { y = Celu(x) }")
    source.graph[0].name = "/layers.3/act:fn é"
    with pytest.raises(TargetError, match="PORT-0410.*Celu.*layers.3/act:fn é"):
        imported(source)


def test_an_old_opset_is_refused() -> None:
    with pytest.raises(TargetError, match="PORT-0420"):
        imported(model("g (float[b,4] x) => (float[b,4] y) { y = Softmax(x) }", opset=12))


@pytest.mark.parametrize(
    ("inputs", "body", "feeds"),
    [
        ("float[b,s] x, float[b,t] z", "y = Add(x, z)", {"x": (2, 3), "z": (2, 4)}),
        ("float[b,s] x, float[n,s] z", "y = Concat<axis=1>(x, z)", {"x": (2, 3), "z": (3, 3)}),
        ("float[b,s] x, float[s,t] z", "y = MatMul(x, z)", {"x": (2, 3), "z": (4, 2)}),
    ],
)
def test_sizes_that_do_differ_stop_the_program(inputs: str, body: str, feeds: dict[str, tuple]) -> None:
    run = compiled(model(f"g ({inputs}) => (float y) {{ {body} }}"))
    with pytest.raises(Exception, match="(?i)match|expected|shape"):
        run({name: np.zeros(shape, np.float32) for name, shape in feeds.items()})


@pytest.mark.parametrize(("x", "z"), [(-(2**63), -1), (5, 0), (-(2**63), 0)])
@pytest.mark.parametrize("op", ["Div", "Mod", "Mod<fmod=1>"])
def test_integer_division_never_traps(op: str, x: int, z: int) -> None:
    """What the processor would stop at: numpy's answers, and 0 for a division by 0."""
    run = compiled(model(f"g (int64[2] x, int64[2] z) => (int64[2] y) {{ y = {op}(x, z) }}"))
    (got,) = run({"x": np.array([x, 7]), "z": np.array([z, 2])})
    whole = {"Div": -(2**63) if z else 0, "Mod": 0, "Mod<fmod=1>": 0}[op]
    assert got.tolist() == [whole, 3 if op == "Div" else 1]


def test_large_integer_constants_stay_exact() -> None:
    """Shape arithmetic is in Python's integers, not in floats."""
    big = 2**62 + 1
    body = "h = Shape(x) n = Gather(h, i) a = Mul(n, k) y = Div(a, d)"
    source = model(
        f"g (float[3,b] x) => (int64 y) <int64 i = {{0}}, int64 k = {{{big // 3}}}, int64 d = {{1}}> {{ {body} }}"
    )
    assert compiled(source)({"x": np.zeros((3, 2), np.float32)})[0] == big // 3 * 3


def test_symbols_without_a_name_have_names_of_their_own() -> None:
    source = model(
        "g (float[b,4] x, float[b,4] z) => (float[b,4] y, float[b,4] q) { y = Relu(x) q = Relu(z) }"
    )
    for value in source.graph.inputs:
        value.shape = ir.Shape([None, 4])
    run = compiled(source, {"x_0": 3, "z_0": 5})
    y, q = run({"x": np.ones((2, 4), np.float32), "z": np.ones((5, 4), np.float32)})
    assert (y.shape, q.shape) == ((2, 4), (5, 4))
