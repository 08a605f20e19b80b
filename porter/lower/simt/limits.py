"""Limits: whether kernels, launches and buffers keep to what the target's spec says of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from porter.errors import TargetError
from porter.lower.simt.kernels import Kernel
from porter.run.trees import evaluate

if TYPE_CHECKING:
    from porter.lower.simt.program import Program
    from porter.target import TargetSpec


FEW = 32  # tokens of a step before its rows are fewer: prompts are fed in pieces, rows are what was asked for


def fit(plan: Program, kernels: dict[str, Kernel], spec: TargetSpec) -> None:
    """Make the bounds smaller until buffers and launches keep to the limits: of a step's tokens first, then
    of its rows.

    Raises TargetError PORT-0453 naming the limit that is exceeded however small they are.
    """
    for fault in _kernels(plan, kernels, spec):
        raise fault
    steps = sorted(plan.symbols, key=lambda s: -plan.symbols[s][1])
    steps = [s for s in steps if _is_of_tokens(plan, s)]
    while True:
        fault = next(iter([*_buffers(plan, spec), *_grids(plan, spec)]), None)
        if fault is None:
            break
        most = next((s for s in steps if plan.bounds[s] > (FEW if plan.symbols[s][1] else 1)), None)
        most = most or next((s for s in steps if plan.bounds[s] > 1), None)
        if most is None:
            raise fault
        plan.bounds[most] = (plan.bounds[most] + 1) // 2
    plan.sized()


def _is_of_tokens(plan: Program, symbol: str) -> bool:
    """Whether it is a size of an input of integers, as tokens are; caches keep their length."""
    kinds = {i["name"]: i["dtype"] for i in plan.inputs}
    return str(kinds[plan.symbols[symbol][0]]).startswith("int")


def _refused(what: str, limit: str, most: object, where: str) -> TargetError:
    return TargetError("PORT-0453", f"{what}; limits.{limit} is {most}", where=where)


def _kernels(plan: Program, kernels: dict[str, Kernel], spec: TargetSpec) -> Iterator[TargetError]:
    limits = spec.limits
    for name, kernel in kernels.items():
        block = plan.kernels[name]["block"]
        threads = block[0] * block[1] * block[2]
        if threads > limits.invocations.value:
            yield _refused(f"groups of {threads} threads", "invocations", limits.invocations.value, name)
        if any(size > most for size, most in zip(block, limits.workgroup.value, strict=True)):
            yield _refused(f"groups of {block}", "workgroup", list(limits.workgroup.value), name)
        if kernel.shared > limits.shared.value:
            yield _refused(f"{kernel.shared} bytes are shared by a group", "shared", limits.shared.text, name)
        if limits.bindings is not None and len(kernel.writes) > limits.bindings.value:
            yield _refused(f"{len(kernel.writes)} buffers", "bindings", limits.bindings.value, name)


def _buffers(plan: Program, spec: TargetSpec) -> Iterator[TargetError]:
    for limit, most in (("binding-size", spec.limits.binding_size), ("buffer-size", spec.limits.buffer_size)):
        if most is None:
            continue
        for name, tensor in plan.tensors.items():
            size = evaluate(tensor.bytes, plan.bounds)
            if size > most.value:
                yield _refused(f"a buffer of {size} bytes", limit, most.text, name)


def _grids(plan: Program, spec: TargetSpec) -> Iterator[TargetError]:
    """Groups along x beyond the limit are spread over z, where the source says so."""
    most = list(spec.limits.grid.value)
    if plan.source == "wgsl":
        most[0] *= most[2]
    for step in plan.dispatches:
        for axis, tree, limit in zip("xyz", step["grid"], most, strict=True):
            size = evaluate(tree, plan.bounds)
            if size > limit:
                what = f"{size} groups along {axis}"
                yield _refused(what, "grid", list(spec.limits.grid.value), step["kernel"])
