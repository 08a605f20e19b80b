"""Simulate a step of a lowered program: every launch of its plan, equal ones once."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from porter.errors import TargetError
from porter.simulate.kernel import simulate
from porter.simulate.kernels import Kernels
from porter.simulate.program import Program
from porter.simulate.result import KernelTime, StepTime
from porter.target import TargetSpec

Call = tuple[str, tuple[tuple[int, ...], ...], tuple[int, ...]]  # kernel, shapes of its buffers, integers


def simulate_plan(
    plan: Mapping[str, Any], dimensions: Mapping[str, int], kernels: Kernels, spec: TargetSpec
) -> StepTime:
    """The time of one step of the program of `plan` (`plan.json`, as read) with symbols at `dimensions`.

    Launches come one after the other; equal ones, of one kernel with the same sizes, are simulated once.
    Kernels without a time, and those that cannot be timed at these sizes, are `untimed`. Raises
    TargetError PORT-0447 where a size of the plan is not known, PORT-0449 for a kernel that is not there.
    """
    programs: Counter[Program] = Counter()
    untimed: dict[str, tuple[int, str]] = {}

    def leave_out(kernel: str, number: int, why: str) -> None:
        untimed[kernel] = (untimed.get(kernel, (0, ""))[0] + number, why)

    for (kernel, shapes, integers), number in Counter(_calls(plan, dimensions)).items():
        if why := kernels.untimed.get(kernel):
            leave_out(kernel, number, why)
        else:
            programs[kernels(kernel, shapes, integers)] += number
    times: list[tuple[KernelTime, int]] = []
    for program, number in programs.items():
        try:
            times.append((simulate(program, spec), number))
        except TargetError as error:
            leave_out(program.name, number, error.what)
    return StepTime(tuple(times), untimed)


def _calls(plan: Mapping[str, Any], dimensions: Mapping[str, int]) -> list[Call]:
    shapes = {
        buffer["name"]: tuple(evaluated(size, dimensions) for size in buffer["shape"])
        for buffer in plan["buffers"]
    }
    return [
        (
            launch["kernel"],
            tuple(shapes[name] for name in launch["buffers"]),
            tuple(evaluated(text, dimensions) for text in launch["integers"]),
        )
        for launch in plan["launches"]
    ]


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluated(text: str, dimensions: Mapping[str, int]) -> int:
    """The value of a size as the plan writes it: `past + 1`. Raises TargetError PORT-0447."""
    try:
        return _evaluated(ast.parse(text, mode="eval").body, dimensions)
    except KeyError as error:
        what = f"nothing says how large the dimension {error.args[0]!r} is"
        raise TargetError("PORT-0447", what, text, f"known: {', '.join(sorted(dimensions))}") from error
    except (SyntaxError, TypeError, ZeroDivisionError) as error:
        raise TargetError("PORT-0447", "a size in the plan cannot be read", text) from error


def _evaluated(node: ast.expr, dimensions: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return dimensions[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand, dimensions)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluated(node.left, dimensions), _evaluated(node.right, dimensions)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and not node.keywords:
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        chosen = {"min": min, "max": max}.get(name)
        if chosen and len(node.args) > 1:
            return chosen(_evaluated(argument, dimensions) for argument in node.args)
    raise TypeError(ast.dump(node))
