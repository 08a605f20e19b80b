"""The calls of a scheduled module's `main`: which kernel, with what sizes, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import tvm
from tvm import relax, tirx

from porter.errors import TargetError
from porter.lower.scheduled.expressions import Names
from porter.lower.scheduled.reader import kernel
from porter.simulate.binding import Kernel
from porter.simulate.step import CONTROL, Call, Step
from porter.target import TargetSpec

OUTSIDE = "no kernel of the program"


def step(module: tvm.IRModule, spec: TargetSpec, control: Collection[str] = ()) -> Step:
    """One step of a scheduled module, after StaticPlanBlockMemory.

    `control` names kernels that are the control processor's, one number at a time: they have no time. Nor
    have those that cannot be read, of which a conversion is not the worse; it is said why.
    """
    functions = {name.name_hint: function for name, function in module.functions.items()}
    kernels, untimed = {}, {}
    calls = []
    names = Names("main")
    for name, arguments in _launches(module["main"]):
        function = functions.get(name)
        if name not in kernels and name not in untimed:
            found = _read(function, spec, name) if name not in control else CONTROL
            if isinstance(found, Kernel):
                kernels[name] = found
            else:
                untimed[name] = found
        calls.append(Call(name, tuple(_sizes(names, function, arguments)) if name in kernels else ()))
    return Step(kernels, untimed, tuple(calls))


def _read(function: Any, spec: TargetSpec, name: str) -> Kernel | str:
    """A kernel, or why there is none."""
    if not isinstance(function, tirx.PrimFunc):
        return OUTSIDE
    try:
        return kernel(function, spec, name)
    except TargetError as error:
        return error.what


def _launches(main: relax.Function) -> Iterator[tuple[str, list[Any]]]:
    """Kernels and what they are called with, as the plan has them."""
    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and isinstance(call.op, relax.GlobalVar | relax.ExternFunc):
                name = getattr(call.op, "name_hint", None) or str(call.op.global_symbol)
                yield name, list(call.args)


def _sizes(names: Names, function: tirx.PrimFunc, arguments: list[Any]) -> Iterator[tuple[str, Any]]:
    """Of each symbol of a kernel its size in a call: a view has the shape that the kernel sees."""
    known: set[str] = set()
    for parameter, argument in zip(function.params, arguments, strict=True):
        buffer = isinstance(parameter.ty, tirx.buffer.BufferType)
        pairs = zip(parameter.shape, argument.ty.shape, strict=True) if buffer else [(parameter, argument)]
        for symbol, size in pairs:
            if isinstance(symbol, tirx.Var) and symbol.name not in known:
                known.add(symbol.name)
                yield symbol.name, names.expression(size)
