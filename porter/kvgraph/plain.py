"""Integers with a scale for each token and head, as far as ONNX has operators for them.

    present = TensorScatter<axis=2>(past, new, past_lengths)                    past float [B,H,C,D]
    Y = Attention(Q, present, …)
    ->
    scale = max(|new|) over D / 127, at least the smallest normal number        float [B,H,S,1]
    codes = QuantizeLinear<axis=3, block_size=D>(new, scale)                    int8 [B,H,S,D]
    present = TensorScatter<axis=2>(past, codes, past_lengths)                  past int8 [B,H,C,D]
    present_scale = TensorScatter<axis=2>(past_scale, scale, past_lengths)      past_scale float [B,H,C,1]
    Y = Attention(Q, DequantizeLinear<axis=3, block_size=D>(present, present_scale), …)

int4 divides by 7, and keeps two codes in a byte: `porter.PackInt4(codes)` is what is scattered into past,
uint8 [B,H,C,D/2], and `porter.UnpackInt4(present)` is what is dequantized.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from porter import nibbles
from porter.kv.scheme import Scheme, Side

LARGEST = {"int8": 127, "int4": 7}


def fits(scheme: Scheme, side: Side, size: int) -> bool:
    """Whether a side of `size` channels can be stored so: whole tokens, with computed fp32 scales."""
    whole = side in (Side("int8", rotate=side.rotate), Side("int4", rotate=side.rotate))
    even = side.element == "int8" or size % 2 == 0
    return whole and even and not scheme.windowed(side) and not scheme.copy


def rewrite(model: ir.Model, scatter: ir.Node, element: str) -> None:
    """Put codes and scales in place of the floats."""
    if element == "int4":
        nibbles.add_functions(model)
    _Cache(scatter, element).rewrite()


class _Cache:
    """One cache being rewritten; nodes are added before its TensorScatter, then, in order, after it."""

    def __init__(self, scatter: ir.Node, scheme: str) -> None:
        self.scatter, self.graph, self.scheme = scatter, scatter.graph, scheme
        self.past, self.new, self.lengths = scatter.inputs
        self.present, self.float = scatter.outputs[0], scatter.inputs[0].dtype
        self.size = self.past.shape[3]
        self.last: ir.Node | None = None

    def rewrite(self) -> None:
        """Put codes and scales in place of the floats."""
        readers = list(self.present.uses())
        scale = self._scale()
        self._store(self._codes(scale))
        value = self._dequantized(self._store_scale(scale))
        for node, index in readers:
            node.replace_input_with(index, value)

    def _scale(self) -> ir.Value:
        """max(|new|) / largest code, kept above zero: float [B,H,S,1]."""
        kind = self.float.numpy()
        axes = self._constant("axes", np.array([3], np.int64))
        largest = self._constant("largest", np.array(LARGEST[self.scheme], kind))
        floor = self._constant("floor", np.array(ml_dtypes.finfo(kind).smallest_normal, kind))
        size = self._add("Abs", [self.new], "abs", self.float, self._rows(self.new, self.size))
        one = self._rows(self.new, 1)
        peak = self._add("ReduceMax", [size, axes], "peak", self.float, one, keepdims=1)
        step = self._add("Div", [peak, largest], "step", self.float, one)
        return self._add("Max", [step, floor], "scale", self.float, one)

    def _codes(self, scale: ir.Value) -> ir.Value:
        """What is stored: int8 [B,H,S,D], or uint8 [B,H,S,D/2]."""
        attributes = {"output_dtype": ir.DataType.INT8, "axis": 3, "block_size": self.size}
        rows = self._rows(self.new, self.size)
        codes = self._add("QuantizeLinear", [self.new, scale], "codes", ir.DataType.INT8, rows, **attributes)
        if self.scheme == "int8":
            return codes
        rows = self._rows(self.new, self.size // 2)
        return self._add("PackInt4", [codes], "packed", ir.DataType.UINT8, rows, domain=nibbles.DOMAIN)

    def _store(self, codes: ir.Value) -> None:
        """Let the TensorScatter write codes: what was a cache of floats is one of bytes."""
        self.scatter.replace_input_with(1, codes)
        columns = self.size if self.scheme == "int8" else self.size // 2
        for value in (self.past, self.present):
            value.type, value.shape = ir.TensorType(codes.dtype), self._rows(self.past, columns)
        self.last = self.scatter

    def _store_scale(self, scale: ir.Value) -> ir.Value:
        """The scales' own cache, float [B,H,C,1], in and out beside the codes'."""
        shape = self._rows(self.past, 1)
        past = ir.Value(name=f"{self.past.name}_scale", type=ir.TensorType(self.float), shape=shape)
        inputs, outputs = self.graph.inputs, self.graph.outputs
        inputs.insert(list(inputs).index(self.past) + 1, past)
        present = self._add("TensorScatter", [past, scale, self.lengths], "", self.float, shape, axis=2)
        present.name = f"{self.present.name}_scale"
        outputs.insert(list(outputs).index(self.present) + 1, present)
        return present

    def _dequantized(self, scale: ir.Value) -> ir.Value:
        """The whole cache as floats [B,H,C,D]."""
        codes, rows = self.present, self._rows(self.past, self.size)
        if self.scheme == "int4":
            codes = self._add(
                "UnpackInt4", [codes], "unpacked", ir.DataType.INT8, rows, domain=nibbles.DOMAIN
            )
        attributes = {"axis": 3, "block_size": self.size}
        return self._add("DequantizeLinear", [codes, scale], "dequantized", self.float, rows, **attributes)

    def _rows(self, like: ir.Value, columns: int) -> ir.Shape | None:
        """The shape of `like` with another last axis."""
        return None if like.shape is None else ir.Shape([*list(like.shape)[:3], columns])

    def _constant(self, role: str, array: np.ndarray) -> ir.Value:
        """An initializer that all caches share."""
        name = f"cache.{role}.{self.scheme}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(tensor.dtype)
            self.graph.register_initializer(
                ir.Value(name=name, const_value=tensor, type=kind, shape=tensor.shape)
            )
        return self.graph.initializers[name]

    def _add(
        self,
        op: str,
        inputs: list[ir.Value],
        suffix: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        domain: str = "",
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes or None, domain=domain)
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{self.present.name}.{suffix}", ir.TensorType(dtype), shape
        if self.last is None:
            self.graph.insert_before(self.scatter, node)
        else:
            self.graph.insert_after(self.last, node)
            self.last = node
        return out
