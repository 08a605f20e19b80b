"""Plan: the memory and the launches of a planned Relax program, as data.

A storage is a block of the workspace; buffers are views of storages, alive from the launch that writes them
first to the launch that reads them last. Sizes are upper bounds at the largest symbolic dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import Constant, PrimType

from porter.lower.weights import ALIGNMENT, Parameter, offsets
from porter.target.placed import Placed


@dataclass
class Buffer:
    """One tensor: where it lies, its shape (text, with symbols) and the launches between which it lives."""

    name: str
    kind: str  # workspace, output, input, weight
    storage: int | None
    shape: list[str]
    dtype: str
    bytes: int  # at the bounds
    first: int
    last: int


@dataclass
class Launch:
    """One kernel call: its buffers and integer arguments in order, and the ONNX nodes that it computes."""

    kernel: str
    buffers: list[str]
    integers: list[str]
    nodes: list[str]


@dataclass
class Plan:
    """What a runner needs besides the code, which is in the file `library`."""

    bounds: dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    in_place: dict[str, str]
    library: str = ""
    storages: list[dict[str, int]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    workspace_bytes: int = 0
    lower_bound_bytes: int = 0
    placement: list[Placed] = field(default_factory=list)  # for the report; no runner asks

    def to_json(self) -> dict[str, Any]:
        """As plain data, without the placement."""
        return {name: value for name, value in asdict(self).items() if name != "placement"}


def extract(module: tvm.IRModule, plan: Plan, parameters: list[Parameter], nodes: list[list[str]]) -> Plan:
    """Fill `plan` from `main` of a module after StaticPlanBlockMemory.

    `nodes` are the ONNX nodes behind each launch, in order.
    """
    walker = _Walker(plan, iter(nodes))
    function = module["main"]
    names = [i["name"] for i in plan.inputs] + [p.name for p in parameters]
    for i, (variable, name) in enumerate(zip(function.params, names, strict=True)):
        walker.declare(variable, name, "input" if i < len(plan.inputs) else "weight", None)
    plan.weights = [
        {"name": b.name, "shape": list(p.shape), "dtype": p.dtype, "offset": start, "bytes": p.bytes}
        for b, p, start in zip(plan.buffers[len(plan.inputs) :], parameters, offsets(parameters), strict=True)
    ]
    for block in function.body.blocks:
        for binding in block.bindings:
            walker.visit(binding.var, binding.value)
    walker.finish(function.body.body)
    return plan


def _text(size: Any) -> str:
    """A size as a person writes it: `past + 1`, not `past + T.int64(1)`."""
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(size))


class _Walker:
    def __init__(self, plan: Plan, nodes: Iterator[list[str]]) -> None:
        self.plan, self.nodes = plan, nodes
        self.buffers: dict[Any, Buffer | list[Buffer]] = {}
        self.storages: dict[Any, int] = {}
        self.analyzer = tvm.sym.Analyzer()
        self.bound: set[Any] = set()
        self.names: set[str] = set()

    def declare(self, variable: Any, name: str, kind: str, storage: int | None) -> None:
        ty, at = variable.ty, len(self.plan.launches)
        buffer = Buffer(
            self.unique(name),
            kind,
            storage,
            [_text(d) for d in ty.shape],
            str(ty.dtype),
            self.bytes(ty),
            at,
            at,
        )
        self.buffers[variable] = buffer
        self.plan.buffers.append(buffer)

    def unique(self, name: str) -> str:
        """A model may name its inputs as the program names its variables."""
        found = next(n for i in count() if (n := f"{name}_{i}" if i else name) not in self.names)
        self.names.add(found)
        return found

    def bytes(self, ty: relax.TensorType) -> int:
        """The most that the tensor may take while every symbol is within its bound."""
        total = tirx.IntImm("int64", np.dtype(str(ty.dtype)).itemsize)
        for dim in ty.shape:
            total = total * dim
        for symbol in tirx.analysis.undefined_vars(total):
            if symbol not in self.bound:
                self.bound.add(symbol)
                self.analyzer.bind(symbol, tvm.ir.Range(0, self.plan.bounds[symbol.name] + 1))
        return int(self.analyzer.const_int_bound(total).max_value)

    def visit(self, variable: Any, value: Any) -> None:
        if isinstance(value, relax.Var):
            self.alias(variable, value)
        elif isinstance(value, relax.Call):
            self.call(variable, value)
        elif isinstance(value, relax.Tuple):
            self.buffers[variable] = [self.buffers[v] for v in value.fields if v in self.buffers]
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in self.buffers:
            self.buffers[variable] = self.buffers[value.tuple_value][value.index]

    def alias(self, variable: Any, value: Any) -> None:
        if value in self.buffers:
            self.buffers[variable] = self.buffers[value]
        if value in self.storages:
            self.storages[variable] = self.storages[value]

    def call(self, variable: Any, call: Any) -> None:
        name = getattr(call.op, "name", None)
        if name == "relax.memory.alloc_storage":
            self.storages[variable] = len(self.plan.storages)
            size = int(call.args[0][0])
            self.plan.storages.append({"offset": self.plan.workspace_bytes, "bytes": size})
            self.plan.workspace_bytes += -(-size // ALIGNMENT) * ALIGNMENT
        elif name == "relax.memory.alloc_tensor":
            self.declare(variable, variable.name, "workspace", self.storages[call.args[0]])
        elif name == "relax.builtin.alloc_tensor":
            self.declare(variable, variable.name, "output", None)
        elif name == "relax.reshape":
            self.alias(variable, call.args[0])
        elif isinstance(call.op, relax.GlobalVar | relax.ExternFunc):
            self.launch(call)

    def launch(self, call: Any) -> None:
        at = len(self.plan.launches)
        buffers = [self.buffers[a] for a in call.args if a in self.buffers]
        for buffer in buffers:
            buffer.last = at
        integers = [_text(a) for a in call.args if not isinstance(a, Constant) and isinstance(a.ty, PrimType)]
        kernel = getattr(call.op, "name_hint", None) or str(call.op.global_symbol)
        self.plan.launches.append(Launch(kernel, [b.name for b in buffers], integers, next(self.nodes, [])))

    def finish(self, results: Any) -> None:
        """The lower bound: the most bytes that are alive during any one launch. Results live to the end."""
        end = len(self.plan.launches)
        for result in getattr(results, "fields", [results]):
            if isinstance(found := self.buffers.get(result), Buffer):
                found.last = max(found.last, end - 1)
        alive = [0] * (end + 1)
        for buffer in self.plan.buffers:
            if buffer.kind == "workspace":
                for at in range(buffer.first, buffer.last + 1):
                    alive[at] += buffer.bytes
        self.plan.lower_bound_bytes = max(alive, default=0)
