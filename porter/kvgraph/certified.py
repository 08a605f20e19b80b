"""CertifiedAttention: a model-local function that attends over codes, bounds what that changed, and where the
bound is too large attends over the exact copy.

    CertifiedAttention_…{scheme, scale, softcap, is_causal}(q float32 [B,Hq,S,D], present key buffers…,
        present value buffers…, total_lengths int64 [B][, mask bool])
      -> y float32 [B,Hq,S,Dv], bound float32 [B,Hq,S], exact bool [B,Hq,S]

Buffers are those of `porter.kv.layout`, in its order. The bound is that of `porter.kv.bounds`, computed in
float32, where T is a row's total length: on the distance between attention over the codes and attention over
the copy, of each head and query. Within tolerance is a bound of at most tolerance times the norm of what the
codes gave; y is that there, and attention over the copy elsewhere, where `exact` is true.

The body is plain ONNX. porter's importer knows the function by its name's prefix.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx import helper

from porter.kv import bounds
from porter.kv.names import text_of
from porter.kv.scheme import Scheme
from porter.kvgraph import body
from porter.kvgraph.body import Body
from porter.kvgraph.functions import Cached
from porter.kvgraph.rounding import Rounding

PREFIX = "CertifiedAttention_"
SOFTMAX = 3  # Attention's fourth output after the softmax


@dataclass(frozen=True)
class Certified:
    """Attention over both sides of a layer's cache. `mask`: whether there is one."""

    key: Cached
    value: Cached
    scale: float
    softcap: float = 0.0
    causal: bool = True
    mask: bool = False

    @property
    def scheme(self) -> Scheme:
        """That of both sides."""
        return self.key.scheme

    @property
    def attributes(self) -> dict[str, object]:
        """The attributes of a call."""
        return {
            "scheme": text_of(self.scheme),
            "scale": float(self.scale),
            "softcap": float(self.softcap),
            "is_causal": int(self.causal),
        }

    @property
    def name(self) -> str:
        """The prefix, and what tells one body from another."""
        key = self.key
        about = f"{self.attributes} {key.heads} {key.size} {self.value.size} {key.capacity} {self.mask}"
        return f"{PREFIX}{hashlib.sha256(about.encode()).hexdigest()[:12]}"

    @property
    def inputs(self) -> list[str]:
        """The function's inputs."""
        sides = [f"{c.name}{b.name}" for c in (self.key, self.value) for b in c.buffers]
        return ["q", *sides, "total_lengths", *(["mask"] if self.mask else [])]


def certified_function(certified: Certified, opset: int) -> ir.Function:
    """The function."""
    b = Body()
    outputs = _Certified(b, certified).outputs()
    return b.function(certified.name, certified.inputs, outputs, list(certified.attributes), opset)


class _Certified:
    """The nodes; shapes are those of the module's docstring, C tokens in a buffer, H KV heads."""

    def __init__(self, b: Body, certified: Certified) -> None:
        self.b, self.certified = b, certified
        self.total = b.op("Unsqueeze", "total_lengths", b.ints(1, 2, 3))  # [B,1,1,1]
        self.count = b.cast(b.op("Squeeze", self.total, b.ints(3)), body.FLOAT)  # T, [B,1,1]

    def outputs(self) -> dict[str, str]:
        b, size = self.b, self.certified.value.size
        keys, values = (self._decoded(c) for c in (self.certified.key, self.certified.value))
        held, weights = self._attention(keys, values)
        copies = [b.cast(f"{side}_copy", body.FLOAT) for side in ("key", "value")]
        exact, _ = self._attention(*copies)
        norm = b.op("Sqrt", self._square(held))
        bound = self._output_bound(self._logit_bound(), weights, values, norm)
        limit = b.op("Mul", norm, b.number(bounds.allowed(self.certified.scheme.tolerance, size)))
        finite = b.op("Less", norm, b.number(np.float32(np.inf)))
        within = b.op("And", b.op("LessOrEqual", bound, limit), finite)
        y = b.op("Where", b.op("Unsqueeze", within, b.ints(3)), held, exact)
        return {"y": y, "bound": bound, "exact": b.op("Not", within)}

    def _decoded(self, cached: Cached) -> str:
        parts = {name: f"{cached.name}_{name}" for name in ("codes", "scale")}
        return Rounding(self.b, cached.side, cached.size).decode(parts)

    def _attention(self, keys: str, values: str) -> tuple[str, str]:
        """The output [B,Hq,S,D], and the weights [B,Hq,S,C]."""
        made, b = self.certified, self.b
        y, weights = f"attention_{len(b.nodes)}", f"weights_{len(b.nodes)}"
        mask = "mask" if made.mask else ""
        node = helper.make_node(
            "Attention",
            ["q", keys, values, mask, "", "", "total_lengths"],
            [y, "", "", weights],
            scale=float(made.scale),
            softcap=float(made.softcap),
            is_causal=int(made.causal),
            qk_matmul_output_mode=SOFTMAX,
        )
        b.nodes.append(node)
        return y, weights

    # `porter.kv.bounds`, term by term.

    def _logit_bound(self) -> str:
        """delta [B,Hq,S]."""
        b, made = self.b, self.certified
        size = made.key.size
        steps = b.op("ReduceMax", "key_scale", b.ints(3), keepdims=0)  # [B,H,C]
        steps = b.op("Unsqueeze", self._for_queries(steps), b.ints(2))  # [B,Hq,1,C]
        seen = b.op("Where", self._seen(), steps, b.number(0))
        total = b.op("ReduceSum", b.op("Abs", "q"), b.ints(3), keepdims=0)
        product = b.op("Mul", total, b.op("ReduceMax", seen, b.ints(3), keepdims=0))
        half = b.number(bounds.key_half(size) * abs(made.scale))
        delta = b.op("Mul", product, b.op("Mul", self._enlarged(size), half))
        own = b.number(16 * bounds.ROUNDOFF * made.softcap + bounds.LEAST)
        return b.op("Add", delta, b.op("Add", self._tokens(bounds.ROUNDOFF), own))

    def _output_bound(self, delta: str, weights: str, values: str, norm: str) -> str:
        b, made = self.b, self.certified
        size, errors = made.value.size, self._value_errors()  # [B,H,C]
        columns = [self._for_queries(x) for x in (errors, b.op("Mul", errors, errors), self._square(values))]
        columns = [b.op("Unsqueeze", x, b.ints(3)) for x in columns]
        means = b.op("MatMul", weights, b.op("Concat", *columns, axis=3))  # [B,Hq,S,3]
        error, error_square, square = (b.op("Squeeze", b.part(means, i, i + 1), b.ints(3)) for i in range(3))
        spread = b.op("Add", self._deviation(square, norm), self._deviation(error_square, error))
        power = b.op("Exp", b.op("Div", b.op("Mul", delta, delta), b.number(6)))
        moved = b.op("Mul", b.op("Mul", delta, power), b.number(1 + 16 * bounds.ROUNDOFF))
        rest = b.op("Mul", b.op("Sqrt", square), self._tokens(4 * bounds.ROUNDOFF))
        held = b.op("Less", b.ints(*range(made.key.capacity)), b.op("Squeeze", self.total, b.ints(3)))
        largest = b.op("ReduceMax", b.op("Where", held, errors, b.number(0)), b.ints(2), keepdims=1)
        factor = b.number(bounds.VANISHED * bounds.longest(made.value.side.element))
        vanished = b.op("Mul", self._for_queries(largest), b.op("Mul", self.count, factor))
        vanished = b.op("Mul", b.op("Exp", b.op("Add", delta, delta)), vanished)
        terms = b.op("Sum", error, b.op("Mul", moved, spread), rest, vanished)
        return b.op("Mul", terms, self._enlarged(size))

    def _deviation(self, square: str, mean: str) -> str:
        b = self.b
        tokens = b.op("Add", self.count, b.number(self.certified.value.size + 16))
        room = b.op("Mul", tokens, b.number(8 * bounds.ROUNDOFF))
        left = b.op("Max", b.op("Sub", square, b.op("Mul", mean, mean)), b.number(0))
        return b.op("Sqrt", b.op("Add", left, b.op("Mul", square, room)))

    def _value_errors(self) -> str:
        b, value = self.b, self.certified.value
        group = value.side.group or value.size
        sizes = np.diff([*range(0, value.size, group), value.size])
        steps = b.op("Max", "value_scale", b.number(bounds.LEAST))
        squares = b.op("Mul", b.op("Mul", steps, steps), b.constant(sizes, np.float32))
        root = b.op("Sqrt", b.op("ReduceSum", squares, b.ints(3), keepdims=0))
        return b.op("Mul", root, b.number(bounds.value_half(value.size)))

    def _tokens(self, factor: float) -> str:
        """(T + 256) times a factor, float32 [B,1,1]."""
        return self.b.op("Mul", self.b.op("Add", self.count, self.b.number(256)), self.b.number(factor))

    def _enlarged(self, size: int) -> str:
        """`bounds.enlarged`, float32 [B,1,1]."""
        b = self.b
        terms = b.op("Mul", self.count, b.number(2 * bounds.ROUNDOFF))
        return b.op("Add", terms, b.number(bounds.enlarged(size, 0)))

    def _seen(self) -> str:
        """Which tokens a query may see, bool that broadcasts to [B,Hq,S,C]."""
        b, made = self.b, self.certified
        tokens = b.ints(*range(made.key.capacity))
        if made.causal:
            steps = b.size("q", 2)
            column = b.op("Unsqueeze", b.counted(steps), b.ints(1))  # [S,1]
            end = b.op("Add", b.op("Sub", self.total, steps), b.op("Add", column, b.integer(1)))
        else:
            end = self.total
        seen = b.op("Less", tokens, end)
        return b.op("And", seen, "mask") if made.mask else seen

    def _square(self, x: str) -> str:
        """The sum of squares over the last axis."""
        return self.b.op("ReduceSum", self.b.op("Mul", x, x), self.b.ints(3), keepdims=0)

    def _for_queries(self, x: str) -> str:
        """[B,H,N] -> [B,Hq,N]: each query head has that of the KV head that it reads."""
        b, heads = self.b, self.certified.key.heads
        shared = b.op("Div", b.op("Shape", "q", start=1, end=2), b.ints(heads))
        shape = b.op("Concat", b.ints(1, 1), shared, b.ints(1), axis=0)
        apart = b.op("Expand", b.op("Unsqueeze", x, b.ints(2)), shape)
        whole = b.op("Concat", b.op("Shape", "q", start=0, end=2), b.op("Shape", x, start=2, end=3), axis=0)
        return b.op("Reshape", apart, whole)
