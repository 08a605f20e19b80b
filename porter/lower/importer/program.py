"""Importer: walks an ONNX graph and builds one Relax function, `main(inputs…, weights…)`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx
from tvm.ir import Expr

from porter.errors import ModelError, PorterError, TargetError
from porter.lower.importer.values import Ints, Quantized, Value, Weight
from porter.lower.kernels import integers
from porter.lower.weights import Parameter, Weights

SMALL = 16  # constants of at most this many elements are written into the program; larger ones are parameters

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
    ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool",
}


@dataclass
class Imported:
    """The module, its parameters beyond the graph's inputs, and which outputs overwrite which inputs."""

    module: tvm.IRModule
    parameters: list[Parameter]
    in_place: dict[str, str]
    sources: dict[str, list[str]]  # kernel name -> the ONNX nodes that it computes


class Importer:
    """Holds what the operator functions share: the block builder, known values, weights and kernels."""

    def __init__(self, model: ir.Model, bounds: dict[str, int]) -> None:
        """`bounds` are upper bounds of symbolic dimensions: they plan memory, and prove clamped sizes equal."""
        self.model = model
        self.bounds = bounds
        self.builder = relax.BlockBuilder()
        self.analyzer = tvm.sym.Analyzer()
        self.symbols: dict[str, tirx.Var] = {}
        self.weights = Weights()
        self.in_place: dict[str, str] = {}
        self.sources: dict[str, list[str]] = {}
        self._values: dict[ir.Value, Value] = {}
        self._kernels: dict[Hashable, relax.GlobalVar] = {}
        self._inputs: dict[relax.Var, str] = {}
        self.current = ""  # the node being imported, for messages

    def run(self) -> Imported:
        """Import the whole graph.

        Raises TargetError PORT-0410 for an operator without importer and PORT-0411 when one cannot be lowered.
        """
        graph = self.model.graph
        inputs = [self._input(v) for v in graph.inputs if not v.is_initializer()]
        known = {name: bound for name, bound in self.bounds.items() if name in self.symbols}
        attrs = {"tir_var_upper_bound": known, "num_input": len(inputs)}
        with self.builder.function("main", attrs=attrs):
            with self.builder.dataflow():
                for node in graph:
                    self._node(node)
                outputs = [self.builder.emit_output(self.tensor(self.value(v))) for v in graph.outputs]
            self._name_in_place(outputs)
            self.builder.emit_func_output(relax.Tuple(outputs), [*inputs, *self.weights.variables])
        return Imported(self.builder.finalize(), self.weights.parameters, self.in_place, self.sources)

    # What operator functions use.

    def value(self, value: ir.Value | None) -> Value | None:
        """What is known of an ONNX value; a constant becomes a Weight, an absent input None."""
        if value is None:
            return None
        if value not in self._values:
            if value.const_value is None:
                raise ModelError(
                    "PORT-0412", "a value is used before anything makes it", where=value.name or "?"
                )
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
        return value

    def ints(self, value: Value | None) -> list[Any] | None:
        """The entries of a value that is known at import, else None."""
        if isinstance(value, Ints):
            return value.flat()
        if isinstance(value, Weight) and value.value.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            return [int(v) for v in value.numpy().reshape(-1)]
        return None

    def array(self, value: Value | None) -> np.ndarray | None:
        """The contents of a constant, else None."""
        return value.numpy() if isinstance(value, Weight) else None

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression."""
        return self.builder.emit(expr)

    def te(self, function: Callable[..., Any], *args: Any, name: str) -> relax.Var:
        """Bind a tensor expression over relax tensors."""
        return self.builder.emit_te(function, *args, primfunc_name_hint=name)

    def kernel(self, key: Hashable, make: Callable[[], tirx.PrimFunc]) -> relax.GlobalVar:
        """The kernel made for `key`, made once per module."""
        if key not in self._kernels:
            func = make()
            name = str(func.attrs["global_symbol"])
            same = sum(k.name_hint.split("__")[0] == name for k in self._kernels.values())
            name = (
                f"{name}__{same}" if same else name
            )  # a kernel's name does not tell all, its epsilon for one
            self._kernels[key] = self.builder.add_func(func.with_attr("global_symbol", name), name)
        return self._kernels[key]

    def call(
        self, kernel: relax.GlobalVar, args: list[relax.Expr], shape: list[Any], dtype: str
    ) -> relax.Var:
        """Bind a kernel's result."""
        self._remember(kernel)
        return self.emit(relax.call_tir(kernel, args, relax.TensorType(shape, dtype)))

    def call_in_place(self, kernel: relax.GlobalVar, args: list[relax.Expr]) -> relax.Var:
        """Bind the first argument after a kernel has written to it."""
        self._remember(kernel)
        result = self.emit(relax.op.call_tir_inplace(kernel, args, 0, args[0].ty))
        if args[0] in self._inputs:
            self._inputs[result] = self._inputs[args[0]]
        return result

    def is_input(self, value: relax.Expr) -> bool:
        """Is this the graph's own input, whose buffer the caller lends?"""
        return value in self._inputs

    def shape(self, value: Value) -> list[Any]:
        """Dimensions, as ints and expressions."""
        if isinstance(value, Weight):
            return list(value.shape)
        return [int(d) if isinstance(d, tirx.IntImm) else d for d in self.tensor(value).ty.shape]

    def simplify(self, value: Any) -> Any:
        """An integer expression in its simplest form."""
        value = self.analyzer.simplify(tirx.convert(value)) if isinstance(value, Expr) else value
        return int(value) if isinstance(value, tirx.IntImm) else value

    def same(self, a: Any, b: Any) -> bool:
        """Are two dimensions provably equal?"""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return self.analyzer.can_prove_equal(tirx.convert(a), tirx.convert(b))

    # The walk.

    def _input(self, value: ir.Value) -> relax.Var:
        shape = [self._dim(d, f"{value.name}_{i}") for i, d in enumerate(value.shape or [])]
        if value.dtype not in DTYPES:
            raise TargetError(
                "PORT-0413", f"an input of type {value.dtype} cannot be lowered", where=value.name or "?"
            )
        var = relax.Var(value.name, relax.TensorType(shape, DTYPES[value.dtype]))
        self._values[value] = var
        self._inputs[var] = value.name
        return var

    def _dim(self, dim: int | ir.SymbolicDim, fallback: str) -> Any:
        """A dimension; `a + b` is the sum of two named ones."""
        if isinstance(dim, int):
            return tirx.IntImm("int64", dim)
        terms = [t.strip() for t in str(dim.value or fallback).split("+")]
        parts = [tirx.IntImm("int64", int(t)) if t.isdigit() else self._symbol(t) for t in terms]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _symbol(self, name: str) -> tirx.Var:
        if name not in self.symbols:
            self.symbols[name] = tirx.Var(name, "int64")
            self.analyzer.bind(self.symbols[name], tvm.ir.Range(0, self.bounds.get(name, 1 << 24) + 1))
        return self.symbols[name]

    def _node(self, node: ir.Node) -> None:
        from porter.lower.importer.table import function_for

        self.current = node.name or node.outputs[0].name or node.op_type
        function = function_for(node)
        if function is None:
            raise TargetError("PORT-0410", f"there is no lowering for {node.domain or 'ai.onnx'}.{node.op_type}",
                              where=self.current)  # fmt: skip
        try:
            result = function(self, node, *[self.value(v) for v in node.inputs])
        except PorterError:
            raise
        except Exception as error:
            what = f"{node.op_type} cannot be lowered: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            raise TargetError("PORT-0411", what, where=self.current) from error
        results = result if isinstance(result, tuple) else (result,)
        for output, value in zip(node.outputs, results, strict=False):
            if value is not None:
                self._values[output] = value

    def _name_in_place(self, outputs: list[relax.Var]) -> None:
        for graph_output in self.model.graph.outputs:
            value = self.value(graph_output)
            if (
                isinstance(value, relax.Var)
                and value in self._inputs
                and graph_output.name != self._inputs[value]
            ):
                self.in_place[graph_output.name] = self._inputs[value]

    def _remember(self, kernel: relax.GlobalVar) -> None:
        self.sources.setdefault(kernel.name_hint, []).append(self.current)

    def _ints_tensor(self, value: Ints) -> relax.Expr:
        flat = value.flat()
        if all(isinstance(v, int) for v in flat):
            return relax.const(np.array(flat, np.int64).reshape(value.values.shape), "int64")
        entries = [v if isinstance(v, Expr) else tirx.IntImm("int64", v) for v in flat]
        shape = value.values.shape
        kernel = self.kernel(("sizes", shape), lambda: integers.scalars(len(entries), len(shape)))
        return self.call(kernel, entries, list(shape), "int64")

    def _weight_tensor(self, weight: Weight) -> relax.Expr:
        array_type = weight.value.dtype
        if array_type not in DTYPES:
            raise TargetError("PORT-0413", f"a constant of type {array_type} cannot be lowered here",
                              where=weight.value.name or "?")  # fmt: skip
        if int(np.prod(weight.shape)) <= SMALL:
            return relax.const(np.array(weight.numpy(), order="C"), DTYPES[array_type])
        key = (weight.value.name, "plain", weight.transposed)
        return self.weights.parameter(key, weight.shape, DTYPES[array_type], weight.numpy)
