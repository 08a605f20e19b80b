"""Every operator of the table beside ONNX Runtime, on sizes that the program learns only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from lowering import Feeds, compiled, model, reference, with_weights

from porter.lower.importer.table import TABLES

SIZES = ({"b": 1, "s": 1, "n": 1, "m": 4}, {"b": 3, "s": 5, "n": 7, "m": 2})


@dataclass(frozen=True)
class Case:
    """A graph, and by how many units (2^-24 of the largest value) its result may differ from ONNX Runtime's.

    0 where the operator is a choice, a copy, or one correctly rounded operation; the rest say why in place.
    Inputs are small integers where `whole`, so that sums and products are exact in any order.
    """

    body: str
    inputs: str = "float[b,s,4] x"
    outputs: str = "float[...] y"
    units: int = 0
    whole: bool = False
    weights: str = ""
    opset: int = 24
    feeds: Callable[[np.random.Generator], Feeds] | None = None
    sizes: tuple[dict[str, int], ...] = field(default=SIZES, hash=False)

    @property
    def text(self) -> str:
        outputs = self.outputs.replace("[...]", "")
        weights = f"<{self.weights}>" if self.weights else ""
        return f"g ({self.inputs}) => ({outputs}) {weights} {{ {self.body} }}"


# The error of a function that both sides approximate: test_accuracy.py holds ours to 4 units, and MLAS
# documents none of its own above 8; a formula of three such steps adds them up.
APPROXIMATED = 16

XY = "float[b,s,4] x, float[b,s,4] z"
CASES: dict[str, Case] = {
    # elementwise, one correctly rounded operation each
    **{op: Case(f"y = {op}(x, z)", XY) for op in ("Add", "Sub", "Mul", "Div")},
    **{
        f"{op} broadcast": Case(f"y = {op}(x, z)", "float[b,s,4] x, float[s,1] z")
        for op in ("Add", "Sub", "Mul", "Div")
    },
    **{
        f"{op} constant": Case(f"y = {op}(x, w)", weights="float[4] w = {1.5, -2, 0.1, 3}")
        for op in ("Add", "Div")
    },
    **{
        f"{op} integers": Case(f"y = {op}(x, z)", "int64[b,4] x, int64[b,4] z", "int64[...] y")
        for op in ("Add", "Sub", "Mul")
    },
    **{op: Case(f"y = {op}(x, z, w)", XY + ", float[1,s,1] w") for op in ("Min", "Max")},
    **{f"{op} of one": Case(f"y = {op}(x)") for op in ("Min", "Max", "Sum")},
    "Sum": Case("y = Sum(x, z, w)", XY + ", float[4] w", whole=True),
    **{op: Case(f"y = {op}(x)") for op in ("Neg", "Abs", "Sign", "Relu", "Floor", "Ceil", "Identity")},
    "Sqrt": Case("a = Abs(x) y = Sqrt(a)"),
    "Reciprocal": Case("y = Reciprocal(x)"),
    "Round half to even": Case(
        "y = Round(x)",
        "float[8] x",
        feeds=lambda rng: {"x": np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.49, 3.51])},
    ),
    "Dropout": Case("y = Dropout(x)"),
    # comparisons and logic
    **{op: Case(f"y = {op}(x, z)", XY, "bool[...] y", whole=True) for op in ("Equal", "Less", "Greater")},
    **{
        op: Case(f"y = {op}(x, z)", XY, "bool[...] y", whole=True) for op in ("LessOrEqual", "GreaterOrEqual")
    },
    "Equal of bools": Case("y = Equal(x, z)", "bool[b,4] x, bool[b,4] z", "bool[...] y"),
    **{op: Case(f"y = {op}(x, z)", "bool[b,4] x, bool[4] z", "bool[...] y") for op in ("And", "Or", "Xor")},
    "Not": Case("y = Not(x)", "bool[b,4] x", "bool[...] y"),
    "IsNaN": Case(
        "y = IsNaN(x)",
        "float[4] x",
        "bool[...] y",
        feeds=lambda rng: {"x": np.float32([np.nan, 1, np.inf, -np.inf])},
    ),
    **{
        f"IsInf {p}{n}": Case(
            f"y = IsInf<detect_positive={p}, detect_negative={n}>(x)",
            "float[4] x",
            "bool[...] y",
            feeds=lambda rng: {"x": np.float32([np.nan, 1, np.inf, -np.inf])},
        )
        for p, n in ((1, 1), (1, 0), (0, 1))
    },
    "Where": Case("y = Where(c, x, z)", "bool[b,1,4] c, " + XY),
    "Where with constants": Case(
        "y = Where(c, x, w)", "bool[s,4] c, float[b,s,4] x", weights="float w = {-3.4e38}"
    ),
    # functions that both sides approximate
    **{
        op: Case(f"y = {op}(x)", units=APPROXIMATED)
        for op in ("Exp", "Sin", "Cos", "Tanh", "Erf", "Sigmoid", "Gelu")
    },
    "Log": Case("a = Abs(x) y = Log(a)", units=APPROXIMATED),
    "Gelu by tanh": Case('y = Gelu<approximate="tanh">(x)', units=APPROXIMATED),
    "Swish": Case("y = Swish<alpha=1.5>(x)", units=APPROXIMATED),
    **{f"Softmax {a}": Case(f"y = Softmax<axis={a}>(x)", units=APPROXIMATED) for a in (-1, 1)},
    "Softmax far from zero": Case(
        "y = Softmax(x)",
        "float[2,4] x",
        units=APPROXIMATED,
        feeds=lambda rng: {"x": np.float32([[1e30, 1e30, 0, -1e30], [-1e30, -np.inf, -1e30, -1e30]])},
    ),
    "LogSoftmax": Case("y = LogSoftmax<axis=-1>(x)", units=APPROXIMATED),
    **{
        op: Case(f"y = {op}(x)", units=APPROXIMATED)
        for op in ("HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Selu", "Softplus")
    },
    "LeakyRelu alpha": Case("y = LeakyRelu<alpha=0.3>(x)", units=1),
    "Elu alpha": Case("y = Elu<alpha=0.3>(x)", units=APPROXIMATED),
    # Pow: squares and cubes are products; ours and theirs are the C library's otherwise, of 1 unit each
    "Pow square": Case("y = Pow(x, w)", weights="float w = {2}"),
    "Pow cube": Case("y = Pow(x, w)", weights="float w = {3}", units=4),  # two roundings, and theirs
    "Pow square by an integer": Case("y = Pow(x, w)", weights="int64 w = {2}"),
    **{
        f"Pow {e}": Case("a = Abs(x) y = Pow(a, w)", weights=f"float w = {{{e}}}", units=4)
        for e in (0.5, 3, -1.5)
    },
    "Pow of tensors": Case("a = Abs(x) y = Pow(a, z)", XY, units=4),
    "Pow of a wider exponent": Case("y = Pow(x, w)", "float[b] x", weights="float[1,1] w = {2}"),
    "Pow of integers": Case(
        "y = Pow(x, z)",
        "int64[6] x, int64[6] z",
        "int64[...] y",
        feeds=lambda rng: {"x": np.array([2, -3, 0, 7, 1, -1]), "z": np.array([10, 3, 0, 2, 50, 7])},
    ),
    # integer division
    "Div integers": Case(
        "y = Div(x, z)",
        "int64[8] x, int64[8] z",
        "int64[...] y",
        feeds=lambda rng: {
            "x": np.array([7, -7, 7, -7, 0, 2**62, -(2**62), 5]),
            "z": np.array([2, 2, -2, -2, 3, 3, 3, 7]),
        },
    ),
    "Div int32": Case("y = Div(x, w)", "int32[b,4] x", "int32[...] y", weights="int32 w = {3}"),
    **{
        f"Mod {kind} {fmod}": Case(
            f"y = Mod<fmod={fmod}>(x, z)",
            f"{kind}[6] x, {kind}[6] z",
            f"{kind}[...] y",
            feeds=lambda rng, kind=kind: {
                "x": np.array([7, -7, 7, -7, 0, 5]).astype(kind),
                "z": np.array([3, 3, -3, -3, 4, 5]).astype(kind),
            },
        )
        for kind in ("int64", "int32")
        for fmod in (0, 1)
    },
    "Mod of floats": Case(
        "y = Mod<fmod=1>(x, z)",
        "float[4] x, float[4] z",
        feeds=lambda rng: {"x": np.float32([5.5, -5.5, 5.5, -5.5]), "z": np.float32([2, 2, -2, -2])},
    ),
    # casts
    "Cast to int": Case("y = Cast<to=7>(x)", outputs="int64[...] y"),
    "Cast to int32": Case("y = Cast<to=6>(x)", outputs="int32[...] y"),
    "Cast to bool": Case(
        "y = Cast<to=9>(x)",
        "float[5] x",
        "bool[...] y",
        feeds=lambda rng: {"x": np.float32([0, -0.0, 0.1, -2, np.nan])},
    ),
    "Cast int to bool": Case("y = Cast<to=9>(x)", "int64[b,4] x", "bool[...] y"),
    "Cast bool to float": Case("y = Cast<to=1>(x)", "bool[b,4] x"),
    "Cast bool to int": Case("y = Cast<to=7>(x)", "bool[b,4] x", "int64[...] y"),
    "Cast int to float": Case("y = Cast<to=1>(x)", "int64[b,4] x"),
    "Cast to half and back": Case("h = Cast<to=10>(x) y = Cast<to=1>(h)"),
    "Cast to bfloat16 and back": Case("h = Cast<to=16>(x) y = Cast<to=1>(h)"),
    "Cast to double": Case("h = Cast<to=11>(x) d = Mul(h, h) y = Cast<to=1>(d)"),
    "Cast a constant": Case("c = Cast<to=1>(w) y = Mul(x, c)", weights="int64[4] w = {1, -2, 3, 4}"),
    "CastLike": Case("y = CastLike(x, z)", "int64[b,4] x, float[1] z"),
    "CastLike a constant": Case("y = CastLike(x, w)", "int64[b,4] x", weights="float w = {0}"),
    # products of whole numbers are exact
    "MatMul": Case("y = MatMul(x, w)", weights="float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}", whole=True),
    "MatMul transposed": Case(
        "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)",
        weights="float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}",
        whole=True,
    ),
    "MatMul matrix": Case(
        "y = MatMul(x, w)", "float[n,2] x", weights="float[2,3] w = {1,2,3,4,5,6}", whole=True
    ),
    "MatMul vector": Case(
        "y = MatMul(x, w)", "float[2] x", weights="float[2,3] w = {1,2,3,4,5,6}", whole=True
    ),
    "MatMul vectors": Case("y = MatMul(x, z)", "float[4] x, float[4] z", whole=True),
    "MatMul tensor by vector": Case("y = MatMul(x, z)", "float[b,s,4] x, float[4] z", whole=True),
    "MatMul vector by tensor": Case("y = MatMul(z, x)", "float[b,4,s] x, float[4] z", whole=True),
    "MatMul tensors": Case("y = MatMul(x, z)", "float[b,2,s,4] x, float[b,1,4,n] z", whole=True),
    "MatMul one rank less": Case("y = MatMul(x, z)", "float[b,2,s,4] x, float[4,n] z", whole=True),
    "MatMul constant tensor": Case(
        "y = MatMul(x, w)", "float[b,2,s,2] x", weights="float[2,2,2] w = {1,2,3,4,5,6,7,8}", whole=True
    ),
    "MatMul constant on the left": Case(
        "y = MatMul(w, x)", "float[b,2,s] x", weights="float[3,2] w = {1,2,3,4,5,6}", whole=True
    ),
    "MatMul of integers": Case("y = MatMul(x, z)", "int64[s,4] x, int64[4,2] z", "int64[...] y"),
    **{
        f"Gemm {a}{b} {alpha} {beta}": Case(
            f"y = Gemm<transA={a}, transB={b}, alpha={alpha}, beta={beta}>(x, w, c)",
            f"float[{'4,n' if a else 'n,4'}] x, float[3] c",
            weights=f"float[{'3,4' if b else '4,3'}] w = {{1,2,3,4,5,6,7,8,9,10,11,12}}",
            whole=True,
        )
        for a, b, alpha, beta in ((0, 0, 1.0, 1.0), (0, 1, 2.0, 0.5), (1, 0, 1.0, 0.0), (1, 1, 0.5, 2.0))
    },
    "Gemm of tensors": Case("y = Gemm<transB=1>(x, z)", "float[n,4] x, float[m,4] z", whole=True),
    "Gemm without bias": Case(
        "y = Gemm(x, w)", "float[n,2] x", weights="float[2,2] w = {1,2,3,4}", whole=True
    ),
    "Gemm with a column": Case(
        "y = Gemm(x, w, c)", "float[n,2] x, float[n,1] c", weights="float[2,2] w = {1,2,3,4}", whole=True
    ),
    "Transpose": Case("y = Transpose<perm=[2,0,1]>(x)"),
    "Transpose back to front": Case("y = Transpose(x)"),
    "Transpose of nothing": Case("y = Transpose<perm=[0,1,2]>(x)"),
    "Transpose of a constant": Case(
        "t = Transpose<perm=[1,0]>(w) y = Add(x, t)", "float[b,3,2] x", weights="float[2,3] w = {1,2,3,4,5,6}"
    ),
    "Transpose of a constant tensor": Case(
        "t = Transpose<perm=[2,1,0]>(w) y = Add(x, t)",
        "float[b,2,3,3] x",
        "float[...] y",
        weights=f"float[3,3,2] w = {{{','.join(map(str, range(18)))}}}",
    ),
    # gathers
    "Gather rows": Case(
        "y = Gather(w, x)",
        "int64[b,s] x",
        weights="float[3,2] w = {1,2,3,4,5,6}",
        feeds=lambda rng: {"x": np.array([[0, -1, 2], [1, -3, 0]])},
    ),
    "Gather axis 1": Case("y = Gather<axis=1>(x, w)", weights="int64[2] w = {0, 0}"),
    "Gather axis 1, from the end": Case("y = Gather<axis=-2>(x, w)", weights="int64[2] w = {-1, 0}"),
    "Gather one": Case("y = Gather<axis=2>(x, w)", weights="int64 w = {-2}"),
    "Gather by data": Case(
        "y = Gather<axis=1>(x, i)",
        "float[b,3,2] x, int64[n] i",
        feeds=lambda rng: {"x": rng.standard_normal((2, 3, 2)).astype("f4"), "i": np.array([2, -3, 0, -1])},
    ),
    "Gather by one datum": Case(
        "y = Gather<axis=1>(x, i)",
        "float[b,3,2] x, int64 i",
        feeds=lambda rng: {"x": rng.standard_normal((2, 3, 2)).astype("f4"), "i": np.array(-1)},
    ),
    "Gather by int32": Case(
        "y = Gather(w, x)",
        "int32[b,s] x",
        weights="float[3,2] w = {1,2,3,4,5,6}",
        feeds=lambda rng: {"x": np.array([[0, -1, 2]], np.int32)},
    ),
    "Gather integers": Case(
        "y = Gather(w, x)",
        "int64[s] x",
        "int64[...] y",
        weights="int64[3] w = {5, 6, 7}",
        feeds=lambda rng: {"x": np.array([2, -3, 0])},
    ),
    "GatherND": Case(
        "y = GatherND(x, i)",
        "float[b,s,2] x, int64[n,2] i",
        feeds=lambda rng: {
            "x": rng.standard_normal((3, 4, 2)).astype("f4"),
            "i": np.array([[0, 3], [-1, -4], [2, 0]]),
        },
    ),
    "GatherND in batches": Case(
        "y = GatherND<batch_dims=1>(x, i)",
        "float[b,s,2] x, int64[b,1] i",
        feeds=lambda rng: {"x": rng.standard_normal((3, 4, 2)).astype("f4"), "i": np.array([[0], [-1], [3]])},
    ),
    "GatherElements": Case(
        "y = GatherElements<axis=1>(x, i)",
        "float[b,s] x, int64[b,n] i",
        feeds=lambda rng: {
            "x": rng.standard_normal((2, 3)).astype("f4"),
            "i": np.array([[0, -1, 2, 1], [1, 1, -3, 0]]),
        },
    ),
    # parts
    "Concat": Case("y = Concat<axis=1>(x, z)", "float[b,s,4] x, float[b,n,4] z"),
    "Concat from the end": Case("y = Concat<axis=-1>(x, x, x)"),
    "Concat with something empty": Case(
        "y = Concat<axis=1>(w, x)", "float[1,s,2] x", weights="float[1,0,2] w = {}", sizes=({"s": 3},)
    ),
    "Split": Case(
        "y, z = Split<axis=2>(x, k)", outputs="float[...] y, float[...] z", weights="int64[2] k = {1, 3}"
    ),
    "Split evenly": Case("y, z = Split<axis=2, num_outputs=2>(x)", outputs="float[...] y, float[...] z"),
    "Split unevenly": Case(
        "y, z, q = Split<axis=-1, num_outputs=3>(x)",
        "float[b,7] x",
        "float[...] y, float[...] z, float[...] q",
    ),
    "Split in one": Case("y = Split<axis=2, num_outputs=1>(x)"),
    "Split opset 13": Case("y, z = Split<axis=2>(x)", outputs="float[...] y, float[...] z", opset=13),
    "Split of a symbolic axis": Case(
        "y, z = Split<axis=0>(x, k)",
        "float[n,2] x",
        "float[...] y, float[...] z",
        weights="int64[2] k = {1, 3}",
        sizes=({"n": 4},),
    ),
    **{
        f"Slice {a}:{b}:{c}": Case(
            "y = Slice(x, a, e, w, c)",
            "float[b,6] x",
            weights=f"int64[1] a = {{{a}}}, int64[1] e = {{{b}}}, int64[1] w = {{1}}, int64[1] c = {{{c}}}",
        )
        for a, b, c in (
            (0, 3, 1),
            (-3, 6, 1),
            (1, -1, 2),
            (-9, 99, 3),
            (0, 9223372036854775807, 1),
            (4, 2, 1),
            (5, -9223372036854775808, -1),
            (-1, -7, -2),
            (3, 0, -1),
            (9223372036854775807, 1, -3),
            (0, 4, -1),
        )
    },
    **{
        f"Slice of a symbolic axis {a}:{b}:{c}": Case(
            "y = Slice(x, a, e, w, c)",
            "float[n,2] x",
            weights=f"int64[1] a = {{{a}}}, int64[1] e = {{{b}}}, int64[1] w = {{-2}}, int64[1] c = {{{c}}}",
            sizes=({"n": 1}, {"n": 2}, {"n": 7}),
        )
        for a, b, c in (
            (0, 3, 1),
            (-3, 9223372036854775807, 1),
            (1, -1, 1),
            (-9223372036854775808, -2, 1),
            (2, 99, 2),
            (5, 3, 1),
            (-1, -9223372036854775808, -1),
            (3, 0, -1),
            (-2, -9223372036854775808, -2),
        )
    },
    "Slice of two axes": Case("y = Slice(x, a, e)", weights="int64[2] a = {0, 0}, int64[2] e = {9, 1}"),
    "Tile": Case("y = Tile(x, k)", weights="int64[3] k = {1, 2, 3}"),
    "Tile once": Case("y = Tile(x, k)", weights="int64[3] k = {1, 1, 1}"),
    **{
        f"Trilu {u} {k}": Case(f"y = Trilu<upper={u}>(x, k)", "float[b,s,5] x", weights=f"int64 k = {{{k}}}")
        for u in (0, 1)
        for k in (-1, 0, 2)
    },
    "Trilu of bools": Case("y = Trilu<upper=0>(x)", "bool[s,s] x", "bool[...] y"),
    "a sequence of equal parts": Case(
        "q = SplitToSequence<axis=2>(x, k) y = SequenceAt(q, i)", weights="int64 k = {2}, int64 i = {-1}"
    ),
    "a sequence of parts": Case(
        "q = SplitToSequence<axis=-1>(x, k) y = SequenceAt(q, i)",
        weights="int64[2] k = {1, 3}, int64 i = {1}",
    ),
    "a sequence of slices": Case(
        "q = SplitToSequence<axis=2>(x) y = SequenceAt(q, i)", weights="int64 i = {2}"
    ),
    # reductions of whole numbers are exact, but for the mean's division
    **{
        f"{op} {axes}{' kept' if keep else ''}": Case(
            f"y = {op}<keepdims={keep}>(x, a)",
            weights=f"int64[{len(axes)}] a = {{{','.join(map(str, axes))}}}",
            whole=True,
            units=1 if op == "ReduceMean" else 0,
        )
        for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin")
        for axes, keep in (((-1,), 1), ((0, 2), 0), ((1,), 0))
    },
    **{
        f"{op} of all": Case(f"y = {op}<keepdims=0>(x)", whole=True)
        for op in ("ReduceSum", "ReduceMax", "ReduceL1", "ReduceSumSquare")
    },
    "ReduceProd": Case("y = ReduceProd<keepdims=0>(x, a)", weights="int64[1] a = {2}", whole=True),
    "ReduceL2": Case(
        "y = ReduceL2(x, a)", weights="int64[1] a = {-1}", whole=True
    ),  # a correctly rounded root
    "ReduceSum of integers": Case(
        "y = ReduceSum<keepdims=0>(x, a)", "int64[b,4] x", "int64[...] y", weights="int64[1] a = {1}"
    ),
    "ReduceSum of no axes": Case("y = ReduceSum<noop_with_empty_axes=1>(x)"),
    "ReduceMean opset 13": Case("y = ReduceMean<axes=[-1]>(x)", opset=13, whole=True, units=1),
    "ReduceSum opset 13": Case("y = ReduceSum(x, a)", opset=13, whole=True, weights="int64[1] a = {-1}"),
    **{
        f"CumSum {a} {e}{r}": Case(
            f"y = CumSum<exclusive={e}, reverse={r}>(x, a)", weights=f"int64 a = {{{a}}}", whole=True
        )
        for a in (-1, 1)
        for e in (0, 1)
        for r in (0, 1)
    },
    "CumSum of integers": Case("y = CumSum(x, a)", "int64[b,4] x", "int64[...] y", weights="int64 a = {1}"),
    **{
        f"{op} {keep}": Case(f"y = {op}<axis=1, keepdims={keep}>(x)", outputs="int64[...] y", whole=True)
        for op in ("ArgMax", "ArgMin")
        for keep in (0, 1)
    },
    **{
        f"TopK {largest}": Case(
            f"y, i = TopK<axis=-1, largest={largest}>(x, k)",
            "float[b,s,9] x",
            "float[...] y, int64[...] i",
            whole=True,
            weights="int64[1] k = {3}",
        )
        for largest in (0, 1)
    },
    # shapes
    "Flatten": Case("y = Flatten<axis=2>(x)"),
    **{f"Flatten {a}": Case(f"y = Flatten<axis={a}>(x)") for a in (0, 1, -1, 3)},
    "Squeeze": Case("y = Squeeze(x, a)", "float[b,1,s,1] x", weights="int64[2] a = {1, -1}"),
    "Squeeze all ones": Case("y = Squeeze(x)", "float[4,1,2,1] x"),
    "Unsqueeze": Case("y = Unsqueeze(x, a)", "float[b,4] x", weights="int64[2] a = {-1, 0}"),
    "Constant": Case("c = Constant<value = float[4] {1, 2, 3, 4}>() y = Add(x, c)"),
    "Constant float": Case("c = Constant<value_float = 2.5>() y = Mul(x, c)"),
    "Constant ints": Case("c = Constant<value_ints = [0, -1]>() y = Reshape(x, c)"),
    # normalization and other borrowed converters
    "LayerNormalization": Case(
        "y = LayerNormalization<axis=-1, epsilon=1e-5>(x, g, h)",
        weights="float[4] g = {1, 2, -1, 0.5}, float[4] h = {0, 1, 2, 3}",
        units=APPROXIMATED,
    ),
    "LayerNormalization without bias": Case(
        "y = LayerNormalization(x, g)", weights="float[4] g = {1, 2, -1, 0.5}", units=APPROXIMATED
    ),
    "Clip": Case("y = Clip(x, a, e)", weights="float a = {-0.5}, float e = {0.25}"),
    "Clip from below": Case("y = Clip(x, a)", weights="float a = {-0.5}"),
    "Clip from above": Case("y = Clip(x, , e)", weights="float e = {0.25}"),
    "Clip integers": Case(
        "y = Clip(x, a, e)", "int64[b,4] x", "int64[...] y", weights="int64 a = {-2}, int64 e = {3}"
    ),
    "Pad": Case("y = Pad(x, p)", weights="int64[6] p = {0, 1, 2, 0, 0, 1}"),
    "Pad with a value": Case("y = Pad(x, p, v)", weights="int64[6] p = {0, 0, 2, 0, 0, 1}, float v = {7}"),
    "Conv": Case(
        "y = Conv<kernel_shape=[3], pads=[1,1], strides=[2]>(x, w, c)",
        "float[b,2,8] x, float[3] c",
        weights="float[3,2,3] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18}",
        whole=True,
    ),
    "Conv of pictures": Case(
        "y = Conv<kernel_shape=[2,2]>(x, w)",
        "float[b,1,4,5] x",
        weights="float[2,1,2,2] w = {1,2,3,4,5,6,7,8}",
        whole=True,
    ),
    # RMSNormalization: a sum of 4 squares, halved by the root, and six operations
    "RMSNormalization": Case("y = RMSNormalization(x, g)", weights="float[4] g = {1, 2, -1, 0.5}", units=8),
    "RMSNormalization epsilon": Case(
        "y = RMSNormalization<epsilon=0.5>(x, g)", weights="float[1] g = {2}", units=8
    ),
    "RMSNormalization of two axes": Case(
        "y = RMSNormalization<axis=1>(x, g)",
        "float[b,2,3] x",
        weights="float[2,3] g = {1,2,3,4,5,6}",
        units=8,
    ),
}

NUMPY = {"int64": np.int64, "int32": np.int32, "float": np.float32, "bool": np.bool_}


def drawn(source: ir.Model, sizes: dict[str, int], whole: bool, rng: np.random.Generator) -> Feeds:
    """Feeds of these sizes; integers from -4 to 4."""
    feeds = {}
    for value in source.graph.inputs:
        if value.is_initializer():
            continue
        shape = [d if isinstance(d, int) else sizes[d.value] for d in value.shape]
        small = rng.integers(-4, 5, shape)
        if value.dtype == ir.DataType.BOOL:
            feeds[value.name] = small > 0
        else:
            array = small if whole or value.dtype != ir.DataType.FLOAT else rng.standard_normal(shape)
            feeds[value.name] = np.asarray(array, value.dtype.numpy())
    return feeds


def close(got: np.ndarray, wanted: np.ndarray, units: int) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if not units:
        np.testing.assert_array_equal(got, wanted)
    else:
        bound = units * 2.0**-24 * np.abs(wanted).max(initial=0)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    case, rng = CASES[name], np.random.default_rng(0)
    source = model(case.text, case.opset)
    ours, theirs = compiled(source), reference(source)
    for sizes in [{}] if case.feeds else case.sizes:
        feeds = case.feeds(rng) if case.feeds else drawn(source, sizes, case.whole, rng)
        for got, wanted in zip(ours(feeds), theirs(feeds), strict=True):
            close(got, wanted, case.units)


@cache
def _covered() -> set[str]:
    elsewhere = {  # in the files beside this one
        "Attention",
        "RotaryEmbedding",
        "TensorScatter",
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "Shape",
        "Size",
        "Reshape",
        "Expand",
        "ConstantOfShape",
        "Range",
    }
    return elsewhere | {n.op_type for c in CASES.values() for n in model(c.text, c.opset).graph}


def test_every_operator_of_the_table_is_covered() -> None:
    assert set(TABLES[""]) - _covered() == set()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_floats_are_computed_in_float32(kind: str) -> None:
    """A model in half precision; ONNX Runtime's CPU lacks it, so beside float64 rounded at the end."""
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[kind]
    body = """{ a = MatMul(x, w) n = RMSNormalization(a, g) c = Softmax(n)
                e = Gather(w, i) t = Transpose<perm=[1,0]>(e)
                d = MatMul(c, t) m = ReduceMean(d, k) y = Sub(d, m) }"""
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((4, 4)).astype(dtype), rng.standard_normal(4).astype(dtype)
    inputs = f"{kind}[b,4] x, {kind}[4,4] w, {kind}[4] g"
    source = model(f"g ({inputs}) => ({kind}[b,2] y) <int64[2] i = {{0, -1}}, int64[1] k = {{-1}}> {body}")
    source = with_weights(source, w=w, g=g)
    x = rng.standard_normal((3, 4)).astype(dtype)
    (got,) = compiled(source)({"x": x})
    a = x.astype(np.float64) @ w.astype(np.float64)
    n = a / np.sqrt((a**2).mean(1, keepdims=True) + 1e-5) * g.astype(np.float64)
    c = np.exp(n) / np.exp(n).sum(1, keepdims=True)
    d = c @ w.astype(np.float64)[[0, -1]].T
    assert got.dtype == dtype
    # Each of the six results is rounded to 11 (8) bits; the norm and the softmax pass relative errors of size
    # |n| < 4 on, so 16 roundings cover all.
    bits = 11 if kind == "float16" else 8
    assert (
        np.abs(got.astype(np.float64) - (d - d.mean(1, keepdims=True))).max()
        <= 16 * 2.0**-bits * np.abs(d).max()
    )
