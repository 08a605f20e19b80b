"""Round what quantized weights multiply to 8 bits, each token by itself, so that codes multiply codes.

    y = MatMul(x, W)                                            x float [..., K], W decoded from codes
    ->
    scale = Max(ReduceMax<axes=[-1]>(Abs(x)) / largest, tiny)   float [..., 1]
    codes = QuantizeLinear<axis=-1, block_size=K>(x, scale)     [..., K]
    y = MatMul(DequantizeLinear<axis=-1, block_size=K>(codes, scale), W)

W8A8 with dynamic scales: every vector of the last axis, a token, gets the scale under which its largest
magnitude is the largest code (127, 448 for e4m3fn, …), as `porter.formats.encode` does for a row. `tiny` is
the least scale that dividing by keeps finite; under it a token of zeros is zeros. With s the token's scale
and t[n] the weights', y[n] = sum_k (s c[k]) (t[n] w[n,k]) = s t[n] sum_k c[k] w[n,k]: a target may multiply
codes, and apply scales to the sum.

Gemm's A is treated the same. Layers that read the same x share its codes. A layer is chosen by its weight:
one that is stored in codes, of 8 bits or fewer, in whatever form `porter.weights.store` gives it; a layer
whose weight stays a float keeps its float activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.formats import Format
from porter.match import add_initializer, fresh_name
from porter.pipeline import Pass, Promise
from porter.weights import select
from porter.weights.store import OPSET, TYPED

ELEMENTS = ("int8", "e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")  # symmetric, and QuantizeLinear makes them


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """`format`: int8, fp8-e4m3fn or another 8-bit float that ONNX has, or a family (`fp8`) of the target.

    `skip` and `only` list roles and patterns of names of the weights that are multiplied, as in
    `quantize.rtn`.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    after: ClassVar[tuple[str, ...]] = (
        "clean.opset",
        "fuse.matmul",
        "quantize.awq",
        "quantize.gptq",
        "quantize.hqq",
        "quantize.kquant",
        "quantize.rtn",
    )

    format: str = "int8"
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("skip", "only"):  # `skip=` skips nothing
            object.__setattr__(self, option, tuple(word for word in getattr(self, option) if word))

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite; the count is of values that were rounded. Raises PassError PORT-0254, 0256, 0292, 0297,
        0298."""
        form = self._form(context)
        if form.element == "fp32":
            return 0
        found = select.multiplied_codes(model.graph)
        if not found:
            what = "no layer multiplies by quantized weights, so there are no activations to round"
            raise PassError("PORT-0297", what, where=str(self), hint="let quantize.rtn stand before")
        if model.opset_imports.get("", 0) < OPSET:
            what = f"rounded activations need opset {OPSET}, and the model has {model.opset_imports.get('')}"
            raise PassError("PORT-0254", what, hint="let clean.opset stand before")
        chosen = select.pick(found, model.graph, self.skip, self.only, str(self))
        return _round(model.graph, {use.node for matrix in chosen for use in matrix.uses}, form)

    def _form(self, context: Context) -> Format:
        form = formats.parse(context.target.flavour(self.format) if context.target else self.format)
        by_row = form.rows == 1 and not form.group and form.scale == "fp32"
        if form.element != "fp32" and not (by_row and form.element in ELEMENTS):
            what = f"activations cannot be rounded to {form.name} in ONNX"
            hint = f"one of int8, {', '.join(f'fp8-{e}' for e in ELEMENTS[1:])}, a scale for each token"
            raise PassError("PORT-0292", what, where=str(self), hint=hint)
        return form


def _round(graph: ir.Graph, layers: set[ir.Node], form: Format) -> int:
    """Let the layers read rounded activations; how many values were rounded."""
    rounded: dict[ir.Value, ir.Value] = {}
    for node in [n for n in graph if n in layers]:
        x = node.inputs[0]
        if node.attributes.get_int("transA", 0) or _is_rounded(x):
            continue
        if x not in rounded:
            rounded[x] = _Rounding(node, form).rounded()
        node.replace_input_with(0, rounded[x])
    return len(rounded)


def _is_rounded(x: ir.Value) -> bool:
    """Whether x is decoded from codes that are made at run time."""
    node = x.producer()
    maker = node.inputs[0].producer() if node is not None and node.op_type == "DequantizeLinear" else None
    return maker is not None and maker.op_type == "QuantizeLinear"


class _Rounding:
    """The nodes that round the first input of `first`, put before it."""

    def __init__(self, first: ir.Node, form: Format) -> None:
        self.first, self.form, self.graph, self.x = first, form, first.graph, first.inputs[0]
        self.kind = self.x.dtype or ir.DataType.FLOAT

    def rounded(self) -> ir.Value:
        """What the input becomes, in its own type and shape."""
        x, kind, shape = self.x, self.kind, self.x.shape
        one = None if shape is None else ir.Shape([*list(shape)[:-1], 1])
        axes = self._constant("axes", np.array([-1], np.int64))
        largest = self._number("largest", self.form.largest)
        size = self._op("Abs", [x], "abs", kind, shape)
        peak = self._op("ReduceMax", [size, axes], "peak", kind, one, keepdims=1)
        step = self._op("Div", [peak, largest], "step", kind, one)
        scale = self._op("Max", [step, self._number("tiny", _least(kind))], "scale", kind, one)
        place, codes = {"axis": -1, "block_size": self._channels()}, TYPED[self.form.element]
        made = self._op(
            "QuantizeLinear", [x, scale], "codes", codes, shape, output_dtype=codes.value, **place
        )
        return self._op("DequantizeLinear", [made, scale], "rounded", kind, shape, **place)

    def _channels(self) -> int:
        """The size of the last axis, which the weight has too."""
        weight, turned = self.first.inputs[1].shape, self.first.attributes.get_int("transB", 0)
        places = ((self.x.shape, -1), (weight, -1 if turned else -2))
        known = [shape[axis] for shape, axis in places if shape is not None]
        sizes = [size for size in known if isinstance(size, int)]
        if not sizes:
            what, hint = "the number of channels is unknown", "let clean.shapes stand before"
            raise PassError("PORT-0298", what, where=str(self.x.name), hint=hint)
        return sizes[0]

    def _number(self, role: str, value: float) -> ir.Value:
        name = f"{role}.{self.form.element}.{self.kind.name.lower()}"
        return self._constant(name, np.array(value, self.kind.numpy()))

    def _constant(self, role: str, array: np.ndarray) -> ir.Value:
        """An initializer that all layers share."""
        name = f"activations.{role}"
        return self.graph.initializers.get(name) or add_initializer(self.graph, name, array)

    def _op(
        self,
        op: str,
        inputs: list[ir.Value],
        suffix: str,
        kind: ir.DataType,
        shape: ir.Shape | None,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes or None)
        out = node.outputs[0]
        out.name = fresh_name(self.graph, f"{self.x.name}.{suffix}")
        out.type, out.shape = ir.TensorType(kind), shape
        self.graph.insert_before(self.first, node)
        return out


def _least(kind: ir.DataType) -> float:
    """As small as a scale may be. Dividing by less may overflow, but in float16, whose range is short."""
    if kind == ir.DataType.FLOAT16:
        return float(np.finfo(np.float16).smallest_subnormal)
    return float(np.finfo(np.float32).smallest_normal)
