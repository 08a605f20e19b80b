"""One function of a program on a device's machine, beside the same function compiled for this CPU."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tvm
from tvm import tirx

from porter.lower.simt import kernels, storage
from porter.lower.simt.language import device, language
from porter.lower.simt.trees import Trees
from porter.run.device import Binding, Kernel, Machine, Step, converted, fetched
from porter.run.trees import evaluate
from porter.target import TargetSpec

BOUND = 1 << 20


def on_host(function: tirx.PrimFunc, arguments: list[np.ndarray | int]) -> list[np.ndarray | int]:
    """The arguments after the function has run on LLVM."""
    library = tvm.tirx.build(function.with_attr("global_symbol", "main"), target="llvm")
    given = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    library["main"](*given)
    return [g.numpy() if isinstance(a, np.ndarray) else a for a, g in zip(arguments, given, strict=True)]


_MADE: dict[tuple, tuple[tirx.PrimFunc, kernels.Compiled]] = {}


def _made(function: tirx.PrimFunc, spec: TargetSpec, constant: tuple[int, ...]) -> kernels.Compiled:
    """A function's kernels, made once (and it is kept, so that its id is its own)."""
    key = (id(function), spec.name, constant)
    if key not in _MADE:
        _MADE[key] = function, kernels.compiled(function, device(spec), language(spec), constant)
    return _MADE[key][1]


def on_device(
    function: tirx.PrimFunc,
    arguments: list[np.ndarray | int],
    spec: TargetSpec,
    machine: Machine,
    constant: Collection[int] = (),
) -> list[np.ndarray | int]:
    """The same from the device's kernels; parameters whose numbers are in `constant` are weights."""
    told = language(spec)
    made = _made(function, spec, tuple(constant))
    symbols, buffers, kinds = {}, {}, {}
    for number, (parameter, argument) in enumerate(zip(function.params, arguments, strict=True)):
        if not isinstance(argument, np.ndarray):
            symbols[parameter.name] = argument
            continue
        symbols |= {
            d.name: n for d, n in zip(parameter.shape, argument.shape, strict=True) if isinstance(d, tirx.Var)
        }
        name = str(argument.dtype)
        kinds[number] = storage.stored(name, constant=number in constant) if told.words else name
        data = converted(argument, kinds[number])
        buffers[number] = machine.allocate(max(16, data.nbytes)), max(16, data.nbytes)
        machine.write(buffers[number][0], data)
    trees = Trees(dict.fromkeys(symbols, BOUND))

    def number(expression: object) -> int:
        return evaluate(trees.of(expression), symbols)

    for i, (count, _dtype) in enumerate(made.scratch):
        size = max(16, number(count) * 8)
        buffers[-1 - i] = machine.allocate(size), size
    steps = []
    for step in made.dispatches:
        k = step.kernel
        kernel = Kernel(k.name, k.source, tuple(k.block), tuple(k.writes), tuple(k.scalars))
        bound = tuple(Binding(buffers[b][0], 0, buffers[b][1]) for b in step.buffers)
        grid = tuple(number(g) for g in step.grid)
        steps.append(Step(kernel, bound, tuple(number(s) for s in step.scalars), grid))
    machine.run(machine.record([s for s in steps if all(s.grid)]))
    return [
        fetched(machine, buffers[i][0], kinds[i], a.dtype, a.shape)
        if isinstance(a, np.ndarray) and i not in constant
        else a
        for i, a in enumerate(arguments)
    ]
