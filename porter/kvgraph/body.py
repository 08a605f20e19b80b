"""Body: the nodes of a model-local function in the making, values by name."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "porter"
FLOAT, DOUBLE, HALF = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16
INT8, UINT8 = TensorProto.INT8, TensorProto.UINT8
INT32, INT64 = TensorProto.INT32, TensorProto.INT64
FP8, BOOL = TensorProto.FLOAT8E4M3FN, TensorProto.BOOL


class Body:
    """Nodes in order. Values are names; a constant that is asked for twice is one value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output."""
        out = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def constant(self, value: object, dtype: type) -> str:
        """An array or number as a constant."""
        array = np.asarray(value, dtype, order="C")
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """int64 [n]: axes and shapes."""
        return self.constant(values, np.int64)

    def integer(self, value: int) -> str:
        """An int64 number."""
        return self.constant(value, np.int64)

    def number(self, value: float | np.floating) -> str:
        """A float32 number."""
        return self.constant(value, np.float32)

    def cast(self, x: str, to: int) -> str:
        """x in another type (of `TensorProto`)."""
        return self.op("Cast", x, to=to)

    def reshape(self, x: str, *shape: int) -> str:
        """x in another shape; 0 keeps an axis."""
        return self.op("Reshape", x, self.ints(*shape))

    def part(self, x: str, start: int, end: int, axis: int = -1) -> str:
        """Elements start to end - 1 of an axis."""
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis))

    def size(self, x: str, axis: int) -> str:
        """The length of an axis, int64 []."""
        return self.op("Squeeze", self.op("Shape", x, start=axis, end=axis + 1))

    def counted(self, count: str) -> str:
        """0, 1, … count - 1 for an int64 []."""
        return self.op("Range", self.integer(0), count, self.integer(1))

    def function(
        self, name: str, inputs: list[str], outputs: dict[str, str], attributes: list[str], opset: int
    ) -> ir.Function:
        """What was built; `outputs`: values by the names that the function gives them."""
        made = [helper.make_node("Identity", [value], [name]) for name, value in outputs.items()]
        proto = helper.make_function(
            DOMAIN,
            name,
            inputs,
            list(outputs),
            [*self.nodes, *made],
            [helper.make_opsetid("", opset)],
            attributes,
        )
        return ir.from_proto(proto)
