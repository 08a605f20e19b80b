"""Importer: walks an ONNX graph and builds one Relax function, `main(inputs…, weights…)`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx
from tvm.ir import Constant, Expr

from porter.errors import ModelError, PorterError, TargetError
from porter.lower.importer.dimensions import Dimensions
from porter.lower.importer.templates import Host, Multiplied, Templates
from porter.lower.importer.values import Ints, Picked, Quantized, Sequence, StoredCache, Value, Weight
from porter.lower.kernels import integers
from porter.lower.kernels.copy import copied
from porter.lower.weights import Parameter, Weights

SMALL = 16  # constants of at most this many elements are written into the program; larger ones are parameters
OLDEST = 13  # the first opset whose operators mean what the importers take them to mean

# TVM type of an ONNX tensor; formats that LLVM computes wrongly travel as bytes (kernels decode them).
DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT16: "int16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.UINT16: "uint16",
    ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool",
}
INDEX_TYPES = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass
class Imported:
    """The module, its parameters beyond the graph's inputs, and which outputs overwrite which inputs."""

    module: tvm.IRModule
    parameters: list[Parameter]
    in_place: dict[str, str]
    sources: dict[str, str]  # variable of `main` -> the ONNX node that it is a result of
    bounds: dict[str, int]  # of the symbolic dimensions in use
    multiplied: list[Multiplied]  # one entry for each weight, cache and pair of tensors in a product


class Importer:
    """Holds what the operator functions share: the block builder, known values, weights and kernels."""

    def __init__(self, model: ir.Model, bounds: dict[str, int], templates: Templates | None = None) -> None:
        """`bounds` has the largest value of every symbolic dimension: memory is planned for them.

        `templates` makes the kernels, those of the host unless others are given.
        """
        self.model = model
        self.templates: Templates = templates or Host()
        self.opset = model.opset_imports.get("", OLDEST)
        self.builder = relax.BlockBuilder()
        self.given = [v for v in model.graph.inputs if not v.is_initializer()]
        self.dimensions = Dimensions(bounds, self.given)
        self.simplify, self.same, self.holds = (
            self.dimensions.simplify,
            self.dimensions.same,
            self.dimensions.holds,
        )
        self.weights = Weights()
        self.in_place: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.multiplied: dict[Hashable, Multiplied] = {}
        self.current = ""  # the node being imported, for messages
        self._values: dict[ir.Value, Value] = {}
        self._kernels: dict[Hashable, relax.GlobalVar] = {}
        self._written: dict[relax.Var, str] = {}  # results that are an input's own buffer

    def run(self) -> Imported:
        """Import the whole graph.

        Raises TargetError PORT-0410 for an operator without importer, PORT-0411 when one cannot be lowered,
        PORT-0413 to PORT-0416 and PORT-0419 to PORT-0421 for what the lowering does not take, ModelError
        PORT-0412.
        """
        if self.opset < OLDEST:
            raise TargetError(
                "PORT-0420", f"opset {self.opset} is too old to be lowered", hint="run clean.opset first"
            )
        inputs = [self._input(i, v) for i, v in enumerate(self.given)]
        attrs = {"tir_var_upper_bound": self.dimensions.upper, "num_input": len(inputs)}
        with self.builder.function("main", attrs=attrs):
            with self.builder.dataflow():
                for node in self.model.graph:
                    self._node(node)
                outputs = self._outputs()
            self.builder.emit_func_output(relax.Tuple(outputs), [*inputs, *self.weights.variables])
        return Imported(
            self.builder.finalize(),
            self.weights.parameters,
            self.in_place,
            self.sources,
            self.dimensions.upper,
            list(self.multiplied.values()),
        )

    # What operator functions use.

    def value(self, value: ir.Value | None) -> Value | None:
        """What is known of an ONNX value; a constant becomes a Weight, an absent input None."""
        if value is None:
            return None
        if value not in self._values:
            if value.const_value is None:
                what = (
                    "a value is used that nothing makes, or that is a second result its operator lacks here"
                )
                raise ModelError("PORT-0412", what, where=value.name or "?")
            self._values[value] = Weight(value)
        return self._values[value]

    def tensor(self, value: Value) -> relax.Expr:
        """A Relax tensor of any value: a small constant is written out, a large one becomes a parameter."""
        if isinstance(value, Ints):
            return self._ints_tensor(value)
        if isinstance(value, Weight):
            return self._weight_tensor(value)
        if isinstance(value, Quantized):
            from porter.lower.importer.quantized import expand  # it uses the importer's kernels

            return expand(self, value)
        if isinstance(value, Picked):
            from porter.lower.importer.experts import matrices

            return matrices(self, value)
        if isinstance(value, StoredCache):
            from porter.lower.importer.caches import read

            return read(self, value)
        if isinstance(value, Sequence):
            raise TargetError("PORT-0415", "a sequence stands where a tensor belongs", where=self.current)
        return value

    def ints(self, value: Value | None) -> list[Any] | None:
        """The entries of a value that is known at import, else None."""
        if isinstance(value, Ints):
            return value.flat()
        if isinstance(value, Weight) and value.type in INDEX_TYPES:
            return [int(v) for v in value.numpy().reshape(-1)]
        return None

    def array(self, value: Value | None) -> np.ndarray | None:
        """The contents of a constant, else None."""
        return value.numpy() if isinstance(value, Weight) else None

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression."""
        return self._made(self.builder.emit(expr))

    def te(self, function: Callable[..., Any], *args: Any, name: str) -> relax.Var:
        """Bind a tensor expression over relax tensors."""
        return self._made(self.builder.emit_te(function, *args, primfunc_name_hint=name))

    def match(self, tensor: relax.Expr, dims: list[Any]) -> relax.Var:
        """The same tensor, checked at run time to have these dimensions."""
        matched = relax.TensorType([self.dim(d) for d in dims], tensor.ty.dtype)
        return self._made(self.builder.match_cast(tensor, matched))

    def kernel(self, key: Hashable, make: Callable[[], tirx.PrimFunc]) -> relax.GlobalVar:
        """The kernel made for `key`, made once per module."""
        if key not in self._kernels:
            func = make()
            # A kernel's name does not tell all of it: its epsilon, for one.
            name = str(func.attrs["global_symbol"])
            same = sum(k.name_hint.split("__")[0] == name for k in self._kernels.values())
            name = f"{name}__{same}" if same else name
            self._kernels[key] = self.builder.add_func(func.with_attr("global_symbol", name), name)
        return self._kernels[key]

    def call(
        self, kernel: relax.GlobalVar, args: list[relax.Expr], shape: list[Any], dtype: str
    ) -> relax.Var:
        """Bind a kernel's result."""
        return self.emit(relax.call_tir(kernel, args, relax.TensorType(shape, dtype)))

    def call_all(
        self, kernel: relax.GlobalVar, args: list[relax.Expr], types: list[tuple[str, list[Any]]]
    ) -> tuple[relax.Var, ...]:
        """Bind the results of a kernel with several: (dtype, shape) of each."""
        results = self.emit(relax.call_tir(kernel, args, [relax.TensorType(s, d) for d, s in types]))
        return tuple(self.emit(relax.TupleGetItem(results, i)) for i in range(len(types)))

    def overwrite(self, kernel: relax.GlobalVar, args: list[relax.Expr], owner: str | None) -> relax.Var:
        """Bind the first argument once a kernel has written to it; `owner` is the input that it is."""
        result = self.emit(relax.op.call_tir_inplace(kernel, args, 0, args[0].ty))
        if owner is not None:
            self._written[result] = owner
        return result

    def overwrite_all(
        self, kernel: relax.GlobalVar, args: list[relax.Expr], owners: list[str | None]
    ) -> tuple[relax.Var, ...]:
        """Bind the first arguments, as many as there are `owners`, once a kernel has written to them."""
        count = len(owners)
        if count == 1:
            return (self.overwrite(kernel, args, owners[0]),)
        types = [a.ty for a in args[:count]]
        results = self.emit(relax.op.call_tir_inplace(kernel, args, list(range(count)), types))
        parts = tuple(self.emit(relax.TupleGetItem(results, i)) for i in range(count))
        self._written |= {part: owner for part, owner in zip(parts, owners, strict=True) if owner is not None}
        return parts

    def lent(self, node: ir.Node, number: int = 0) -> bool:
        """May `node` overwrite this input, and answer it at the same place? If it is the graph's, comes back,
        and has no other reader."""
        value = node.inputs[number]
        readers = [use.node for use in value.uses() if use.node.op_type not in ("Shape", "Size")]
        returned = node.outputs[number].is_graph_output() and not value.is_graph_output()
        return value in self.given and len(readers) == 1 and returned

    def copied(self, tensor: relax.Expr, dtype: str = "") -> relax.Var:
        """A buffer of its own, which may have another element type."""
        dims, source = self.shape(tensor), str(tensor.ty.dtype)
        to = dtype or source
        kernel = self.kernel(("copied", len(dims), source, to), lambda: copied(len(dims), source, to))
        return self.call(kernel, [tensor], dims, to)

    def shape(self, value: Value) -> list[Any]:
        """Dimensions, as ints and expressions."""
        if isinstance(value, Weight | StoredCache):
            return list(value.shape)
        if isinstance(value, Ints):
            return list(value.values.shape)
        if isinstance(value, Quantized):
            from porter.lower.importer.quantized import shape_of

            return shape_of(self, value)
        if isinstance(value, Picked):
            return [*self.shape(value.ids), *self.shape(value.matrices)[1:]]
        return [int(d) if isinstance(d, tirx.IntImm) else d for d in self.tensor(value).ty.shape]

    def dim(self, value: Any) -> Expr:
        """A dimension as an expression."""
        return tirx.IntImm("int64", value) if isinstance(value, int) else value

    def product(self, dims: list[Any]) -> Any:
        """The number of elements of a shape."""
        total: Any = 1
        for d in dims:
            total = total * d
        return self.simplify(total)

    def dtype(self, value: Value) -> str:
        """TVM's name of a tensor's element type."""
        if isinstance(value, Weight):
            return DTYPES.get(value.type, value.type.name.lower())
        if isinstance(value, Picked):
            return self.dtype(value.stack)
        if isinstance(value, Quantized):
            return self._dtype_of_codes(value)
        if isinstance(value, StoredCache):
            return "float32"
        return value.dtype if isinstance(value, Ints) else str(self.tensor(value).ty.dtype)

    def _dtype_of_codes(self, value: Quantized) -> str:
        if value.raw:
            return "int8"
        narrow = value.scales is not None and self.dtype(value.scales) in ("float16", "bfloat16")
        return self.dtype(value.scales) if narrow else "float32"

    # The walk.

    def _input(self, number: int, value: ir.Value) -> relax.Var:
        if value.dtype not in DTYPES or value.shape is None:
            what = f"an input of type {value.type} and shape {value.shape} cannot be lowered"
            raise TargetError("PORT-0413", what, where=value.name or "?")
        shape = [self.dimensions.of(d, f"{value.name}_{i}") for i, d in enumerate(value.shape)]
        var = relax.Var(f"x{number}", relax.TensorType(shape, DTYPES[value.dtype]))
        self._values[value] = var
        return var

    def _node(self, node: ir.Node) -> None:
        from porter.lower.importer.table import function_for

        self.current = node.name or node.outputs[0].name or node.op_type
        function = function_for(node)
        if function is None:
            what = f"there is no lowering for {node.domain or 'ai.onnx'}.{node.op_type}"
            raise TargetError("PORT-0410", what, where=self.current)
        try:
            result = function(self, node, *[self.value(v) for v in node.inputs])
        except PorterError:
            raise
        except Exception as error:  # TVM raises many kinds: this is where they become ours
            text = (str(error).strip() or "no reason given").splitlines()[-1]
            what = f"{node.op_type} cannot be lowered: {type(error).__name__}: {text}"
            raise TargetError("PORT-0411", what, where=self.current) from error
        results = result if isinstance(result, tuple) else (result,)
        for output, value in zip(node.outputs, results, strict=False):
            if value is not None:
                self._values[output] = value

    def _outputs(self) -> list[relax.Var]:
        """The results; an input, a weight or an earlier result is copied, so that none shares memory."""
        taken = {self._values[v] for v in self.given}
        results = []
        for output in self.model.graph.outputs:
            self.current = output.name or "?"
            tensor = self.tensor(self.value(output))
            if isinstance(tensor, Constant):  # else TVM would fold the copy
                tensor = self._parameter(tensor)
            if tensor in taken or tensor in {*self.weights.variables}:
                tensor = self.copied(tensor)
            elif tensor in self._written:
                self.in_place[output.name] = self._written[tensor]
            taken.add(tensor)
            results.append(self.builder.emit_output(tensor))
        return results

    def _parameter(self, constant: Constant) -> relax.Var:
        array = constant.value.numpy()
        return self.weights.parameter(
            ("result", self.current), array.shape, str(constant.ty.dtype), lambda: array
        )

    def _made(self, variable: relax.Var) -> relax.Var:
        self.sources[variable.name] = self.current
        return variable

    def _ints_tensor(self, value: Ints) -> relax.Expr:
        flat, shape = value.flat(), value.values.shape
        if all(isinstance(v, int) for v in flat):
            return relax.const(np.array(flat, value.dtype).reshape(shape), value.dtype)
        entries = [self.dim(v) for v in flat]
        kernel = self.kernel(("sizes", shape), lambda: integers.scalars(len(entries), len(shape)))
        tensor = self.call(kernel, entries, list(shape), "int64")
        return tensor if value.dtype == "int64" else self.emit(relax.op.astype(tensor, value.dtype))

    def _weight_tensor(self, weight: Weight) -> relax.Expr:
        if weight.type not in DTYPES:
            raise TargetError("PORT-0413", f"a constant of type {weight.type} cannot be lowered here",
                              where=weight.value.name or "?")  # fmt: skip
        dtype = DTYPES[weight.type]
        if int(np.prod(weight.shape)) <= SMALL:
            return relax.const(np.array(weight.numpy(), order="C"), dtype)
        return self.weights.parameter(
            (weight.value, "plain", weight.transposed), weight.shape, dtype, weight.numpy
        )
