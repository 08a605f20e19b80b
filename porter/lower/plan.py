"""Plan: the memory and the launches of a planned Relax program, as data.

A storage is a block of the workspace; buffers are views of storages, alive from the launch that writes them first to
the launch that reads them last. Sizes are upper bounds at the largest symbolic dimensions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from porter.lower.weights import ALIGNMENT, Parameter, offsets


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
    """One kernel call: its buffers in the kernel's order, then its integer arguments, and the ONNX nodes it computes."""

    kernel: str
    buffers: list[str]
    integers: list[str]
    nodes: list[str]


@dataclass
class Plan:
    """Everything a runner needs besides the code: interface, bounds, storages with offsets, weights, launches."""

    bounds: dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    in_place: dict[str, str]
    storages: list[dict[str, int]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    workspace_bytes: int = 0
    lower_bound_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def extract(
    module: tvm.IRModule, plan: Plan, parameters: list[Parameter], sources: dict[str, list[str]]
) -> Plan:
    """Fill `plan` from `main` of a module after StaticPlanBlockMemory."""
    walker = _Walker(plan, {name: list(nodes) for name, nodes in sources.items()})
    function = module["main"]
    for i, variable in enumerate(function.params):
        walker.declare(variable, "input" if i < len(plan.inputs) else "weight", None)
    for block in function.body.blocks:
        for binding in block.bindings:
            walker.visit(binding.var, binding.value)
    walker.finish()
    plan.weights = [
        {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "offset": start, "bytes": p.bytes}
        for p, start in zip(parameters, offsets(parameters), strict=True)
    ]
    return plan


class _Walker:
    def __init__(self, plan: Plan, sources: dict[str, list[str]]) -> None:
        self.plan, self.sources = plan, sources
        self.buffers: dict[Any, Buffer] = {}
        self.storages: dict[Any, int] = {}
        self.analyzer = tvm.sym.Analyzer()
        self.bound: set[Any] = set()

    def declare(self, variable: Any, kind: str, storage: int | None) -> None:
        ty = variable.ty
        shape = [str(d) for d in ty.shape]
        at = len(self.plan.launches)
        buffer = Buffer(variable.name, kind, storage, shape, str(ty.dtype), self.bytes(ty), at, at)
        self.buffers[variable] = buffer
        self.plan.buffers.append(buffer)

    def bytes(self, ty: relax.TensorType) -> int:
        """The size when every symbol stands at its bound (a symbol without one counts as 1)."""
        total = np.dtype(str(ty.dtype)).itemsize
        for dim in ty.shape:
            if isinstance(dim, relax.Var) and dim not in self.bound:
                self.bound.add(dim)
                self.analyzer.bind(dim, tirx.IntImm("int64", self.plan.bounds.get(dim.name, 1)))
            total *= int(self.analyzer.simplify(dim))
        return total

    def visit(self, variable: Any, value: Any) -> None:
        if isinstance(value, relax.Var):
            self.alias(variable, value)
        elif isinstance(value, relax.Call):
            self.call(variable, value)
        elif isinstance(value, relax.Tuple | relax.TupleGetItem):
            self.tuple(variable, value)

    def tuple(self, variable: Any, value: Any) -> None:
        if isinstance(value, relax.Tuple):
            self.buffers[variable] = [self.buffers[v] for v in value.fields if v in self.buffers]  # type: ignore[assignment]
        elif value.tuple_value in self.buffers:
            self.buffers[variable] = self.buffers[value.tuple_value][value.index]  # type: ignore[index]

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
            self.declare(variable, "workspace", self.storages[call.args[0]])
        elif name == "relax.builtin.alloc_tensor":
            self.declare(variable, "output", None)
        elif name == "relax.reshape":
            self.alias(variable, call.args[0])
        elif isinstance(call.op, relax.GlobalVar):
            self.launch(call)

    def launch(self, call: Any) -> None:
        at = len(self.plan.launches)
        buffers = [self.buffers[a] for a in call.args if a in self.buffers]
        for buffer in buffers:
            buffer.last = at
        integers = [str(a) for a in call.args if not isinstance(a.ty, relax.TensorType)]
        nodes = self.sources.get(call.op.name_hint, [])
        node = [nodes.pop(0)] if nodes else []
        self.plan.launches.append(Launch(call.op.name_hint, [b.name for b in buffers], integers, node))

    def finish(self) -> None:
        """The lower bound: the most bytes that are alive during any one launch."""
        alive = [0] * (len(self.plan.launches) + 1)
        for buffer in self.plan.buffers:
            if buffer.kind == "workspace":
                for at in range(buffer.first, buffer.last + 1):
                    alive[at] += buffer.bytes
        self.plan.lower_bound_bytes = max(alive, default=0)
