"""The program of a device: a planned Relax module's kernels, and its launches as data.

What `porter.lower.plan` says of a program in launches of whole functions is here said in launches of kernels:
which buffers, which scalars, how many groups, as trees over the symbols that the inputs' shapes give.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import Constant

from porter.lower.plan import Buffer, Plan, Walker, extract, most_alive
from porter.lower.simt import kernels, rebuild, storage
from porter.lower.simt.kernels import Compiled, Kernel
from porter.lower.simt.language import device, language
from porter.lower.simt.trees import Tree, Trees
from porter.lower.weights import ALIGNMENT, Parameter
from porter.run.trees import evaluate
from porter.target import TargetSpec

UNCHANGING = ("weight", "constant")


@dataclass
class Tensor:
    """How a buffer lies on the device: its shape, what an element is stored as, and where."""

    shape: list[Tree]
    stored: str
    storage: int | None
    bytes: Tree


@dataclass
class Program(Plan):
    """A plan for a device, besides that for the host: `source` is the kernels' language.

    `symbols` says which axis of which input a symbol is. `constants` are the bytes of small tensors, base64.
    `shards` are parts of the weights' file, each for one buffer. Of `dispatches`, `launch` is the plan's.
    `results` are the buffers that the outputs are, in order.
    """

    source: str = ""
    symbols: dict[str, list[Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    shards: list[dict[str, int]] = field(default_factory=list)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    dispatches: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def sized(self) -> None:
        """Compute what is told in bytes anew, at the bounds."""
        for buffer in self.buffers:
            buffer.bytes = evaluate(self.tensors[buffer.name].bytes, self.bounds)
        self.workspace_bytes = 0
        for number, entry in enumerate(self.storages):
            held = [t.bytes for t in self.tensors.values() if t.storage == number]
            entry["bytes"] = max((evaluate(size, self.bounds) for size in held), default=0)
            entry["offset"] = self.workspace_bytes
            self.workspace_bytes += -(-entry["bytes"] // ALIGNMENT) * ALIGNMENT
        self.lower_bound_bytes = most_alive(self)


def program(
    module: tvm.IRModule, plan: Program, parameters: list[Parameter], nodes: list[list[str]], spec: TargetSpec
) -> dict[str, Kernel]:
    """Fill `plan` from a planned module, and return the kernels by name. Raises as `kernels.compiled`."""
    walkers: list[_Walker] = []

    def walker(plan: Plan, nodes: Iterator[list[str]]) -> _Walker:
        walkers.append(_Walker(plan, nodes, module, spec))
        return walkers[0]

    extract(module, plan, parameters, nodes, walker)
    plan.source = walkers[0].language.name
    return walkers[0].kernels


class _Walker(Walker):
    def __init__(
        self, plan: Program, nodes: Iterator[list[str]], module: tvm.IRModule, spec: TargetSpec
    ) -> None:
        super().__init__(plan, nodes)
        self.module, self.target, self.language = module, device(spec), language(spec)
        self.trees = Trees(plan.bounds)
        self.kernels: dict[str, Kernel] = {}
        self.compiled: dict[Any, Compiled] = {}
        self.constants: dict[Any, Buffer] = {}

    def declare(self, variable: Any, name: str, kind: str, storage_: int | None) -> None:
        super().declare(variable, name, kind, storage_)
        buffer, shape = self.plan.buffers[-1], list(variable.ty.shape)
        if kind == "input":
            for axis, size in enumerate(shape):
                if isinstance(size, tirx.Var):
                    self.plan.symbols.setdefault(size.name, [name, axis])
        self._placed(buffer, shape, storage_)

    def _placed(self, buffer: Buffer, shape: list[Any], storage_: int | None) -> None:
        stored = buffer.dtype
        if self.language.words:
            stored = storage.stored(buffer.dtype, constant=buffer.kind in UNCHANGING)
        count: Any = tirx.IntImm("int64", 1)
        for size in shape:
            count = count * size
        width = _bytes(buffer.dtype if stored == "packed" else stored)
        size = self.trees.of((count * width + 3) // 4 * 4)
        self.plan.tensors[buffer.name] = Tensor([self.trees.of(d) for d in shape], stored, storage_, size)

    def finish(self, results: Any) -> None:
        super().finish(results)
        found = self.buffers.get(results) or [self.buffers[r] for r in results.fields]
        self.plan.results = [b.name for b in (found if isinstance(found, list) else [found])]

    def launch(self, call: Any) -> None:
        super().launch(call)
        function, given = self.module[call.op], [self._argument(a) for a in call.args]
        constant = frozenset(i for i, g in enumerate(given) if isinstance(g, Buffer) and g.kind in UNCHANGING)
        made = self._made(call.op, function, constant)
        symbols: dict[Any, Any] = {}
        for parameter, argument in zip(function.params, call.args, strict=True):
            if not tirx.is_buffer_var(parameter):
                symbols.setdefault(parameter, argument)
                continue
            for own, size in zip(parameter.shape, argument.ty.shape, strict=True):
                if isinstance(own, tirx.Var):
                    symbols.setdefault(own, size)
        scratch = [self._scratch(i, size, dtype, symbols) for i, (size, dtype) in enumerate(made.scratch)]
        for step in made.dispatches:
            self._dispatch(step, [g.name if isinstance(g, Buffer) else "" for g in given], scratch, symbols)

    def _dispatch(
        self, step: kernels.Dispatch, names: list[str], scratch: list[str], symbols: dict[Any, Any]
    ) -> None:
        def told(expression: Any) -> Tree:
            return self.trees.of(rebuild.replaced(expression, symbols))

        self.plan.dispatches.append(
            {
                "launch": len(self.plan.launches) - 1,
                "kernel": step.kernel.name,
                "buffers": [names[b] if b >= 0 else scratch[-1 - b] for b in step.buffers],
                "scalars": [told(s) for s in step.scalars],
                "grid": [told(g) for g in step.grid],
            }
        )

    def _made(self, name: Any, function: tirx.PrimFunc, constant: frozenset[int]) -> Compiled:
        """The kernels of a function; where the same is called with other buffers constant, others."""
        key = name.name_hint, constant if self.language.words else frozenset()
        if key not in self.compiled:
            same = sum(k[0] == key[0] for k in self.compiled)
            own = function.with_attr("global_symbol", f"{key[0]}_v{same}" if same else key[0])
            self.compiled[key] = kernels.compiled(own, self.target, self.language, constant)
            self.kernels |= {d.kernel.name: d.kernel for d in self.compiled[key].dispatches}
        return self.compiled[key]

    def _argument(self, argument: Any) -> Buffer | None:
        if isinstance(argument, Constant) and isinstance(argument.ty, relax.TensorType):
            if argument not in self.constants:
                self.constants[argument] = self._constant(argument)
            return self.constants[argument]
        return self.buffers.get(argument)

    def _constant(self, constant: Any) -> Buffer:
        array = constant.value.numpy()
        name = self.unique(f"constant{len(self.constants)}")
        shape = [str(d) for d in array.shape]
        buffer = Buffer(name, "constant", None, shape, str(constant.ty.dtype), array.nbytes, 0, 0)
        self.plan.constants[name] = {
            "dtype": buffer.dtype,
            "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        }
        self._placed(buffer, list(array.shape), None)
        return buffer

    def _scratch(self, number: int, count: Any, dtype: str, symbols: dict[Any, Any]) -> str:
        """A buffer between the kernels of one function, in a storage that all functions share."""
        at = next((i for i, s in enumerate(self.plan.storages) if s.get("scratch") == number), None)
        if at is None:
            at = len(self.plan.storages)
            self.plan.storages.append({"offset": 0, "bytes": 0, "scratch": number})
        name = self.unique(f"scratch{number}")
        size = rebuild.replaced(count, symbols)
        stored = storage.stored(dtype, constant=False) if self.language.words else dtype
        total = (size * _bytes(stored) + 3) // 4 * 4
        self.plan.tensors[name] = Tensor([self.trees.of(size)], stored, at, self.trees.of(total))
        return name


def _bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
