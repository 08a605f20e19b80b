"""CertifiedAttention: a model-local function that attends over codes, bounds what that changed, and where the
bound is too large attends over the exact copy.

    CertifiedAttention_…{scheme, scale, softcap, is_causal}(q float32 [B,Hq,S,D], present key buffers…, present
        value buffers…, total_lengths int64 [B][, mask bool])
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
        b = self.b
        keys, values = (self._decoded(c) for c in (self.certified.key, self.certified.value))
        held, weights = self._attention(keys, values)
        copies = [b.cast(f"{side}_copy", body.FLOAT) for side in ("key", "value")]
        exact, _ = self._attention(*copies)
        bound = self._output_bound(self._variation(), weights, values)
        norm = self._norm(held)
        size = self.certified.value.size
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

    def _variation(self) -> str:
        """Total variation [B,Hq,S]."""
        b, made = self.b, self.certified
        size = made.key.size
        steps = b.op("ReduceMax", "key_scale", b.ints(3), keepdims=0)  # [B,H,C]
        steps = b.op("Unsqueeze", self._for_queries(steps), b.ints(2))  # [B,Hq,1,C]
        largest = self._largest(b.op("Where", self._seen(), steps, b.number(0)))
        half = 0.5 + bounds.ROUNDING + (size + 4) * 128 * bounds.ROUNDOFF
        total = b.op("ReduceSum", b.op("Abs", "q"), b.ints(3), keepdims=0)
        factor = b.op("Mul", self._enlarged(size), b.number(half * abs(made.scale)))
        delta = b.op("Mul", b.op("Mul", total, largest), factor)
        delta = b.op("Add", delta, b.number(16 * bounds.ROUNDOFF * made.softcap + bounds.LEAST))
        moved = b.op("Tanh", b.op("Mul", delta, b.number(0.5)))
        return b.op("Min", b.op("Mul", moved, b.number(1 + 8 * bounds.ROUNDOFF)), b.number(1))

    def _output_bound(self, variation: str, weights: str, values: str) -> str:
        b, made = self.b, self.certified
        errors = self._value_errors()  # [B,H,C]
        held = b.op("Less", b.ints(*range(made.key.capacity)), b.op("Squeeze", self.total, b.ints(3)))
        sizes = b.op("Where", held, b.op("Add", self._norm(values), errors), b.number(0))
        largest = self._for_queries(b.op("ReduceMax", sizes, b.ints(2), keepdims=1))  # [B,Hq,1]
        room = b.op("Add", self.count, b.number(256))
        rest = b.op("Mul", room, b.number(4 * bounds.ROUNDOFF))
        moved = b.op("Mul", b.op("Add", b.op("Add", variation, variation), rest), largest)
        column = b.op("Unsqueeze", self._for_queries(errors), b.ints(3))  # [B,Hq,C,1]
        own = b.op("Squeeze", b.op("MatMul", weights, column), b.ints(3))
        return b.op("Mul", b.op("Add", moved, own), self._enlarged(made.value.size))

    def _value_errors(self) -> str:
        b, value = self.b, self.certified.value
        group = value.side.group or value.size
        sizes = np.diff([*range(0, value.size, group), value.size])
        steps = b.op("Max", "value_scale", b.number(bounds.LEAST))
        squares = b.op("Mul", b.op("Mul", steps, steps), b.constant(sizes, np.float32))
        half = (0.5 + bounds.ROUNDING) * bounds.enlarged(value.size, 0)
        root = b.op("Sqrt", b.op("ReduceSum", squares, b.ints(3), keepdims=0))
        return b.op("Mul", root, b.number(half))

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

    def _largest(self, x: str) -> str:
        return self.b.op("ReduceMax", x, self.b.ints(3), keepdims=0)

    def _norm(self, x: str) -> str:
        """Over the last axis."""
        b = self.b
        return b.op("Sqrt", b.op("ReduceSum", b.op("Mul", x, x), b.ints(3), keepdims=0))

    def _for_queries(self, x: str) -> str:
        """[B,H,N] -> [B,Hq,N]: each query head has that of the KV head that it reads."""
        b, heads = self.b, self.certified.key.heads
        shared = b.op("Div", b.op("Shape", "q", start=1, end=2), b.ints(heads))
        shape = b.op("Concat", b.ints(1, 1), shared, b.ints(1), axis=0)
        apart = b.op("Expand", b.op("Unsqueeze", x, b.ints(2)), shape)
        whole = b.op("Concat", b.op("Shape", "q", start=0, end=2), b.op("Shape", x, start=2, end=3), axis=0)
        return b.op("Reshape", apart, whole)
