"""Bounds: how large the symbols of each kernel become, from the largest values of those of the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Expr, Range


def of_kernels(module: tvm.IRModule, bounds: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """By kernel's name: the largest value of each of its symbols, over all calls in `main`."""
    found: dict[str, dict[str, int]] = {}
    analyzer, bound = tvm.sym.Analyzer(), set()

    def largest(size: Expr) -> int:
        for symbol in tirx.analysis.undefined_vars(size):
            if symbol not in bound and symbol.name in bounds:
                bound.add(symbol)
                analyzer.bind(symbol, Range(0, bounds[symbol.name] + 1))
        return int(analyzer.const_int_bound(size).max_value)

    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                kernel = module[value.op]
                if isinstance(kernel, tirx.PrimFunc):
                    _match(kernel, value.args, largest, found.setdefault(value.op.name_hint, {}))
    return found


def most(size: Expr, bounds: Mapping[str, int]) -> int:
    """The largest value of one size of a kernel, whose symbols are at most their `bounds`."""
    analyzer = tvm.sym.Analyzer()
    for symbol in tirx.analysis.undefined_vars(size):
        analyzer.bind(symbol, Range(0, bounds.get(symbol.name, 0) + 1))
    return int(analyzer.const_int_bound(size).max_value)


def _match(kernel: tirx.PrimFunc, arguments: Any, largest: Any, found: dict[str, int]) -> None:
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        pairs = []
        if isinstance(argument.ty, relax.TensorType) and argument.ty.shape is not None:
            pairs = list(zip(parameter.shape, argument.ty.shape, strict=True))
        elif isinstance(argument, Expr):
            pairs = [(parameter, argument)]
        for symbol, size in pairs:
            if isinstance(symbol, tirx.Var) and not isinstance(size, int):
                found[symbol.name] = max(found.get(symbol.name, 0), largest(size))
